"""Writes docs/recipes.md: what every config asks for, computed from the config.

    JAX_PLATFORMS=cpu python docs/recipes.py

The published results are the data below; all else but the numbers of clips comes from
the config as the trainers read it.
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from av_mae import finetune, inputs, loop, optim, pretrain
from av_mae.plan import CLIPS, clips_of

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
NAMES = sorted(p.relative_to(CONFIGS).as_posix()[:-3] for p in CONFIGS.glob("*/*.py"))

CLASSES = 10  # where the data set says how many there are

# Results that others published, of the model after finetuning.
PUBLISHED = {
    "audioset/finetune": "51.8 mAP",
    "audioset/finetune:audio": "46.6 mAP",
    "audioset/finetune:video": "31.1 mAP",
    "vggsound/finetune": "65.0 top-1",
    "vggsound/finetune:audio": "57.2 top-1",
    "vggsound/finetune:video": "50.3 top-1",
    "ucf101/finetune": "91.3 top-1",
    "kinetics400/finetune": "81.5 top-1",
    "kinetics400/finetune:S": "79.0 top-1",
    "kinetics400/finetune:B": "81.5 top-1",
    "kinetics400/finetune:L": "85.2 top-1",
    "kinetics400/finetune:H": "86.6 top-1",
    "ssv2/finetune": "70.8 top-1",
    "ssv2/finetune:S": "66.8 top-1",
    "ssv2/finetune:B": "70.8 top-1",
    "epic_kitchens/finetune": "71.4 top-1 of verbs",
}


@functools.cache
def module(name: str):
    """The Python module of a config, `audioset/pretrain`."""
    path = CONFIGS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name.replace("/", "_"), path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def config_of(name: str, arg: str = "") -> ConfigDict:
    return module(name).get_config(arg)


def variants(name: str) -> list[str]:
    """What may stand after the colon but `smoke`: '', words, words with commas."""
    groups = [("", *group.split()) for group in module(name).VARIANTS]
    choices = itertools.product(*(g for g in groups if "smoke" not in g))
    return sorted((",".join(filter(None, words)) for words in choices), key=_order)


def _order(arg: str):
    return bool(arg), arg.count(","), arg


def full(name: str, arg: str) -> str:
    return f"{name}:{arg}" if arg else name


def classes_of(config):
    """What the heads are for, 10 classes where the data set would say it."""
    return dict(config.model.label_heads) or config.model.classes or CLASSES


# What parameters do not depend on: models that differ in these alone are built once.
APART = ("batch_size", "epochs", "schedule", "optimizer", "augment", "eval", "mode")


def shapes(config):
    """Shapes of all parameters, nothing allocated."""
    settings = {k: v for k, v in config.to_dict().items() if k not in APART}
    settings["spectrogram"] = {"preset": config.spectrogram.preset, "normalise": "none"}
    settings["compute"] |= {"accumulate": 1}
    return _shapes(json.dumps(settings))


@functools.cache
def _shapes(settings: str):
    config = ConfigDict(json.loads(settings))
    if config.trainer == "pretrain":
        init = functools.partial(pretrain.init, config, pretrain.build(config))
    else:
        model = finetune.build(config, classes_of(config))
        init = functools.partial(finetune.init, config, model)
    return jax.eval_shape(init, jax.random.key(0))


def parameters(config) -> int:
    """How many numbers are learned or kept frozen; running statistics are not."""
    leaves = optim.named(shapes(config))
    return sum(
        math.prod(leaf.shape)
        for name, leaf in leaves.items()
        if not name.endswith(("/mean", "/variance"))
    )


class Plan(NamedTuple):
    """How long a config trains, and how fast."""

    clips: int  # of an update
    per_epoch: int  # updates; 0 where the number of clips is not known
    total: int
    peak: float  # of the learning rate
    floor: float


def plan(config) -> Plan:
    """The plan of a config on its published data set."""
    clips = config.batch_size * config.compute.accumulate
    scale, rates = clips / 256, config.schedule
    known = clips_of(config)
    steps = loop.steps(config, known) if known else (0, 0)
    schedule, _ = optim.learning_rate(rates, clips, *(steps if known else (100, 1000)))
    warmup = math.ceil(rates.warmup_epochs * (steps[0] or 100))
    peak = max(float(schedule(step)) for step in range(max(warmup - 2, 0), warmup + 3))
    return Plan(clips, *steps, peak, rates.floor_per_256 * scale)


def row(name: str, arg: str) -> str:
    """A line of the table."""
    config = config_of(name, arg)
    found = plan(config)
    tokens = {m: layout.n for m, layout in inputs.layouts(config).items()}
    cells = [
        f"`{full(name, arg)}`",
        f"{parameters(config):,}",
        " + ".join(f"{tokens[m]:,}" for m in config.modalities),
        f"{found.clips:,}",
        f"{found.per_epoch:,}" if found.per_epoch else "–",
        f"{found.total:,}" if found.total else "–",
        f"{config.epochs:g}, {config.schedule.warmup_epochs:g}",
        f"{found.peak:.4g}",
        f"{found.floor:.3g}",
        PUBLISHED.get(full(name, arg), "–"),
    ]
    return f"| {' | '.join(cells)} |"


HEAD = [
    "| config | parameters | tokens of a view | clips an update | updates an epoch | "
    "updates | epochs, of warm-up | learning rate: peak | floor | published |",
    "|---|--:|---|--:|--:|--:|---|--:|--:|---|",
]
TEXT = """\
# Recipes

Written by `python docs/recipes.py`; do not edit it by hand. Every config and each of
its variants (`--config=configs/audioset/pretrain.py:audio`); all have `:smoke` besides.

- **parameters**: of the whole model at full size, without running statistics; with
  {classes} classes where the data set says how many there are. A probe learns only its
  last few.
- **tokens of a view**: rgb + spectrogram, before masking.
- **clips an update**: batch × accumulation. The learning rate is that of the config per
  256 clips × clips an update / 256; samples of a clip do not count.
- **updates**: from the number of training clips that was published (digits: made);
  what does not fill an update is left out of an epoch. With your copy of the data set,
  from which clips have vanished, there are fewer.
- **published**: what others report of this recipe. We have not run it at full size.

{table}

Training clips: {clips}.
"""


def page() -> str:
    """The text of docs/recipes.md."""
    rows = [row(name, arg) for name in NAMES for arg in variants(name)]
    clips = ", ".join(f"{name} {count:,}" for name, count in CLIPS.items())
    table = "\n".join([*HEAD, *rows])
    return TEXT.format(table=table, clips=clips, classes=CLASSES)


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    (ROOT / "docs" / "recipes.md").write_text(page(), encoding="utf-8")
    print(f"docs/recipes.md: {len(NAMES)} configs")


if __name__ == "__main__":
    main()
