"""Trains or evaluates what a config describes.

    python -m av_mae.main --config=configs/digits/pretrain.py --workdir=runs/pretrain
    python -m av_mae.main --config=configs/digits/finetune.py --workdir=runs/finetune \\
        --config.init_from.checkpoint_path=runs/pretrain

`--config.a.b=value` changes a field; `--config=…:smoke` is a run of seconds;
`--config.mode=eval` evaluates the newest checkpoint of the workdir.
"""

import logging
import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from av_mae import (
    UserError,
    choose,
    finetune,
    loop,
    parallel,
    pretrain,
    spectrogram,
    stats,
)
from data import DataError, pipeline

log = logging.getLogger(__name__)

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; default: runs/<data>_<file> of the config."
)
flags.mark_flag_as_required("config")

TRAINERS = {"pretrain": pretrain, "finetune": finetune}


def load_data(config) -> dict[str, pipeline.Dataset]:
    """The splits that the config names; fills in statistics it asks of the data set."""
    sound = config.spectrogram
    preset = choose("spectrogram.preset", sound.preset, spectrogram.PRESETS)
    label = "none"
    if config.trainer == "finetune":
        label = choose("objective.kind", config.objective.kind, finetune.LABELS)
    if sound.normalise == "dataset" and "spectrogram" in config.modalities:
        sound.mean, sound.std = stats.sound(config.data.dir, sound.preset)
        log.info("log-mel mean %.4f, deviation %.4f (data set)", sound.mean, sound.std)
    load = lambda split: pipeline.load(
        config.data,
        split,
        modalities=tuple(config.modalities),
        label=label,
        sample_rate=preset.sample_rate,
        seed=config.seed,
        process=(jax.process_index(), jax.process_count()),
    )
    return {"train": load(config.data.split), "eval": load(config.eval.split)}


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"what is {argv[1]!r}? Options begin with --.")
    config = CONFIG.value
    file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    workdir = Path(WORKDIR.value or f"runs/{file.parent.name}_{file.stem}")
    try:
        parallel.initialize()
        level = logging.INFO if jax.process_index() == 0 else logging.WARNING
        logging.basicConfig(level=level, format="%(message)s", force=True)
        log.info("%s", parallel.describe_devices())
        trainer = choose("trainer", config.trainer, TRAINERS)
        modes = {"train": trainer.train, "eval": trainer.evaluate}
        run = choose("mode", config.mode, modes)
        log.info("workdir %s  %s\n%s", workdir, loop.provenance(), config)
        run(config, load_data(config), workdir)
    except (UserError, DataError) as error:
        stop(error)


def parse(argv):
    """The flags; what is wrong with them, or in the config file, in one sentence."""
    try:
        return flags.FLAGS(argv)
    except AttributeError as error:  # a field that the locked config does not have
        given = " ".join(arg for arg in argv if arg.startswith("--config."))
        stop(UserError(f"the config has no field {error} (in {given})"))
    except (flags.Error, KeyError, TypeError, ValueError) as error:
        stop(error)


def stop(error: Exception):
    """Prints an error in one line, without the traceback that some carry, and exits."""
    lines = (
        str(error).replace("\\n", "\n").replace("\\'", "'").strip("\"'").splitlines()
    )
    traceback = any(line.startswith("Traceback") for line in lines)
    print("error:", lines[-1] if traceback else " ".join(lines), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
