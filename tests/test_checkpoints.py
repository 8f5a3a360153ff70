"""Checkpoints: what is damaged is refused by name, what is good comes back exactly."""

import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from av_mae import CheckpointError, ConfigError, checkpoints, checksums
from av_mae.checkpoints import Checkpoints

ROOT = Path(__file__).resolve().parents[1]
CONFIG = {"seed": 0, "batch_size": 8, "data": {"dir": "a"}, "mask": {"ratio": 0.9}}


def make_state(step=0):
    params = {
        "encoder": {"kernel": jax.random.normal(jax.random.key(1), (64, 48))},
        "head": {"bias": jnp.arange(5.0)},
    }
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = {
        "step": jnp.int32(step),
        "params": jax.tree.map(lambda x: x + step, params),
        "opt_state": optimiser.init(params),
        "rng": jax.random.key(7),
    }
    return state


def abstract(state):
    return jax.eval_shape(lambda: state)


def open_run(workdir, config=CONFIG, meta=None, **options):
    return Checkpoints(workdir, config, meta or {"labels": ["a"]}, **options)


def save_steps(workdir, *steps, **options):
    run = open_run(workdir, **options)
    for step in steps:
        run.save(step, make_state(step), force=True)
    run.close()


def assert_equal(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the steps 100 and 200; tests that damage it copy it."""
    workdir = tmp_path_factory.mktemp("saved")
    save_steps(workdir, 100, 200)
    return workdir


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "run"))


# Saving and restoring.


def test_what_is_saved_comes_back_although_it_was_donated_at_once(tmp_path):
    run = open_run(tmp_path, every_steps=5)
    add = jax.jit(
        lambda s: s | {"params": jax.tree.map(lambda x: x + 1, s["params"])},
        donate_argnums=0,
    )
    state = make_state()
    assert run.latest() is None
    assert not run.save(4, state)
    assert run.save(5, state)
    for _ in range(10):
        state = add(state)
    run.wait()
    assert run.latest() == 5
    assert_equal(run.restore(5, abstract(state)), make_state())
    run.close()


def test_only_the_newest_are_kept(tmp_path):
    save_steps(tmp_path, 1, 2, 3, 4, keep=1)
    assert checksums.steps(tmp_path / "checkpoints") == [4]
    save_steps(tmp_path, 5, 6, 7, keep=3)
    assert checksums.steps(tmp_path / "checkpoints") == [5, 6, 7]


def test_every_file_has_a_checksum(saved):
    folder = saved / "checkpoints" / "200"
    listed = json.loads((folder / "checksums-0.json").read_text())["files"]
    files = {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    }
    assert files == set(listed) | {"checksums-0.json"}


def test_another_model_is_named(saved):
    run = open_run(saved)
    state = abstract(make_state())
    state["params"]["head"]["bias"] = jax.ShapeDtypeStruct((6,), jnp.float32)
    with pytest.raises(CheckpointError, match=r"params/head/bias is \(5,\) .*\(6,\)"):
        run.restore(200, state)
    del state["params"]["head"]
    with pytest.raises(CheckpointError, match="params/head/bias is only in the check"):
        run.restore(200, state)
    run.close()


# Damage.


def test_every_bit_flip_is_refused_by_name_of_the_file(copied):
    draw = random.Random(0)
    folder = copied / "checkpoints" / "200"
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    run = open_run(copied)
    for path in [*files, *draw.choices(files, k=50 - len(files))]:
        good = path.read_bytes()
        bad = bytearray(good)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        path.write_bytes(bad)
        name = path.relative_to(folder).as_posix()
        with pytest.raises(CheckpointError, match=f"200 cannot .*{name} is damaged"):
            run.restore(200, abstract(make_state()))
        path.write_bytes(good)
    assert_equal(run.restore(200, abstract(make_state())), make_state(200))
    run.close()


@pytest.mark.parametrize("damage", ["truncated", "removed", "unfinished", "empty"])
def test_older_good_step_is_used_and_the_log_says_why(copied, damage, caplog):
    folder = copied / "checkpoints" / "200"
    manifest = folder / "state" / "manifest.ocdbt"
    if damage == "truncated":
        manifest.write_bytes(manifest.read_bytes()[:-1])
    elif damage == "removed":
        manifest.unlink()
    elif damage == "unfinished":
        (folder / "checksums-0.json").unlink()
    else:
        shutil.rmtree(folder)
        folder.mkdir()
    run = open_run(copied)
    assert run.latest() == 100
    reason = {"truncated": "bytes instead of", "removed": "manifest.ocdbt is missing"}
    assert reason.get(damage, "unfinished") in caplog.text
    assert "Step 200" in caplog.text
    # The run goes on from 100, saves 200 anew, and the damaged one is gone.
    run.save(200, make_state(3), force=True)
    run.wait()
    assert run.latest() == 200
    assert_equal(run.restore(200, abstract(make_state())), make_state(3))
    run.close()


def test_damaged_newest_step_does_not_count_among_those_kept(copied):
    manifest = copied / "checkpoints" / "200" / "state" / "manifest.ocdbt"
    manifest.write_bytes(b"x")
    run = open_run(copied, keep=2)
    assert run.latest() == 100
    run.save(150, make_state(150), force=True)
    run.close()
    assert checkpoints.find(copied) == (copied / "checkpoints", 150)
    assert checksums.steps(copied / "checkpoints") == [100, 150, 200]


# Orbax leaves a cancelled write behind.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_failed_save_is_one_sentence_and_the_older_step_stays(copied):
    run = open_run(copied)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # stands for a full disk
    try:
        with pytest.raises(CheckpointError, match="300 could not be saved .* MiB are"):
            run.save(300, make_state(300), force=True)
            run.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.close()
    run = open_run(copied)
    assert run.latest() == 200
    assert run.save(300, make_state(300), force=True)
    run.close()
    assert checkpoints.find(copied)[1] == 300


TRAIN = """
import sys
import jax, jax.numpy as jnp
from av_mae.checkpoints import Checkpoints
run = Checkpoints(sys.argv[1], {"seed": 0}, {}, keep=2, every_steps=1)
state = {"step": jnp.int32(0), "w": jnp.zeros((300, 300))}
step = run.latest()
if step is not None:
    state = run.restore(step, jax.eval_shape(lambda: state))
    assert int(state["step"]) == step and bool((state["w"] == step).all())
print("from", step, flush=True)
next_state = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
for i in range((step or 0) + 1, 1000):
    state = next_state(state)
    run.save(i, state)
"""


def kill_and_restart(workdir, kills, seed):
    draw = random.Random(seed)
    last = None
    for _ in range(kills):
        child = subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(workdir)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        first = child.stdout.readline()
        assert first.startswith("from"), first  # restored, and its values were right
        step = first.split()[1]
        assert last is None or (step != "None" and int(step) >= last)
        last = None if step == "None" else int(step)
        time.sleep(draw.uniform(0.3, 1.0))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
    folder, step = checkpoints.find(workdir)
    assert step >= (last or 1)


def test_killed_at_any_moment_a_good_step_remains(tmp_path):
    kill_and_restart(tmp_path, 3, seed=0)


# Whose workdir it is.


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 1}, "config.seed is 1, there it is 0"),
        ({"batch_size": 16}, "config.batch_size is 16"),
        ({"mask": {"ratio": 0.5}}, "config.mask.ratio is 0.5"),
    ],
)
def test_other_experiment_is_refused_by_field(saved, change, field):
    with pytest.raises(CheckpointError, match=field):
        open_run(saved, CONFIG | change)


def test_fields_that_change_nothing_may_change(saved):
    run = open_run(saved, CONFIG | {"data": {"dir": "b"}, "steps": 9, "log": {"x": 1}})
    assert run.latest() == 200
    run.close()


@pytest.mark.parametrize(
    ("name", "free"),
    [
        ("mode", True),
        ("epochs", True),
        ("checkpoint.keep", True),
        ("compute.dtype", True),
        ("compute.accumulate", False),
        ("parallel.fsdp", True),
        ("data.workers", True),
        ("data.skip_bad_records", True),
        ("data.stride", False),
        ("model.width", False),
        ("init_from.checkpoint_path", False),
    ],
)
def test_which_fields_are_free(name, free):
    *parents, last = name.split(".")
    old, new = {last: 1}, {last: 2}
    for parent in parents:
        old, new = {parent: old}, {parent: new}
    assert checkpoints.changes(old, new) == {name: (1, 2)}
    assert (checkpoints.FREE.fullmatch(name) is not None) is free


def test_numbers_measured_elsewhere_may_differ_by_rounding():
    old, new = {"spectrogram": {"mean": -4.25}}, {"spectrogram": {"mean": -4.250001}}
    assert not checkpoints.changes(old, new)
    new["spectrogram"]["mean"] = -4.26
    assert checkpoints.changes(old, new) == {"spectrogram.mean": (-4.25, -4.26)}


def test_other_records_are_refused(tmp_path):
    run = open_run(tmp_path, meta={"dataset_checksum": "1"})
    run.save(1, make_state(), force=True)
    run.close()
    with pytest.raises(CheckpointError, match="other records"):
        open_run(tmp_path, meta={"dataset_checksum": "2"})
    open_run(tmp_path, meta={"dataset_checksum": "1"}).close()


def test_two_runs_in_one_workdir_are_refused(tmp_path):
    run = open_run(tmp_path)
    with pytest.raises(CheckpointError, match="in use by another run"):
        open_run(tmp_path)
    run.close()
    open_run(tmp_path).close()


def test_workdir_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        open_run(tmp_path / "file")


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="checkpoint.keep=0"):
        open_run(tmp_path, keep=0)


# Finding and loading.


def test_find_takes_a_workdir_its_folder_or_a_step(saved):
    folder = saved / "checkpoints"
    assert checkpoints.find(saved) == (folder, 200)
    assert checkpoints.find(folder) == (folder, 200)
    assert checkpoints.find(folder / "100") == (folder, 100)


def test_find_says_what_is_wrong(copied, tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoints.find(tmp_path / "nothing")
    folder = copied / "checkpoints"
    (folder / "200" / "config" / "metadata").write_text("{}")
    with pytest.raises(CheckpointError, match="200 cannot be read: config/metadata"):
        checkpoints.find(folder / "200")
    assert checkpoints.find(copied) == (folder, 100)
    (folder / "100" / "checksums-0.json").unlink()
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        checkpoints.find(copied)


def test_load_rebuilds_without_knowing_shapes(saved, caplog):
    caplog.set_level("INFO")
    params, config, meta = checkpoints.load(saved)
    assert f"reading the params of {saved}/checkpoints/200" in caplog.text
    assert config == CONFIG
    assert meta == {"labels": ["a"], "format": 1}
    expected = make_state(200)["params"]
    assert isinstance(params["encoder"]["kernel"], np.ndarray)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    with pytest.raises(CheckpointError, match="holds no 'ema'; it holds opt_state, p"):
        checkpoints.load(saved, weights="ema")


def test_load_reads_the_average_and_refuses_newer_formats(tmp_path, monkeypatch):
    run = open_run(tmp_path)
    run.save(1, {"params": {"w": jnp.ones(2)}, "ema": {"w": jnp.zeros(2)}}, force=True)
    run.close()
    np.testing.assert_array_equal(checkpoints.load(tmp_path, "ema")[0]["w"], [0, 0])
    monkeypatch.setattr(checkpoints, "FORMAT", 0)
    with pytest.raises(CheckpointError, match="format 1"):
        checkpoints.load(tmp_path)


# Several devices and processes.


def test_restores_onto_any_mesh(tmp_path):
    code = f"""
    import jax, jax.numpy as jnp, numpy as np
    from av_mae import parallel
    from av_mae.checkpoints import Checkpoints
    values = {{"w": np.arange(256 * 128.0).reshape(256, 128), "b": np.arange(5)}}
    def shardings(data, fsdp):
        return parallel.state_shardings(values, parallel.mesh(data, fsdp))
    for step, sizes in enumerate([(2, 4), (8, 1), (1, 1)]):
        run = Checkpoints({str(tmp_path)!r}, {{}}, {{}})
        run.save(step, jax.device_put(values, shardings(*sizes)), force=True)
        run.wait()
        for other in [(-1, 2), (1, 8), (1, 1)]:
            want = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                values, shardings(*other))
            got = run.restore(step, want)
            assert got["w"].sharding == want["w"].sharding
            assert all(np.array_equal(got[k], values[k]) for k in values)
        run.close()
    print("good")
    """
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "good\n", done.stderr[-3000:]


TWO = """
import sys
import jax, numpy as np
from av_mae import parallel
port, process, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
parallel.initialize(f"localhost:{port}", 2, process)
parallel.initialize()
assert jax.process_count() == 2 and len(jax.devices()) == 4
from av_mae.checkpoints import Checkpoints
values = {"w": np.arange(256 * 128.0).reshape(256, 128), "b": np.arange(5.0)}
def placed(data, fsdp):
    shardings = parallel.state_shardings(values, parallel.mesh(data, fsdp))
    return jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]),
        values, shardings)
run = Checkpoints(workdir, {}, {}, keep=2)
assert run.latest() is None
state = placed(1, 4)
for step in (1, 2, 3):
    run.save(step, state, force=True)
run.wait()
assert run.latest() == 3
for sizes in [(1, 4), (2, 2), (4, 1)]:
    state = placed(*sizes)
    got = run.restore(3, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state))
    for name in values:
        for shard in got[name].addressable_shards:
            assert np.array_equal(shard.data, values[name][shard.index])
batch = parallel.put_batch(np.full((2, 3), process), parallel.mesh())
assert batch.shape == (4, 3)
assert float(jax.jit(lambda x: x.sum())(batch)) == 6
run.close()
print("good")
"""


def run_two(code, workdir, port):
    environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(port), str(process), str(workdir)],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    for child in children:
        out, err = child.communicate(timeout=120)
        assert out.endswith("good\n"), err[-3000:]  # Gloo writes there too


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def test_two_processes_save_and_one_restores(tmp_path):
    run_two(TWO, tmp_path, free_port())
    folder = tmp_path / "checkpoints" / "3"
    assert checksums.steps(folder.parent) == [2, 3]
    sealed = [
        json.loads((folder / f"checksums-{i}.json").read_text())["files"]
        for i in (0, 1)
    ]
    assert any("process_1" in name for name in sealed[1])
    assert not sealed[0].keys() & sealed[1].keys()
    params = np.arange(256 * 128.0).reshape(256, 128)
    run = open_run(tmp_path, {})
    state = {"w": jnp.zeros((256, 128)), "b": jnp.zeros(5)}
    np.testing.assert_array_equal(run.restore(3, abstract(state))["w"], params)
    run.close()
    (folder / "checksums-1.json").unlink()
    assert "checksums-1.json" in checksums.verify(folder)
    assert checkpoints.find(tmp_path)[1] == 2


# Starting from other weights.


def test_init_from_takes_names_that_are_equal_and_reports_each_once():
    target = {"a": {"kernel": jnp.zeros((2, 2))}, "head": {"bias": jnp.ones(3)}}
    source = {"a": {"kernel": np.full((2, 2), 5.0)}, "decoder": {"bias": np.ones(1)}}
    with pytest.raises(CheckpointError, match="head/bias.*decoder/bias"):
        checkpoints.init_from(target, source)
    with pytest.raises(CheckpointError, match="decoder/bias"):
        checkpoints.init_from(target, source, allow_fresh="head/.*")
    with pytest.raises(CheckpointError, match="head/bias"):
        checkpoints.init_from(target, source, allow_unused=["decoder/.*"])
    params, report = checkpoints.init_from(
        target, source, allow_fresh="head/.*", allow_unused="decoder/.*"
    )
    np.testing.assert_array_equal(params["a"]["kernel"], np.full((2, 2), 5.0))
    assert params["a"]["kernel"].dtype == jnp.float32
    np.testing.assert_array_equal(params["head"]["bias"], np.ones(3))
    assert [row.target for row in report.rows] == ["a/kernel", "head/bias"]
    assert report.fresh == ["head/bias"]
    assert report.unused == [("decoder/bias", (1,))]
    table = report.table().splitlines()
    assert len(table) == 1 + 2 + 1 + 1
    assert table[1].split()[:2] == ["a/kernel", "a/kernel"]
    assert "float64 to float32" in table[1]
    assert table[-1].startswith("1 of 2 parameters from the source (1 changed), 1 fre")


def test_init_from_shape_mismatch_names_both_and_adapts():
    target = {"positions": jnp.zeros((4, 1)), "x": jnp.zeros(1)}
    source = {"positions": np.ones((2, 1), np.float32), "x": np.ones(1, np.float32)}
    with pytest.raises(CheckpointError, match=r"positions is \(4, 1\), .*\(2, 1\)"):
        checkpoints.init_from(target, source)

    def stretched(array, shape):
        return np.repeat(array, shape[0] // array.shape[0], 0)

    params, report = checkpoints.init_from(target, source, adapt=[("pos.*", stretched)])
    np.testing.assert_array_equal(params["positions"], np.ones((4, 1)))
    assert report.rows[0].change == "(2, 1) by stretched"
    assert report.rows[1].change == ""


def test_init_from_may_leave_a_head_of_another_size_fresh():
    target, source = {"head": jnp.zeros(3)}, {"head": np.ones(7, np.float32)}
    params, report = checkpoints.init_from(target, source, allow_fresh="head")
    np.testing.assert_array_equal(params["head"], np.zeros(3))
    assert report.rows[0] == ("head", "fresh", (3,), "is (3,), in the source (7,)")


def test_init_from_renames_and_one_source_may_serve_two():
    target = {"encoder": {"rgb": jnp.zeros(1), "spectrogram": jnp.zeros(1)}}
    source = {"encoder": {"shared": np.ones(1, np.float32)}}
    params, report = checkpoints.init_from(
        target, source, renames=[(r"encoder/(rgb|spectrogram)", "encoder/shared")]
    )
    assert [float(x[0]) for x in jax.tree.leaves(params)] == [1.0, 1.0]
    assert {row.source for row in report.rows} == {"encoder/shared"}
    assert report.unused == []
