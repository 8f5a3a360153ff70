"""Trains or evaluates what a config describes.

    python -m av_mae.main --config=configs/digits/pretrain.py --workdir=runs/pretrain
    python -m av_mae.main --config=configs/digits/finetune.py --workdir=runs/finetune \\
        --config.init_from.checkpoint_path=runs/pretrain

`--config.a.b=value` changes a field; `--config=…:smoke` is a run of seconds;
`--config.mode=eval` evaluates the newest checkpoint of the workdir.
"""

import json
import logging
import os
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
from av_mae import run as runs
from data import DataError, pipeline

log = logging.getLogger("av_mae.main")  # `__name__` is "__main__" here

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; default: runs/<data>_<file> of the config."
)

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
    del argv
    config = CONFIG.value
    file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    workdir = Path(WORKDIR.value or default_workdir(file))
    try:
        quiet_libraries()
        parallel.initialize()
        if jax.process_index() == 0:
            for ours in ("av_mae", "data"):
                logging.getLogger(ours).setLevel(logging.INFO)
        log.info("%s", parallel.describe_devices())
        trainer = choose("trainer", config.trainer, TRAINERS)
        modes = {"train": trainer.train, "eval": trainer.evaluate}
        run = choose("mode", config.mode, modes)
        readable = runs.config_of(json.loads(runs.config_json(config)))
        log.info("workdir %s  %s\n%s", workdir, loop.provenance(), readable)
        run(config, load_data(config), workdir)
    except (UserError, DataError) as error:
        stop(error)


def default_workdir(file: Path) -> str:
    """runs/<data>_<file> for configs/<data>/<file>.py."""
    return f"runs/{file.resolve().parent.name}_{file.stem}"


def quiet_libraries():
    """Lines without decoration; of JAX, Orbax and TensorFlow, warnings alone.

    Dozens of their lines go with every checkpoint, and our own would drown in them.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("absl").setLevel(logging.WARNING)
    # TensorFlow writes TensorBoard files and computes nothing.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def parse(argv):
    """The flags; what is wrong with them, or in the config file, in one sentence."""
    try:
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise UserError(f"what is {rest[1]!r}? Options begin with --.")
        if CONFIG.value is None:
            raise UserError("give a config, as in --config=configs/digits/pretrain.py.")
        CONFIG.value.to_dict()  # a file that could not be read is told only here
        return rest
    except AttributeError as error:  # a field that the locked config does not have
        what = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error
        given = " ".join(arg for arg in argv if arg.startswith("--config."))
        stop(UserError(f"the config has no field {what} (given: {given})"))
    except OSError as error:
        stop(UserError(f"--config: {str(error).splitlines()[-1].strip()}"))
    except (UserError, flags.Error, KeyError, TypeError, ValueError) as error:
        stop(error)


def stop(error: Exception):
    """Prints an error in one line, without the traceback that some carry, and exits."""
    lines = str(error).strip().splitlines()
    if any(line.startswith("Traceback") for line in lines):
        lines = [lines[-1].removeprefix("ValueError: ")]
    print("error:", " ".join(lines), file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
