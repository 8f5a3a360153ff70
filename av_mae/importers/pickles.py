"""PyTorch's .pth and .bin files, read without torch and without running what they hold.

Such a file is a zip archive: `<name>/data.pkl`, a pickle of the whole tree, and
`<name>/data/<key>`, the bytes of each tensor's storage. A pickle is a program: it may
name any function of any module and call it. The one here can reach only what is in this
file: tensors that are read later, containers, and `Inert` objects in place of anything
else. Names of functions are refused, so that a file that tries to run code is told of,
and so are tensors that reach beyond their storage.
"""

import dataclasses
import math
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from av_mae import CheckpointError

MAGIC = b"PK\x03\x04"

# torch.<name>Storage by the type of its values; the archive is little-endian.
_STORAGES = {
    "Double": "<f8",
    "Float": "<f4",
    "Half": "<f2",
    "BFloat16": ml_dtypes.bfloat16,
    "Long": "<i8",
    "Int": "<i4",
    "Short": "<i2",
    "Char": "i1",
    "Byte": "u1",
    "Bool": "?",
}


class _Final:
    """Keeps a pickle from changing an object that was made and checked here."""

    def __setstate__(self, state):
        raise pickle.UnpicklingError("it changes a tensor that it has described")


@dataclasses.dataclass(frozen=True)
class Tensor(_Final):
    """A tensor of the file; its bytes are read when it becomes an array."""

    archive: "_Archive"
    key: str
    dtype: np.dtype
    offset: int  # in values, as the strides
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        values = np.frombuffer(self.archive.read(f"data/{self.key}"), self.dtype)
        if math.prod(self.shape) > len(values):  # however little a bomb takes on disk
            raise CheckpointError(
                f"{self.archive.path}: a tensor {self.shape} is not read, because the "
                f"file has only {len(values)} values for it."
            )
        strides = [stride * self.dtype.itemsize for stride in self.strides]
        view = np.lib.stride_tricks.as_strided(
            values[self.offset :], self.shape, strides, writeable=False
        )
        return np.array(view, dtype, order="C")


class Inert:
    """What stands for an object of a class that is not admitted; it does nothing.

    `name` is the class's, `state` what the object was given: attributes by name where
    these were stored as a dict.
    """

    name = "?"

    def __new__(cls, *args, **kwargs):
        made = super().__new__(cls)
        made.state = {}
        return made

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, value):
        pass

    def extend(self, values):
        pass

    def __repr__(self):
        return f"<{self.name}>"


class _Dict(dict):
    """A dict that may have attributes in the file (torch's `_metadata`): dropped."""

    def __setstate__(self, state):
        pass


class _Admitted:
    """A function of ours under the name of another; it takes no attributes."""

    __slots__ = ("_function",)

    def __init__(self, function):
        object.__setattr__(self, "_function", function)

    def __call__(self, *args):
        return self._function(*args)

    def __setattr__(self, name, value):
        raise pickle.UnpicklingError("it sets attributes of a function")


@dataclasses.dataclass(frozen=True)
class _Storage(_Final):
    archive: "_Archive"
    key: str
    dtype: np.dtype
    size: int


def _tensor(storage, offset, shape, strides, *_) -> Tensor:
    """`torch._utils._rebuild_tensor_v2`, for tensors within their storage only."""
    numbers = (offset, *shape, *strides)
    if (
        not isinstance(storage, _Storage)
        or len(shape) != len(strides)
        or not all(type(n) is int and n >= 0 for n in numbers)
    ):
        raise pickle.UnpicklingError("it describes a tensor in an unknown way")
    reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    size = math.prod(shape)
    if size and offset + reach >= storage.size:
        raise pickle.UnpicklingError(
            f"it describes a tensor {tuple(shape)} that reaches beyond its storage of "
            f"{storage.size} values"
        )
    if not size:
        offset, strides = 0, (0,) * len(shape)
    return Tensor(
        storage.archive, storage.key, storage.dtype, offset, tuple(shape), strides
    )


def _parameter(data, *_):
    """`torch._utils._rebuild_parameter`: the tensor alone."""
    return data


_FUNCTIONS = {
    "torch._utils._rebuild_tensor_v2": _Admitted(_tensor),
    "torch._utils._rebuild_parameter": _Admitted(_parameter),
    "collections.OrderedDict": _Dict,
    "collections.defaultdict": _Admitted(lambda *_: _Dict()),
    "torch.Size": _Admitted(lambda *sizes: tuple(*sizes)),
    "builtins.set": _Admitted(lambda *values: list(*values)),
    "builtins.frozenset": _Admitted(lambda *values: list(*values)),
}

# Of the standard library, modules whose objects become inert; all else there is
# refused. Elsewhere a name that begins with a capital is a class, by custom.
_DATA_MODULES = ("argparse", "collections", "datetime", "decimal", "enum", "pathlib")
# Names in small letters that numpy and torch write for their scalars and settings.
_DATA_NAMES = (
    "_codecs.encode",
    "builtins.dict",
    "builtins.list",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "torch.device",
    *(f"torch.{x}int{bits}" for x in ("", "u") for bits in (8, 16, 32, 64)),
    *(f"torch.{x}" for x in ("bfloat16", "bool", "float16", "float32", "float64")),
)


class _Unpickler(pickle.Unpickler):
    """A pickle machine whose every name leads to something of this module."""

    def __init__(self, file, archive: "_Archive"):
        super().__init__(file)
        self._archive = archive

    def find_class(self, module: str, name: str):
        module = {"__builtin__": "builtins"}.get(module, module)  # Python 2's name
        full = f"{module}.{name}"
        if full in _FUNCTIONS:
            return _FUNCTIONS[full]
        if module == "torch" and name.removesuffix("Storage") in _STORAGES:
            return type(name, (Inert,), {"name": full})
        top, last = module.split(".")[0], name.split(".")[-1]
        standard = top in sys.stdlib_module_names
        plain = top in _DATA_MODULES if standard else last[:1].isupper()
        if plain or full in _DATA_NAMES:
            return type("Inert", (Inert,), {"name": full})
        raise pickle.UnpicklingError(
            f"it asks for {full}, which is neither a tensor nor a plain object"
        )

    def persistent_load(self, pid):
        kind, storage, key, _, size = pid
        name = storage.name.removeprefix("torch.").removesuffix("Storage")
        if kind != "storage" or not isinstance(key, str) or type(size) is not int:
            raise pickle.UnpicklingError("it describes a storage in an unknown way")
        dtype = np.dtype(_STORAGES[name])
        if self._archive.size(f"data/{key}") < size * dtype.itemsize or size < 0:
            raise pickle.UnpicklingError(
                f"storage {key} is to have {size} values, and the file holds fewer"
            )
        return _Storage(self._archive, key, dtype, size)


class _Archive:
    """The zip file: members by their name without the leading folder."""

    def __init__(self, path: Path):
        self.path = path
        self._zip = zipfile.ZipFile(path)
        roots = [
            name.removesuffix("data.pkl")
            for name in self._zip.namelist()
            if name.endswith("/data.pkl") and name.count("/") == 1
        ]
        if len(roots) != 1:
            raise pickle.UnpicklingError("it holds no single data.pkl")
        self._root = roots[0]

    def _info(self, name: str) -> zipfile.ZipInfo:
        info = self._zip.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED:  # torch never compresses
            raise pickle.UnpicklingError(f"its member {name} is compressed")
        return info

    def __contains__(self, name: str) -> bool:
        return self._root + name in self._zip.NameToInfo

    def size(self, name: str) -> int:
        return self._info(name).file_size

    def read(self, name: str) -> bytes:
        info = self._info(name)
        try:
            data = self._zip.read(info)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{self.path} is damaged ({name}: {error}): fetch it anew."
            ) from error
        if len(data) != info.file_size:  # a directory can promise more than there is
            raise CheckpointError(f"{self.path} is damaged ({name} is cut short).")
        return data


def matches(path: Path | str) -> bool:
    """Whether the file is a zip archive with a pickle in it, by its first bytes."""
    path = Path(path)
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == MAGIC


def read(path: Path | str) -> Any:
    """The tree in a .pth file: dicts, lists, numbers, strings, `Tensor` and `Inert`.

    `np.asarray(tensor)` reads a tensor from disk. Raises CheckpointError, having run
    nothing, if the file is damaged, in the format before PyTorch 1.6, or wants code.
    """
    path = Path(path)
    if not matches(path):
        raise CheckpointError(
            f"{path} is no zip archive, so not a file of PyTorch 1.6 or later: open it "
            "where you trust it and save it anew, torch.save(torch.load(path), path)."
        )
    try:
        archive = _Archive(path)
        if "byteorder" in archive and archive.read("byteorder") != b"little":
            raise pickle.UnpicklingError("its numbers are big-endian")
        with archive._zip.open(archive._info("data.pkl")) as file:
            return _Unpickler(file, archive).load()
    except CheckpointError:
        raise
    # A hostile pickle can raise anything, by giving our objects what they do not take.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{path} is not read: {reason}; nothing in it was run. Use it only if you "
            "know who made it."
        ) from error


def weights(path: Path | str) -> tuple[dict[str, Tensor], Any]:
    """(tensors by name, the whole tree) of a checkpoint.

    They are under 'model', 'module' (DeepSpeed) or 'state_dict', or the tree itself.
    Raises CheckpointError as `read`, and if there are none.
    """
    tree = found = read(path)
    for key in ("model", "module", "state_dict"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    found = found if isinstance(found, dict) else {}
    tensors = {k: v for k, v in found.items() if isinstance(v, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no parameters: give a model's checkpoint.")
    return tensors, tree
