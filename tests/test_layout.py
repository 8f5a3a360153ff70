"""The arrows between the rooms: who may import whom, and what stays light."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The commands: they alone know both `av_mae` and `data`.
ENTRY_POINTS = set(
    "main demo api clips predict reconstruct extract attend report serve knn retrieve "
    "sweep convert export benchmark stats datasets featureset robustness "
    "results".split()
)
LEAVES = "tokens masking metrics optim parallel spectrogram".split()
TRAINERS = ["pretrain", "finetune"]
MODELS = ["autoencoder", "classifier"]
ON_DEMAND = {"tensorflow", "tensorflow_datasets", "clu"}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "registry", "misc"}


def name_of(path: Path) -> str:
    """av_mae/importers/scenic.py is av_mae.importers.scenic; a package is its name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def imports_in(tree: ast.AST, modules: frozenset[str], inside: bool = True) -> set[str]:
    """Full names that `tree` imports; without `inside`, not those within functions."""
    found = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            for alias in node.names:
                # `from av_mae import tokens` imports a room, `UserError` does not.
                room = f"{node.module}.{alias.name}"
                found.add(room if room in modules else node.module)
        elif inside or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found |= imports_in(node, modules, inside)
    return found


@cache
def all_modules() -> frozenset[str]:
    return frozenset(name_of(p) for p in sources("av_mae", "data"))


@cache
def imports_of(path: Path, inside: bool = True) -> frozenset[str]:
    tree = ast.parse(path.read_text())
    return frozenset(imports_in(tree, all_modules(), inside))


def roots(names) -> set[str]:
    return {name.split(".")[0] for name in names}


def rooms() -> dict[str, Path]:
    """The files of av_mae by the name of their room, the package itself left out."""
    files = {name_of(p): p for p in sources("av_mae")}
    return {n.removeprefix("av_mae."): p for n, p in files.items() if n != "av_mae"}


def neighbours(room: str) -> set[str]:
    """The rooms of av_mae that a room imports."""
    names = imports_of(rooms()[room])
    return {n.removeprefix("av_mae.") for n in names if n.startswith("av_mae.")}


def test_the_reader_of_imports():
    tree = ast.parse(
        "import jax.numpy as jnp\nfrom av_mae import tokens, UserError\n"
        "if True:\n    import grain\nclass A:\n    def f():\n        import clu\n"
    )
    modules = frozenset({"av_mae", "av_mae.tokens"})
    top = {"jax.numpy", "av_mae.tokens", "av_mae", "grain"}
    assert imports_in(tree, modules, inside=False) == top
    assert imports_in(tree, modules) == top | {"clu"}


@pytest.mark.parametrize("path", sources("data"), ids=name_of)
def test_data_knows_neither_jax_nor_av_mae(path):
    banned = {"jax", "jaxlib", "flax", "optax", "orbax", "av_mae"}
    assert not roots(imports_of(path)) & banned


@pytest.mark.parametrize("room", sorted(rooms()))
def test_only_commands_know_data(room):
    media = {"data", "av", "grain", "array_record"}
    if room not in ENTRY_POINTS:
        assert not roots(imports_of(rooms()[room])) & media


@pytest.mark.parametrize("room", [r for r in LEAVES if r in rooms()])
def test_leaves_import_no_other_room(room):
    assert neighbours(room) == set()


def test_models_stand_on_fusion_and_fusion_on_transformer():
    above = {
        "transformer": {"fusion", *MODELS, *TRAINERS},
        "fusion": {*MODELS, *TRAINERS},
        "losses": {*MODELS, *TRAINERS},
        **{model: {*TRAINERS, "loop", "optim", "checkpoints"} for model in MODELS},
        **{room: set(TRAINERS) for room in ("loop", "checkpoints", "augment")},
    }
    for room in above.keys() & rooms().keys():
        assert not neighbours(room) & above[room], room


def test_rooms_import_in_no_circle():
    waiting = {room: neighbours(room) & rooms().keys() for room in rooms()}
    while ready := {room for room, needs in waiting.items() if not needs}:
        waiting = {r: needs - ready for r, needs in waiting.items() if r not in ready}
    assert waiting == {}


@pytest.mark.parametrize("path", sources("av_mae", "data", "configs"), ids=name_of)
def test_nobody_imports_main(path):
    assert not imports_of(path) & {"av_mae.main", "main"}


@pytest.mark.parametrize("path", sources("av_mae", "data"), ids=name_of)
def test_tensorflow_and_clu_are_imported_where_they_are_used(path):
    assert not roots(imports_of(path, inside=False)) & ON_DEMAND


@pytest.mark.parametrize("path", sources("configs"), ids=name_of)
def test_configs_import_only_ml_collections(path):
    assert imports_of(path) <= {"ml_collections"}


def python(code: str) -> str:
    """What a fresh interpreter prints; its error is the test's."""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_importing_av_mae_is_light():
    heavy = "{'jax', 'numpy', 'flax', 'orbax', 'tensorflow', 'av', 'grain', 'sklearn'}"
    assert python(f"import sys, av_mae; print({heavy} & set(sys.modules))") == "set()"


@pytest.mark.parametrize("trainer", TRAINERS)
def test_trainers_need_no_video_and_no_tensorflow(trainer):
    blocked = [
        "tensorflow",
        "tensorflow_datasets",
        "clu",
        "grain",
        "av",
        "array_record",
    ]
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        f"import av_mae.{trainer}; print(callable(av_mae.{trainer}.train))"
    )
    assert python(code) == "True"


def fields_of(node: ast.ClassDef) -> list[str]:
    return [x.target.id for x in node.body if isinstance(x, ast.AnnAssign)]


@pytest.mark.parametrize("room", sorted(rooms()))
def test_modules_and_options_have_few_fields(room):
    """More than ten of them are two concepts in one."""
    for node in ast.walk(ast.parse(rooms()[room].read_text())):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            options = node.name.endswith("Options")
            if options or bases & {"nn.Module", "classifier.Classifier"}:
                assert len(fields_of(node)) <= 10, node.name


def test_rooms_are_named_by_concept():
    names = {p.stem for p in sources("av_mae", "data")}
    folders = {p.parent.name for p in sources("av_mae", "data")}
    assert not (names | folders) & FORBIDDEN_NAMES


def test_every_source_has_a_test_and_every_stem_is_one_file():
    stems = [p.stem for p in sources("av_mae", "data") if p.stem != "__init__"]
    assert sorted(stems) == sorted(set(stems))
    names = {p.stem.removeprefix("test_") for p in sources("tests")}
    tests = names | {name.removeprefix("import_") for name in names}
    assert set(stems) - tests == set()


@pytest.mark.parametrize(
    "path",
    [ROOT / "main.py", *sources("av_mae", "data", "configs", "tests")],
    ids=name_of,
)
def test_every_file_says_what_it_is(path):
    assert ast.get_docstring(ast.parse(path.read_text()))
