"""What devices can do at most: a table of accelerators, and a CPU measured here.

Dense matrix products without sparsity, from the makers' data sheets, in TFLOP/s for
bfloat16 and for float32 as XLA computes it by default (TF32 on NVIDIA's GPUs, bfloat16
passes on TPUs), and memory in GB.
"""

import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from av_mae import choose


class Device(NamedTuple):
    """bfloat16 and float32: products in FLOP/s; memory: bytes."""

    bfloat16: float
    float32: float
    memory: float


def _device(bfloat16: int, float32: float | int, gigabytes: int) -> Device:
    return Device(bfloat16 * 1e12, float32 * 1e12, gigabytes * 1e9)


# By the name that `--device` and `describe` use; `device_kind` of jax contains the key
# of KINDS. Chips of TPU v4 and v5p are one jax device each.
DEVICES = {
    "H200": _device(989, 494.5, 141),
    "GH200": _device(989, 494.5, 96),
    "H100": _device(989, 494.5, 80),
    "H100-PCIe": _device(756, 378, 80),
    "A100-80GB": _device(312, 156, 80),
    "A100-40GB": _device(312, 156, 40),
    "L40S": _device(362, 183, 48),
    "L40": _device(181, 90.5, 48),
    "L4": _device(121, 60, 24),
    "RTX4090": _device(165, 82.6, 24),
    "TPU-v4": _device(275, 275, 32),
    "TPU-v5e": _device(197, 197, 16),
    "TPU-v5p": _device(459, 459, 95),
    "TPU-v6e": _device(918, 918, 32),
}

# What jax calls a device (a part of it, in lower case, the first that fits).
KINDS = {
    "gh200": "GH200",
    "h200": "H200",
    "h100 pcie": "H100-PCIe",
    "h100": "H100",
    "a100-sxm4-80gb": "A100-80GB",
    "a100 80gb": "A100-80GB",
    "a100": "A100-40GB",
    "l40s": "L40S",
    "l40": "L40",
    "nvidia l4": "L4",
    "rtx 4090": "RTX4090",
    "tpu v4": "TPU-v4",
    "tpu v5 lite": "TPU-v5e",
    "tpu v5e": "TPU-v5e",
    "tpu v5p": "TPU-v5p",
    "tpu v5": "TPU-v5p",
    "tpu v6": "TPU-v6e",
}


def name_of(device_kind: str) -> str:
    """The name in DEVICES of what jax calls the device; '' if it is none of them."""
    kind = device_kind.lower()
    return next((name for part, name in KINDS.items() if part in kind), "")


def named(name: str) -> Device:
    """The device of the table; ConfigError for another name."""
    return choose("device", name, DEVICES)


def flops(device: Device, dtype: str) -> float:
    """Its peak in FLOP/s for products of this type (config.compute.dtype)."""
    return device.bfloat16 if dtype == "bfloat16" else device.float32


class Product:
    """A square matrix product of this device, timed again and again: its rate."""

    def __init__(self, n: int = 4096, dtype: str = "float32"):
        self.n = n
        self._x = jnp.ones((n, n), dtype)
        self._run = jax.jit(lambda x: x @ x)
        self._run(self._x).block_until_ready()
        self.rates: list[float] = []

    def measure(self) -> float:
        """FLOP/s of one product, now."""
        start = time.perf_counter()
        self._run(self._x).block_until_ready()
        self.rates.append(2 * self.n**3 / (time.perf_counter() - start))
        return self.rates[-1]

    @property
    def rate(self) -> float:
        """The median of all measurements, FLOP/s."""
        return float(np.median(self.rates))
