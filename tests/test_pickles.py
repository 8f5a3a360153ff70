"""PyTorch's files: what is in them comes back, and nothing in them is run."""

import io
import os
import pickle
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch_files
from torch_files import Call, Changed, Global, New, View, namespace, ordered

from av_mae import CheckpointError
from av_mae.importers import pickles

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "videomae"


def some(dtype="float32") -> np.ndarray:
    return np.arange(6).reshape(2, 3).astype(dtype)


@pytest.mark.parametrize("dtype", torch_files.STORAGES)
def test_values_of_every_type_come_back(tmp_path, dtype):
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    path = torch_files.write(tmp_path / "a.pth", {"x": some(kind)})
    x = pickles.read(path)["x"]
    assert x.shape == (2, 3) and x.dtype == kind
    np.testing.assert_array_equal(np.asarray(x), some(kind))


def test_views_of_a_storage_come_back(tmp_path):
    values = np.arange(24, dtype=np.float32)
    tree = {
        "transposed": values.reshape(4, 6).T,
        "part": View(values, 5, (2, 3), (6, 1)),
        "scalar": View(values, 7, (), ()),
        "empty": View(values[:0], 0, (0, 3), (3, 1)),
    }
    found = pickles.read(torch_files.write(tmp_path / "a.pth", tree))
    np.testing.assert_array_equal(found["transposed"], values.reshape(4, 6).T)
    np.testing.assert_array_equal(found["part"], [[5, 6, 7], [11, 12, 13]])
    assert np.asarray(found["scalar"]) == 7
    assert np.asarray(found["empty"]).shape == (0, 3)


def test_containers_come_back_and_other_objects_are_inert(tmp_path):
    numpy_scalar = Call(
        Global("numpy._core.multiarray", "scalar"),
        (Call(Global("numpy", "dtype"), ("f8", False, True)), "bytes"),
    )
    tree = {
        "model": ordered({"x": some()}),
        "list": [1, 2.5, None, True, "text", (1, 2)],
        "parameter": Call(Global("torch._utils", "_rebuild_parameter"), (some(), True)),
        "size": Call(Global("torch", "Size"), ((2, 3),)),
        "set": Call(Global("__builtin__", "set"), ([1, 2],)),
        "path": Call(Global("pathlib", "PosixPath"), ("/", "tmp")),
        "device": Call(Global("torch", "device"), ("cuda", 0)),
        "type": Global("torch", "float16"),
        "score": numpy_scalar,
        "args": namespace(epochs=5, out=Call(Global("pathlib", "Path"), ("a",))),
        "theirs": New(Global("somewhere.else", "Config"), {"a": 1}),
    }
    found = pickles.read(torch_files.write(tmp_path / "a.pth", tree))
    np.testing.assert_array_equal(found["model"]["x"], some())
    np.testing.assert_array_equal(found["parameter"], some())
    assert found["list"] == [1, 2.5, None, True, "text", (1, 2)]
    assert found["size"] == (2, 3) and found["set"] == [1, 2]
    assert found["args"].state["epochs"] == 5 and found["theirs"].state == {"a": 1}
    for name in ("path", "device", "score", "args", "theirs"):
        assert isinstance(found[name], pickles.Inert), name
    assert "argparse.Namespace" in repr(found["args"])


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
def test_weights_are_found_wherever_they_lie(tmp_path, key):
    tree = {"x": some(), "name": "text"}
    tree = {key: ordered(tree), "epoch": 3, "optimizer": {"y": some()}} if key else tree
    tensors, whole = pickles.weights(torch_files.write(tmp_path / "a.pth", tree))
    assert list(tensors) == ["x"] and whole.get("epoch") == (3 if key else None)


def test_a_file_without_weights_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="holds no parameters"):
        pickles.weights(torch_files.write(tmp_path / "a.pth", {"epoch": 3}))


def test_stored_files_are_read_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # to import it is an error now
    if not FIXTURES.is_dir():
        pytest.skip(f"{FIXTURES} is not here")
    paths = sorted(FIXTURES.glob("*/*.pth"))
    assert len(paths) >= 6
    for path in paths:
        tensors, _ = pickles.weights(path)
        assert all(np.isfinite(np.asarray(x)).all() for x in tensors.values()), path


# Files that mean harm.


class Touch:
    """Runs a command when unpickled by Python's own reader."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_real_attempt_to_run_code_is_refused(tmp_path):
    marker = tmp_path / "was-run"
    code = pickle.dumps({"model": {}, "x": Touch(f"touch {marker}")}, 2)
    pickle.load(io.BytesIO(code))  # it does work where it is let
    assert marker.exists()
    marker.unlink()
    path = torch_files.write_code(tmp_path / "bad.pth", code)
    with pytest.raises(CheckpointError, match=r"asks for \w+.system.*nothing in it"):
        pickles.read(path)
    assert not marker.exists()


NAMES = [
    ("os", "system"),
    ("posix", "system"),
    ("nt", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("__builtin__", "eval"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("subprocess", "Popen"),
    ("subprocess", "check_output"),
    ("runpy", "_run_code"),
    ("pickle", "loads"),
    ("importlib", "import_module"),
    ("functools", "partial"),
    ("operator", "methodcaller"),
    ("types", "CodeType"),
    ("webbrowser", "open"),
    ("torch.hub", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("numpy.testing._private.utils", "runstring"),
    ("collections", "OrderedDict.__init__.__globals__"),
]


@pytest.mark.parametrize("module, name", NAMES, ids=".".join)
def test_functions_are_neither_found_nor_called(tmp_path, module, name):
    marker = tmp_path / "was-run"
    code = f"open({str(marker)!r}, 'w')"
    call = Call(Global(module, name), (code,))
    made = New(Global(module, name), {}, (code,))
    for tree in ({"x": call}, {"x": made}, {"x": Global(module, name)}):
        path = torch_files.write(tmp_path / "bad.pth", tree)
        if module == "collections":  # a plain object of a module of data
            pickles.read(path)
        else:
            with pytest.raises(CheckpointError, match="nothing in it was run"):
                pickles.read(path)
        assert not marker.exists()


def test_stack_global_takes_the_same_door(tmp_path):
    code = pickle.dumps({"x": Touch("true")}, 4)
    assert b"\x93" in code
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        pickles.read(torch_files.write_code(tmp_path / "bad.pth", code))


FLOATS = np.arange(6, dtype=np.float32)
VIEWS = {
    "shape": View(FLOATS, 0, (7,), (1,)),
    "offset": View(FLOATS, 5, (2,), (1,)),
    "far offset": View(FLOATS, 10**12, (1,), (1,)),
    "negative offset": View(FLOATS, -1, (2,), (1,)),
    "stride": View(FLOATS, 0, (2,), (6,)),
    "huge stride": View(FLOATS, 0, (2,), (2**62,)),
    "negative stride": View(FLOATS, 5, (3,), (-1,)),
    "negative shape": View(FLOATS, 0, (-1,), (1,)),
    "a bomb": View(FLOATS, 0, (10**6, 10**6), (0, 0)),
    "lengths differ": View(FLOATS, 0, (2, 2), (1,)),
    "a float": View(FLOATS, 0, (2.0,), (1,)),
    "a text": View(FLOATS, 0, "22", "11"),
    "claimed": View(FLOATS, 0, (100,), (1,), claimed=100),
    "claimed negative": View(FLOATS, 0, (1,), (1,), claimed=-5),
    "changed later": Changed(View(FLOATS, 0, (6,), (1,)), {"shape": (10**6,)}),
    "changed slots": Changed(View(FLOATS, 0, (6,), (1,)), (None, {"offset": 99})),
    "no storage": Call(
        Global("torch._utils", "_rebuild_tensor_v2"),
        (Call(Global("torch", "Thing")), 0, (1,), (1,), False, {}),
    ),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_tensors_beyond_their_storage_are_refused(tmp_path, view):
    path = torch_files.write(tmp_path / "bad.pth", {"x": view})
    with pytest.raises(CheckpointError, match="is not read"):
        np.asarray(pickles.read(path)["x"])


def test_a_directory_that_promises_too_much_is_refused(tmp_path):
    view = View(FLOATS, 0, (1000,), (1,), claimed=1000)
    path = torch_files.write(tmp_path / "bad.pth", {"x": view})
    data = bytearray(path.read_bytes())
    entry = data.index(b"archive/data/0", data.index(b"PK\x01\x02")) - 46
    assert data[entry : entry + 4] == b"PK\x01\x02"
    data[entry + 24 : entry + 28] = (4000).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        np.asarray(pickles.read(path)["x"])


@pytest.mark.parametrize(
    "tree",
    [
        Changed(Global("torch._utils", "_rebuild_tensor_v2"), (None, {"x": 1})),
        Changed(Global("torch._utils", "_rebuild_tensor_v2"), {"_function": 1}),
        Changed(Global("collections", "OrderedDict"), {"__init__": 1}),
        Changed(Global("argparse", "Namespace"), {"__new__": 1}),
        Changed(Global("argparse", "Namespace"), (None, {"state": 1})),
    ],
)
def test_what_the_reader_is_made_of_cannot_be_changed(tmp_path, tree):
    with pytest.raises(CheckpointError, match="is not read"):
        pickles.read(torch_files.write(tmp_path / "bad.pth", {"x": tree}))
    good = torch_files.write(tmp_path / "good.pth", {"x": some(), "y": namespace(a=1)})
    assert pickles.read(good)["y"].state == {"a": 1}


def test_compressed_members_are_refused(tmp_path):
    path = torch_files.write(
        tmp_path / "bad.pth", {"x": some()}, compression=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(CheckpointError, match="compressed"):
        pickles.read(path)


def test_the_old_format_is_told(tmp_path):
    path = tmp_path / "old.pth"
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")
    with pytest.raises(CheckpointError, match="1.6 or later.*save it anew"):
        pickles.read(path)


def test_damaged_files_are_told(tmp_path):
    whole = torch_files.write(tmp_path / "a.pth", {"x": some()}).read_bytes()
    path = tmp_path / "cut.pth"
    for end in (10, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match="is not read"):
            pickles.read(path)
    flipped = bytearray(whole)
    flipped[whole.index(some().tobytes()) + 5] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(CheckpointError, match="damaged"):
        np.asarray(pickles.read(path)["x"])


def test_other_archives_are_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("a.txt", "text")
    with pytest.raises(CheckpointError, match="no single data.pkl"):
        pickles.read(tmp_path / "a.zip")
