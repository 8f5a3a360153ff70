"""What a run will take, before it runs: memory, FLOPs, time, the largest batch.

Memory is XLA's own analysis of the compiled step, for the compiler of the backend at
hand; the compiler of another device fuses otherwise, so that its figure is an estimate
(as a rule CPU's is the larger: it keeps the attention's weights, which a fused kernel
does not). The largest batch is where a straight line through two compiled batch sizes
meets SHARE of the device's memory.
"""

import contextlib
import logging
import math
from pathlib import PurePath
from typing import NamedTuple

import jax

from av_mae import flops, peaks, program

log = logging.getLogger(__name__)

CLIPS = {
    "audioset": 1_857_210,
    "audioset500k": 508_994,
    "vggsound": 172_427,
    "ucf101": 9_537,
    "kinetics400": 240_000,
    "ssv2": 168_913,
    "epic-kitchens-100": 67_217,
    "digits": 4_000,
}
"""Training clips by the last name of `data.dir`, as published (VideoMAE says "around
240k" of Kinetics); of digits those that `python -m data.digits` makes."""

SHARE = 0.9
"""Of a device's memory that a run may fill; XLA and the driver need the rest."""

MFU = 0.4
"""Assumed share of the peak where no step was timed."""


class Memory(NamedTuple):
    """Bytes on each device: what the step is given, gives and needs meanwhile."""

    arguments: int
    outputs: int
    aliased: int  # outputs that lie where donated arguments lay
    temporary: int

    @property
    def total(self) -> int:
        """At the peak, as XLA lays it out."""
        return self.arguments + self.outputs - self.aliased + self.temporary


def memory_of(compiled) -> Memory:
    """XLA's analysis of a compiled program."""
    found = compiled.memory_analysis()
    return Memory(
        found.argument_size_in_bytes,
        found.output_size_in_bytes,
        found.alias_size_in_bytes,
        found.temp_size_in_bytes,
    )


def compiled(config, batch_size: int, num_clips: int = 0):
    """The training step at this batch size, compiled but not run."""
    config = type(config)(config.to_dict())
    config.batch_size = batch_size
    found = program.step(config, num_clips=num_clips)
    return found.run.lower(*found.arguments()).compile()


class Plan(NamedTuple):
    """memory: at the config's batch; base, per_clip: bytes of a device whose share of
    the batch is c clips take base + c · per_clip; devices: in the mesh."""

    memory: Memory
    base: float
    per_clip: float
    devices: int

    def largest(self, memory: float) -> int:
        """The largest global batch for devices with this memory; 0: not even one."""
        room = SHARE * memory - self.base
        return max(0, math.floor(room / max(self.per_clip, 1.0))) * self.devices


def make(config, num_clips: int = 0) -> Plan:
    """Compiles the step twice, at the config's batch size and, silently, at another."""
    devices = program.mesh_of(config).size
    size = config.batch_size
    other = size // 2 // devices * devices or 2 * size
    found = memory_of(compiled(config, size, num_clips))
    with _silence():
        second = memory_of(compiled(config, other, num_clips))
    per_clip = (found.total - second.total) * devices / (size - other)
    return Plan(found, found.total - per_clip * size / devices, per_clip, devices)


@contextlib.contextmanager
def _silence():
    ours = logging.getLogger("av_mae")
    level = ours.level
    ours.setLevel(logging.WARNING)
    try:
        yield
    finally:
        ours.setLevel(level)


def clips_of(config) -> int:
    """Training clips that the config takes of its data set; 0 where none is known."""
    return config.data.limit or CLIPS.get(PurePath(config.data.dir).name, 0)


def days(seconds: float | int) -> str:
    """2.5 days, 3.1 hours or 40 minutes."""
    for unit, size in (("days", 86400), ("hours", 3600)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.1f} minutes"


def run_seconds(config, num_clips: int, clips_per_second: float) -> float | int:
    """Training alone; NaN where neither steps nor the number of clips is known."""
    clips = config.epochs * num_clips if num_clips else math.nan
    if config.steps:
        clips = config.steps * config.batch_size * config.compute.accumulate
    return clips / clips_per_second


def here() -> str:
    """The present device's name in the table; '' for a CPU or an unknown one."""
    return peaks.name_of(jax.devices()[0].device_kind)


def lines(config, plan: Plan, num_clips: int, names) -> list[str]:
    """The plan in words, for the devices of these names."""
    counts, memory = flops.multiply_adds(config, train=True), plan.memory
    total, once = sum(counts.values()), flops.per_clip(config)
    parts = ", ".join(f"{name} {n / total:.0%}" for name, n in counts.items())
    update = once * config.batch_size * config.compute.accumulate
    size = lambda x: f"{x / 1e9:.2f}"
    result = [
        f"forward pass of a clip: {total / 1e9:.2f} G multiply-adds ({parts})",
        f"training step: {once / 1e9:.1f} GFLOP a clip, {update / 1e12:.3g} TFLOP",
        f"memory of each of {plan.devices} devices, batch_size {config.batch_size} "
        f"(XLA for {jax.default_backend()}): {size(memory.total)} GB = state and batch "
        f"{size(memory.arguments)}, temporary {size(memory.temporary)}, new outputs "
        f"{size(memory.outputs - memory.aliased)}",
        f"each clip of a device's batch {size(plan.per_clip)} GB, on top of "
        f"{size(plan.base)} GB",
    ]
    for name in names:
        device = peaks.named(name)
        rate = MFU * peaks.flops(device, config.compute.dtype) * plan.devices / once
        seconds = run_seconds(config, num_clips, rate)
        time = "" if math.isnan(seconds) else f", the run {days(seconds)}"
        result.append(
            f"{plan.devices} × {name}: largest batch {plan.largest(device.memory)}; "
            f"at {MFU:.0%} of its peak (assumed) {rate:.3g} clips/s{time}"
        )
    return result


def dry_run(config, num_clips: int = 0, device: str = ""):
    """Logs the plan of a run, for `device`, else the present one, else a few.

    num_clips: of the training split, 0 where the data set is not there: then as many as
    were published. Raises ConfigError for
    what `train` would refuse, and for a device that the table does not have.
    """
    names = [device] if device else [here()] if here() else DEFAULT
    for name in names:
        peaks.named(name)
    num_clips = num_clips or clips_of(config)
    for line in lines(config, make(config, num_clips), num_clips, names):
        log.info("%s", line)


DEFAULT = ["H200", "A100-80GB", "TPU-v5e"]
