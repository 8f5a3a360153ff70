"""Writes .pth files as torch does, and as somebody with bad intentions might.

A file is what `torch.save` makes: a zip archive of a pickle and of the tensors' bytes.
"""

import dataclasses
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclasses.dataclass
class Global:
    """A name of a module, which the reader has to look up."""

    module: str
    name: str


@dataclasses.dataclass
class Call:
    """The result of calling a function when the file is read."""

    function: Global
    args: tuple = ()


@dataclasses.dataclass
class New:
    """An object of a class, made without calling it, and given this state."""

    cls: Global
    state: Any
    args: tuple = ()


@dataclasses.dataclass
class Changed:
    """Anything, given a state when the file is read."""

    value: Any
    state: Any


@dataclasses.dataclass
class View:
    """A tensor that claims these numbers of a storage with these values."""

    values: np.ndarray
    offset: Any
    shape: Any
    strides: Any
    claimed: Any = None  # the size of the storage; None: as it is


def namespace(**attributes) -> New:
    """An argparse.Namespace."""
    return New(Global("argparse", "Namespace"), attributes)


def ordered(tree: dict) -> Changed:
    """An OrderedDict with the attribute that torch gives to a state dict."""
    made = Call(Global("collections", "OrderedDict"))
    return Changed(Filled(made, tree), {"_metadata": {"": {"version": 1}}})


@dataclasses.dataclass
class Filled:
    """A mapping made by a call, with items."""

    value: Any
    items: dict


class Writer:
    """Opcodes of a tree, and the storages that it refers to."""

    def __init__(self):
        self.storages: list[np.ndarray] = []

    def code(self, value) -> bytes:
        match value:
            case dict():
                return b"}(" + self.items(value) + b"u"
            case list():
                return b"(" + b"".join(map(self.code, value)) + b"l"
            case tuple():
                return b"(" + b"".join(map(self.code, value)) + b"t"
            case np.ndarray():
                turned = value.ndim > 1 and value.T.flags.c_contiguous
                base = value.T if turned else np.ascontiguousarray(value)
                value = base.T if turned else base
                strides = tuple(s // value.itemsize for s in value.strides)
                return self.code(View(base, 0, value.shape, strides))
            case View():
                return self.view(value)
            case Global():
                return f"c{value.module}\n{value.name}\n".encode()
            case Call():
                return self.code(value.function) + self.code(value.args) + b"R"
            case New():
                made = self.code(value.cls) + self.code(value.args) + b"\x81"
                return made + self.code(value.state) + b"b"
            case Changed():
                return self.code(value.value) + self.code(value.state) + b"b"
            case Filled():
                return self.code(value.value) + b"(" + self.items(value.items) + b"u"
        return pickle.dumps(value, 2)[2:-1]

    def items(self, tree: dict) -> bytes:
        return b"".join(self.code(x) for pair in tree.items() for x in pair)

    def view(self, view: View) -> bytes:
        kind = Global("torch", STORAGES[view.values.dtype.name])
        size = view.values.size if view.claimed is None else view.claimed
        key = str(len(self.storages))
        self.storages.append(view.values)
        storage = self.code(("storage", kind, key, "cpu", size)) + b"Q"
        rebuild = self.code(Global("torch._utils", "_rebuild_tensor_v2"))
        rest = (view.offset, view.shape, view.strides, False, {})
        rest = b"".join(map(self.code, rest))
        return rebuild + b"(" + storage + rest + b"tR"


def write(path: Path, tree, compression: int = zipfile.ZIP_STORED) -> Path:
    """Writes a tree of dicts, arrays and the objects above as torch.save would."""
    writer = Writer()
    code = b"\x80\x02" + writer.code(tree) + b"."
    return write_code(path, code, writer.storages, compression)


def write_code(
    path: Path, code: bytes, storages=(), compression: int = zipfile.ZIP_STORED
) -> Path:
    """A .pth file around a pickle that is given as bytes."""
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", code)
        file.writestr("archive/byteorder", "little")
        for i, values in enumerate(storages):
            file.writestr(f"archive/data/{i}", np.ascontiguousarray(values).tobytes())
        file.writestr("archive/version", "3\n")
    return path
