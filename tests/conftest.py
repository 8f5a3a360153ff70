"""Settings that every test shares."""

import atexit
import logging
import os
import shutil
import tempfile
from importlib import metadata

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

# What one test compiled, the next ones and their child processes need not.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    cache = tempfile.mkdtemp(prefix="av_mae_compiled_")
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

# Nearly all of a training test's time goes to XLA's compiler; its older emitters, which
# make the same arithmetic, take half. Other releases may not know the flag and abort,
# and 0.10.0 gives wrong numbers with it where other optimisations are off.
if "XLA_FLAGS" not in os.environ and metadata.version("jaxlib") == "0.10.2":
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"


@pytest.fixture(autouse=True)
def log_as_it_was():
    """Commands that are called inside of a test set the log up: for that test alone."""
    loggers = [logging.getLogger(name) for name in ("", "av_mae", "data", "absl")]
    before = [(x.level, x.handlers[:]) for x in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A bucket of gs://, see buckets.py."""
    import buckets

    return buckets.make(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def toy_run(tmp_path_factory):
    """A folder with clips (`clips`), records (`set`), runs `pretrain` and `finetune`.

    Made by the user's commands, so only for slow tests.
    """
    import toy

    path = tmp_path_factory.mktemp("toy_run")
    toy.write_folder(path / "clips", 16, silent=(2,))
    split = "--split=train=0.5,validation=0.5"
    toy.run("-m", "data.prepare", path / "clips", "--out", path / "set", split)
    for name in ("pretrain", "finetune"):
        command = ["-m", "av_mae.main", f"--config=configs/folder/{name}.py:smoke"]
        command += [f"--workdir={path / name}", f"--config.data.dir={path / 'set'}"]
        if name == "finetune":
            start = path / "pretrain"
            command += [f"--config.init_from.checkpoint_path={start}"]
        toy.run(*command)
    return path
