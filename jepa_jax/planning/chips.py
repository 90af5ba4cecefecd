"""Peak speeds and memories of accelerators, as their makers state them."""

import dataclasses
import re
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one JAX device of a kind can do.

  Attributes:
    name: as the maker calls it.
    pattern: matches jax.Device.device_kind in full, upper or lower case.
    bfloat16_flops: operations a second of dense matrix products in bfloat16,
      accumulated in float32, at the boost clock; a multiplication and an
      addition being two.
    source: where the figures stand.
    hbm_bytes: of memory; None where planning does not need it.
    hbm_bandwidth: bytes a second between memory and the chip.
    link_bandwidth: bytes a second that all links to other chips of a slice, or
      of a GPU's host, carry in one direction, half of what is stated as
      bidirectional.
    network_bandwidth: bytes a second that a GPU's share of its host's network
      carries in one direction; None where the maker states none.
    devices: JAX devices a chip; every figure above is of one of them.
  """

  name: str
  pattern: str
  bfloat16_flops: float
  source: str
  hbm_bytes: float | None = None
  hbm_bandwidth: float | None = None
  link_bandwidth: float | None = None
  network_bandwidth: float | None = None
  devices: int = 1


_TPU = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://resources.nvidia.com/, data sheet of the "

# Dense speeds: data sheets that state twice as much count zeros. A TPU v2 or
# v3 chip and a TPU7x chip are two JAX devices each, so each has half.
CHIPS = (
  Chip("TPU v2", r"tpu v2", 45e12 / 2, _TPU + "v2", devices=2),
  Chip("TPU v3", r"tpu v3", 123e12 / 2, _TPU + "v3", devices=2),
  Chip(
    "TPU v4",
    r"tpu v4",
    275e12,
    _TPU + "v4",
    hbm_bytes=32 * 2**30,
    hbm_bandwidth=1200e9,
    # Of all-reduce in a pod, a chip; on v5e and v6e that is the links' sum.
    link_bandwidth=1.1e15 / 4096,
  ),
  Chip(
    "TPU v5e",
    r"tpu v5 ?(lite|e)",
    197e12,
    _TPU + "v5e",
    hbm_bytes=16 * 2**30,
    hbm_bandwidth=819e9,
    link_bandwidth=400e9 / 2,
  ),
  Chip(
    "TPU v5p",
    r"tpu v5p?",
    459e12,
    _TPU + "v5p",
    hbm_bytes=95 * 2**30,
    hbm_bandwidth=2765e9,
    link_bandwidth=1200e9 / 2,
  ),
  Chip(
    "TPU v6e",
    r"tpu v6 ?(lite|e)",
    918e12,
    _TPU + "v6e",
    hbm_bytes=32 * 2**30,
    hbm_bandwidth=1638e9,
    link_bandwidth=800e9 / 2,
  ),
  Chip(
    "TPU7x",
    r"tpu ?(v?7x?)",
    2307e12 / 2,
    _TPU + "tpu7x",
    hbm_bytes=192 * 2**30 / 2,
    hbm_bandwidth=7380e9 / 2,
    link_bandwidth=1200e9 / 2 / 2,
    devices=2,
  ),
  Chip(
    "A100",
    r"nvidia a100.*",
    312e12,
    _NVIDIA + "A100; of a host's links, DGX A100",
    # Of the 80 GB kind; of all GPUs, bytes as the driver states them.
    hbm_bytes=85100068864,
    hbm_bandwidth=2039e9,
    link_bandwidth=600e9 / 2,
    network_bandwidth=200e9 / 8,
  ),
  Chip("H100 PCIe", r"nvidia h100 pcie.*", 756e12, _NVIDIA + "H100"),
  Chip("H100 NVL", r"nvidia h100 nvl.*", 835e12, _NVIDIA + "H100"),
  Chip(
    "H100 SXM",
    r"nvidia (h100.*|gh200.*)",
    989e12,
    _NVIDIA + "H100; of a host's links, DGX H100",
    hbm_bytes=84942979072,
    hbm_bandwidth=3352e9,
    link_bandwidth=900e9 / 2,
    network_bandwidth=400e9 / 8,
  ),
  Chip("H200 NVL", r"nvidia h200 nvl.*", 835e12, _NVIDIA + "H200"),
  Chip(
    "H200 SXM",
    r"nvidia h200.*",
    989e12,
    _NVIDIA + "H200; of a host's links, DGX H200",
    hbm_bytes=151397597184,
    hbm_bandwidth=4800e9,
    link_bandwidth=900e9 / 2,
    network_bandwidth=400e9 / 8,
  ),
  Chip(
    "B200",
    r"nvidia b200.*",
    2250e12,
    _NVIDIA + "HGX B200; of a host's links, DGX B200",
    hbm_bytes=191514411008,
    hbm_bandwidth=7700e9,
    link_bandwidth=1800e9 / 2,
    network_bandwidth=400e9 / 8,
  ),
  Chip("L4", r"nvidia l4", 121e12, _NVIDIA + "L4"),
  # The last two have PCIe 4.0 x16 alone.
  Chip(
    "L40S",
    r"nvidia l40s",
    362e12,
    _NVIDIA + "L40S",
    hbm_bytes=46068 * 2**20,
    hbm_bandwidth=864e9,
    link_bandwidth=64e9 / 2,
  ),
  Chip(
    "RTX 4090",
    r"nvidia geforce rtx 4090",
    165.2e12,
    "NVIDIA Ada GPU architecture, white paper, appendix A",
    hbm_bytes=24564 * 2**20,
    hbm_bandwidth=1008e9,
    link_bandwidth=64e9 / 2,
  ),
)


def find(device: Any) -> Chip | None:
  """The chip of a jax.Device; None for one that is not listed, as a CPU."""
  kind = device.device_kind
  return next(
    (c for c in CHIPS if re.fullmatch(c.pattern, kind, re.IGNORECASE)), None
  )
