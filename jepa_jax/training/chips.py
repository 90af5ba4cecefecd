"""Peak speeds of accelerators, as their makers state them."""

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
    source: where the figure stands.
  """

  name: str
  pattern: str
  bfloat16_flops: float
  source: str


_TPU = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://resources.nvidia.com/, data sheet of the "

# Dense speeds: data sheets that state twice as much count zeros. A TPU v2 or
# v3 chip and a TPU7x chip are two JAX devices each, so each has half.
CHIPS = (
  Chip("TPU v2", r"tpu v2", 45e12 / 2, _TPU + "v2"),
  Chip("TPU v3", r"tpu v3", 123e12 / 2, _TPU + "v3"),
  Chip("TPU v4", r"tpu v4", 275e12, _TPU + "v4"),
  Chip("TPU v5e", r"tpu v5 ?(lite|e)", 197e12, _TPU + "v5e"),
  Chip("TPU v5p", r"tpu v5p?", 459e12, _TPU + "v5p"),
  Chip("TPU v6e", r"tpu v6 ?(lite|e)", 918e12, _TPU + "v6e"),
  Chip("TPU7x", r"tpu ?(v?7x?)", 2307e12 / 2, _TPU + "tpu7x"),
  Chip("A100", r"nvidia a100.*", 312e12, _NVIDIA + "A100"),
  Chip("H100 PCIe", r"nvidia h100 pcie.*", 756e12, _NVIDIA + "H100"),
  Chip("H100 NVL", r"nvidia h100 nvl.*", 835e12, _NVIDIA + "H100"),
  Chip("H100 SXM", r"nvidia (h100.*|gh200.*)", 989e12, _NVIDIA + "H100"),
  Chip("H200 NVL", r"nvidia h200 nvl.*", 835e12, _NVIDIA + "H200"),
  Chip("H200 SXM", r"nvidia h200.*", 989e12, _NVIDIA + "H200"),
  Chip("B200", r"nvidia b200.*", 2250e12, _NVIDIA + "HGX B200"),
  Chip("L4", r"nvidia l4", 121e12, _NVIDIA + "L4"),
  Chip("L40S", r"nvidia l40s", 362e12, _NVIDIA + "L40S"),
)


def find(device: Any) -> Chip | None:
  """The chip of a jax.Device; None for one that is not listed, as a CPU."""
  kind = device.device_kind
  return next(
    (c for c in CHIPS if re.fullmatch(c.pattern, kind, re.IGNORECASE)), None
  )
