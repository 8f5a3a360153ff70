"""Devices: the mesh, what is split over it, and several processes."""

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import toy

from av_mae import ConfigError, parallel

ROOT = Path(__file__).resolve().parents[1]


def simulated(code: str, devices: int = 8) -> str:
    """Standard output of Python code run with simulated CPU devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_mesh_of_one_device():
    mesh = parallel.mesh()
    assert mesh.axis_names == ("data", "fsdp")
    assert dict(mesh.shape) == {"data": len(jax.devices()), "fsdp": 1}


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ((64, 1), "parallel.data=64"),
        ((-1, 7), "parallel.fsdp=7"),
        ((-1, 0), "parallel.fsdp=0"),
        ((0, 1), "parallel.data=0"),
    ],
)
def test_mesh_that_does_not_fit_is_refused_by_field(sizes, field):
    with pytest.raises(ConfigError, match=field):
        parallel.mesh(*sizes)


def test_batch_must_divide():
    code = """
    from av_mae import ConfigError, parallel
    mesh = parallel.mesh(-1, 4)
    parallel.check_batch(16, mesh)
    try:
        parallel.check_batch(12, mesh, "eval.batch_size")
    except ConfigError as error:
        print(error)
    """
    assert "eval.batch_size=12 is not divisible by the 8 devices" in simulated(code)


def test_fsdp_splits_bytes_and_data_parallel_copies():
    code = """
    import jax, jax.numpy as jnp, numpy as np
    from av_mae import parallel
    state = {"kernel": jnp.zeros((128, 512)), "bias": jnp.zeros(512),
             "odd": jnp.zeros((129, 257)), "step": jnp.zeros((), jnp.int32)}
    for fsdp in (1, 4):
        mesh = parallel.mesh(-1, fsdp)
        shardings = parallel.state_shardings(jax.eval_shape(lambda: state), mesh)
        placed = jax.device_put(state, shardings)
        size = {k: v.addressable_shards[0].data.size for k, v in placed.items()}
        print(fsdp, tuple(shardings["kernel"].spec), size)
    batch = parallel.put_batch({"x": np.arange(16).reshape(8, 2)}, mesh)["x"]
    shapes = [s.data.shape for s in batch.addressable_shards][:2]
    print(tuple(batch.sharding.spec), shapes,
          np.array_equal(batch, np.arange(16).reshape(8, 2)))
    print(parallel.mesh(1, 1).size, parallel.describe_devices())
    """
    lines = simulated(code).splitlines()
    whole = {"bias": 512, "kernel": 128 * 512, "odd": 129 * 257, "step": 1}
    assert lines[0] == f"1 () {whole}"
    assert lines[1] == f"4 (None, 'fsdp') {whole | {'kernel': 128 * 512 // 4}}"
    assert lines[2] == "(('data', 'fsdp'),) [(1, 2), (1, 2)] True"
    assert lines[3].startswith("1 8 CPU devices (cpu), 1 process, jax ")


def test_one_process_initialises_nothing(monkeypatch):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    parallel.initialize()
    parallel.initialize()
    parallel.initialize("localhost:1", 1, 0)
    assert not jax.distributed.is_initialized()


def test_half_an_address_is_refused():
    with pytest.raises(ConfigError, match="process_id"):
        parallel.initialize("localhost:1234", 2)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "1"}, False),
        (
            {"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
            False,
        ),
        (
            {"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            True,
        ),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
    ],
)
def test_clusters_are_joined_only_when_there_is_more_than_one_process(
    environment, expected
):
    assert parallel.in_cluster(environment) is expected


def test_idle_nvidia_device_is_told(tmp_path, monkeypatch):
    empty = str(tmp_path / "bin")
    assert not parallel.nvidia_present(str(tmp_path), path=empty)
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev" / "nvidia0").touch()
    assert parallel.nvidia_present(str(tmp_path), path=empty)
    monkeypatch.setattr(parallel, "nvidia_present", lambda: True)
    assert "WARNING" in parallel.describe_devices()
    assert "jax[cuda13]" in parallel.describe_devices()
    monkeypatch.setattr(parallel, "nvidia_present", lambda: False)
    assert "WARNING" not in parallel.describe_devices()


def test_put_batch_keeps_values_and_types():
    batch = {"rgb": np.arange(6, dtype=np.uint8).reshape(2, 3)}
    placed = parallel.put_batch(batch, parallel.mesh(1, 1))
    assert placed["rgb"].dtype == np.uint8
    np.testing.assert_array_equal(placed["rgb"], batch["rgb"])


@pytest.mark.slow
def test_processes_meet_by_flags():
    """Two of them on this machine; that there is no data set is found together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *("-m", "av_mae.main", "--config=configs/digits/pretrain.py:smoke"),
        *("--config.data.dir=/none", f"--coordinator=127.0.0.1:{port}"),
        "--num_processes=2",
    ]
    both = [toy.start(*command, f"--process_id={i}") for i in range(2)]
    first, second = (toy.finish(process, 2) for process in both)
    assert "2 CPU devices" in first and "2 processes" in first
    assert "2 processes" not in second  # one process speaks
    assert "error: " in first and "/none" in first
    text = toy.run(*command, code=2)
    assert "process_id" in text and "give the missing ones" in text


FSDP = """
import re, sys
sys.path.insert(0, "tests")
import jax, synthetic
from av_mae import parallel, plan, program

jax.config.update("jax_disable_most_optimizations", True)
parallel.MIN_SPLIT = 64

def compiled(data, fsdp, clips=8, scan=False):
    config = synthetic.tiny("digits/pretrain", batch_size=clips, compute__scan=scan)
    config.eval.batch_size = clips
    config.parallel.data, config.parallel.fsdp = data, fsdp
    found = program.step(config, parallel.mesh(data, fsdp))
    return found, found.run.lower(*found.arguments()).compile()
"""


@pytest.mark.slow
def test_fsdp_splits_the_state_and_gathers_it():
    """Parameters and optimiser, 1/8 on each of 8 devices but for small ones."""
    code = FSDP + textwrap.dedent("""
    for fsdp in (1, 8):
        found, step = compiled(-1, fsdp)
        size = lambda x: x.sharding.shard_shape(x.shape)
        leaves = jax.tree.leaves(found.abstract)
        whole = sum(x.size for x in leaves)
        mine = sum(__import__("math").prod(size(x)) for x in leaves)
        text = step.as_text()
        print(fsdp, mine / whole, plan.memory_of(step).arguments,
              len(re.findall(r"all-gather\\(|all-gather-start\\(", text)) > 0,
              len(re.findall(r"reduce-scatter\\(|all-reduce\\(", text)) > 0)
    """)
    plain, split = (line.split() for line in simulated(code).splitlines())
    assert plain[0] == "1" and float(plain[1]) == 1.0 and plain[3] == "False"
    assert 1 / 8 <= float(split[1]) < 1.1 / 8
    assert int(split[2]) < int(plain[2]) / 2  # the batch is there in both
    assert split[3:] == ["True", "True"]


@pytest.mark.slow
def test_weak_scaling_keeps_each_devices_work_constant():
    """The compiled program of one device of 1, 2 or 8, each with two clips."""
    code = FSDP + textwrap.dedent("""
    for devices in (1, 2, 8):
        _, step = compiled(devices, 1, 2 * devices)
        cost = step.cost_analysis()
        print(devices, cost["flops"], cost["bytes accessed"])
    """)
    rows = np.array([line.split() for line in simulated(code).splitlines()], float)
    np.testing.assert_allclose(rows[:, 1], rows[0, 1], rtol=0.03)
    np.testing.assert_allclose(rows[:, 2], rows[0, 2], rtol=0.03)
