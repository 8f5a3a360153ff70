"""Trains or evaluates what a config describes.

    python -m av_mae.main --config=configs/digits/pretrain.py --workdir=runs/pretrain
    python -m av_mae.main --config=configs/digits/finetune.py --workdir=runs/finetune \\
        --config.init_from.checkpoint_path=runs/pretrain

`--config.a.b=value` changes a field; `--config=…:smoke` is a run of seconds;
`--config.mode=eval` evaluates the newest checkpoint of the workdir.
"""

import functools
import json
import logging
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from av_mae import (
    UserError,
    choose,
    commandline,
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
    preset, log_mel = spectrogram.preset_of(sound), None
    if isinstance(preset, spectrogram.Precomputed):
        log_mel = preset.rows, preset.mels
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
        log_mel=log_mel,
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
        commandline.quiet_libraries()
        parallel.initialize()
        if jax.process_index() == 0:
            commandline.show_our_log()
        log.info("%s", parallel.describe_devices())
        trainer = choose("trainer", config.trainer, TRAINERS)
        modes = {"train": trainer.train, "eval": trainer.evaluate}
        run = choose("mode", config.mode, modes)
        readable = runs.config_of(json.loads(runs.config_json(config)))
        log.info("workdir %s  %s\n%s", workdir, loop.provenance(), readable)
        run(config, load_data(config), workdir)
    except (UserError, DataError) as error:
        commandline.stop(error)


def default_workdir(file: Path) -> str:
    """runs/<data>_<file> for configs/<data>/<file>.py."""
    return f"runs/{file.resolve().parent.name}_{file.stem}"


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(commandline.parse, CONFIG))
