"""Writes docs/reliability.md from docs/reliability.json, which `make stress` measures.

    python docs/reliability.py

No number of the page is typed in: the tests themselves note how often they tried a
fault, and only when they have passed (tests/reliability.py).
"""

import argparse
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What `make stress` tries, and at least how often. A fault that has not run so often is
# told to be open; several kinds of one fault begin with the same words.
FAULTS = {
    "SIGKILL of a training: pretrain": 50,
    "SIGKILL of a training: finetune": 50,
    "checkpoint step: a bit flipped": 50,
    "checkpoint step: truncated": 50,
    "checkpoint step: half-written": 40,
    "checkpoint step: a file lost": 10,
    "full disk during training": 4,
    "random valid config: pretrain": 250,
    "random valid config: finetune": 250,
    "random broken config": 500,
    "damaged media file": 2000,
    "steps of one long run": 20_000,
    "the same smoke run twice": 42,
    "gone on with": 6,
}

TEXT = """# Reliability

Written by `python docs/reliability.py` from what `make stress` measured.

| fault | times tried | seed | outcome | test |
|---|---:|---:|---|---|
{rows}

{open}

Again: `make stress` (hours; it measures anew and writes this page), or one of them, as
in

    AV_MAE_STRESS=full JAX_PLATFORMS=cpu python -m pytest -m stress \\
        tests/test_kills.py

A few of each run in `make test`, more in `make test-slow`. A test of a fault passes
only if every one of its tries has the outcome named. Where the seed is "fixed", the
cases are always the same, listed or drawn without a seed of their own.

How a try is made:

- **SIGKILL.** A run on real records, of each trainer, is killed, started again, killed,
  to its end; the moment is drawn within a phase (start, step, reading, saving,
  evaluating), and the table tells which were going on when it fell. It is compared with
  a run that was never killed: every array of the state bit for bit, the clips of every
  step, `metrics.jsonl` in every field but times, TensorBoard's last value of every
  number and step.
- **Checkpoint steps.** Every file of the newest step in turn, then files by chance.
  Where no step is good, a run ends with a sentence and changes nothing.
- **Long run.** After a fifth of the steps the quarters are compared: at most 2 % more
  memory, as many files and threads, at most 25 % more processor time a step.
- **Full disk.** A small file system of its own, filled after the first checkpoint until
  as many bytes are left as a number, a part of a checkpoint or nothing takes.
- **Shapes.** A checkpoint is gone on from with `compute.scan`, another float type, 8
  simulated devices, `parallel.fsdp`, another batch of the evaluation
  (`tests/test_shapes.py`), by one process where two stood (`tests/test_run.py`), with
  worker processes (`tests/test_pipeline.py`), and from the stored checkpoint of every
  release (`tests/test_releases.py`). Another `batch_size` is another experiment, since
  the order of the clips depends on it: it is refused by name of the field.
- **Files of strangers.** `tests/test_safety.py` holds the code to a rule: nothing that
  runs what it reads. `tests/test_pickles.py` attempts to run code from weights, and
  `tests/test_page.py` from names in a report.
"""


def matching(rows: dict, fault: str) -> dict:
    return {name: row for name, row in rows.items() if name.startswith(fault)}


def page(rows: dict) -> str:
    """The text of docs/reliability.md."""
    lines = []
    for name, row in sorted(rows.items()):
        seed = "fixed" if row["seed"] is None else row["seed"]
        test = row["test"].split("[")[0].replace("::", " ")
        lines.append(
            f"| {name} | {row['times']:,} | {seed} | {row['outcome']} | {test} |"
        )
    missing = []
    for fault, least in FAULTS.items():
        found = sum(row["times"] for row in matching(rows, fault).values())
        if found < least:
            missing.append(f"{fault} ({found:,} of {least:,})")
    text = "Every count is the full one."
    if missing:
        text = f"Not yet tried as often as `make stress` does: {'; '.join(missing)}."
    return TEXT.format(rows="\n".join(lines), open=text)


def read() -> dict:
    return json.loads((ROOT / "docs" / "reliability.json").read_text(encoding="utf-8"))


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    path = ROOT / "docs" / "reliability.md"
    path.write_text(page(read()), encoding="utf-8")
    print(f"docs/reliability.md: {len(read())} faults")


if __name__ == "__main__":
    main()
