"""A long run takes as much memory, files, threads and time at its end as before.

Also a program, so that nothing else is measured:

    python tests/test_long_runs.py WORKDIR STEPS EVERY     (log every, save every)
"""

import functools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import reliability  # noqa: E402
import synthetic  # noqa: E402


def measure() -> dict[str, float]:
    """Of this process: bytes of memory, open files, threads, seconds of processor."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "memory": pages * os.sysconf("SC_PAGE_SIZE"),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "seconds": time.process_time(),
    }


def train(workdir: Path, steps: int, every: int):
    """A tiny run on sound alone, measured whenever it logs; prints the measurements."""
    from av_mae import pretrain
    from av_mae import run as runs

    config = synthetic.tiny(
        "digits/pretrain",
        modalities=["spectrogram"],
        model__fusion="separate",
        log__pictures=0,
        log__every_steps=every,
        checkpoint__every_steps=every,
        steps=steps,
        ema=0.9,
    )
    config.eval.every_epochs = every / 4  # an epoch is four steps
    data = {name: synthetic.Dataset(config) for name in ("train", "eval")}
    for dataset in data.values():
        dataset.clip = functools.cache(dataset.clip)
    rows, log = [], runs.Run.log

    def logged(self, clock, total):
        log(self, clock, total)
        rows.append(measure())

    runs.Run.log = logged
    pretrain.train(config, data, workdir)
    print(json.dumps(rows))


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    sys.exit()

import pytest  # noqa: E402
import test_kills  # noqa: E402

FULL = os.environ.get("AV_MAE_STRESS") == "full"
STEPS, EVERY = (20_000, 250) if FULL else (3_000, 50)


@pytest.mark.slow
@pytest.mark.stress
def test_nothing_grows(tmp_path):
    """After a fifth, in which caches and pools fill, the quarters are compared."""
    workdir = tmp_path / "run"
    command = [sys.executable, __file__, workdir, STEPS, EVERY]
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=3000
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert len(rows) == STEPS // EVERY
    columns = {name: np.asarray([row[name] for row in rows]) for name in rows[0]}
    columns["seconds"] = np.diff(columns["seconds"]) / EVERY
    early, late = {}, {}
    for name, values in columns.items():
        values = values[len(values) // 5 :]
        quarter = len(values) // 4
        early[name] = float(np.median(values[:quarter]))
        late[name] = float(np.median(values[-quarter:]))
    growth = {name: late[name] / early[name] - 1 for name in early}
    # In the small run pools are still filling, and other tests share the processor.
    memory, seconds = (0.02, 0.25) if FULL else (0.1, 1.0)
    assert growth["memory"] <= memory, (early, late)
    # A checkpoint may be on its way in more of the measurements.
    assert late["files"] <= early["files"] + 2
    assert late["threads"] <= early["threads"] + 2
    assert growth["seconds"] <= seconds, (early, late)

    kept = sorted(int(p.name) for p in (workdir / "checkpoints").glob("[0-9]*"))
    assert kept == [STEPS - EVERY, STEPS]
    test_kills.board({"workdir": workdir, "out": tmp_path / "board.json"})
    test_kills.assert_shown(json.loads((tmp_path / "board.json").read_text()), workdir)
    assert len((workdir / "metrics.jsonl").read_text().splitlines()) == (
        2 * STEPS // EVERY
    )
    outcome = f"memory {growth['memory']:+.1%}, processor time of a step "
    outcome += f"{growth['seconds']:+.1%}, open files {late['files']:.0f}, threads "
    outcome += f"{late['threads']:.0f}, as before; two checkpoints; TensorBoard agrees"
    reliability.record("steps of one long run", STEPS, outcome)
