"""Flax's legacy checkpoint file: one msgpack map, its arrays left on disk until asked.

A released pretraining file holds every parameter three times (two Adam moments). So the
file is mapped and walked header by header; `arrays` tells where each array lies, and
only `Stored.read` copies one, then gives the mapped pages back to the system.

The layout is that of `flax.serialization.to_bytes`: extension 1 is an array and 3 a
scalar, both a msgpack list (shape, name of the type, bytes); an array of more than
1 GiB is a map with the key `__msgpack_chunked_array__`, its shape and its flat pieces.
"""

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from av_mae import CheckpointError

_CHUNKED = "__msgpack_chunked_array__"

# First byte: (kind, width of the number that follows), see msgpack's specification.
_SIZED = {
    **{0xC4 + i: ("bin", 1 << i) for i in range(3)},
    **{0xC7 + i: ("ext", 1 << i) for i in range(3)},
    **{0xD9 + i: ("str", 1 << i) for i in range(3)},
    **{0xDC + i: ("list", 2 << i) for i in range(2)},
    **{0xDE + i: ("map", 2 << i) for i in range(2)},
}
_PLAIN = {
    **{0xC0: None, 0xC2: False, 0xC3: True},
    **{0xCA: ">f", 0xCB: ">d"},
    **{0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"},
    **{0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"},
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """An array in a mapped file; `pieces` are (first byte, number of bytes)."""

    file: mmap.mmap
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: tuple[tuple[int, int], ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        """A copy of the array in memory."""
        values = np.empty(self.shape, self.dtype)
        flat, done = values.reshape(-1).view(np.uint8), 0
        for start, length in self.pieces:
            if not length:
                continue
            flat[done : done + length] = np.frombuffer(
                self.file, np.uint8, length, start
            )
            done += length
            release(self.file, start, length)
        return values


def release(file: mmap.mmap, start: int = 0, length: int | None = None):
    """Lets the system drop mapped pages that have been read."""
    if hasattr(file, "madvise"):  # not on Windows
        whole = start // mmap.PAGESIZE * mmap.PAGESIZE
        length = len(file) if length is None else length
        file.madvise(mmap.MADV_DONTNEED, whole, start + length - whole)


def arrays(path: Path) -> dict[str, Any]:
    """The file's tree: nested dicts with `Stored` in the place of arrays.

    Raises CheckpointError, naming the byte, where the file is cut off or damaged.
    """
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    walker = _Walker(mapped)
    try:
        tree = walker.value()
        if walker.at != len(mapped):
            raise ValueError(f"{len(mapped) - walker.at} bytes follow its end")
        if not isinstance(tree, dict):
            raise ValueError("it is no map of names")
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as error:
        raise CheckpointError(
            f"{path} is cut off or damaged at byte {walker.at} of {len(mapped)} "
            f"({error}): fetch it again."
        ) from error
    release(mapped)
    return tree


class _Walker:
    """Reads one value after another; `at` is the next byte."""

    def __init__(self, file: mmap.mmap):
        self.file = file
        self.at = 0

    def take(self, length: int) -> bytes:
        start = self.skip(length)
        return self.file[start : self.at]

    def skip(self, length: int) -> int:
        start = self.at
        if length > len(self.file) - start:
            raise ValueError(f"{length} bytes should follow")
        self.at += length
        return start

    def number(self, form: str) -> int | float:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def head(self) -> tuple[str, Any]:
        """(kind, number of bytes or entries), or ("plain", the value itself)."""
        first = self.take(1)[0]
        if first < 0x80 or first >= 0xE0:
            return "plain", first if first < 0x80 else first - 0x100
        if first < 0xC0:
            kind = "map" if first < 0x90 else "list" if first < 0xA0 else "str"
            return kind, first & (0x1F if kind == "str" else 0x0F)
        if first in _SIZED:
            kind, width = _SIZED[first]
            return kind, self.number({1: ">B", 2: ">H", 4: ">I"}[width])
        if 0xD4 <= first <= 0xD8:
            return "ext", 1 << (first - 0xD4)
        if first not in _PLAIN:
            raise ValueError(f"a value cannot begin with byte {first:#x}")
        plain = _PLAIN[first]
        return "plain", self.number(plain) if isinstance(plain, str) else plain

    def value(self) -> Any:
        kind, size = self.head()
        if kind == "plain":
            return size
        if kind == "str":
            return self.take(size).decode()
        if kind == "bin":
            self.skip(size)
            return None
        if kind == "list":
            return [self.value() for _ in range(size)]
        if kind == "ext":
            return self.extension(size)
        found = {self.value(): self.value() for _ in range(size)}
        return self.joined(found) if _CHUNKED in found else found

    def extension(self, size: int) -> Stored | None:
        """An array or scalar; None for anything else."""
        code = self.take(1)[0]
        start = self.skip(size)
        if code not in (1, 3):
            return None
        end, self.at = self.at, start
        if self.head() != ("list", 3):
            raise ValueError("an array has a shape, a type and bytes")
        shape, dtype = tuple(self.value()), _dtype(self.value())
        kind, length = self.head()
        first = self.skip(length)
        if kind != "bin" or self.at != end or any(n < 0 for n in shape):
            raise ValueError("an array has a shape, a type and bytes")
        if length != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{length} bytes are no {dtype} of shape {shape}")
        return Stored(self.file, shape, dtype, ((first, length),))

    def joined(self, found: dict) -> Stored:
        """An array that flax has cut into flat pieces."""
        in_order = lambda values: [values[str(i)] for i in range(len(values))]
        shape, chunks = in_order(found["shape"]), in_order(found["chunks"])
        if sum(chunk.size for chunk in chunks) != math.prod(shape):
            raise ValueError(f"the pieces of an array do not fill its shape {shape}")
        pieces = tuple(piece for chunk in chunks for piece in chunk.pieces)
        return Stored(self.file, tuple(shape), chunks[0].dtype, pieces)


def _dtype(name: str) -> np.dtype:
    """The type of this name, bfloat16 included; numbers and truth values alone."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    dtype = np.dtype(name)
    if dtype.kind not in "fiub":
        raise ValueError(f"arrays of {name} are not read")
    return dtype
