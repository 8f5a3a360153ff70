"""Trains or evaluates what a config describes.

    python -m av_mae.main --config=configs/digits/pretrain.py --workdir=runs/pretrain
    python -m av_mae.main --config=configs/digits/finetune.py --workdir=runs/finetune \\
        --config.init_from.checkpoint_path=runs/pretrain

`--config.a.b=value` changes a field; `--config=…:smoke` is a run of seconds;
`--config.mode=eval` evaluates the newest checkpoint of the workdir;
`--config.dry_run=True` says what a run will take, and runs none.
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
    datasets,
    finetune,
    loop,
    mirror,
    parallel,
    pretrain,
)
from av_mae import run as runs
from data import DataError, pipeline

log = logging.getLogger("av_mae.main")  # `__name__` is "__main__" here

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.")
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where the run lives, a folder or a bucket; default: runs/<data>_<file> of the "
    "config.",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "Of several processes: host:port of the first; see parallel.py."
)
PROCESSES = flags.DEFINE_integer("num_processes", 0, "How many processes there are.")
PROCESS = flags.DEFINE_integer("process_id", -1, "Which one this is, from 0.")

TRAINERS = {"pretrain": pretrain, "finetune": finetune}


def main(argv):
    del argv
    config = CONFIG.value
    file = Path(config_flags.get_config_filename(flags.FLAGS["config"]))
    workdir = WORKDIR.value or default_workdir(file)
    try:
        commandline.quiet_libraries()
        parallel.initialize(COORDINATOR.value, PROCESSES.value, PROCESS.value)
        if jax.process_index() == 0:
            commandline.show_our_log()
        log.info("%s", parallel.describe_devices())
        trainer = choose("trainer", config.get("trainer", ""), TRAINERS)
        trainer.check(config)
        modes = {"train": trainer.train, "eval": trainer.evaluate}
        run = choose("mode", config.mode, modes)
        pipeline.check(config.data)
        if config.dry_run:
            from av_mae import benchmark  # what a run needs no more than this

            benchmark.dry_run(config, num_clips(config))
            return
        data = datasets.load(config)
        readable = runs.config_of(json.loads(runs.config_json(config)))
        log.info("workdir %s  %s\n%s", workdir, loop.provenance(), readable)
        with mirror.kept(workdir) as folder:
            run(config, data, folder)
    except (UserError, DataError) as error:
        commandline.stop(error)


def num_clips(config) -> int:
    """Clips of the training split; 0, with a word, where the data set is not there."""
    try:
        return datasets.split(config, config.data.split).num_clips
    except DataError as error:
        log.info("a dry run without the data set: %s", error)
        return 0


def default_workdir(file: Path) -> str:
    """runs/<data>_<file> for configs/<data>/<file>.py."""
    return f"runs/{file.resolve().parent.name}_{file.stem}"


if __name__ == "__main__":
    app.run(main, flags_parser=functools.partial(commandline.parse, CONFIG))
