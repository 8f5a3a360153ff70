"""Small VideoMAE models with random numbers, written in the layouts of all editions.

MCG-NJU's names are the common ground; the others are made from them.
"""

import functools
import json
import re

import h5py
import jax
import numpy as np
import torch_files
from safetensors.numpy import save_file

from av_mae import convert, importers, optim
from av_mae import run as runs
from av_mae.importers import videomae

WIDTH, HEADS, MLP, FRAMES, SIZE, SIDE, CLASSES = 8, 2, 16, 4, 8, 4, 3
TOKENS = (FRAMES // 2) * (SIZE // SIDE) ** 2
# What a file of MCG-NJU or Keras does not tell of these models.
UNTOLD = {"model.heads": HEADS, "data.size": SIZE, "data.num_frames": FRAMES}
UNTOLD_DECODER = {"model.decoder.heads": HEADS}


def arrays(
    finetuned: bool,
    *,
    pooled: bool = True,
    scaled: bool = False,
    learned: bool = False,
    decoder: bool = True,
    depth: int = 2,
) -> dict[str, np.ndarray]:
    """A state dict of MCG-NJU's. pooled: with fc_norm, else with the final norm."""
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int):
        found[name] = rng.normal(0, 0.5, shape).astype(np.float32)

    def pair(name: str, rows: int, *shape: int):
        add(f"{name}.weight", rows, *shape)
        add(f"{name}.bias", rows)

    def stack(name: str, d: int, layers: int):
        for i in range(layers):
            block = f"{name}.{i}"
            pair(f"{block}.norm1", d)
            add(f"{block}.attn.q_bias", d)
            add(f"{block}.attn.v_bias", d)
            add(f"{block}.attn.qkv.weight", 3 * d, d)
            pair(f"{block}.attn.proj", d, d)
            pair(f"{block}.norm2", d)
            pair(f"{block}.mlp.fc1", MLP, d)
            pair(f"{block}.mlp.fc2", d, MLP)
            if scaled:
                add(f"{block}.gamma_1", d)
                add(f"{block}.gamma_2", d)

    root = "" if finetuned else "encoder."
    pair(f"{root}patch_embed.proj", WIDTH, 3, 2, SIDE, SIDE)
    if learned:
        add(f"{root}pos_embed", 1, TOKENS, WIDTH)
    stack(f"{root}blocks", WIDTH, depth)
    if finetuned:
        pair("fc_norm" if pooled else "norm", WIDTH)
        pair("head", CLASSES, WIDTH)
        return found
    pair("encoder.norm", WIDTH)
    if decoder:
        add("encoder_to_decoder.weight", WIDTH // 2, WIDTH)
        add("mask_token", 1, 1, WIDTH // 2)
        stack("decoder.blocks", WIDTH // 2, 1)
        pair("decoder.norm", WIDTH // 2)
        pair("decoder.head", 2 * SIDE * SIDE * 3, WIDTH // 2)
    return found


def write_mcg(path, found: dict, key: str = "model", **more):
    """A .pth file, with what training runs put beside the parameters."""
    tree = {key: torch_files.ordered(found), "epoch": 1599, "optimizer": {}, **more}
    return torch_files.write(path, tree)


def split(found: dict, biases: str = "q_bias") -> dict:
    """Queries, keys and values apart. biases: q_bias | query | all | none."""
    result = {}
    for name, value in found.items():
        if name.endswith("attn.qkv.weight"):
            for part, x in zip("qkv", np.split(value, 3), strict=True):
                result[name.replace("qkv", part)] = x
            if biases == "all":
                key = np.full(len(value) // 3, 0.7, np.float32)
                result[name.replace("qkv.weight", "k.bias")] = key
        elif name.endswith(("q_bias", "v_bias")) and biases != "q_bias":
            if biases != "none":
                result[re.sub(r"(q|v)_bias$", r"\1.bias", name)] = value
        else:
            result[name] = value
    return result


_HUGGINGFACE = (
    (r"attn\.(q|k|v)\.", r"attention.attention.\1."),
    (r"attn\.(q_bias|v_bias)", r"attention.attention.\1"),
    (r"attention\.q\.", "attention.query."),
    (r"attention\.k\.", "attention.key."),
    (r"attention\.v\.", "attention.value."),
    (r"attn\.proj", "attention.output.dense"),
    (r"mlp\.fc1", "intermediate.dense"),
    (r"mlp\.fc2", "output.dense"),
    (r"norm1", "layernorm_before"),
    (r"norm2", "layernorm_after"),
    (r"^(encoder\.)?blocks", "videomae.encoder.layer"),
    (r"^decoder\.blocks", "decoder.decoder_layers"),
    (
        r"^(encoder\.)?patch_embed\.proj",
        "videomae.embeddings.patch_embeddings.projection",
    ),
    (r"^(encoder\.)?norm", "videomae.layernorm"),
    (r"^head", "classifier"),
)


def huggingface(found: dict, biases: str = "q_bias") -> dict:
    """The same parameters by Hugging Face's names."""
    result = {}
    for name, value in split(found, biases).items():
        for pattern, theirs in _HUGGINGFACE:
            name = re.sub(pattern, theirs, name)
        result[name] = value
    return result


def huggingface_config(finetuned: bool, **more) -> dict:
    """Hugging Face's config.json of these models."""
    config = {
        "model_type": "videomae",
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "intermediate_size": MLP,
        "image_size": SIZE,
        "patch_size": SIDE,
        "num_frames": FRAMES,
        "tubelet_size": 2,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
        "use_mean_pooling": finetuned,
    }
    if finetuned:
        names = ("archery", "bowling", "crawling baby")
        config["id2label"] = {str(i): name for i, name in enumerate(names)}
    else:
        config["decoder_num_attention_heads"] = HEADS
        config["decoder_hidden_size"] = WIDTH // 2
    return config | more


def write_huggingface(folder, found: dict, config: dict, layout: str = "safetensors"):
    """A folder of save_pretrained. layout: safetensors | bin, whole or '… shards'."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    kind, _, shards = layout.partition(" ")
    stem, ending = {
        "safetensors": ("model", "safetensors"),
        "bin": ("pytorch_model", "bin"),
    }[kind]

    def put(name: str, part: dict):
        if kind == "bin":
            torch_files.write(folder / name, torch_files.ordered(part))
        else:
            save_file(part, folder / name, metadata={"format": "pt"})

    if not shards:
        put(f"{stem}.{ending}", found)
        return folder
    names, places = list(found), {}
    for i in range(2):
        shard = f"{stem}-0000{i + 1}-of-00002.{ending}"
        part = {name: found[name] for name in names[i::2]}
        put(shard, part)
        places |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    return folder


# What a file is to give.


@functools.cache
def whole(settings: str) -> dict[str, tuple[int, ...]]:
    """{name: shape} of all parameters of a config's model."""
    return convert.shapes(convert.abstract(runs.config_of(json.loads(settings))))


@functools.cache
def anchor(finetuned: bool, **kind):
    """A model of MCG-NJU's as read from memory: what other layouts are to give too."""
    untold = UNTOLD | ({} if finetuned else UNTOLD_DECODER)
    found = arrays(finetuned, **kind)
    return videomae.imported(videomae.original(found, {}), untold)


def untold(finetuned: bool) -> dict:
    return UNTOLD | ({} if finetuned else UNTOLD_DECODER)


def assert_same(found: importers.Imported, wanted: importers.Imported):
    """The same parameters and the same model."""
    assert optim.named(found.params).keys() == optim.named(wanted.params).keys()
    jax.tree.map(np.testing.assert_array_equal, found.params, wanted.params)
    assert found.config.model == wanted.config.model
    assert convert.shapes(found.params) == whole(runs.config_json(wanted.config))


# Keras.


def keras(found: dict) -> list[tuple[str, str, np.ndarray]]:
    """(layer group, variable name, array) in the order of Keras's weights."""
    result, counter = [], iter(range(20, 1000))

    def put(group: str, name: str, value: np.ndarray):
        result.append((group, f"{name}:0", value))

    def kernel(group: str, name: str, theirs: str):
        value = found[f"{theirs}.weight"]
        axes = (2, 3, 4, 1, 0) if value.ndim == 5 else (1, 0)
        put(group, f"{name}/kernel", value.transpose(axes))
        if f"{theirs}.bias" in found:
            put(group, f"{name}/bias", found[f"{theirs}.bias"])

    def norm(group: str, name: str, theirs: str):
        put(group, f"{name}/gamma", found[f"{theirs}.weight"])
        put(group, f"{name}/beta", found[f"{theirs}.bias"])

    def blocks(group, theirs: str):
        i = 0
        while f"{theirs}.{i}.norm1.weight" in found:
            block = group or f"TFBlock{i + 1}"
            number = lambda: next(counter)
            norm(block, f"layer_normalization_{number()}", f"{theirs}.{i}.norm1")
            kernel(block, f"dense_{number()}", f"{theirs}.{i}.attn.qkv")
            kernel(block, f"dense_{number()}", f"{theirs}.{i}.attn.proj")
            for name in ("q_bias", "v_bias"):
                put(block, f"{name}_id{number()}", found[f"{theirs}.{i}.attn.{name}"])
            norm(block, f"layer_normalization_{number()}", f"{theirs}.{i}.norm2")
            kernel(block, f"dense_{number()}", f"{theirs}.{i}.mlp.fc1")
            kernel(block, f"dense_{number()}", f"{theirs}.{i}.mlp.fc2")
            for name in ("gamma_1", "gamma_2"):
                if f"{theirs}.{i}.{name}" in found:
                    put(block, f"{name}{number()}", found[f"{theirs}.{i}.{name}"])
            i += 1

    top = "top_level_model_weights"
    if "encoder.norm.weight" in found:
        encoder = "TFPretrainVisionTransformerEncoder"
        decoder = "TFPretrainVisionTransformerDecoder"
        kernel(encoder, "patch_embed_proj", "encoder.patch_embed.proj")
        blocks(encoder, "encoder.blocks")
        norm(encoder, "norm_encoder", "encoder.norm")
        blocks(decoder, "decoder.blocks")
        norm(decoder, "norm_decoder", "decoder.norm")
        kernel(decoder, "head_decoder", "decoder.head")
        kernel("encoder_to_decoder", "encoder_to_decoder", "encoder_to_decoder")
        put(top, "mask_token_pretrained", found["mask_token"])
        return result
    kernel("patch_embed", "patch_embed/patch_embed_proj", "patch_embed.proj")
    blocks("", "blocks")
    last = "fc_norm" if "fc_norm.weight" in found else "norm"
    norm(last, last, last)
    kernel("head", "head", "head")
    if "pos_embed" in found:
        put(top, "pos_embed", found["pos_embed"])
    return result


def write_h5(path, variables, root: str = ""):
    """An .h5 file of save_weights, or of save (root: model_weights)."""
    groups: dict[str, list] = {}
    for group, name, value in variables:
        groups.setdefault(group, []).append((name, value))
    with h5py.File(path, "w") as file:
        place = file.create_group(root) if root else file
        layers = [g for g in groups if g != "top_level_model_weights"]
        place.attrs["layer_names"] = np.array([g.encode() for g in layers])
        for group, members in groups.items():
            made = place.create_group(group)
            names = np.array([name.encode() for name, _ in members])
            made.attrs["weight_names"] = names
            for name, value in members:
                made.create_dataset(name, data=value)
    return path


def read_h5(path) -> list[tuple[str, str, np.ndarray]]:
    """(layer group, variable name, array) in Keras's order: what `write_h5` takes."""
    text = lambda names: [np.bytes_(name).decode() for name in names]
    top = "top_level_model_weights"
    with h5py.File(path) as file:
        groups = text(file.attrs["layer_names"]) + [top] * (top in file)
        return [
            (group, name, file[group][name][()])
            for group in groups
            for name in text(file[group].attrs["weight_names"])
        ]


def write_savedmodel(path, variables, functional: bool = False):
    """A SavedModel with its variables where Keras's are.

    Those of nested models lie at `variables/<n>`. Those of the model itself, and in a
    functional model those of its plain layers, lie nearer to the root.
    """
    import tensorflow as tf

    node = lambda: tf.__internal__.tracking.AutoTrackable()
    model, numbered = node(), []
    plain = {}
    for group, name, value in variables:
        variable = tf.Variable(value, name=f"model/{group}/{name.removesuffix(':0')}")
        attribute = {
            "mask_token_pretrained:0": "mask_token",
            "pos_embed:0": "pos_embed",
        }
        if name in attribute:
            setattr(model, attribute[name], variable)
            continue
        numbered.append(variable)
        if functional and group in ("fc_norm", "norm", "head", "encoder_to_decoder"):
            plain.setdefault(group, {})[name.split("/")[-1].removesuffix(":0")] = (
                variable
            )
    for i, parts in enumerate(plain.values()):
        layer = node()
        for leaf, variable in parts.items():
            setattr(layer, leaf, variable)
        model._track_trackable(layer, f"layer_with_weights-{i + 3}")
    kept = {id(v) for parts in plain.values() for v in parts.values()}
    places = node()
    for i, variable in enumerate(numbered):
        if id(variable) not in kept:
            places._track_trackable(variable, str(i))
    model._track_trackable(places, "variables")
    tf.saved_model.save(model, str(path))
    return path
