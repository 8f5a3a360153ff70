"""Devices: joining the hosts of a run, the mesh, and what is split over it.

One mesh with the axes `data` and `fsdp`. The batch is split over both; parameters and
optimiser state are copied to every device, or with `parallel.fsdp > 1` split over
`fsdp`. `jax.jit` with these shardings inserts the communication.
"""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from av_mae import ConfigError

log = logging.getLogger(__name__)

AXES = ("data", "fsdp")

MIN_SPLIT = 2**14
"""Arrays with fewer elements than this (biases, norms: 64 kB in float32) are copied
to every device even with fsdp: gathering them would cost more than it saves."""


def initialize(coordinator: str = "", num_processes: int = 0, process_id: int = -1):
    """Joins the processes of one run; does nothing where there is only one process.

    The three values come from the arguments, else from the environment variables
    `JAX_COORDINATOR_ADDRESS` (host:port), `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`. With
    none of them, jax finds the cluster by itself if the variables of SLURM, Open MPI
    or a TPU pod with several workers are present. Call it before anything asks jax
    for its devices; a second call does nothing.

    Raises ConfigError if only some of the three values are known.
    """
    if jax.distributed.is_initialized():
        return
    environment = os.environ
    coordinator = coordinator or environment.get("JAX_COORDINATOR_ADDRESS", "")
    num_processes = num_processes or int(environment.get("JAX_NUM_PROCESSES", 0))
    if process_id < 0:
        process_id = int(environment.get("JAX_PROCESS_ID", -1))
    if num_processes == 1:
        return
    if coordinator or num_processes or process_id >= 0:
        if not coordinator or not 0 <= process_id < num_processes:
            raise ConfigError(
                f"several processes need all of coordinator ({coordinator!r}), "
                f"num_processes ({num_processes}) and process_id ({process_id}, from "
                "0 to num_processes - 1): give the missing ones."
            )
        _use_cpu_collectives()
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif in_cluster(environment):
        _use_cpu_collectives()
        jax.distributed.initialize()


def in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether the variables of a cluster with more than one process are present."""
    slurm = "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment
    if slurm and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return True
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    return (
        "," in environment.get("TPU_WORKER_HOSTNAMES", "")
        or "," in environment.get("TPU_PROCESS_ADDRESSES", "")
        or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    )


def _use_cpu_collectives():
    """Lets processes with only CPUs talk to each other; other devices ignore it."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")


def mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """The mesh of data × fsdp devices; data = -1 takes all devices there are.

    A process that is alone may take fewer devices than it has (the log says so).
    Raises ConfigError naming the field that does not fit the number of devices.
    """
    devices = jax.devices()
    count = len(devices)
    if fsdp < 1 or (data != -1 and data < 1):
        raise ConfigError(
            f"parallel.fsdp={fsdp} must be at least 1 and parallel.data={data} at "
            "least 1, or -1 for all devices."
        )
    if data == -1:
        if count % fsdp:
            raise ConfigError(
                f"parallel.fsdp={fsdp} does not divide the number of devices ({count}):"
                " choose a divisor of it."
            )
        data = count // fsdp
    used = data * fsdp
    if used > count or (used < count and jax.process_count() > 1):
        raise ConfigError(
            f"parallel.data={data} times parallel.fsdp={fsdp} is {used}, but there are "
            f"{count} devices: set parallel.data=-1 to use all."
        )
    if used < count:
        log.warning(
            "parallel.data=%d, parallel.fsdp=%d: %d of the %d devices are used.",
            data,
            fsdp,
            used,
            count,
        )
    return jax.make_mesh(
        (data, fsdp), AXES, axis_types=(AxisType.Auto,) * 2, devices=devices[:used]
    )


def check_batch(batch_size: int, mesh: Mesh, name: str = "batch_size"):
    """Raises ConfigError, naming the field, if the devices cannot share the batch."""
    if batch_size < 1 or batch_size % mesh.size:
        raise ConfigError(
            f"{name}={batch_size} is not divisible by the {mesh.size} devices of the "
            "mesh: choose a multiple of it."
        )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Axis 0 split over all devices."""
    return NamedSharding(mesh, PartitionSpec(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """The sharding of every array of a state: the same tree, with NamedSharding leaves.

    With fsdp > 1, an array with at least `MIN_SPLIT` elements is split over `fsdp`
    along its largest axis that fsdp divides (the first of equals); all others are
    copied. abstract_state: arrays or ShapeDtypeStructs.
    """
    fsdp = mesh.shape["fsdp"]

    def one(array: Any) -> NamedSharding:
        shape = np.shape(array)
        axes = [axis for axis, size in enumerate(shape) if size % fsdp == 0]
        if fsdp == 1 or np.prod(shape, dtype=np.int64) < MIN_SPLIT or not axes:
            return replicated(mesh)
        largest = max(axes, key=lambda axis: shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * largest, "fsdp"))

    return jax.tree.map(one, abstract_state)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """This process's rows as global arrays, split over the mesh on axis 0.

    batch: a dict (or tree) of numpy arrays with batch size / processes rows each.
    """
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch
    )


def describe_devices() -> str:
    """The devices in a line for the head of the log, and a warning if a GPU is idle."""
    devices = jax.devices()
    kinds = sorted({device.device_kind for device in devices})
    processes = jax.process_count()
    line = (
        f"{len(devices)} {devices[0].platform.upper()} "
        f"device{'s' if len(devices) > 1 else ''} ({', '.join(kinds)}), "
        f"{processes} process{'es' if processes > 1 else ''}, jax {jax.__version__}"
    )
    if devices[0].platform == "cpu" and nvidia_present():
        line += (
            "\nWARNING: this machine has an NVIDIA device, but jax sees only the CPU. "
            'Install `pip install "jax[cuda13]"` (and unset JAX_PLATFORMS) to use it.'
        )
    return line


def nvidia_present(root: str = "/", path: str | None = None) -> bool:
    """Whether an NVIDIA device shows: driver, device file or nvidia-smi on PATH."""
    files = ("proc/driver/nvidia", "dev/nvidia0")
    return any(Path(root, name).exists() for name in files) or bool(
        shutil.which("nvidia-smi", path=path)
    )
