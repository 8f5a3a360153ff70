"""The model card: README.md beside exported weights, filled in from the run.

Follows Mitchell et al. 2019, "Model cards for model reporting", as far as a run knows
itself; what it cannot know (the licence of its data) it says it does not know.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from av_mae import caveats, checksums, loop, maskenhancer

CODE = """\
```python
import av_mae

model = av_mae.load("THIS FOLDER")
{call}
```
"""
STABLEHLO_CODE = """\
```python
import jax.export, safetensors.numpy

program = jax.export.deserialize(bytearray(open("model.stablehlo", "rb").read()))
weights = safetensors.numpy.load_file("model.safetensors")
outputs = program.call(weights, inputs)
```
"""
SAVEDMODEL_CODE = """\
```python
import tensorflow as tf

# A SavedModel is a program: this runs what is in it. Load only what you trust.
outputs = tf.saved_model.load("saved_model").serve(inputs)
```
"""


def text(
    config,
    meta: Mapping[str, Any],
    results: Mapping[str, float],
    parameters: int,
    to: str = "safetensors",
    inputs: Mapping[str, tuple] | None = None,
    licence: str = "",
) -> str:
    """The card in Markdown.

    results: the last evaluation's numbers; parameters: how many; to: the layout;
    inputs: {name: (shape of a clip, dtype)} of a program; licence: of the weights.
    """
    where = data_name(config)
    name = f"{config.model.variant} on {where}" if where else config.model.variant
    parts = [
        _header(config, licence),
        f"# {_plain(name)}\n\n{_what(config, parameters)}",
        "## Use\n\n" + _use(config, to, inputs or {}),
        "## Intended use\n\n" + _intended(config, meta),
        "## Data\n\n" + _data(config, meta),
        "## Recipe\n\n" + _recipe(config, meta),
        "## Results\n\n" + _results(config, results, caveats.of_meta(meta)),
        "## Licence\n\n" + _licence(licence),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def results_of(checkpoint: Path | str, weights: str = "params") -> dict[str, float]:
    """The numbers of the last evaluation of a run, up to a step; none where none is.

    checkpoint: a workdir, the folder of its checkpoints, or one of them; weights: those
    that were evaluated, `params` or `ema`.
    """
    path, step = Path(checkpoint).absolute(), math.inf
    if path.name.isdigit() and (path / "state").is_dir():
        path, step = path.parent, int(path.name)
    if path.name == checksums.FOLDER:
        path = path.parent
    rows = [row for row in loop.evaluations(path) if row["step"] <= step]
    found = {k: v for k, v in rows[-1].items() if k != "step"} if rows else {}
    averaged = {k: v for k, v in found.items() if "/ema_" in k}
    if weights == "ema":
        return {k.replace("/ema_", "/"): v for k, v in averaged.items()}
    return {k: v for k, v in found.items() if k not in averaged}


def label_lines(labels: Sequence[str] | Mapping[str, Sequence[str]]) -> str:
    """labels.txt: a class a line, in the order of the logits; of heads, `head: class`.

    A line break within a name becomes a space.
    """
    if isinstance(labels, Mapping):
        names = [f"{head}: {name}" for head, each in labels.items() for name in each]
    else:
        names = list(labels)
    return "".join(" ".join(name.split()) + "\n" for name in names)


def data_name(config) -> str:
    """The data set's name: the last part of its address."""
    return PurePath(config.data.dir).name or config.data.dir


def _plain(words: Any) -> str:
    """Words in Markdown that mean nothing but themselves."""
    return re.sub(r"([\\`*_\[\]<>|#$])", r"\\\1", " ".join(str(words).split()))


def _header(config, licence: str) -> str:
    """What model hubs read; values are JSON, which YAML includes."""
    task = "video-classification" if config.trainer == "finetune" else "other"
    fields = {
        "library_name": "av_mae",
        "license": licence or "other",
        "pipeline_tag": task,
        "tags": ["audiovisual", "masked-autoencoder", *config.modalities],
    }
    lines = [f"{name}: {json.dumps(value)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _what(config, parameters: int) -> str:
    kind = "A classifier" if config.trainer == "finetune" else "A masked autoencoder"
    return (
        f"{kind} of {' and '.join(config.modalities)}, {parameters / 1e6:.1f} M "
        f"parameters, `model.variant` {_plain(config.model.variant)}, fusion "
        f"{_plain(config.model.fusion)}. After {_paper(config)}."
    )


def _paper(config) -> str:
    """The publication whose kind of model it is."""
    if config.model.fusion in maskenhancer.FUSIONS:
        return "Diao et al. 2023, AV-MaskEnhancer (ICTAI)"
    if tuple(config.modalities) == ("rgb",):
        return "Tong et al. 2022, VideoMAE (NeurIPS)"
    return "Georgescu et al. 2023, Audiovisual Masked Autoencoders (ICCV)"


def _use(config, to: str, inputs: Mapping[str, tuple]) -> str:
    calls = {
        "finetune": 'model.predict("clip.mp4")',
        "pretrain": 'model.reconstruct("clip.mp4", ratio=0.9)',
    }
    codes = {"stablehlo": STABLEHLO_CODE, "savedmodel": SAVEDMODEL_CODE}
    code = codes.get(to, CODE.format(call=calls[config.trainer]))
    rows = [
        f"| `{name}` | {' × '.join(['b', *map(str, shape)])} | {dtype} |"
        for name, (shape, dtype) in inputs.items()
    ]
    if to not in codes or not rows:
        return code + "\n" + _input(config)
    table = ["| input | shape | type |", "|---|---|---|", *rows]
    return code + "\n" + "\n".join(table) + "\n\n" + _input(config)


def _input(config) -> str:
    data, words = config.data, []
    if "rgb" in config.modalities:
        words.append(
            f"{data.num_frames} frames of {data.size} × {data.size} pixels, one in "
            f"{data.stride} of {data.fps:g} a second"
        )
    if "spectrogram" in config.modalities:
        words.append(
            f"{data.audio_seconds:g} s of mono sound (log-mel preset "
            f"`{config.spectrogram.preset}`)"
        )
    return f"It sees {' and '.join(words)}."


def _intended(config, meta: Mapping[str, Any]) -> str:
    if config.trainer == "finetune":
        labels = meta.get("labels") or []
        heads = labels.values() if isinstance(labels, Mapping) else [labels]
        count = " × ".join(str(len(names)) for names in heads if names) or "its"
        task = (
            f"To tell which of {count} classes (labels.txt) a clip like those of "
            f"{_plain(data_name(config) or 'its data set')} shows. It knows no other "
            "classes, and its probabilities are not calibrated."
        )
    else:
        task = (
            "To be finetuned, to extract features, and to study what masked "
            "autoencoders learn. Its reconstructions are guesses, not evidence of what "
            "was there."
        )
    return (
        f"{task} It was not tested on clips of other sources, nor for fairness "
        "between groups of people; do not use it to identify or to judge people."
    )


UNKNOWN = "The published file that these weights are from does not tell it."


def _data(config, meta: Mapping[str, Any]) -> str:
    if not config.data.dir:
        return UNKNOWN
    limit = config.data.limit if "limit" in config.data else 0
    lines = [
        f"- data set: {_plain(data_name(config))}, split {_plain(config.data.split)}"
        + (f", {limit} clips of it" if limit else ""),
        f"- evaluated on: {_plain(config.eval.split)}",
    ]
    if meta.get("dataset_checksum"):
        lines.append(f"- checksum of its records: `{meta['dataset_checksum']}`")
    return "\n".join(lines)


def _recipe(config, meta: Mapping[str, Any]) -> str:
    if not config.data.dir:
        return UNKNOWN
    length = f"{config.steps} steps" if config.steps else f"{config.epochs:g} epochs"
    rate = config.schedule.learning_rate_per_256
    lines = [
        f"- {length}, {config.batch_size} clips a step, seed {config.seed}",
        f"- {config.optimizer.name}, learning rate {rate:g} per 256 clips, weight "
        f"decay {config.optimizer.weight_decay:g}",
    ]
    if config.trainer == "pretrain":
        masks = [
            f"{m} {config.mask[m].kind} {config.mask[m].ratio:g}"
            for m in config.modalities
            if m in config.mask
        ]
        lines.append(f"- objective {config.objective.kind}, masks {', '.join(masks)}")
    start = config.init_from.checkpoint_path if "init_from" in config else ""
    if start:
        lines.append(f"- started from {_plain(PurePath(start).name)}")
    made = meta.get("provenance", {})
    names = [f"{name} {made[name]}" for name in ("jax", "flax") if name in made]
    if names:
        commit = made.get("git_commit") or "unknown"
        lines.append(f"- made with {', '.join(names)}, commit `{commit}`")
    lines.append("- every other setting: config.json")
    return "\n".join(lines)


def _results(config, results: Mapping[str, float], said: Sequence[str]) -> str:
    if not results:
        return "The run that these weights are from left no evaluation beside them."
    lines = [f"On {_plain(config.eval.split)}:", "", "| measure | value |", "|---|---|"]
    lines += [
        f"| {_plain(name.removeprefix('eval/'))} | {value:.4g} |"
        for name, value in results.items()
    ]
    lines += ["", *(f"- {_plain(sentence)}." for sentence in said)] if said else []
    return "\n".join(lines)


def _licence(licence: str) -> str:
    weights = (
        f"The weights are under {_plain(licence)}."
        if licence
        else "Nobody has said under which licence the weights are; it may depend on "
        "that of the data set, which the run does not know."
    )
    return f"{weights} The code (av_mae) is under Apache-2.0."
