"""Checkpoints of every released version are read by this one, and gone on from.

    python tests/test_releases.py       stores the one of the version in pyproject.toml

tests/releases/<version>.zip is the workdir of a tiny pretraining of six updates, with
`expected.json`: what that version computed, and SHA-256 of the parameters.
"""

import hashlib
import json
import shutil
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import synthetic  # noqa: E402
import training_run  # noqa: E402

from av_mae import checkpoints, pretrain  # noqa: E402

FOLDER = Path(__file__).parent / "releases"
CHANGES = {
    "model__variant": "Ti/4x2",
    "model__width": 4,
    "model__mlp": 4,
    "model__heads": 1,
    "model__decoder__width": 4,
    "model__decoder__mlp": 4,
    "model__decoder__heads": 1,
    "data__size": 8,
    "data__num_frames": 2,
    "log__pictures": 0,
    "log__every_steps": 1,
    "checkpoint__keep": 1,
    "ema": 0.9,
}
STEPS, MORE = 6, 8


def config(steps: int):
    return synthetic.tiny("digits/pretrain", **CHANGES, steps=steps)


def digests(workdir) -> dict[str, str]:
    """SHA-256 of every array of the parameters and their average, by name."""
    found = {}
    for part in ("params", "ema"):
        values = checkpoints._names(checkpoints.load(workdir, part)[0])
        for name, value in values.items():
            found[f"{part}/{name}"] = hashlib.sha256(value.tobytes()).hexdigest()
    return found


def train(workdir, steps: int):
    training_run.run("digits/pretrain", workdir, CHANGES | {"steps": steps})


def evaluate(workdir) -> dict[str, float]:
    settings = config(STEPS)
    data = synthetic.Dataset(settings, num_clips=6, first=100)
    return pretrain.evaluate(settings, {"eval": data}, workdir)


def losses(workdir) -> dict[int, float]:
    return {x["step"]: x["loss"] for x in synthetic.lines(workdir) if "loss" in x}


def version() -> str:
    text = (synthetic.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["version"]


def store():
    """Trains the tiny model and stores it under the name of this version."""
    with tempfile.TemporaryDirectory() as folder, synthetic.quick():
        workdir = Path(folder) / "run"
        train(workdir, STEPS)
        expected = {"digests": digests(workdir), "evaluation": evaluate(workdir)}
        further = Path(shutil.copytree(workdir, Path(folder) / "further"))
        train(further, MORE)
        expected["losses"] = losses(further)
        (workdir / "expected.json").write_text(json.dumps(expected, indent=1))
        path = FOLDER / f"{version()}.zip"
        path.parent.mkdir(exist_ok=True)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
            for file in sorted(workdir.rglob("*")):
                if file.is_file() and file.name not in (".lock",):
                    archive.write(file, file.relative_to(workdir))
    print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    store()
    sys.exit()


@pytest.fixture(autouse=True, scope="module")
def quick():
    with synthetic.quick():
        yield


def test_the_current_version_is_stored():
    assert (FOLDER / f"{version()}.zip").is_file(), "run python tests/test_releases.py"


@pytest.mark.parametrize("release", sorted(path.stem for path in FOLDER.glob("*.zip")))
def test_a_released_checkpoint_is_read_and_gone_on_from(release, tmp_path):
    """The same arrays, the same evaluation, the same further updates."""
    with zipfile.ZipFile(FOLDER / f"{release}.zip") as archive:
        archive.extractall(tmp_path)
    expected = json.loads((tmp_path / "expected.json").read_text())
    assert digests(tmp_path) == expected["digests"]
    found = evaluate(tmp_path)
    assert found.keys() == expected["evaluation"].keys()
    for name, value in expected["evaluation"].items():
        assert found[name] == pytest.approx(value, rel=1e-3), name
    train(tmp_path, MORE)
    wanted = {int(step): loss for step, loss in expected["losses"].items()}
    assert losses(tmp_path) == pytest.approx(wanted, rel=1e-3)
    assert sorted(wanted) == list(range(1, MORE + 1))
    assert np.isfinite(list(wanted.values())).all()
