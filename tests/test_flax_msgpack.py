"""Flax's checkpoint files: read as flax reads them, lazily, and never past damage."""

import json
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax.numpy as jnp
import numpy as np
import pytest
import scenic

from av_mae import CheckpointError
from av_mae.importers import flax_msgpack

RNG = np.random.default_rng(0)
TREE = {
    "params": {
        "a": {"kernel": RNG.normal(size=(3, 4)).astype(np.float32)},
        "large": RNG.normal(size=(7, 5)).astype(np.float32),
        "half": np.asarray(RNG.normal(size=(2, 3)), jnp.bfloat16),
        "doubles": RNG.normal(size=9),
        "truth": np.array([True, False]),
        "nothing": np.zeros((0, 3), np.float32),
        "": np.float32(2.5),
    },
    "step": np.int32(7),
    "plain": {
        "small": [1, -1, 127, -32, -33, 128, 255, 256, 65536, 2**40, -200, -(2**40)],
        "others": [None, True, False, 1.5, "x" * 40, "y" * 300, b"bytes", 2 + 1j],
        "names": {str(i): i for i in range(20)},
        "many": list(range(20)),
    },
}


def written(tmp_path, tree, chunk=2**30) -> Path:
    """The tree as flax writes it; arrays of more bytes than `chunk` are cut."""
    path = tmp_path / "checkpoint_7"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
        path.write_bytes(flax.serialization.msgpack_serialize(tree))
    return path


def values(tree):
    """The tree with arrays read."""
    if isinstance(tree, dict):
        return {name: values(value) for name, value in tree.items()}
    return tree.read() if isinstance(tree, flax_msgpack.Stored) else tree


@pytest.mark.parametrize("chunk", [2**30, 40])
def test_arrays_are_those_that_flax_reads(tmp_path, chunk):
    path = written(tmp_path, TREE, chunk)
    found = flax_msgpack.arrays(path)
    read, expected = (
        values(found),
        flax.serialization.msgpack_restore(path.read_bytes()),
    )
    assert len(found["params"]["large"].pieces) == (1 if chunk > 40 else 4)
    assert read["params"].keys() == expected["params"].keys()
    for name, value in scenic.named(expected["params"]).items():
        ours = scenic.named(read["params"])[name]
        assert ours.dtype == value.dtype and ours.shape == np.shape(value), name
        np.testing.assert_array_equal(ours, value, err_msg=name)
        assert ours.flags.owndata or ours.base.flags.owndata
    plain, theirs = read["plain"], expected["plain"]
    assert plain["small"] == theirs["small"] and plain["names"] == theirs["names"]
    assert plain["many"] == theirs["many"]
    assert plain["others"][:6] == theirs["others"][:6]
    assert plain["others"][6:] == [None, None]  # neither is an array


def test_damage_is_told(tmp_path):
    """Cut off anywhere, or with any byte another: an error or a tree, no crash."""
    path = written(tmp_path, TREE, 40)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 37), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="cut off or damaged|cannot be read"):
            flax_msgpack.arrays(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CheckpointError, match="1 bytes follow its end"):
        flax_msgpack.arrays(path)
    refused = 0
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            values(flax_msgpack.arrays(path))
        except CheckpointError as error:
            refused += "\n" not in str(error)
    assert refused > 40


def test_what_is_no_checkpoint_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="none cannot be read"):
        flax_msgpack.arrays(tmp_path / "none")
    path = tmp_path / "text"
    for content in (
        b"hello",
        b"\x91" * 100_000,
        b"\xc1",
        b"\x81\xa1a\xc7\x02\x01\x93\x90",
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="cut off or damaged"):
            flax_msgpack.arrays(path)
    # An array of Python objects would be a program.
    entry = flax.serialization.msgpack_serialize({"a": np.zeros(2, np.float64)})
    path.write_bytes(entry.replace(b"\xa7float64", b"\xa7object_"))
    with pytest.raises(CheckpointError, match="damaged at byte"):
        flax_msgpack.arrays(path)


@scenic.needed
def test_the_stored_file():
    folder = scenic.SCENIC / "checkpoint"
    found = flax_msgpack.arrays(folder / "pretrain_checkpoint_3")
    told = json.loads((folder / "pretrain_checkpoint_3.tree.json").read_text())
    arrays = {k: v for k, v in scenic.named(found).items() if v is not None}
    kinds = {
        name: f"ndarray {value.dtype}{list(value.shape)}"
        for name, value in arrays.items()
        if isinstance(value, flax_msgpack.Stored)
    }
    assert kinds == {k: v for k, v in told.items() if v.startswith("ndarray")}
    expected = dict(np.load(folder / "pretrain_checkpoint_3.params.npz"))
    ours = scenic.named(values(found["optimizer"]["target"]))
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


PEAK = """
import sys
from av_mae.importers import scenic
path, modules = sys.argv[1], sys.modules
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
def status(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(l.split()[1]) for l in lines if l.startswith(name))
before = status("VmRSS")
params = scenic.read(path).params
held = sum(x.nbytes for x in __import__("jax").tree.leaves(params))
print((status("VmHWM") - before) / held)
"""


def padded(path: Path, width: int) -> int:
    """A pretraining file with two moments that are holes; bytes of its parameters."""
    import test_import_scenic

    shapes = test_import_scenic.tiny_shapes(width)
    pack = flax.serialization.msgpack_serialize
    header = lambda n: b"\xde" + n.to_bytes(2, "big")
    with open(path, "wb") as file:

        def array(name: str, shape: tuple[int, ...], hole: bool):
            value = np.ones(shape, np.float32)
            body = pack({name: value})[1:]
            if not hole or value.nbytes < 1 << 16:
                file.write(body)
                return
            file.write(body[: -value.nbytes])
            file.seek(value.nbytes, 1)

        file.write(b"\x81" + pack("optimizer") + header(2))
        for part in ("state", "target"):
            file.write(pack(part))
            tree: dict = {}
            for name, shape in shapes.items():
                place = tree
                *parents, last = name.split("/")
                for parent in parents:
                    place = place.setdefault(parent, {})
                leaves = [last] if part == "target" else [last + "_1", last + "_2"]
                place.update(dict.fromkeys(leaves, shape))

            def nested(tree, hole):
                file.write(header(len(tree)))
                for name, value in tree.items():
                    if isinstance(value, dict):
                        file.write(pack(name))
                        nested(value, hole)
                    else:
                        array(name, value, hole)

            nested(tree, part == "state")
        file.truncate()
    return 4 * sum(int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak is read from /proc"
)
def test_memory_is_that_of_the_parameters(tmp_path):
    path = tmp_path / "checkpoint"
    held = padded(path, 512)
    assert held > 60e6 and path.stat().st_size > 2.9 * held
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert 0.9 < float(run.stdout) <= 1.3
