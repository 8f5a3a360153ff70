"""What strangers give us is data: it is neither run, nor believed about its place."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for room in ("av_mae", "data") for p in (ROOT / room).rglob("*.py"))

# What runs what it reads. Names as they are called, whatever module they come from.
CALLS = {"eval", "exec", "compile", "__import__", "execfile"}
MEMBERS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads"),
    *("cloudpickle.load", "cloudpickle.loads", "marshal.load", "marshal.loads"),
    *("joblib.load", "torch.load", "shelve.open", "pandas.read_pickle"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("runpy.run_path", "runpy.run_module", "importlib.import_module"),
    *("tarfile.open", "shutil.unpack_archive"),
}
ATTRIBUTES = {
    *("extractall", "extract"),  # of archives, whose members may climb out
    *("exec_module", "load_model"),  # of importlib; of Keras, whose models are programs
}
# Where one is allowed, and why that is safe.
ALLOWED = {
    # The base of a reader whose every name leads to something of its own module.
    ("av_mae/importers/pickles.py", "pickle.Unpickler"),
    # What it has written itself, to compare it.
    ("av_mae/portable.py", "saved_model.load"),
    # One of two names that stand there.
    ("data/input_speed.py", "__import__"),
    # The shipped configs of digits.
    ("av_mae/demo.py", "exec_module"),
}


def faults(text: str) -> set[str]:
    """What a source calls or names that could run, or misplace, what it was given."""
    found, tree = set(), ast.parse(text)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    modules = {a.asname: a.name for node in imports for a in node.names if a.asname}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in CALLS:
                found.add(node.func.id)
            for keyword in node.keywords:
                value = keyword.value
                off = isinstance(value, ast.Constant) and value.value is False
                if keyword.arg == "shell" and not off:
                    found.add("shell=True")
                if keyword.arg == "allow_pickle" and not off:
                    found.add("allow_pickle=True")
            if isinstance(node.func, ast.Attribute) and node.func.attr in ATTRIBUTES:
                found.add(node.func.attr)
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            name = ".".join([modules.get(first, first), *rest])
            found |= {x for x in MEMBERS if name == x}
            if name.endswith("saved_model.load"):
                found.add("saved_model.load")
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" for a in node.names} & MEMBERS
    return found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("eval(x)", "eval"),
        ("import pickle\npickle.loads(x)", "pickle.loads"),
        ("from pickle import load", "pickle.load"),
        ("import pickle as p\np.loads(x)", "pickle.loads"),
        ("spec.loader.exec_module(module)", "exec_module"),
        ("keras.models.load_model(x)", "load_model"),
        ("np.load(x, allow_pickle=True)", "allow_pickle=True"),
        ("subprocess.run(x, shell=True)", "shell=True"),
        ("subprocess.run(x, shell=y)", "shell=True"),
        ("yaml.load(x)", "yaml.load"),
        ("archive.extractall(x)", "extractall"),
        ("tf.saved_model.load(x)", "saved_model.load"),
    ],
)
def test_the_rule_finds_it(text, fault):
    assert faults(text) == {fault}


def test_the_rule_lets_harmless_calls_through():
    text = "re.compile(x)\nmodel.eval()\nast.literal_eval(x)\nnp.load(x)\njson.load(x)"
    assert faults(text + "\nsubprocess.run(x, shell=False)\nyaml.safe_load(x)") == set()


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_runs_what_it_reads(path):
    name = path.relative_to(ROOT).as_posix()
    found = faults(path.read_text(encoding="utf-8"))
    assert {x for x in found if (name, x) not in ALLOWED} == set()


def test_what_is_allowed_is_there():
    for name, fault in ALLOWED:
        assert fault in faults((ROOT / name).read_text(encoding="utf-8"))


def test_the_licence_of_every_dependency_is_listed():
    page = (ROOT / "docs" / "licences.md").read_text(encoding="utf-8").lower()
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = [re.match(r"[\w-]+", x)[0] for x in lines if x and x[0] not in "# "]
    assert len(names) > 20
    for name in set(names) - {"tensorflow"}:  # where there is no tensorflow-cpu
        row = rf"^\| \*\*{name.replace('_', '-')}\*\* \| [\d.]+ \| \w"
        assert re.search(row, page, re.M), f"{name}: run `python docs/licences.py`"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for extra, lines in extras["project"]["optional-dependencies"].items():
        for line in lines:
            name = re.match(r"[\w-]+", line)[0]
            row = rf"^\| {extra} \| {name} \| \w"
            assert re.search(row, page, re.M), f"{line}: run `python docs/licences.py`"
