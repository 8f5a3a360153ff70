"""Mutated copies of real clips: each ends as frames or as an error, soon and small."""

import os
import re
import time
from pathlib import Path

import pytest

from data import MediaError, media, workers
from tests import hostile, reliability

CLIPS = Path(__file__).resolve().parents[2] / "shared" / "clips"
COUNT = 2000 if os.environ.get("AV_MAE_STRESS") == "full" else 200
SECONDS, MEGABYTES = 20.0, 600
BATCH = 50  # files at a time on the disk


def read(path, beat):
    """How the reading of a file ended, how long it took, and the process' peak in MiB.

    The peak that the kernel keeps is set back first.
    """
    Path("/proc/self/clear_refs").write_text("5")
    began, count = time.process_time(), 0
    try:
        clip = media.read(path, short_side=64, stream=True)
        for _ in clip.frames or ():
            count += 1
        how = "frames"
    except MediaError:
        how = "MediaError"
    seconds = time.process_time() - began
    status = Path("/proc/self/status").read_text()
    peak = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) // 1024
    return [f"{how} {count} {seconds:.3f} {peak}".encode()]


def end_of_all(folder, seeds):
    """(seed, outcome) of every mutated copy, read in two worker processes."""
    files = sorted(p for p in CLIPS.iterdir() if p.suffix != ".md" and p.stat().st_size)
    for first in range(0, len(seeds), BATCH):
        batch, paths = seeds[first : first + BATCH], []
        for seed in batch:
            suffix, data = hostile.mutate(files, seed)
            paths.append(folder / f"{seed}{suffix}")
            paths[-1].write_bytes(data)
        yield from zip(batch, workers.run(paths, 2, read), strict=True)
        for path in paths:
            path.unlink()


def test_the_mutator_repeats_itself():
    files = [Path(__file__), Path(hostile.__file__)]
    once = [hostile.mutate(files, seed) for seed in range(40)]
    assert once == [hostile.mutate(files, seed) for seed in range(40)]
    whole = {path.read_bytes() for path in files}
    assert len(set(once)) > 35 and sum(data in whole for _, data in once) < 5


@pytest.mark.slow
@pytest.mark.stress
@pytest.mark.skipif(not CLIPS.is_dir(), reason=f"the clips are not at {CLIPS}")
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="Linux tells peaks of memory"
)
def test_each_ends_as_frames_or_as_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "STALL", 60 * SECONDS)  # the machine may be busy
    ends, wrong = [], []
    for seed, outcome in end_of_all(tmp_path, range(COUNT)):
        if outcome.payload is None:  # a C library died; the next file was read anyway
            ends.append("died")
            if not outcome.reason.startswith("its worker process died (SIG"):
                wrong.append((seed, outcome.reason))
            continue
        how, _, seconds, peak = outcome.payload.decode().split()
        ends.append(how)
        if float(seconds) > SECONDS or int(peak) > MEGABYTES:
            wrong.append((seed, outcome.payload.decode()))
    print({how: ends.count(how) for how in sorted(set(ends))})
    assert not wrong and len(ends) == COUNT
    assert ends.count("frames") > COUNT / 4 and ends.count("MediaError") > COUNT / 20
    outcome = f"read for what is good ({ends.count('frames')}), else one sentence "
    outcome += f"({ends.count('died')} of them that the file ended its own reading "
    outcome += (
        f"process, which is begun anew); at most {SECONDS:g} s and {MEGABYTES} MB each"
    )
    reliability.record("damaged media file", COUNT, outcome, seed=0)
