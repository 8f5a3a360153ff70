"""AV-MaskEnhancer's .pth files (Diao et al. 2023): pretraining and finetuning.

The video half is a VideoMAE of MCG-NJU and is read as one. The sound encoder has the
name `audio_endoder` in the files. Its running statistics of batches come with it; the
counters of batches are left. What the files do not tell is taken from the publication
or from the options (fields of our config by dotted name):

    model.heads, model.decoder.heads     published: width/64
    data.num_frames, data.size           published: 16 frames of 224 pixels
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from av_mae import MODALITIES, CheckpointError
from av_mae.importers import pickles, videomae
from av_mae.importers.imported import Imported, Row

_SOUND = "audio_endoder."
_JOINS = ("audio_proj.", "encoder_proj.", "crossA2V.", "crossV2A.", "selfAV.")

_STEM = {"conv1": "stem", "bn1": "stem_norm"}
_UNIT = {
    "conv1": "conv_1",
    "bn1": "norm_1",
    "conv2": "conv_2",
    "bn2": "norm_2",
    "se.fc.0": "squeeze",
    "se.fc.2": "excite",
    "downsample.0": "shortcut",
    "downsample.1": "shortcut_norm",
}
_MEETING = {
    "audio_proj": "embed",
    "encoder_proj": "join",
    "crossA2V": "to_video",
    "crossV2A": "to_sound",
    "selfAV": "together",
}
_LAYER = {
    "self_attn.out_proj": "out",
    "linear1": "mlp_in",
    "linear2": "mlp_out",
    "norm1": "norm_1",
    "norm2": "norm_2",
}
_HEADS = 8  # of the layers where picture and sound meet


def matches(path: Path | str) -> bool:
    """Whether a path is a PyTorch file with the sound encoder's names in it."""
    if not pickles.matches(path):
        return False
    try:
        names, _ = pickles.weights(path)
    except CheckpointError:
        return False
    return any(name.startswith(_SOUND) for name in names)


def read(path: Path | str, **options) -> Imported:
    """A published AV-MaskEnhancer; options are config fields by dotted name.

    Raises CheckpointError for a damaged file, one of another model, one that wants to
    run code, or an option that contradicts it.
    """
    try:
        return _read(*pickles.weights(path), options)
    except CheckpointError as error:
        if str(path) in str(error):
            raise
        raise CheckpointError(f"{path}: {error}") from error


def _read(arrays: Mapping[str, Any], tree, options: Mapping[str, Any]) -> Imported:
    sound = {k: a for k, a in arrays.items() if k.startswith((_SOUND, *_JOINS))}
    video = {k: a for k, a in arrays.items() if k not in sound}
    flat, rows, left = _heard(sound)
    source = videomae.original(video, tree)
    source.left.update(left)
    source.assumed.update(_published("head/kernel" in source.pieces))
    found = videomae.imported(source, options)
    kind = "attention" if "meet/to_video/norm_1/scale" in flat else "concat"
    found.config.modalities = MODALITIES
    found.config.model.update(fusion=kind, sound=_sizes(flat))
    params = found.params | videomae.nested(flat)
    return Imported(found.config, params, [*found.rows, *rows], found.notes)


def _published(finetuned: bool) -> dict[str, Any]:
    """What the published project chose, where that is not VideoMAE's."""
    assumed = {
        "spectrogram.preset": "mfcc",
        "data.audio_seconds": 20.48,
        "data.audio_align": "whole",
        "data.fps": 25.0,
    }
    return assumed if finetuned else assumed | {"mask.rgb.ratio": 0.75}


def _heard(
    arrays: Mapping[str, Any],
) -> tuple[dict[str, np.ndarray], list[Row], dict[str, str]]:
    """(arrays by our names, a row for each, names left out and why) of the sound."""
    flat, rows, left = {}, [], {}
    for name, array in arrays.items():
        if name.endswith("num_batches_tracked"):
            left[name] = "a counter"
            continue
        ours = _ours(name)
        if not ours:
            raise CheckpointError(f"it has {name}, which no AV-MaskEnhancer has.")
        for target, value, note in _as_ours(ours, np.asarray(array, np.float32)):
            flat[target] = value
            rows.append(Row(name, target, note))
    return flat, rows, left


def _ours(name: str) -> str:
    """Our name of a parameter of the sound, '' if there is none."""
    layer, _, leaf = name.rpartition(".")
    if match := re.fullmatch(r"audio_endoder\.layer([1-4])\.(\d+)\.(.+)", layer):
        place, inner = f"sound/stage_{int(match[1]) - 1}_unit_{match[2]}", match[3]
        layer = _UNIT.get(inner) and f"{place}/{_UNIT[inner]}"
    elif layer.startswith(_SOUND):
        inner = _STEM.get(layer.removeprefix(_SOUND))
        layer = inner and f"sound/{inner}"
    else:
        first, _, rest = layer.partition(".")
        if leaf.startswith("in_proj_"):  # of self_attn: queries, keys, values
            layer, leaf = f"meet/{_MEETING[first]}/in", leaf.removeprefix("in_proj_")
        elif rest:
            layer = _LAYER.get(rest) and f"meet/{_MEETING[first]}/{_LAYER[rest]}"
        else:
            layer = f"meet/{_MEETING[first]}"
    norm = layer and "norm" in layer.rsplit("/", 1)[-1]
    leaves = {
        "weight": "scale" if norm else "kernel",
        "bias": "bias",
        "running_mean": "mean",
        "running_var": "variance",
    }
    return f"{layer}/{leaves[leaf]}" if layer and leaf in leaves else ""


def _as_ours(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray, str]]:
    """(our name, array, what was changed) of one array; queries go apart."""
    layer, leaf = name.rsplit("/", 1)
    if layer.endswith("/in"):
        parts = value.reshape(3, _HEADS, -1, *value.shape[1:])  # 3 h e (d)
        query, rest = parts[0], parts[1:]
        if leaf == "kernel":
            query, rest = np.moveaxis(query, -1, 0), np.moveaxis(rest, -1, 0)
        place = layer.removesuffix("in")
        return [
            (f"{place}query/{leaf}", query, "queries apart"),
            (f"{place}key_value/{leaf}", rest, "queries apart"),
        ]
    if value.ndim == 4:  # a convolution's [outputs, inputs, h, w]
        value = value.transpose(2, 3, 1, 0)
    elif value.ndim == 2:
        value = value.T
    if layer.endswith("/out") and leaf == "kernel":
        value = value.reshape(_HEADS, -1, value.shape[-1])
    return [(name, value, "")]


def _sizes(flat: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """`model.sound`: channels and units of each stage."""
    filters, blocks = [], []
    for i in range(4):
        units = {n for n in flat if re.match(rf"sound/stage_{i}_unit_\d+/conv_1/", n)}
        if not units:
            raise CheckpointError(f"its sound encoder has no stage {i + 1} of four.")
        blocks.append(len(units))
        filters.append(flat[sorted(units)[0]].shape[-1])
    return dict(filters=tuple(filters), blocks=tuple(blocks))
