"""Checksums of a step: what makes it whole, on files made by hand."""

import pytest

from av_mae import checksums


@pytest.fixture
def step(tmp_path):
    """A step of two processes' files, without checksums yet."""
    folder = tmp_path / "checkpoints" / "7"
    for name in ("state/a", "state/ocdbt.process_1/b"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode() * 9)
    return folder


def test_a_step_is_whole_when_every_process_has_sealed_its_files(step):
    assert "before checksums-0.json was written" in checksums.verify(step)
    checksums.seal(step, 0, 2)
    assert checksums.missing(step) == "checksums-1.json"
    assert "before checksums-1.json was written" in checksums.verify(step)
    checksums.seal(step, 1, 2)
    assert checksums.missing(step) == checksums.verify(step) == ""


def test_what_is_not_as_it_was_written_is_named(step):
    for process in (0, 1):
        checksums.seal(step, process, 2)
    file = step / "state/ocdbt.process_1/b"
    good = file.read_bytes()
    for bad, text in (
        (b"x" + good[1:], "b is damaged (its SHA-256"),
        (good[:-1], f"b is damaged ({len(good) - 1} bytes instead of {len(good)})"),
    ):
        file.write_bytes(bad)
        assert text in checksums.verify(step)
    # Of two that look at every other file, one finds it.
    found = [checksums.verify(step, (i, 2)) for i in (0, 1)]
    assert sorted(map(bool, found)) == [False, True]
    file.unlink()
    assert checksums.verify(step) == "state/ocdbt.process_1/b is missing."
    file.write_bytes(good)
    seal = step / "checksums-1.json"
    seal.write_text(seal.read_text().replace('"process": 1', '"process": 2'))
    assert checksums.verify(step) == "checksums-1.json is damaged."


def test_a_step_under_another_number_is_another_step(step):
    for process in (0, 1):
        checksums.seal(step, process, 2)
    other = step.rename(step.with_name("8"))
    assert checksums.verify(other) == "checksums-0.json is damaged."


def test_steps_are_the_folders_with_numbers(step):
    folder = step.parent
    for name in ("12", "8.orbax-checkpoint-tmp", "x"):
        (folder / name).mkdir()
    assert checksums.steps(folder) == [7, 12]
    assert checksums.steps(folder / "absent") == []
    checksums.delete(step)
    assert checksums.steps(folder) == [12]
