"""VideoMAE (Tong et al., NeurIPS 2022) in its three editions.

    Hugging Face   a folder of `save_pretrained`: config.json and model.safetensors or
                   pytorch_model.bin, whole or in shards
    MCG-NJU        one .pth file, pretraining or finetuning
    Keras          one .h5 file, or a SavedModel (where TensorFlow is installed)

All become a model of rgb alone, with the fusion `separate`, so that the names are those
of the video branch of an audiovisual model. Hugging Face's config.json tells all sizes;
the others tell what shapes tell. What they do not is taken from the publication, or
from the options (fields of our config by dotted name):

    model.heads, model.decoder.heads     published: width/64, in H 16 and 8
    data.num_frames, data.size           published: 16 frames of 224 pixels

LayerNorm's epsilon is 1e-6 in MCG-NJU's models and Keras; Hugging Face takes
`layer_norm_eps` in all blocks, and torch's 1e-5 in the last norm of the decoder and in
the head's. Keys have no bias: where a file has one it is left out, which changes
nothing, since it adds the same number to all scores of a query.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (lets safetensors read bfloat16)
import numpy as np
from ml_collections import ConfigDict
from safetensors import SafetensorError, safe_open

from av_mae import CheckpointError, tokens
from av_mae.importers import keras, pickles
from av_mae.importers.imported import Imported, Row, configure
from av_mae.transformer import VARIANTS, size_of

# Decoders as published, by the encoder's width: (width, depth, heads).
DECODERS = {
    384: (192, 4, 3),
    768: (384, 4, 6),
    1024: (512, 12, 8),
    1280: (640, 12, 8),
}
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_STACKS = (
    (r"(?:encoder\.)?(?:blocks|layer)\.(\d+)\.(.+)", "encoder/rgb"),
    (r"decoder\.(?:blocks|decoder_layers)\.(\d+)\.(.+)", "decoder/rgb"),
)
# Layers of a block, MCG-NJU's and Hugging Face's names.
_IN_BLOCK = {
    "norm1": "norm_1",
    "layernorm_before": "norm_1",
    "norm2": "norm_2",
    "layernorm_after": "norm_2",
    "attn.qkv": "attention/qkv",
    "attention.attention.query": "attention/q",
    "attention.attention.key": "attention/k",
    "attention.attention.value": "attention/v",
    "attn.proj": "attention/out",
    "attention.output.dense": "attention/out",
    "mlp.fc1": "mlp/in",
    "intermediate.dense": "mlp/in",
    "mlp.fc2": "mlp/out",
    "output.dense": "mlp/out",
}
_ALONE_IN_BLOCK = {
    "attn.q_bias": "attention/q/bias",
    "attn.v_bias": "attention/v/bias",
    "attention.attention.q_bias": "attention/q/bias",
    "attention.attention.v_bias": "attention/v/bias",
    "gamma_1": "scale_1",
    "gamma_2": "scale_2",
}
_OUTSIDE = {
    "patch_embed.proj": "embed/rgb",
    "encoder.patch_embed.proj": "embed/rgb",
    "embeddings.patch_embeddings.projection": "embed/rgb",
    "norm": "encoder/rgb/norm",
    "encoder.norm": "encoder/rgb/norm",
    "layernorm": "encoder/rgb/norm",
    "encoder_to_decoder": "decoder_embed/rgb",
    "decoder.norm": "decoder/rgb/norm",
    "decoder.head": "predict/rgb",
    "fc_norm": "head_norm",
    "head": "head",
    "classifier": "head",
}
_ALONE_OUTSIDE = {
    "pos_embed": "embed/positions_rgb/embedding",
    "encoder.pos_embed": "embed/positions_rgb/embedding",
    "embeddings.position_embeddings": "embed/positions_rgb/embedding",
    "mask_token": "decoder_embed/mask_token_rgb",
}
_PREFIXES = re.compile(r"(?:module\.|model\.|backbone\.|videomae\.)*")

# What every VideoMAE is, of our choices.
_FIXED = {
    "modalities": ("rgb",),
    "model.fusion": "separate",
    "model.block.key_bias": False,
    "data.missing_modalities": False,
}

# Layers that need not have a bias.
_UNPAIRED = re.compile(r".*/attention/(q|k|v|qkv)|decoder_embed/rgb")

# What runs of MCG-NJU keep of their command line: `args` in the .pth file.
_ARGUMENTS = {
    "num_frames": "data.num_frames",
    "input_size": "data.size",
    "sampling_rate": "data.stride",
    "mask_ratio": "mask.rgb.ratio",
}


class Piece(NamedTuple):
    """A parameter of a file: its name, an array-like, and whose axes it has."""

    name: str
    array: Any
    torch: bool  # kernels are [outputs, inputs]

    def value(self) -> np.ndarray:
        """In float32, with kernels [inputs, outputs] and patches flat (t, h, w, c)."""
        value = np.asarray(self.array).astype(np.float32)
        if value.ndim == 5:
            value = value.transpose(2, 3, 4, 1, 0) if self.torch else value
            return value.reshape(-1, value.shape[-1])
        return value.T if value.ndim == 2 and self.torch else value

    @property
    def dtype(self) -> np.dtype:
        known = getattr(self.array, "dtype", None)
        return np.asarray(self.array).dtype if known is None else known


Pieces = Mapping[str, Piece]


@dataclasses.dataclass(frozen=True)
class Source:
    """A file of any edition, before its numbers are read.

    pieces: by our names, except that queries, keys and values are apart in some;
    found and assumed: config fields that the edition tells, or stands for; left: names
    in the file that have no place, and why.
    """

    pieces: dict[str, Piece]
    found: dict[str, Any]
    assumed: dict[str, Any]
    left: dict[str, str]
    labels: list[str] = dataclasses.field(default_factory=list)


def matches(path: Path | str) -> bool:
    """Whether a path is a VideoMAE of some edition, or a PyTorch file of any kind.

    A .pth file that cannot be read counts: `read` then tells why.
    """
    path = Path(path)
    if _huggingface_folder(path) or keras.matches(_only_file(path)):
        return True
    path = _only_file(path)
    if path.is_dir():
        return False
    if path.suffix not in (".pth", ".pt", ".bin", ".tar") and not pickles.matches(path):
        return False
    try:
        names, _ = pickles.weights(path)
    except CheckpointError:
        return True
    return any(_ours(name) == "embed/rgb/kernel" for name in names)


def read(path: Path | str, **options) -> Imported:
    """A published VideoMAE; options are config fields by dotted name (see above).

    Raises CheckpointError for a damaged file, one of another model, one that wants to
    run code, or an option that contradicts it.
    """
    path = Path(path)
    try:
        if folder := _huggingface_folder(path):
            source = _huggingface(folder)
        elif keras.matches(_only_file(path)):
            source = _keras(_only_file(path))
        else:
            source = _mcg(_only_file(path))
        return imported(source, options)
    except CheckpointError as error:
        text = str(error)
        if str(path) in text:
            raise
        raise CheckpointError(f"{path}: {text}") from error


def published(trainer: str, variant: str, classes: int = 400) -> ConfigDict:
    """The config of a published model of a size (S, B, L or H), without its file."""
    finetuned = trainer == "finetune"
    found = _FIXED | _exact(finetuned) | {"model.variant": f"{variant}/16x2"}
    found |= {"model.width": 0, "model.norm": not finetuned}
    if finetuned:
        found |= {"model.classes": classes, "model.head_norm": True}
    else:
        found["model.decoder.kind"] = "separate"
    config, _ = configure(trainer, found, _published(finetuned, found, {}), {})
    return config


def _only_file(path: Path) -> Path:
    """The one checkpoint in a folder without config.json, or the path itself."""
    if not path.is_dir() or keras.matches(path):
        return path
    files = [p for p in sorted(path.iterdir()) if p.suffix in (".pth", ".h5")]
    return files[0] if len(files) == 1 else path


# The three editions.


def _huggingface_folder(path: Path) -> Path | None:
    """The folder of `save_pretrained` that a path is, or that holds it."""
    folder = path if path.is_dir() else path.parent
    if not path.is_dir() and path.suffix not in (".safetensors", ".bin", ".json"):
        return None
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return folder if config.get("model_type") == "videomae" else None


def _huggingface(folder: Path) -> Source:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    pieces, left = _by_our_names(_huggingface_arrays(folder))
    mean_pooling = config.get("use_mean_pooling", True)
    if mean_pooling:
        for leaf in ("scale", "bias"):
            norm = pieces.pop(f"encoder/rgb/norm/{leaf}", None)
            if norm:
                left[norm.name] = "config.json has use_mean_pooling: it is not used"
    activation = config.get("hidden_act", "gelu")
    kinds = {"gelu": "erf", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
    if activation not in kinds:
        raise CheckpointError(
            f"config.json has hidden_act {activation!r}: only {', '.join(kinds)} are "
            "built here."
        )
    found = {
        "model.block.gelu": kinds[activation],
        "model.block.eps": float(config.get("layer_norm_eps", 1e-12)),
        "model.heads": config.get("num_attention_heads", 12),
        "data.num_frames": config.get("num_frames", 16),
        "data.size": config.get("image_size", 224),
    }
    assumed = {"data.resize": "antialias"}
    if "head/kernel" in pieces:
        found["model.head_eps"] = 1e-5
        several = config.get("problem_type") == "multi_label_classification"
        assumed["objective.kind"] = "sigmoid" if several else "softmax"
    else:
        found["model.decoder.eps"] = 1e-5
        found["model.decoder.heads"] = config.get("decoder_num_attention_heads", 6)
        unbiased = "standardised_channels_unbiased"
        normalised = config.get("norm_pix_loss", True)
        assumed["objective.target.rgb"] = unbiased if normalised else "pixels"
    labels = config.get("id2label") or {}
    names = [labels[key] for key in sorted(labels, key=int)]
    if len(names) != _classes(pieces):
        names = []
    return Source(pieces, found | _processor(folder), assumed, left, names)


def _processor(folder: Path) -> dict[str, Any]:
    """The normalisation of the image processor's own file, where it is there."""
    try:
        text = (folder / "preprocessor_config.json").read_text(encoding="utf-8")
        settings = json.loads(text)
        return {
            "picture.mean": tuple(float(x) for x in settings["image_mean"]),
            "picture.std": tuple(float(x) for x in settings["image_std"]),
        }
    except (OSError, ValueError, KeyError):
        return {}


class _Stored(NamedTuple):
    """A tensor of an open safetensors file."""

    file: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.file.get_slice(self.name).get_shape())

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.asarray(self.file.get_tensor(self.name), dtype)


def _huggingface_arrays(folder: Path) -> dict[str, Any]:
    """Array-likes by name, from the one file or all shards of the folder."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return _arrays(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _sharded(folder, index)
    raise CheckpointError(
        f"{folder} has a config.json, but neither model.safetensors nor "
        "pytorch_model.bin, nor an index of shards."
    )


def _sharded(folder: Path, index: Path) -> dict[str, Any]:
    try:
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(shard) for shard in shards.values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error!r}") from error
    arrays = {}
    for place in sorted(places):
        if Path(place).name != place or not (folder / place).is_file():
            raise CheckpointError(f"{index} names the shard {place}, which is missing.")
        arrays |= _arrays(folder / place)
    if missing := sorted(set(shards) - set(arrays)):
        raise CheckpointError(f"{index} names {missing[0]}, which no shard holds.")
    return arrays


def _arrays(path: Path) -> dict[str, Any]:
    if path.suffix != ".safetensors":
        return dict(pickles.weights(path)[0])
    try:
        file = safe_open(path, "np")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return {name: _Stored(file, name) for name in file.keys()}


def _mcg(path: Path) -> Source:
    return original(*pickles.weights(path))


def original(arrays: Mapping[str, Any], tree: Mapping[str, Any]) -> Source:
    """MCG-NJU's model from its tensors by name, and the whole tree of the file."""
    pieces, left = _by_our_names(arrays)
    arguments = getattr(tree.get("args"), "state", None)
    arguments = arguments if isinstance(arguments, dict) else {}
    told = {ours: arguments.get(name) for name, ours in _ARGUMENTS.items()}
    finetuned = "head/kernel" in pieces
    found = {
        name: float(value) if "mask" in name else value
        for name, value in told.items()
        if isinstance(value, int | float) and not (finetuned and "mask" in name)
    }
    return Source(pieces, found | _exact(finetuned), {"data.resize": "bilinear"}, left)


def _keras(path: Path) -> Source:
    pieces = {
        ours: Piece(variable.name, variable, torch=False)
        for ours, variable in keras.read(path).items()
    }
    found = _exact("head/kernel" in pieces)
    return Source(pieces, found, {"data.resize": "bilinear"}, {})


def _exact(finetuned: bool) -> dict[str, Any]:
    """The block of the original code, which its files do not tell."""
    norm = "model.head_eps" if finetuned else "model.decoder.eps"
    return {"model.block.gelu": "erf", "model.block.eps": 1e-6, norm: 1e-6}


def _by_our_names(arrays: Mapping[str, Any]) -> tuple[dict[str, Piece], dict[str, str]]:
    """(pieces by our name, names that have no place and why) of a torch file."""
    pieces: dict[str, Piece] = {}
    left, unknown = {}, []
    for name, array in arrays.items():
        ours = _ours(name)
        if name.endswith("num_batches_tracked"):
            left[name] = "a counter"
        elif ours in pieces or not ours:
            unknown.append(name)
        else:
            pieces[ours] = Piece(name, array, torch=True)
    if unknown:
        raise CheckpointError(
            f"it has parameters that no VideoMAE of this release has: "
            f"{', '.join(unknown[:5])}{' …' if len(unknown) > 5 else ''}."
        )
    return pieces, left


def _ours(name: str) -> str:
    """Our name of a torch parameter, '' if there is none."""
    name = name[_PREFIXES.match(name).end() :]
    for pattern, stack in _STACKS:
        if match := re.fullmatch(pattern, name):
            inner = _leaf(match[2], _IN_BLOCK, _ALONE_IN_BLOCK)
            return inner and f"{stack}/block_{match[1]}/{inner}"
    return _leaf(name, _OUTSIDE, _ALONE_OUTSIDE)


def _leaf(name: str, layers: dict[str, str], alone: dict[str, str]) -> str:
    if name in alone:
        return alone[name]
    layer, _, leaf = name.rpartition(".")
    if layer not in layers or leaf not in ("weight", "bias"):
        return ""
    weight = "scale" if "norm" in layers[layer] else "kernel"
    return f"{layers[layer]}/{weight if leaf == 'weight' else 'bias'}"


# From pieces to our config and parameters.


def _shape(pieces: Pieces, name: str, axes: int) -> tuple[int, ...]:
    if name not in pieces:
        raise CheckpointError(f"the parameter that is our {name} is missing.")
    shape = tuple(pieces[name].array.shape)
    if len(shape) != axes:
        raise CheckpointError(
            f"{pieces[name].name} has the shape {shape}, which is of no VideoMAE."
        )
    return shape


def _classes(pieces: Pieces) -> int:
    return _shape(pieces, "head/bias", 1)[0] if "head/bias" in pieces else 0


def _depth(pieces: Pieces, stack: str) -> int:
    numbers = {
        int(match[1])
        for name in pieces
        if (match := re.match(rf"{stack}/block_(\d+)/", name))
    }
    if numbers != set(range(len(numbers))):
        raise CheckpointError(f"of the blocks of {stack} some are missing.")
    return len(numbers)


def imported(source: Source, options: Mapping[str, Any]) -> Imported:
    """The model of a source; options are config fields by dotted name."""
    pieces, left, notes = dict(source.pieces), dict(source.left), []
    finetuned = "head/kernel" in pieces
    whole = _depth(pieces, "decoder/rgb") > 0
    if finetuned or not whole:
        for name in [n for n in pieces if n.startswith(("decoder", "predict/"))]:
            left[pieces.pop(name).name] = "of a decoder that is not whole or not used"
    if not finetuned and not whole:
        notes.append(
            "Only the encoder was loaded: the file holds no decoder. It can start "
            "pretraining or finetuning (a decoder or head begins from its first "
            "values), but does not reconstruct."
        )
    fixed = _fixed_positions(pieces, left)
    found = source.found | _FIXED | _encoder_size(pieces, source, options)
    if not finetuned:
        found["model.decoder.kind"] = "separate"
        found |= _decoder_size(pieces) if whole else {}
    found["model.norm"] = "encoder/rgb/norm/scale" in pieces
    scaled = "encoder/rgb/block_0/scale_1" in pieces
    learned = "embed/positions_rgb/embedding" in pieces
    found["model.positions"] = "learned" if learned else "sinusoidal"
    if learned:
        found |= _frames(pieces, found, options)
    if finetuned:
        found |= {
            "model.classes": _classes(pieces),
            "model.head_norm": "head_norm/scale" in pieces,
            "model.pool": "mean" if "head_norm/scale" in pieces else "token",
        }
    if scaled:  # where it began leaves no trace in a file
        source.assumed["model.block.layer_scale"] = 0.1
    trainer = "finetune" if finetuned else "pretrain"
    assumed = _published(finetuned, found, options) | source.assumed
    if not whole:
        found = {k: v for k, v in found.items() if not k.startswith("model.decoder.")}
    if "model.heads" not in {**source.found, **options}:
        heads = found["model.heads"] or VARIANTS[_variant(found)][2]
        notes.append(
            f"The file does not tell the number of heads: {heads} is the published one "
            "for its width (model.heads)."
        )
    config, sentences = configure(trainer, found, assumed, options)
    _check_whole(pieces)
    flat, rows = _assemble(pieces, config)
    rows += [Row(name, "", why) for name, why in left.items()]
    notes += fixed + sentences
    return Imported(config, nested(flat), rows, notes, source.labels)


def _encoder_size(pieces: Pieces, source: Source, options) -> dict[str, Any]:
    """Sizes from shapes; heads from the edition, the table of variants or an option."""
    kernel = pieces.get("embed/rgb/kernel")
    shape = _shape(pieces, "embed/rgb/kernel", 5)
    if kernel.torch:
        width, channels, tubelet, side, _ = shape
    else:
        tubelet, side, _, channels, width = shape
    if channels != 3:
        raise CheckpointError(f"{kernel.name} is for {channels} channels, not 3.")
    depth = _depth(pieces, "encoder/rgb")
    (mlp,) = _shape(pieces, "encoder/rgb/block_0/mlp/in/bias", 1)
    heads = source.found.get("model.heads") or options.get("model.heads")
    sizes = {(w, d): (name, h) for name, (w, d, h) in VARIANTS.items()}
    name, usual = sizes.get((width, depth), ("B", 0 if width % 64 else width // 64))
    heads = heads or usual
    if not heads:
        raise CheckpointError(
            f"the file does not tell the number of heads, and a width of {width} is "
            "not a published one: give model.heads."
        )
    explicit = dict(width=width, depth=depth, heads=heads, mlp=mlp)
    if (width, depth) in sizes and heads == usual and mlp == 4 * width:
        explicit = dict.fromkeys(explicit, 0)
    if "model.heads" in options:
        explicit["heads"] = heads
    found = {f"model.{field}": value for field, value in explicit.items()}
    return found | {"model.variant": f"{name}/{side}x{tubelet}"}


def _variant(found: Mapping[str, Any]) -> str:
    return found["model.variant"].split("/")[0]


def _decoder_size(pieces: Pieces) -> dict[str, Any]:
    width = _shape(pieces, "decoder_embed/mask_token_rgb", 3)[-1]
    (mlp,) = _shape(pieces, "decoder/rgb/block_0/mlp/in/bias", 1)
    return {
        "model.decoder.width": width,
        "model.decoder.depth": _depth(pieces, "decoder/rgb"),
        "model.decoder.mlp": mlp,
        "model.decoder.bias": "decoder_embed/rgb/bias" in pieces,
    }


def _fixed_positions(pieces: dict[str, Piece], left: dict[str, str]) -> list[str]:
    """Takes a stored table away that is the fixed sinusoid; a sentence if it was."""
    name = "embed/positions_rgb/embedding"
    if name not in pieces:
        return []
    table = np.asarray(pieces[name].array)
    table = table.reshape(table.shape[-2:])
    if not np.allclose(table, tokens.sinusoid(*table.shape), atol=1e-5):
        return []
    left[pieces.pop(name).name] = "the fixed sinusoid, which is computed here"
    return ["The positions in the file are the fixed sinusoid."]


def _frames(pieces: Pieces, found, options) -> dict[str, Any]:
    """The number of frames from that of learned positions, at the size of the input."""
    n = _shape(pieces, "embed/positions_rgb/embedding", 3)[1]
    size = found.get("data.size") or options.get("data.size") or 224
    side, tubelet = map(int, found["model.variant"].split("/")[1].split("x"))
    frames, rest = divmod(n, (size // side) ** 2)
    frames *= tubelet
    if rest or found.get("data.num_frames", frames) != frames:
        raise CheckpointError(
            f"its {n} positions are not those of pictures of {size} pixels: give "
            "data.size."
        )
    return {"data.num_frames": frames}


def _published(finetuned: bool, found, options) -> dict[str, Any]:
    """The published input, objective and decoder, where the file does not tell."""
    size = found.get("data.size") or options.get("data.size") or 224
    assumed = {
        "model.drop_path_rescale": True,
        "picture.mean": IMAGENET_MEAN,
        "picture.std": IMAGENET_STD,
        "data.num_frames": 16,
        "data.size": size,
        "data.stride": 4,
        "data.fps": 30.0,
    }
    if finetuned:  # the published test: 5 clips, 3 crops
        return assumed | {"data.short_side": size, "data.views": 5, "data.crops": 3}
    width = found["model.width"] or VARIANTS[_variant(found)][0]
    ours, depth, heads = DECODERS.get(width, (width // 2, 4, max(width // 128, 1)))
    return assumed | {
        "model.decoder.width": ours,
        "model.decoder.depth": depth,
        "model.decoder.heads": heads,
        "model.decoder.mlp": 4 * ours,
        "model.decoder.bias": False,
        "mask.rgb.kind": "tube",
        "mask.rgb.ratio": 0.9,
        "objective.target.rgb": "standardised_channels_unbiased",
        "objective.weights.rgb": 1.0,
    }


def _check_whole(pieces: Pieces):
    """CheckpointError for the first layer that is not whole."""
    wanted = {"embed/rgb/kernel"}
    if _depth(pieces, "decoder/rgb"):
        wanted |= {"decoder/rgb/norm/scale", "predict/rgb/kernel"}
        wanted |= {"decoder_embed/rgb/kernel", "decoder_embed/mask_token_rgb"}
    if any(name.endswith("scale_1") for name in pieces):
        scales = ("scale_1", "scale_2")
    else:
        scales = ()
    for stack in ("encoder/rgb", "decoder/rgb"):
        for i in range(_depth(pieces, stack)):
            block = f"{stack}/block_{i}"
            wanted |= {f"{block}/{scale}" for scale in scales}
            wanted |= {f"{block}/norm_{k}/scale" for k in (1, 2)}
            layers = ("attention/out", "mlp/in", "mlp/out")
            wanted |= {f"{block}/{layer}/kernel" for layer in layers}
    for name in sorted(wanted | pieces.keys()):
        layer, _, leaf = name.rpartition("/")
        pair = leaf in ("kernel", "scale") and not _UNPAIRED.fullmatch(layer)
        for part in (name, f"{layer}/bias") if pair else (name,):
            _need(pieces, part)


def _assemble(pieces: Pieces, config) -> tuple[dict[str, np.ndarray], list[Row]]:
    """(our arrays by name, a row for every parameter of the file)."""
    flat: dict[str, np.ndarray] = {}
    rows: list[Row] = []
    for stack in ("encoder/rgb", "decoder/rgb"):
        for i in range(_depth(pieces, stack)):
            block = f"{stack}/block_{i}"
            heads = size_of(config.model).heads
            if stack.startswith("decoder"):
                heads = config.model.decoder.heads
            _attention(pieces, block, heads, flat, rows)
    for name, piece in pieces.items():
        if re.search(r"/attention/(q|k|v|qkv)/", name):
            continue
        value, note = piece.value(), _cast(piece)
        if name.endswith("attention/out/kernel"):
            heads = flat[name.replace("out/kernel", "qkv/kernel")].shape[2]
            value = value.reshape(heads, -1, value.shape[-1])
        elif name.startswith("embed/positions"):
            value = value.reshape(value.shape[-2:])
        elif name == "embed/rgb/kernel":
            note = "patch flattened" + note
        flat[name] = value
        rows.append(Row(piece.name, name, note.removeprefix(", ")))
    return flat, rows


def _cast(*pieces: Piece) -> str:
    kinds = {str(piece.dtype) for piece in pieces} - {"float32"}
    return "".join(f", {kind} to float32" for kind in sorted(kinds))


def _attention(pieces: Pieces, block: str, heads: int, flat: dict, rows: list[Row]):
    """Queries, keys and values of a block side by side; keys without bias."""
    name = f"{block}/attention"
    d = len(_need(pieces, f"{block}/norm_1/scale").value())
    if d % heads:
        raise CheckpointError(f"{heads} heads do not divide the width {d} of {block}.")
    if f"{name}/qkv/kernel" in pieces:
        used = [pieces[f"{name}/qkv/kernel"]]
    else:
        used = [_need(pieces, f"{name}/{x}/kernel") for x in "qkv"]
    kernel = np.concatenate([piece.value() for piece in used], axis=1)  # d 3d
    target = f"{name}/qkv/kernel"
    flat[target] = kernel.reshape(d, 3, heads, -1)
    rows += [Row(piece.name, target, "side by side" + _cast(piece)) for piece in used]
    target = f"{name}/qkv/bias"
    both = pieces.get(f"{name}/qkv/bias")
    if both:
        parts = both.value().reshape(3, heads, -1)[[0, 2]]
        rows.append(Row(both.name, target, "without the keys', which changes nothing"))
    else:
        ends = [pieces.get(f"{name}/{x}/bias") for x in "qv"]
        values = [np.zeros(d, np.float32) if e is None else e.value() for e in ends]
        parts = np.stack(values).reshape(2, heads, -1)
        rows += [Row(e.name, target, "side by side" + _cast(e)) for e in ends if e]
        if not any(ends):
            rows.append(Row("", target, "zeros: the file has no biases here"))
    flat[target] = parts
    if key := pieces.get(f"{name}/k/bias"):
        rows.append(Row(key.name, "", "a bias of keys changes nothing"))


def _need(pieces: Pieces, name: str) -> Piece:
    if name not in pieces:
        raise CheckpointError(f"the parameter that is our {name} is missing.")
    return pieces[name]


def nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arrays by '/'-joined name as nested dicts."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree
