"""Damages media files by a seed: bytes flipped, cut, heads spliced, sizes forged."""

import random
import struct
from pathlib import Path

BOXES = (
    b"moov",
    b"trak",
    b"stts",
    b"stsz",
    b"stsc",
    b"stco",
    b"tkhd",
    b"mdhd",
    b"avcC",
)
ELEMENTS = (b"\x1a\x45\xdf\xa3", b"\x1f\x43\xb6\x75", b"\x16\x54\xae\x6b", b"\xa3")
BIG = (0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def mutate(files: list[Path], seed: int) -> tuple[str, bytes]:
    """(suffix, bytes) of a damaged copy of one of the files; the seed decides all."""
    rng = random.Random(seed)
    path = rng.choice(files)
    data = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 3)):
        rng.choice((flip, flip_header, cut, remove, splice, forge))(data, rng, files)
    return path.suffix, bytes(data)


def flip(data, rng, files) -> None:
    """A few to a few thousand bytes anywhere."""
    for _ in range(rng.choice((1, 10, 100, 3000))):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)


def flip_header(data, rng, files) -> None:
    """Bytes of the first or last 4 kB, where headers and indices are."""
    begin = rng.choice((0, max(0, len(data) - 4096)))
    end = min(len(data), begin + 4096)
    for _ in range(rng.randint(1, 60)):
        if data:
            data[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)


def cut(data, rng, files) -> None:
    """The end is missing."""
    del data[rng.randint(0, len(data)) :]


def remove(data, rng, files) -> None:
    """A piece in the middle is missing."""
    begin = rng.randint(0, len(data))
    del data[begin : begin + rng.choice((1, 7, 4096, 65536))]


def splice(data, rng, files) -> None:
    """The head of another file, of another kind perhaps, before this one's body."""
    head = rng.choice(files).read_bytes()[: rng.choice((16, 256, 4096, 40000))]
    data[: len(head) if rng.random() < 0.5 else 0] = head


def forge(data, rng, files) -> None:
    """A size or a count near the name of a box or an element is another one."""
    name = rng.choice(BOXES + ELEMENTS)
    places = [i for i in range(len(data)) if data.startswith(name, i)][:50]
    at = rng.choice(places) + rng.choice((-4, 4, 8, 12, 16)) if places else 0
    value = rng.choice((*BIG, rng.randrange(1 << 32)))
    data[max(0, at) : max(0, at) + 4] = struct.pack(">I", value)
