"""Workdirs in a bucket: what is copied when, and a run that goes on elsewhere."""

import logging
import shutil
import threading

import jax
import numpy as np
import pytest

from av_mae import (
    CheckpointError,
    ConfigError,
    checkpoints,
    checksums,
    loop,
    mirror,
)

RUN = "gs://mine/run"


def step_of(workdir, step: int, whole: bool = True, content: bytes = b""):
    """A step as a finished save leaves it; or without checksums, as a kill does."""
    folder = workdir / "checkpoints" / str(step)
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "array").write_bytes(content or bytes([step]) * 99)
    if whole:
        checksums.seal(folder, 0, 1)


def names(folder) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def another_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))


def test_a_folder_is_worked_in_itself(tmp_path):
    with mirror.kept(str(tmp_path / "run")) as folder:
        assert folder == tmp_path / "run"


def test_the_bucket_gets_logs_and_complete_steps_alone(bucket):
    with mirror.kept(RUN) as folder:
        step_of(folder, 1)
        step_of(folder, 2, whole=False)
        (folder / "checkpoints/3.orbax-checkpoint-tmp").mkdir()
        (folder / "checkpoints/3.orbax-checkpoint-tmp/x").write_text("")
        (folder / "checkpoints/.lock").write_text("")
        (folder / "metrics.jsonl").write_text("{}\n")
        (folder / "pictures").mkdir()
        (folder / "pictures/a.png").write_bytes(b"png")
    files = {"metrics.jsonl", "pictures/a.png"}
    files |= {f"checkpoints/1/{x}" for x in ("state/array", "checksums-0.json")}
    assert names(bucket.folder / "mine/run") == files
    written = [path for path, mode in bucket.opened if "w" in mode]
    assert written[-1] == f"{RUN}/checkpoints/1/checksums-0.json"


def test_only_what_changed_is_copied_and_old_steps_go(bucket):
    made = mirror.Mirror(RUN)
    step_of(made.here, 1)
    (made.here / "metrics.jsonl").write_text("{}\n")
    made.push()
    bucket.opened.clear()
    step_of(made.here, 2)
    shutil.rmtree(made.here / "checkpoints/1")
    made.push()
    there = bucket.folder / "mine/run"
    assert sorted(p.name for p in (there / "checkpoints").iterdir()) == ["2"]
    assert f"{RUN}/metrics.jsonl" not in [path for path, _ in bucket.opened]
    (made.here / "metrics.jsonl").write_text("{}\n{}\n")
    made.push()
    assert (there / "metrics.jsonl").read_text() == "{}\n{}\n"


def test_another_machine_begins_with_the_newest_complete_step(
    bucket, tmp_path, monkeypatch
):
    with mirror.kept(RUN) as folder:
        for step in (1, 2):
            step_of(folder, step)
        (folder / "metrics.jsonl").write_text("{}\n")
    step_of(bucket.folder / "mine/run", 3, whole=False)
    another_machine(monkeypatch, tmp_path)
    with mirror.kept(RUN) as other:
        assert other != folder
        assert sorted(p.name for p in (other / "checkpoints").iterdir()) == ["2"]
        assert not checksums.verify(other / "checkpoints/2")
        assert (other / "metrics.jsonl").read_text() == "{}\n"


def test_a_start_that_is_killed_anywhere_is_begun_again(bucket, tmp_path, monkeypatch):
    """What is here of a step has its checksums only when all else has come."""
    with mirror.kept(RUN) as folder:
        step_of(folder, 2)
        (folder / "metrics.jsonl").write_text("{}\n")
        (folder / "pictures").mkdir()
        (folder / "pictures/a.png").write_bytes(b"png")
    whole, copy = names(bucket.folder / "mine/run"), mirror._copy
    for killed_at in range(len(whole)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / f"machine {killed_at}"))
        left = iter(range(killed_at))

        def until_killed(source, target, left=left):
            next(left)  # StopIteration stands for the kill
            copy(source, target)

        monkeypatch.setattr(mirror, "_copy", until_killed)
        with pytest.raises(StopIteration):
            mirror.Mirror(RUN).pull()
        monkeypatch.setattr(mirror, "_copy", copy)
        again = mirror.Mirror(RUN)
        again.pull()
        assert names(again.here) == whole
        assert not checksums.verify(again.here / "checkpoints/2")


def test_a_damaged_step_of_the_bucket_is_passed_over(
    bucket, monkeypatch, tmp_path, caplog
):
    there = bucket.folder / "mine/run"
    for step in (1, 2, 3):
        step_of(there, step)
    for step in (2, 3):
        (there / f"checkpoints/{step}/state/array").write_bytes(b"damaged")
    with mirror.kept(RUN) as folder:
        assert checksums.steps(folder / "checkpoints") == [1]
    assert "Step 3" in caplog.text and "Step 2" in caplog.text
    assert mirror.fetched(RUN).name == "1"
    with pytest.raises(CheckpointError, match="state/array is damaged"):
        checkpoints.find(f"{RUN}/checkpoints/3")
    # A damaged step of this machine does not hide a good one of the bucket.
    step = mirror.Mirror(RUN).here / "checkpoints/1"
    (step / "state/array").write_bytes(b"damaged")
    with mirror.kept(RUN) as folder:
        assert not checksums.verify(folder / "checkpoints/1")
    # A good step of this machine is not given up for a damaged one.
    another_machine(monkeypatch, tmp_path)
    step_of(mirror.Mirror(RUN).here, 1)
    with mirror.kept(RUN) as folder:
        assert checksums.steps(folder / "checkpoints") == [1]


def test_a_newer_step_of_this_machine_stays_and_is_told(bucket, caplog):
    with mirror.kept(RUN) as folder:
        step_of(folder, 1)
    step_of(folder, 2)  # the machine stopped before it could be copied
    with mirror.kept(RUN) as again:
        assert checksums.steps(again / "checkpoints") == [1, 2]
    told = f"has step 2 of {RUN}, which the bucket lacks: the run goes on from it"
    assert [told in row.getMessage() for row in caplog.records] == [True]
    assert checksums.steps(bucket.folder / "mine/run/checkpoints") == [1, 2]


def test_a_run_that_is_started_again_does_not_copy_a_step_again(bucket):
    with mirror.kept(RUN) as folder:
        step_of(folder, 1)
    bucket.opened.clear()
    with mirror.kept(RUN):
        pass
    assert not [path for path, mode in bucket.opened if "w" in mode]
    (folder / "checkpoints/1/state/array").write_bytes(b"other")
    checksums.seal(folder / "checkpoints/1", 0, 1)
    with mirror.kept(RUN):
        pass
    assert not checksums.verify(bucket.folder / "mine/run/checkpoints/1")


def test_what_ended_the_run_is_told_not_that_the_bucket_failed_too(bucket, monkeypatch):
    def broken(path, mode):
        raise RuntimeError("of some backend")

    with pytest.raises(ZeroDivisionError), mirror.kept(RUN) as folder:
        monkeypatch.setattr(bucket, "open", broken, raising=False)
        step_of(folder, 1)
        raise ZeroDivisionError


def test_a_workdir_whose_name_is_a_number(bucket):
    step_of(bucket.folder / "mine/2026", 3)
    assert mirror.fetched("gs://mine/2026").name == "3"


def test_it_is_copied_while_the_run_goes_on(bucket, monkeypatch):
    monkeypatch.setattr(mirror, "SECONDS", 0.05)
    copied = threading.Event()
    push = mirror.Mirror.push

    def noticed(self):
        push(self)
        if (bucket.folder / "mine/run/checkpoints/1/checksums-0.json").exists():
            copied.set()

    monkeypatch.setattr(mirror.Mirror, "push", noticed)
    with mirror.kept(RUN) as folder:
        step_of(folder, 1)
        assert copied.wait(20)


def test_a_bucket_that_cannot_be_written(bucket, monkeypatch, caplog):
    """Tried again while the run goes on; at the end a sentence, and nothing is lost."""

    def full(path, mode):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mirror, "SECONDS", 0.05)
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(CheckpointError, match="the run is whole in .*runs/gs%3A"),
    ):
        with mirror.kept(RUN) as folder:
            monkeypatch.setattr(bucket, "open", full, raising=False)
            step_of(folder, 1)
            while "tried again" not in caplog.text:
                threading.Event().wait(0.05)
    assert not checksums.verify(folder / "checkpoints/1")


def test_a_bucket_that_cannot_be_read(bucket, monkeypatch):
    def refused(path, mode):
        raise PermissionError("401, no credentials")

    with mirror.kept(RUN) as folder:
        step_of(folder, 1)
    shutil.rmtree(folder)
    monkeypatch.setattr(bucket, "open", refused, raising=False)
    # A folder that is refused may look empty.
    for workdir in (RUN, "gs://mine/other", "foo://x/run"):
        for read in (lambda x: mirror.kept(x).__enter__(), checkpoints.find):
            if workdir == "gs://mine/other" and read is checkpoints.find:
                continue
            message = f"{workdir} cannot be read or written"
            with pytest.raises(CheckpointError, match=message) as error:
                read(workdir)
            assert "\n" not in str(error.value)


def test_where_every_step_of_the_bucket_is_damaged_nothing_is_replaced(bucket):
    there = bucket.folder / "mine/run"
    for step in (1, 2):
        step_of(there, step)
        (there / f"checkpoints/{step}/state/array").write_bytes(b"damaged")
    before = names(there)
    told = "no good checkpoint.*in step 1, state/array"
    with pytest.raises(CheckpointError, match=told), mirror.kept(RUN):
        pytest.fail("it begins anew")
    assert names(there) == before


def test_several_processes_need_a_folder(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="mount the bucket"), mirror.kept(RUN):
        pass


def test_a_run_goes_on_from_the_bucket_and_its_weights_are_read(
    bucket, tmp_path, monkeypatch
):
    """With Orbax's own steps: resumed by a run, opened by name."""
    values = {"params": {"w": np.arange(12.0).reshape(3, 4)}, "step": np.int32(0)}
    with mirror.kept(RUN) as folder:
        run = checkpoints.Checkpoints(folder, {"a": 1}, {"labels": ["x"]}, keep=1)
        for step in (1, 2):
            run.save(step, values | {"step": np.int32(step)}, force=True)
        run.close()
        (folder / loop.METRICS).write_text('{"step": 2}\n')
    another_machine(monkeypatch, tmp_path)
    with mirror.kept(RUN) as folder:
        run = checkpoints.Checkpoints(folder, {"a": 1}, {"labels": ["x"]}, keep=1)
        assert run.latest() == 2
        assert int(run.restore(2, values)["step"]) == 2
        run.close()
    for name in (RUN, f"{RUN}/checkpoints", f"{RUN}/checkpoints/2"):
        params, config, meta = checkpoints.load(name)
        np.testing.assert_array_equal(params["w"], values["params"]["w"])
        assert (config, meta["labels"]) == ({"a": 1}, ["x"])


def test_a_copy_of_another_run_or_of_a_deleted_step_is_not_kept(bucket):
    run = bucket.folder / "mine/run"
    step_of(run, 1)
    old = mirror.fetched(RUN)
    shutil.rmtree(run)  # begun anew, in the same place
    step_of(run, 1, content=b"other")
    assert (mirror.fetched(RUN) / "state/array").read_bytes() == b"other"
    shutil.rmtree(run / "checkpoints/1")
    step_of(run, 2)
    assert mirror.fetched(RUN).name == "2" and not old.exists()


def test_a_copy_that_was_damaged_is_fetched_again(bucket):
    step_of(bucket.folder / "mine/run", 1)
    here = mirror.fetched(RUN)
    (here / "state/array").write_bytes(b"damaged")
    assert not checksums.verify(mirror.fetched(RUN))
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        mirror.fetched(f"{RUN}/checkpoints/7")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        checkpoints.load("gs://mine/nothing")
