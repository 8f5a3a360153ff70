"""Collects how far each fixture family is met, and writes docs/parity.md from it.

`record` is called by the family's one comparison function. With the environment
variable AV_MAE_PARITY set to a folder, each case is one JSON line in it; otherwise
nothing is written.

    JAX_PLATFORMS=cpu python tests/parity.py            # the tests, then the page
    JAX_PLATFORMS=cpu python tests/parity.py --lines F  # the page of an earlier run

The page has what was recorded and nothing else: no list of cases is kept here.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "parity.md"
FIXTURES = TESTS.parents[1] / "shared" / "fixtures"
ERRORS = ("outputs", "loss", "gradients")


def record(family: str, case: str, **errors: float | None):
    """One case's worst errors: outputs absolute, loss relative, gradients by rule."""
    folder = os.environ.get("AV_MAE_PARITY")
    if not folder:
        return
    known = {name: float(value) for name, value in errors.items() if value is not None}
    line = json.dumps({"family": family, "case": case, **known})
    path = Path(folder) / f"{os.getpid()}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line + "\n")


class Family(NamedTuple):
    """What a family's numbers were made with, and what is compared."""

    folder: str  # of the fixtures; '' where a test makes the numbers itself
    text: str


# What families are. One that is not here is in the page nevertheless, by its name.
FAMILIES = {
    "Scenic pretraining": Family(
        "scenic/pretrain",
        "Scenic pretraining: every encoder, decoder, objective and loss",
    ),
    "Scenic targets": Family("scenic/pretrain", "Scenic targets of the loss"),
    "Scenic finetuning": Family("scenic/finetune", "Scenic finetuning (MBT)"),
    "Scenic metrics": Family("scenic/finetune", "mAP, AUC and d-prime"),
    "Scenic init_from": Family(
        "scenic/init_from_mae",
        "which parameter starts which; logits afterwards where they are stored",
    ),
    "Scenic single modality": Family(
        "scenic/single_modality_models", "Scenic pretraining of one modality"
    ),
    "Scenic models of one modality": Family(
        "scenic/single_modality_models", "Scenic finetuning of one modality"
    ),
    "Scenic training": Family(
        "scenic/train_steps",
        "pretraining updates: parameters after the last, loss at each",
    ),
    "Scenic training steps": Family(
        "scenic/train_steps",
        "three finetuning updates: parameters after them, gradient norms",
    ),
    "scenic/checkpoint": Family(
        "scenic/checkpoint", "a checkpoint file read: the same arrays"
    ),
    "scenic data: batches": Family(
        "scenic/data", "DMVR records: frames in [-1, 1] (resized: within a grey level)"
    ),
    "scenic data: frame tables": Family(
        "scenic/data", "which frames and rows (Scenic)"
    ),
    "Mixup and cutmix": Family(
        "scenic/finetune, videomae/mcg_recipe", "mixup and cutmix, draws fed"
    ),
    "Scenic schedules": Family(
        "scenic/optim", "learning rates, relative to the highest (Scenic)"
    ),
    "Scenic optimisers": Family(
        "scenic/optim", "parameters after three steps of each optimiser"
    ),
    "Schedules and layers": Family(
        "videomae/mcg_recipe",
        "learning rates, relative to the highest; layer and decay of each parameter",
    ),
    "hf_videomae_pretrain": Family(
        "videomae/hf_videomae_pretrain_tiny", "VideoMAE, Hugging Face: pretraining"
    ),
    "hf_videomae_classification": Family(
        "videomae/hf_videomae_classification_tiny",
        "VideoMAE, Hugging Face: classification",
    ),
    "hf_videomae_processor": Family(
        "videomae/hf_videomae_processor",
        "VideoMAE, Hugging Face: the picture processor",
    ),
    "mcg_videomae_pretrain": Family(
        "videomae/mcg_videomae_pretrain_tiny", "VideoMAE, MCG-NJU: pretraining"
    ),
    "mcg_videomae_finetune": Family(
        "videomae/mcg_videomae_finetune_tiny", "VideoMAE, MCG-NJU: classification"
    ),
    "mcg_videomae_transfer": Family(
        "videomae/mcg_videomae_transfer_tiny",
        "VideoMAE, MCG-NJU: a classifier from pretrained weights",
    ),
    "keras_videomae_pretrain": Family(
        "videomae/keras_videomae_pretrain_tiny", "VideoMAE, Keras: pretraining"
    ),
    "keras_videomae_finetune": Family(
        "videomae/keras_videomae_finetune_tiny", "VideoMAE, Keras: classification"
    ),
    "videomae recipe: frame tables": Family(
        "videomae/mcg_recipe", "which frames (MCG-NJU)"
    ),
    "videomae recipe: multiscale crop": Family(
        "videomae/mcg_recipe", "crop boxes: of several scales"
    ),
    "videomae recipe: resized crop": Family(
        "videomae/mcg_recipe", "crop boxes: of random size"
    ),
    "videomae recipe: random erasing": Family(
        "videomae/mcg_recipe", "random erasing: the box, draws fed"
    ),
    "videomae recipe: three crops": Family(
        "videomae/mcg_recipe", "crop boxes: three at test"
    ),
    "videomae recipe: tube masks": Family(
        "videomae/mcg_recipe", "tube masks: how many tokens are masked"
    ),
    "videomae recipe: positions": Family(
        "videomae/mcg_recipe", "the table of positions"
    ),
    "avmaskenhancer": Family(
        "videomae/avmaskenhancer_tiny", "AV-MaskEnhancer (bound 1e-4)"
    ),
    "Colour": Family("", "saturation, contrast and hue: TensorFlow's own operations"),
    "export to transformers": Family(
        "", "our models, exported, in Hugging Face's own classes"
    ),
}


class Row(NamedTuple):
    """One line of the table."""

    folder: str
    text: str
    cases: int
    worst: dict[str, float]


def read(folder: Path) -> list[dict]:
    """The recorded lines, one for each case: the worst of those that ran twice."""
    cases: dict[tuple[str, str], dict] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            known = cases.setdefault((line["family"], line["case"]), line)
            for name in ERRORS:
                if name in line:
                    known[name] = max(known.get(name, 0.0), line[name])
    return list(cases.values())


def rows(lines: Iterable[dict]) -> list[Row]:
    """The table: a row for each family, in the order of the fixtures' folders."""
    families: dict[str, list[dict]] = {}
    for line in lines:
        families.setdefault(line["family"], []).append(line)
    found = []
    for name, cases in families.items():
        known = FAMILIES.get(name, Family("", name))
        worst = {
            kind: max(case[kind] for case in cases if kind in case)
            for kind in ERRORS
            if any(kind in case for case in cases)
        }
        found.append(Row(known.folder, known.text, len(cases), worst))
    last = lambda row: (not row.folder, row.folder, row.text)
    return sorted(found, key=last)


def without(found: list[Row]) -> list[str]:
    """Folders of the fixtures from which no case was recorded."""
    seen = {folder for row in found for folder in row.folder.split(", ")}
    folders = sorted(
        path.relative_to(FIXTURES).as_posix()
        for path in FIXTURES.glob("*/*")
        if path.is_dir()
    )
    # Variants of a model are beside it: hf_videomae_pretrain_tiny_newkeys.
    return [f for f in folders if not any(s and f.startswith(s) for s in seen)]


def number(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if value == 0 else f"{value:.1e}"


def table(found: list[Row]) -> str:
    lines = [
        "| fixtures | what | cases | outputs | loss | gradients |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in found:
        folder = ", ".join(f"`{x}`" for x in row.folder.split(", ") if x)
        errors = " | ".join(number(row.worst.get(kind)) for kind in ERRORS)
        lines.append(f"| {folder} | {row.text} | {row.cases} | {errors} |")
    return "\n".join(lines)


TEXT = """\
# Parity with the published systems

Written by `make parity`, which runs the tests that compare our numbers with those of
the published programs; do not edit it by hand.

The stored numbers were made by running the original programs: Scenic's AV-MAE
(google-research/scenic), VideoMAE in three editions (Hugging Face transformers,
MCG-NJU/VideoMAE, innat/VideoMAE) and AV-MaskEnhancer. They are of tiny models with
random weights, in float32 on a CPU. Every case that is present runs; each number below
is the worst of its cases.

{table}

{cases} cases. An empty cell: nothing of the kind is stored, or it is checked for
equality alone. {without}

- **outputs**: the largest difference of an output. Bound: 1e-5; 1e-4 where the table
  says so; for pretrained and finetuned parameters, 1e-5 after three updates and 1e-3
  after 200.
- **loss**: the largest relative difference of a loss. Bound: 1e-5 in single steps, 1 %
  at every one of the 200 updates.
- **gradients**: the largest ‖g − g_ref‖ / max(‖g_ref‖, 1e-4 · ‖all gradients of the
  case‖) of a parameter. Bound: 1e-4. (The true gradient of a key's bias is zero, and
  what is stored is rounding: hence the second term.) Of training steps: the relative
  difference of the gradient's norm.

## Training dynamics

![Loss over 200 updates, theirs and ours, and their difference](parity_curve.png)

The loss of 200 updates of Scenic's own trainer, and ours from the same parameters, on
the same clips in the same order with the same masks.

## How this was measured

{machine}. All models in float32 with `jax_default_matmul_precision='highest'`: on a CPU
this changes nothing, on a GPU or TPU products in TF32 or bfloat16 would miss 1e-5.

**GPU**: not measured; no figure of this page is of one. `JAX_PLATFORMS=cuda python
tests/parity.py` runs the tests there, with the bounds above, which sums in another
order may miss. Bounds ten times as wide (1e-4 for outputs and losses, 1e-3 for
gradients) are what we expect to hold; nobody has checked that yet.

What the page does not say: published *scores* were not reproduced. Logits given
log-mels are; the log-mel front end of AV-MAE is published only inside its SavedModels,
and has not been compared yet (`python -m av_mae.convert --frontend SAVEDMODEL_DIR
--trust`).

## How to make it again

    make parity                        # the tests, this page, and the picture
    python tests/parity.py             # the tests and this page
    python tests/parity.py --lines F   # this page, from a run with AV_MAE_PARITY=F

Models that we export are opened by Hugging Face's classes only where torch and
transformers are installed (`pip install -e ".[import]"`); elsewhere that line is under
"not run". (Where triton, which torch brings along, crashes beside TensorFlow, uninstall
it.) The stored numbers are expected in `../shared/fixtures` beside the clone;
without them the tests are skipped and the page is not written.
"""


def machine() -> str:
    """Where and with what the numbers were made."""
    versions = ", ".join(f"{x} {metadata.version(x)}" for x in ("jax", "flax", "numpy"))
    return f"{platform.machine()} CPU, Python {platform.python_version()}, {versions}"


def page(lines: list[dict]) -> str:
    """The text of docs/parity.md."""
    found = rows(lines)
    gaps = [f"`{folder}`" for folder in without(found)]
    ran = {line["family"] for line in lines}
    gaps += [family.text for name, family in FAMILIES.items() if name not in ran]
    text = f"Not run: {'; '.join(gaps)}." if gaps else ""
    filled = TEXT.format(
        table=table(found), cases=len(lines), without=text, machine=machine()
    )
    return "\n".join(map(wrapped, filled.split("\n\n")))


def wrapped(paragraph: str) -> str:
    """Plain text at 88 columns; tables, lists and code as they are."""
    if re.match(r"[|#\-! ]", paragraph):
        return paragraph.rstrip("\n") + "\n"
    return textwrap.fill(" ".join(paragraph.split()), 88, break_on_hyphens=False) + "\n"


def files() -> list[Path]:
    """The test files that record something, themselves or by a module beside them."""
    modules = {
        path.stem: path
        for path in sorted(TESTS.glob("*.py"))
        if path != Path(__file__).resolve() and "parity.record(" in path.read_text()
    }
    helpers = [name for name in modules if not name.startswith("test_")]
    uses = lambda text: any(f"import {name}\n" in text for name in helpers)
    return [
        path
        for path in sorted(TESTS.glob("test_*.py"))
        if path.stem in modules or uses(path.read_text())
    ]


def run(folder: Path) -> int:
    """Runs these files whole, slow tests too; pytest's exit status."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not stress"]
    environment = os.environ | {"AV_MAE_PARITY": str(folder)}
    return subprocess.run([*command, *map(str, files())], env=environment).returncode


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=Path, help="a folder of recorded cases")
    parser.add_argument("--page", type=Path, default=PAGE, help="where to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.lines or Path(made)
        if not options.lines and (status := run(folder)):
            sys.exit(f"a test failed (pytest ended with {status}): no page is written")
        lines = read(folder)
    if not lines:
        sys.exit(f"nothing was recorded: are there fixtures at {FIXTURES}?")
    options.page.write_text(page(lines), encoding="utf-8")
    print(f"{options.page}: {len(lines)} cases")


if __name__ == "__main__":
    main()
