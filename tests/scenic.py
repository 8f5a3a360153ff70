"""Scenic's stored numbers and its parameter names, for the tests of the models.

The names of a model of ours are looked up in `places`: {our stack: its blocks and norm
in Scenic}. A QKV kernel of ours is three arrays there.
"""

import functools
import gzip
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from synthetic import config

from av_mae import inputs, tokens

SHARED = Path(__file__).resolve().parents[2] / "shared"
SCENIC = SHARED / "fixtures" / "scenic"
needed = pytest.mark.skipif(
    not SCENIC.is_dir(), reason=f"the published numbers are not at {SCENIC}"
)

# Compiling takes nearly all of a small test's time; the numbers are the same to
# rounding.
quick = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)

ENCODERS = {
    "separate_encoders": "separate",
    "concat_and_encode": "early",
    "same_encoder": "shared",
    "separate_encoders_and_concat": "mid",
}
DECODERS = {
    "same_decoder": "shared",
    "separate_decoders": "separate",
    "concat_and_decode": "joint",
}

_ATTENTION = "MultiHeadDotProductAttention_0"
_IN_BLOCK = {
    "norm_1": ["LayerNorm_0"],
    "norm_2": ["LayerNorm_1"],
    "attention/qkv": [f"{_ATTENTION}/{x}" for x in ("query", "key", "value")],
    "attention/out": [f"{_ATTENTION}/out"],
    "mlp/in": ["MlpBlock_0/Dense_0"],
    "mlp/out": ["MlpBlock_0/Dense_1"],
}


@functools.cache
def arrays(path: str) -> dict[str, np.ndarray]:
    """An .npz file of the fixtures."""
    return dict(np.load(SCENIC / path))


@functools.cache
def meta(path: str) -> dict:
    """A JSON file of the fixtures."""
    return json.loads((SCENIC / path).read_text())


def stored(path: Path, pattern: str) -> list[str]:
    """What the names of stored arrays have in a pattern's group, each once."""
    names = np.load(path).files if path.is_file() else []
    found = [match[1] for name in names if (match := re.fullmatch(pattern, name))]
    return list(dict.fromkeys(found))


def cases(folder: str, pattern: str) -> list[str]:
    """Names of the case files that are present."""
    return sorted(path.stem for path in (SCENIC / folder / "cases").glob(pattern))


def settings(name: str, modalities, **model):
    """Our config of the stored tiny models, from the shipped config `name`."""
    settings = config(name, "smoke")
    settings.modalities = tuple(modalities)
    settings.data.num_frames, settings.data.size = 4, 16
    settings.model.update(variant="Ti/8x2", width=32, depth=4, heads=2, mlp=64)
    settings.model.update(model)
    if "decoder" in settings.model:
        settings.model.decoder.update(width=16, depth=2, heads=2, mlp=32)
    return settings


def patches(clips: dict, config) -> dict[str, jax.Array]:
    """Clips {m: array} to patches, as the config's variant cuts them."""
    cuts = inputs.layouts(config)
    return {m: tokens.patchify(jnp.asarray(clips[m]), cuts[m].patch) for m in cuts}


def places(encoder: str, decoder: str, modalities) -> dict[str, str]:
    """The names of a pretraining model by Scenic's names of the strategies."""
    each = {f"encoder/{m}": f"Transformer_{m}" for m in modalities}
    found = {
        "separate_encoders": each,
        "concat_and_encode": {"encoder/joint": "Transformer"},
        "same_encoder": {"encoder/shared": "Transformer"},
        "separate_encoders_and_concat": {
            **each,
            "encoder/joint": "Transformer_concat",
        },
    }[encoder] | {
        "same_decoder": {"decoder/shared": "Decoder"},
        "separate_decoders": {f"decoder/{m}": f"Decoder_{m}" for m in modalities},
        "concat_and_decode": {"decoder/joint": "Decoder"},
    }[decoder]
    found = {ours: f"{theirs}/encoderblock_{{}}" for ours, theirs in found.items()}
    for m in modalities:
        found |= {
            f"embed/{m}": f"embedding_{m}",
            f"decoder_embed/{m}": f"decoder_projection_{m}",
            f"decoder_embed/mask_token_{m}": f"mask_token_{m}",
            f"predict/{m}": f"output_projection_{m}",
            f"embed/modality_{m}": f"Encoder_modality_token_{m}",
            f"decoder_embed/modality_{m}": f"Decoder_modality_token_{m}",
        }
        # Scenic's encoder and decoder share this name: only one can have it.
        for part in ("embed", "decoder_embed"):
            ours = f"{part}/positions_{m}/embedding"
            found[ours] = f"posembed_input_{m}/pos_embedding"
    return found


def classifier_places(modalities) -> dict[str, str]:
    """The names of a finetuning model (MBT); the first modality's blocks are plain."""
    found = {
        "encoder/bottleneck": "bottleneck",
        "encoder": "Transformer/encoderblock_{}",
        "head": "ProjectionHeadAndClassifier_0/output_projection",
    }
    for i, m in enumerate(modalities):
        suffix = {"rgb": "_rgb", "spectrogram": "_spec"}[m] if i else ""
        found[f"encoder/{m}"] = f"Transformer/encoderblock_{{}}{suffix}"
        found[f"embed/{m}"] = "embedding" if m == "rgb" else f"embedding_{m}"
    return found


def names(ours: str, places: dict[str, str]) -> list[str]:
    """Scenic's names of a parameter of ours: one, or three for QKV."""
    if ours in places:
        return [places[ours]]
    if match := re.fullmatch(r"(.*)/block_(\d+)/(.*)/(\w+)", ours):
        stack, i, part, leaf = match.groups()
        return [f"{places[stack].format(i)}/{x}/{leaf}" for x in _IN_BLOCK[part]]
    if match := re.fullmatch(r"(.*)/norm/(\w+)", ours):
        return [f"{Path(places[match[1]]).parent}/encoder_norm/{match[2]}"]
    layer, leaf = ours.rsplit("/", 1)
    return [f"{places[layer]}/{leaf}"]


def named(tree) -> dict:
    """Leaves of a tree by '/'-joined name."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return {name(path): leaf for path, leaf in leaves}


def _axis(ours: str) -> int:
    """Where Scenic's three arrays lie in ours: QKV kernel [d 3 h e], bias [3 h e]."""
    return 1 if ours.endswith("kernel") else 0


def read(abstract, stored: dict, places: dict[str, str]):
    """The tree `abstract` filled with Scenic's arrays; a missing one is a KeyError."""
    values = []
    for ours, leaf in named(abstract).items():
        parts = [stored[name] for name in names(ours, places)]
        value = np.stack(parts, _axis(ours)) if len(parts) > 1 else parts[0]
        values.append(jnp.asarray(value.reshape(leaf.shape)))
    return jax.tree.unflatten(jax.tree.structure(abstract), values)


def write(tree, places: dict[str, str]) -> dict[str, np.ndarray]:
    """The inverse of `read`, except that patch embeddings stay flat."""
    found = {}
    for ours, value in named(tree).items():
        theirs = names(ours, places)
        parts = [value]
        if len(theirs) > 1:
            parts = np.moveaxis(np.asarray(value), _axis(ours), 0)
        found |= dict(zip(theirs, parts, strict=True))
    return found


@functools.cache
def large(name: str) -> dict:
    """The table {inputs, n_params, params: {name: shape}} of a published L model."""
    path = SCENIC / "checkpoint" / "large_config_param_shapes.json.gz"
    return json.loads(gzip.decompress(path.read_bytes()))[name]


def assert_shapes(abstract, places: dict[str, str], published: dict[str, list[int]]):
    """Every published parameter has one of ours with as many values, and no more.

    Two layouts differ: QKV is one array, and a patch embedding is flat.
    """
    found = {}
    for ours, leaf in named(abstract).items():
        theirs = names(ours, places)
        found |= {name: leaf.size // len(theirs) for name in theirs}
        if len(theirs) == 1 and not ours.startswith("embed/"):
            assert list(leaf.shape) == published[theirs[0]], ours
    assert found == {name: math.prod(shape) for name, shape in published.items()}
