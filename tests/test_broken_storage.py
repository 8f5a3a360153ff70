"""Broken storage: each fault is one clear sentence, and a good step is gone on from.

What a single damaged file of a checkpoint does is in test_checkpoints; here are whole
runs on full disks, in folders that cannot be written, and on damaged steps.
"""

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import reliability
import synthetic
import toy
import training_run

from av_mae import (
    CheckpointError,
    TrainingError,
    UserError,
    checkpoints,
    checksums,
    loop,
)
from av_mae import run as runs

FULL = os.environ.get("AV_MAE_STRESS") == "full"
NAME, STEPS = "digits/pretrain", 9
CHANGES = {
    "modalities": ["spectrogram"],
    "model__fusion": "separate",
    "log__every_steps": 1,
    "log__pictures": 0,
    "checkpoint__every_steps": 3,
    "eval__every_epochs": 1.5,
    "ema": 0.9,
}
NOBODY = 65534


@pytest.fixture(autouse=True, scope="module")
def quick():
    with synthetic.quick():
        yield


def train(workdir, steps=STEPS):
    training_run.run(NAME, workdir, CHANGES | {"steps": steps})


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that nothing happened to; steps 6 and 9 are kept."""
    workdir = tmp_path_factory.mktemp("storage") / "whole"
    train(workdir)
    return workdir


@pytest.fixture
def copied(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def one_sentence(error) -> str:
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text and len(text) < 600, text
    return text


# Damaged steps.


def flip(path, draw):
    """One bit of the file."""
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path, draw):
    """A file that ends too early, perhaps before its first byte."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def half_written(path, draw):
    """Room that was set aside, but not filled from somewhere on."""
    size = path.stat().st_size
    os.truncate(path, draw.randrange(size))
    os.truncate(path, size)


def lose(path, draw):
    path.unlink()


DAMAGES = {
    "a bit flipped": flip,
    "truncated": cut,
    "half-written (zeros to its end)": half_written,
    "a file lost": lose,
}
TIMES = 50 if FULL else 13


@pytest.mark.stress
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_newest_step_is_passed_over_by_file_name(copied, damage, caplog):
    """Every file, and more by chance: `find` uses the step before, and says why."""
    draw, folder = random.Random(0), copied / "checkpoints"
    files = sorted(path for path in (folder / "9").rglob("*") if path.is_file())
    count = TIMES if damage != "a file lost" else len(files)
    tried = 0
    for path in [*files, *draw.choices(files, k=max(0, count - len(files)))]:
        good = path.read_bytes()
        DAMAGES[damage](path, draw)
        if path.exists() and path.read_bytes() == good:
            continue  # zeros where zeros were
        caplog.clear()
        assert checkpoints.find(copied) == (folder, 6)
        name = path.relative_to(folder / "9").as_posix()
        (line,) = caplog.messages
        assert line.startswith(f"Step 9 of {folder} is passed over: ") and name in line
        with pytest.raises(CheckpointError, match="9 cannot be read: .*") as error:
            checkpoints.find(folder / "9")
        assert name in one_sentence(error)
        path.write_bytes(good)
        tried += 1
    assert checkpoints.find(copied) == (folder, 9)
    outcome = "the file named, the step before used"
    reliability.record(f"checkpoint step: {damage}", tried, outcome, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_goes_on_from_the_step_before_a_damaged_one(copied, whole, damage):
    draw = random.Random(1)
    path = max((copied / "checkpoints" / "9").rglob("d/*"), key=os.path.getsize)
    DAMAGES[damage](path, draw)
    train(copied)
    synthetic.assert_same_run(copied, whole)


@pytest.mark.slow
def test_a_flipped_digit_of_the_config_is_damage_not_another_experiment(copied, whole):
    """It is still JSON; only the checksum tells."""
    path = copied / "checkpoints" / "9" / "config" / "metadata"
    text = path.read_text()
    assert '"seed": 0' in text
    path.write_text(text.replace('"seed": 0', '"seed": 1'))
    train(copied)
    synthetic.assert_same_run(copied, whole)


def test_a_file_that_cannot_be_read_is_named(copied, monkeypatch, caplog):
    read = checksums._sha256

    def failing(path):
        if path.match("9/state/*/*") or path.match("9/state/*"):
            raise OSError(5, "Input/output error")
        return read(path)

    monkeypatch.setattr(checksums, "_sha256", failing)
    assert checkpoints.find(copied) == (copied / "checkpoints", 6)
    (line,) = caplog.messages
    assert "9/" not in line.split(": ")[1] and "(Input/output error)." in line


def test_where_every_step_is_damaged_nothing_is_replaced(copied, whole, caplog):
    """It says so of each; moved away, the run is made again, and its numbers kept."""
    for step in ("6", "9"):
        flip(copied / "checkpoints" / step / "checksums-0.json", random.Random(2))
    with pytest.raises(CheckpointError, match="no good checkpoint; its oldest step 6"):
        checkpoints.find(copied)
    files = lambda: {x: x.read_bytes() for x in copied.rglob("*") if x.is_file()}
    before = files()
    with pytest.raises(CheckpointError, match="no good checkpoint") as error:
        train(copied)
    assert "in step 6, checksums-0.json is damaged." in one_sentence(error)
    passed = [text for text in caplog.messages if "passed over" in text]
    assert ["Step 9" in x or "Step 6" in x for x in passed] == 4 * [True]
    assert files() == before
    (copied / "checkpoints").rename(copied / "damaged")
    train(copied)
    synthetic.assert_same_run(copied, whole)
    assert (copied / loop.BEFORE).read_bytes() == before[copied / loop.METRICS]


# Full disks.


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int):
    """A file system of its own in `folder`; skips where nobody may mount one."""
    folder.mkdir()
    size = f"size={megabytes}m"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left: int):
    """Leaves so many bytes on the disk; the file that takes the others."""
    path = folder / "others"
    free = shutil.disk_usage(folder).free - left
    with open(path, "wb") as file:
        file.write(b"\1" * max(free, 0))
    return path


LEFT = [0, 4096, 40_000, 200_000] if FULL else [0, 40_000]


@pytest.mark.stress
def test_a_disk_that_fills_up_stops_the_run_and_it_goes_on_later(
    whole, tmp_path, monkeypatch
):
    """After step 3 so many bytes are left: for no number, or for half a checkpoint."""
    save, left = runs.Run.save, None

    def saved(self, step, state):
        save(self, step, state)
        if left is not None and step == 3:
            self.checkpoints.wait()
            fill(disk, left)

    monkeypatch.setattr(runs.Run, "save", saved)
    with small_disk(tmp_path / "disk", 8) as disk:
        workdir = disk / "run"
        for left in LEFT:  # noqa: B007 (`saved` reads it)
            with pytest.raises(UserError) as error:
                train(workdir)
            text = one_sentence(error)
            assert "MiB" in text and str(workdir) in text
            assert "could not be saved" in text or "could not be written" in text
            assert checkpoints.find(workdir)[1] == 3
            (disk / "others").unlink()
            left = None
            train(workdir)
            synthetic.assert_same_run(workdir, whole)
            shutil.rmtree(workdir)
    outcome = "one sentence with the free space; with room again it ends as without"
    reliability.record("full disk during training", len(LEFT), outcome)


def test_numbers_that_find_no_room_are_one_sentence(tmp_path, monkeypatch):
    pytest.importorskip("clu")
    monkeypatch.setattr(loop, "_tensorboard", TENSORBOARD)
    with small_disk(tmp_path / "disk", 1) as disk:
        writer = loop.MetricWriter(disk)
        writer.write(1, {"loss": 1.0})
        fill(disk, 0)
        for what in (loop.EVENTS, loop.METRICS):
            with pytest.raises(TrainingError, match=f"{what} could not") as error:
                for step in range(1000):
                    writer.write(step, {"loss": 1.0})
            assert "o space left on device" in one_sentence(error)
            assert "(0.0 MiB free)" in str(error.value)
            writer._board = None  # whose files fill up first, by whole pages
        writer.close()


TENSORBOARD = loop._tensorboard  # before `quick` replaces it


# Folders that are not ours to write, or not ours.


@contextlib.contextmanager
def read_only(folder: Path):
    """A copy of the folder that this process may read, and write nowhere in."""
    place = Path(tempfile.mkdtemp(prefix="av_mae_read_only_"))
    copy = place / "run"
    shutil.copytree(folder, copy)
    for path in [place, copy, *copy.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:  # for whom there is no read-only folder
        os.seteuid(NOBODY)
        config = synthetic.ROOT / "configs" / "digits" / "pretrain.py"
        if not os.access(config, os.R_OK, effective_ids=True):
            os.seteuid(0)
            pytest.skip("others than root cannot read this clone")
    try:
        yield copy
    finally:
        if root:
            os.seteuid(0)
        for path in [place, copy, *copy.rglob("*")]:
            path.chmod(0o755)
        shutil.rmtree(place)


def test_a_read_only_workdir_cannot_be_trained_in_but_be_read(whole):
    values = checkpoints.load(whole)[0]
    with read_only(whole) as workdir:
        with pytest.raises(CheckpointError, match="cannot be written") as error:
            train(workdir)
        text = one_sentence(error)
        assert str(workdir) in text and "another --workdir" in text
        found = checkpoints._names(checkpoints.load(workdir)[0])
        for name, value in checkpoints._names(values).items():
            np.testing.assert_array_equal(found[name], value)
        with pytest.raises(CheckpointError, match="cannot be written"):
            train(workdir / "new")


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints/.lock"])
def test_a_file_that_cannot_be_written_is_named(copied, name):
    (copied / name).unlink()
    (copied / name).mkdir()
    with pytest.raises(UserError, match="cannot be written|could not be written") as e:
        train(copied)
    assert str(copied) in one_sentence(e)


def test_the_command_says_it_in_one_line(copied, tmp_path):
    """Exit status 2, no traceback: another experiment, and two runs in one workdir."""
    command = ["-m", "av_mae.main", "--config=configs/digits/pretrain.py:smoke"]
    data = tmp_path / "set"
    toy.write_folder(tmp_path / "clips", 8)
    settings = ["--split=train=0.5,test=0.5"]
    toy.run("-m", "data.prepare", tmp_path / "clips", "--out", data, *settings)
    options = [f"--config.data.dir={data}", f"--workdir={copied}"]
    options += ["--config.spectrogram.normalise=none", "--config.data.fps=25"]
    text = toy.run(*command, *options, code=2)
    last = text.splitlines()[-1]
    assert last.startswith(f"error: {copied} holds another experiment: config.")
    held = checkpoints.Checkpoints(copied, {}, {})
    text = toy.run(*command, *options, code=2)
    held.close()
    last = text.splitlines()[-1]
    assert last.startswith(f"error: {copied} is in use by another run")
    assert "Traceback" not in text
