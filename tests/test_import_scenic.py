"""Scenic's checkpoints: every parameter of the published ten, values, both layouts."""

import re

import flax.serialization
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import scenic

from av_mae import CheckpointError, ConfigError, convert, importers
from av_mae.importers import scenic as importer


def nested(arrays: dict) -> dict:
    """{'a/b': x} as {'a': {'b': x}}."""
    tree: dict = {}
    for name, value in arrays.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return tree


def write(path, arrays: dict, layout: str):
    """A checkpoint of these parameters in one of Scenic's two layouts."""
    params, zeros = nested(arrays), nested({k: 0 * v for k, v in arrays.items()})
    tree = {
        "pretrain": {
            "global_step": np.int32(3),
            "optimizer": {"target": params, "state": {"param_states": zeros}},
            "model_state": {},
            "rng": np.zeros(2, np.uint32),
            "accum_train_time": 5,
        },
        "finetune": {
            "opt_state": {"0": {"trace": zeros}},
            "params": params,
            "metadata": {"chrono": {"note": "x"}},
        },
    }[layout]
    path.write_bytes(flax.serialization.msgpack_serialize(tree))
    return path


def tiny_shapes(width: int = 32, depth: int = 2) -> dict[str, tuple[int, ...]]:
    """A pretraining model of this width (`mid`, one joint layer, one decoder)."""
    shapes = {}
    for stack, layers, d in (
        ("Transformer_rgb", depth, width),
        ("Transformer_spectrogram", depth, width),
        ("Transformer_concat", 1, width),
        ("Decoder", 1, width // 2),
    ):
        norms = [f"{stack}/encoder_norm"]
        for i in range(layers):
            block = f"{stack}/encoderblock_{i}"
            attention = f"{block}/MultiHeadDotProductAttention_0"
            norms += [f"{block}/LayerNorm_0", f"{block}/LayerNorm_1"]
            for part in ("query", "key", "value"):
                shapes[f"{attention}/{part}/kernel"] = (d, 2, d // 2)
                shapes[f"{attention}/{part}/bias"] = (2, d // 2)
            shapes[f"{attention}/out/kernel"] = (2, d // 2, d)
            shapes[f"{attention}/out/bias"] = (d,)
            for j, (rows, columns) in enumerate(((d, 4 * d), (4 * d, d))):
                shapes[f"{block}/MlpBlock_0/Dense_{j}/kernel"] = (rows, columns)
                shapes[f"{block}/MlpBlock_0/Dense_{j}/bias"] = (columns,)
        for norm in norms:
            shapes[f"{norm}/scale"] = shapes[f"{norm}/bias"] = (d,)
    for m, patch in (("rgb", (2, 8, 8, 3)), ("spectrogram", (8, 8, 1))):
        shapes[f"embedding_{m}/kernel"] = (*patch, width)
        shapes[f"embedding_{m}/bias"] = (width,)
        shapes[f"decoder_projection_{m}/kernel"] = (width, width // 2)
        shapes[f"decoder_projection_{m}/bias"] = (width // 2,)
        shapes[f"mask_token_{m}"] = (1, 1, width // 2)
        shapes[f"output_projection_{m}/kernel"] = (width // 2, int(np.prod(patch)))
        shapes[f"output_projection_{m}/bias"] = (int(np.prod(patch)),)
    return shapes


def arrays_of(shapes: dict) -> dict:
    rng = np.random.default_rng(0)
    return {k: rng.normal(size=v).astype(np.float32) for k, v in shapes.items()}


def assert_complete(shapes: dict, **options):
    """Each name of the file has a place or a reason, each of ours a value that fits."""
    plan = importer.plan(shapes, **options)
    used = [name for names in plan.parts.values() for name in names]
    assert len(used) == len(set(used))
    assert set(used) | set(plan.left) == set(shapes)
    assert not set(used) & set(plan.left)
    model = convert.shapes(convert.abstract(plan.config))
    assert plan.parts.keys() == model.keys()
    for name, sources in plan.parts.items():
        size = sum(int(np.prod(shapes[source])) for source in sources)
        if "positions_" in name:
            continue
        channels = 3 if name == "embed/spectrogram/kernel" else 1
        assert int(np.prod(model[name])) in {size, size // channels}, name
    return plan


# The ten published checkpoints.


def table(name: str) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v) for k, v in scenic.large(name)["params"].items()}


def alone(shapes: dict, modality: str) -> dict:
    """The finetuned model of one modality, by the rules for single modalities."""
    other = "spec" if modality == "rgb" else "embedding/"
    kept = {k: v for k, v in shapes.items() if not re.search("spec", k)}
    if modality == "rgb":
        return kept
    kept = {k: v for k, v in kept.items() if not k.startswith(other)}
    spectrogram = [k for k in shapes if k.startswith("embedding_spec")]
    return kept | {k: shapes[k] for k in spectrogram}


def pretrained_alone(shapes: dict) -> dict:
    return {k: v for k, v in shapes.items() if "rgb" not in k}


# name: (parameters in the file, how its names and shapes are known)
TABLE, DERIVED = "the table of shapes", "not checked against a file"
PUBLISHED = {
    "audioset pretrained AV": (595_849_984, TABLE),
    "audioset finetuned AV": (607_002_127, TABLE),
    "audioset finetuned A": (303_118_863, DERIVED),
    "audioset finetuned V": (304_429_583, DERIVED),
    "audioset A pretrained": (315_843_840, DERIVED),
    "audioset A finetuned A": (303_118_863, DERIVED),
    "vggsound pretrained AV": (621_040_384, TABLE),
    "vggsound finetuned AV": (607_302_965, TABLE),
    "vggsound finetuned A": (303_419_701, DERIVED),
    "vggsound finetuned V": (304_206_133, DERIVED),
}


def published(name: str) -> dict[str, tuple[int, ...]]:
    data, *words = name.split()
    if name == "audioset A pretrained":
        return pretrained_alone(table("audioset_pretrain_L"))
    if words == ["pretrained", "AV"]:
        return table(f"{data}_pretrain_L")
    both = table(f"{data}_finetune_L")
    return both if words[-1] == "AV" else alone(both, MODALITY[words[-1]])


MODALITY = {"A": "spectrogram", "V": "rgb"}


@scenic.needed
@pytest.mark.parametrize(
    "name", [pytest.param(k, id=f"{k}, {v[1]}") for k, v in PUBLISHED.items()]
)
def test_published(name):
    shapes = published(name)
    plan = assert_complete(shapes)
    assert importer.count(shapes) == PUBLISHED[name][0]
    config = plan.config
    assert config.model.variant == "L/16x2" and config.model.depth == 0
    assert config.trainer == ("pretrain" if "pretrained" in name else "finetune")
    sound = {"audioset": 10.0, "vggsound": 8.0}[name.split()[0]]
    assert config.data.audio_seconds == sound
    if name.endswith("finetuned AV"):
        assert config.model.fusion == "bottleneck" and config.model.bottlenecks == 4
        assert config.model.fusion_layer == (18 if sound == 10.0 else 16)
        assert config.objective.kind == ("sigmoid" if sound == 10.0 else "softmax")
    if config.trainer == "finetune" and not name.endswith("AV"):
        assert list(plan.left) == ["bottleneck"]
    else:
        assert plan.left == {}


# The stored models.


FILES = sorted((scenic.SCENIC / "checkpoint").glob("pretrain_checkpoint_?"))


@scenic.needed
def test_no_stored_file_is_missing():
    assert len(FILES) >= 1


@scenic.needed
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_stored_file(path):
    assert importers.find(path) is importer
    found = importers.read(path, **{"data.num_frames": 4, "data.size": 16})
    stored = scenic.arrays(f"checkpoint/{path.name}.params.npz")
    places = scenic.places(
        "separate_encoders_and_concat", "same_decoder", ("rgb", "spectrogram")
    )
    model = convert.abstract(found.config)
    expected = scenic.read(model, stored, places)
    assert_same(found.params, expected)
    parity.record("scenic/checkpoint", path.name, outputs=0.0)
    assert {row.source for row in found.rows} == stored.keys()
    assert "79,040 parameters" in found.notes[-1]
    assert "model.decoder.kind='shared'" in found.notes[0]


def assert_same(params, expected):
    ours, theirs = scenic.named(params), scenic.named(expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


# Fields of the stored tiny models. Learned positions are not compared in number: they
# are those of spectrograms with 16 mels.
SMALL = {"data.num_frames": 4, "data.size": 16, "data.audio_seconds": 0.4}


def pretraining_cases() -> dict[str, tuple[dict, dict, dict]]:
    """{case: (stored arrays, what the file tells, what an option has to tell)}."""
    meta, found = scenic.meta("pretrain/meta.json"), {}
    for case, told in meta["cases"].items():
        pool = scenic.arrays("pretrain/params_pool.npz")
        pool = pool | scenic.arrays(f"pretrain/{told['params_file']}")
        names = meta["param_name_sets"][told["param_names"]]
        config = told["config"]
        fusion = scenic.ENCODERS[config["encoder_strategy"]]
        kind = scenic.DECODERS[config["decoder_strategy"]]
        learned = "learned" if "learned_1d" in case else "sinusoidal"
        expected = {
            "fusion": fusion,
            "decoder.kind": kind,
            "decoder.bias": "projection_bias" not in case,
            "norm": config["normalise_encoder_output"],
            "decoder.norm": config["normalise_encoder_output"],
            "modality_embeddings": config["use_modality_tokens"],
            "positions": learned if "encoder" in case else "sinusoidal",
            "decoder.positions": learned if "decoder" in case else "sinusoidal",
        }
        if fusion == "mid":
            expected["fusion_layers"] = config["fusion_layers"]
        options = {"model.fusion": fusion} if fusion in ("early", "shared") else {}
        options |= {"model.decoder.kind": kind} if kind == "joint" else {}
        found[case] = ({n: pool[n] for n in names}, expected, options)
    return found


def finetuning_cases() -> dict[str, tuple[dict, dict, dict]]:
    """As `pretraining_cases`."""
    found = {}
    for case, told in scenic.meta("finetune/meta.json")["cases"].items():
        if case.startswith("variant__return"):
            continue  # models without a head, which nobody stores
        pool = scenic.arrays("finetune/params_pool.npz")
        if "classifier_token" in case:
            pool = scenic.arrays("finetune/params_token.npz")
        for changed in ("n_bottlenecks_1", "representation_size"):
            if changed in case:
                pool = pool | scenic.arrays(f"finetune/params_{changed}_diff.npz")
        config = told["model"]
        both, meet = len(config["modality_fusion"]) > 1, config["use_bottleneck"]
        expected = {
            "fusion": "bottleneck" if meet or not both else "cross",
            "share_encoder": both and config.get("share_encoder", False),
            "representation": config["representation_size"] or 0,
            "cls_token": config["classifier"] == "token",
            "modality_embeddings": config.get("use_modality_tokens", False),
            "fusion_layer": config["fusion_layer"],
            "classes": 11,
        }
        if both and meet:
            # Scenic keeps one more where there are CLS tokens.
            expected["bottlenecks"] = config["n_bottlenecks"] + expected["cls_token"]
        options = {"model.fusion_layer": config["fusion_layer"]}
        stored = {n: pool[n] for n in told["param_names"]}
        found[case] = (stored, expected, options)
    return found


def single_cases() -> dict[str, tuple[dict, dict, dict]]:
    """As `pretraining_cases`: the models of video, or of pictures, alone."""
    found, folder = {}, "single_modality_models"
    for case, told in scenic.meta(f"{folder}/meta.json")["cases"].items():
        pool = scenic.arrays(
            f"{folder}/params_{case.split('__')[0]}.npz".replace("_mae", "")
        )
        override = f"{case}/params_override/"
        fixed = scenic.arrays(f"{folder}/fixtures.npz")
        fixed = {k.removeprefix(override): v for k, v in fixed.items() if override in k}
        learned = {
            "learned_1d": "learned",
            "learned_space_time": "learned_space_time",
            "sinusoidal_2d": "sinusoidal_2d",
        }.get(told["model"]["positional_embedding"], "sinusoidal")
        norm = told["model"].get("normalise_encoder_output", True)
        expected = {"positions": learned, "norm": norm}
        if "finetune" in case:
            expected |= {"classes": 7, "head_norm": not norm}
        stored = pool | fixed
        stored = {n: stored[n] for n in told["param_names"]}
        options = SMALL | {"data.num_frames": 1} if case.startswith("vit_") else SMALL
        found[case] = (stored, expected, options)
    return found


@scenic.needed
@pytest.mark.parametrize(
    ("cases", "count"),
    [(pretraining_cases, 56), (finetuning_cases, 28), (single_cases, 13)],
)
def test_every_stored_model_has_a_place(cases, count):
    """The config of each; and the model, where a choice is met for the first time."""
    cases, seen = cases(), set()
    assert len(cases) >= count
    for case, (stored, expected, options) in cases.items():
        shapes = {name: value.shape for name, value in stored.items()}
        config = importer.plan(shapes, **SMALL | options).config
        for field, value in expected.items():
            assert _field(config.model, field) == value, (case, field)
        choices = {*expected.items(), tuple(config.modalities), config.model.variant}
        if choices - seen:
            assert_complete(shapes, **SMALL | options)
        seen |= choices


def _field(model, name: str):
    for part in name.split("."):
        model = model[part]
    return model


# Files that the test writes.


@scenic.needed
@pytest.mark.parametrize("audio", ["embedding_spec", "embedding_spectrogram"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_finetuned_file(tmp_path, audio, channels):
    stored, _, options = finetuning_cases()["multilabel__rgb_spectrogram"]
    stored = dict(stored)
    kernel = stored.pop("embedding_spectrogram/kernel")
    bias = stored.pop("embedding_spectrogram/bias")
    rng = np.random.default_rng(1)
    shares = [rng.normal(size=kernel.shape).astype(np.float32) for _ in range(channels)]
    kernel = np.concatenate(shares, axis=-2)
    stored |= {f"{audio}/kernel": kernel, f"{audio}/bias": bias}
    path = write(tmp_path / "checkpoint_9", stored, "finetune")
    found = importers.read(path, **options)
    assert {row.source for row in found.rows} == stored.keys()
    row = next(row for row in found.rows if row.target == "embed/spectrogram/kernel")
    assert row.source == f"{audio}/kernel"
    assert ("summed, which is exact" in row.note) == (channels == 3)
    # Three equal channels through their kernels are one channel through the sum.
    patch = rng.normal(size=(8, 8, 1)).astype(np.float32)
    ours = patch.reshape(-1) @ found.params["embed"]["spectrogram"]["kernel"]
    theirs = np.einsum("hwc,hwcd->d", np.repeat(patch, channels, -1), kernel)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    np.testing.assert_array_equal(
        found.params["encoder"]["rgb"]["block_1"]["attention"]["qkv"]["kernel"][:, 2],
        stored[f"Transformer/encoderblock_1/{importer._ATTENTION}/value/kernel"],
    )


def test_a_pretraining_file_in_half_precision(tmp_path):
    stored = arrays_of(tiny_shapes())
    half = {k: np.asarray(v, jnp.bfloat16) for k, v in stored.items()}
    path = write(tmp_path / "checkpoint_9", half, "pretrain")
    found = importers.read(path)
    embed = found.params["embed"]["rgb"]["kernel"]
    assert embed.dtype == np.float32 and embed.shape == (384, 32)
    expected = np.asarray(half["embedding_rgb/kernel"], np.float32).reshape(384, 32)
    np.testing.assert_array_equal(embed, expected)
    assert "bfloat16 to float32" in found.rows[0].note


# What does not fit.


def test_what_the_file_does_not_tell_is_asked_for():
    shapes = tiny_shapes()
    one = {
        k.replace("Transformer_concat", "Transformer"): v
        for k, v in shapes.items()
        if not k.startswith(("Transformer_rgb", "Transformer_spec"))
    }
    with pytest.raises(CheckpointError, match="with --config.model.fusion=early or"):
        importer.plan(one)
    early = importer.plan(one, **{"model.fusion": "early"}).parts
    shared = importer.plan(one, **{"model.fusion": "shared"}).parts
    assert "encoder/joint/norm/bias" in early and "encoder/shared/norm/bias" in shared
    joint = importer.plan(shapes, **{"model.decoder.kind": "joint"})
    assert "decoder/joint/norm/bias" in joint.parts
    assert "model.decoder.kind" not in joint.notes[0]
    head = {f"{importer._HEAD}/kernel": (32, 5), f"{importer._HEAD}/bias": (5,)}
    blocks = {
        k.replace("_rgb", "").replace("_spectrogram/", "_spectrogram/"): v
        for k, v in shapes.items()
        if k.startswith(("Transformer_rgb", "embedding"))
    }
    with pytest.raises(CheckpointError, match="with --config.model.fusion_layer"):
        importer.plan(blocks | head)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model.fusion": "early"}, CheckpointError, "the file says 'mid'"),
        ({"model.fuson": "mid"}, ConfigError, "model.fuson is no field of a pretrain"),
        ({"model.decoder": 1}, ConfigError, "model.decoder"),
        ({"modle.fusion": "mid"}, ConfigError, "modle.fusion is no field"),
        ({"data.num_frames": "8"}, ConfigError, "has to be of type int"),
    ],
)
def test_options_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        importer.plan(tiny_shapes(), **options)


def test_files_of_something_else(tmp_path):
    stored = arrays_of(tiny_shapes())
    stranger = stored | {"Transformer_rgb/encoderblock_0/gate": np.ones(3, np.float32)}
    path = write(tmp_path / "a", stranger, "pretrain")
    with pytest.raises(CheckpointError, match=f"{path}.* no model .*block_0/gate"):
        importers.read(path)
    lost = {k: v for k, v in stored.items() if "value/bias" not in k}
    path = write(tmp_path / "b", lost, "pretrain")
    with pytest.raises(CheckpointError, match="0/value/bias is missing"):
        importers.read(path)
    path = write(tmp_path / "c", {"dense/kernel": np.ones(3)}, "finetune")
    with pytest.raises(CheckpointError, match="no patch embedding"):
        importers.read(path)
    path = tmp_path / "d"
    path.write_bytes(flax.serialization.msgpack_serialize({"params": {}, "rng": 1}))
    with pytest.raises(CheckpointError, match="neither `params` nor"):
        importers.read(path)
    whole = write(tmp_path / "e", stored, "pretrain").read_bytes()
    (tmp_path / "e").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cut off or damaged at byte"):
        importers.read(tmp_path / "e")
