"""The notebooks: well formed, without outputs, and executed from first cell to last.

Cells hold plain Python (no magics), so that they are run without Jupyter, each notebook
in a process of its own, as its kernel would.
"""

import ast
import importlib.util
import json
from pathlib import Path

import pytest
import toy

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NAMES = ["own_clips", "quickstart", "reconstruct"]
RUNNER = """
import json, sys
cells = json.load(open(sys.argv[1]))["cells"]
space = {"__name__": "__main__"}
for cell in cells:
    if cell["cell_type"] == "code":
        exec(compile("".join(cell["source"]), cell["id"], "exec"), space)
"""


def cells(name: str) -> list[dict]:
    return json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))["cells"]


def test_these_are_all():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_are_plain_python_without_outputs(name):
    whole = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))
    assert whole["nbformat"] == 4 and whole["nbformat_minor"] >= 5
    assert len({cell["id"] for cell in whole["cells"]}) == len(whole["cells"])
    assert whole["cells"][0]["cell_type"] == "markdown"
    for cell in whole["cells"]:
        if cell["cell_type"] == "code":
            ast.parse("".join(cell["source"]))
            assert cell["outputs"] == [] and cell["execution_count"] is None


def execute(name: str, work: Path, **environment) -> str:
    """What the notebook prints, at the size of a smoke run."""
    (work / "run.py").write_text(RUNNER)
    settings = dict(AV_MAE_SMOKE="1", AV_MAE_NOTEBOOKS=str(work), **environment)
    return toy.run(work / "run.py", FOLDER / f"{name}.ipynb", **settings)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("espeakng_loader") is None,
    reason="espeakng_loader (the extra `demo`) is not installed",
)
def test_quickstart_and_then_reconstruct(tmp_path):
    text = execute("quickstart", tmp_path)
    assert "step 4/4" in text and "both:" in text and "spectrogram: [(" in text
    text = execute("reconstruct", tmp_path)
    for words in ("50% masked", "75% masked", "90% masked", "written:"):
        assert words in text
    assert (tmp_path / "reconstruction-0.9.wav").stat().st_size > 1000


@pytest.mark.slow
def test_own_clips(tmp_path):
    toy.write_folder(tmp_path / "clips", 16, silent=(3,), broken=True)
    text = execute("own_clips", tmp_path, AV_MAE_FOLDER=str(tmp_path / "clips"))
    for words in ("Failed: bell/broken.mp4", "linear: bell/", "full: bell/"):
        assert words in text
