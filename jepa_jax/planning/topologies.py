"""Devices that are not there, for their compilers to work for.

A TPU slice is named as libtpu does, "v5e:8x8"; GPUs by how many a host has and,
where there are several, how many hosts: "h100:8", "h100:8x4".
"""

import atexit
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import tempfile
import types
from typing import Any

from jepa_jax.planning import chips

# Family -> shapes of its slices, smallest first. Others compile as well.
# Reference: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
_HOST = ("1", "2", "4", "8")
_HOSTS = (*_HOST, "8x2", "8x4", "8x8", "8x16")
TOPOLOGIES = {
  "v4": _CUBES,
  "v5e": _FLAT,
  "v5p": _CUBES,
  "v6e": _FLAT,
  "tpu7x": _CUBES,
  "a100": _HOSTS,
  "h100": _HOSTS,
  "h200": _HOSTS,
  "b200": _HOSTS,
  "l40s": _HOST,
  "rtx4090": _HOST,
}


@dataclasses.dataclass(frozen=True)
class _Gpu:
  """What XLA's compiler asks of a GPU, beside its entry in chips.CHIPS.

  Attributes:
    kind: jax.Device.device_kind.
    capability: CUDA's compute capability, major and minor.
    cores: streaming multiprocessors.
    lanes: float32 units of one.
    shared: bytes of shared memory of one; a block may have 1 KiB less.
    threads: of one, at most.
    cache: bytes of the second-level cache.
    clock: in GHz.
  """

  kind: str
  capability: tuple[int, int]
  cores: int
  lanes: int
  shared: int
  threads: int
  cache: int
  clock: float


# Reference: NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities", and
# the white papers of the architectures; as XLA's backends/gpu/target_config.
_GPUS = {
  "a100": _Gpu(
    "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 << 10, 2048, 40 << 20, 1.41
  ),
  "h100": _Gpu(
    "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 << 10, 2048, 50 << 20, 1.98
  ),
  "h200": _Gpu(
    "NVIDIA H200", (9, 0), 132, 128, 228 << 10, 2048, 50 << 20, 1.98
  ),
  "b200": _Gpu(
    "NVIDIA B200", (10, 0), 148, 128, 228 << 10, 2048, 126 << 20, 1.965
  ),
  "l40s": _Gpu(
    "NVIDIA L40S", (8, 9), 142, 128, 100 << 10, 1536, 96 << 20, 2.52
  ),
  "rtx4090": _Gpu(
    "NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 100 << 10, 1536, 72 << 20, 2.52
  ),
}

_GPU_SHAPE = r"([1-9]\d*)(?:x([1-9]\d*))?"  # GPUs of a host, hosts

# XLA times its algorithms on the GPU. Without one, all products are cuBLAS's:
# those that XLA would write itself have no tile sizes then.
_GPU_OPTIONS = {
  "xla_gpu_autotune_level": 0,
  "xla_gpu_enable_triton_gemm": False,
}

# Of a GPU's memory, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.9: the rest is for
# CUDA, cuDNN and NCCL.
_GPU_SHARE = 0.9


def devices_of(topology: str) -> list[Any]:
  """Devices of a slice, or of GPU hosts, that are not there.

  Args:
    topology: "family:shape", such as "v5e:8x8" or "h100:8x4".

  Returns:
    Devices to compile for.

  Raises:
    ValueError: the compiler is missing, or does not know the topology.
  """
  check(topology)
  family, _, shape = topology.partition(":")
  return (_gpus if family in _GPUS else _tpus)(family, shape)


def check(topology: str) -> None:
  """Raises ValueError where no compiler would know a topology."""
  family, _, shape = topology.partition(":")
  sizes = _GPU_SHAPE if family in _GPUS else r"[1-9]\d*(x\d+)*"
  if family not in TOPOLOGIES or not re.fullmatch(sizes, shape):
    hint = "give GPUs a host, and hosts if there are several; "
    raise ValueError(
      f'unknown topology "{topology}"; {hint if family in _GPUS else ""}known: '
      f"{known_topologies()}."
    )


def _tpus(family: str, shape: str) -> list[Any]:
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "planning for TPUs needs their compiler, libtpu; pip install -e '.[tpu]'."
    )
  # Nothing asks the metadata server, which only a TPU's host has.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  import jax
  from jax.experimental import topologies

  # A chip that is there is left alone.
  jax.config.update("jax_platforms", "cpu")
  options: dict[str, Any] = {}
  if family == "v4":
    # Both cores of a chip work as one device, as they do on such a host.
    options["chip_config_name"] = "megacore"
  if set(shape.split("x")) == {"1"}:
    # Older compilers take four chips a host for granted.
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    found = topologies.get_topology_desc(
      f"{family}:{shape}", platform="tpu", **options
    )
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'unknown topology "{family}:{shape}" ({str(error).splitlines()[0]}); '
      f"known: {known_topologies()}."
    ) from None
  return list(found.devices)


def _gpus(family: str, shape: str) -> list[Any]:
  match = re.fullmatch(_GPU_SHAPE, shape)
  if not any(
    importlib.util.find_spec(f"jax_plugins.{name}")
    for name in ("xla_cuda12", "xla_cuda13")
    if importlib.util.find_spec("jax_plugins")
  ):
    raise ValueError(
      "planning for GPUs needs their compiler, JAX's CUDA plugin; "
      "pip install -e '.[gpu-plan]'."
    )
  import jax
  from jax.experimental import topologies

  jax.config.update("jax_platforms", "cpu")
  found = topologies.get_topology_desc(
    topology_name=family,
    platform="cuda",
    topology=f"1x{match[2] or 1}x{match[1]}",
    target_config=_target(_GPUS[family]),
  )
  return list(found.devices)


def _target(gpu: _Gpu) -> str:
  """XLA's description of a GPU, a text proto."""
  chip = chips.find(types.SimpleNamespace(device_kind=gpu.kind))
  major, minor = gpu.capability
  # Instructions of Hopper's and Blackwell's own, "sm_90a".
  extension = "NONE" if major < 9 else "ACCELERATED_FEATURES"
  return f"""
    gpu_device_info {{
      name: "{gpu.kind}"
      cuda_compute_capability {{
        major: {major} minor: {minor} feature_extension: {extension}
      }}
      core_count: {gpu.cores}
      fpus_per_core: {gpu.lanes}
      clock_rate_ghz: {gpu.clock}
      device_memory_size: {chip.hbm_bytes:.0f}
      memory_bandwidth: {chip.hbm_bandwidth:.0f}
      l2_cache_size: {gpu.cache}
      shared_memory_per_core: {gpu.shared}
      shared_memory_per_block_optin: {gpu.shared - 1024}
      shared_memory_per_block: 49152
      threads_per_core_limit: {gpu.threads}
      threads_per_block_limit: 1024
      threads_per_warp: 32
      registers_per_core_limit: 65536
      registers_per_block_limit: 65536
      thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      block_dim_limit_x: 2147483647
      block_dim_limit_y: 65535 block_dim_limit_z: 65535
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    device_description_str: "{gpu.kind}"
  """


def known_topologies() -> str:
  """All of TOPOLOGIES, for messages."""
  return ", ".join(
    f"{family}:{shape}"
    for family, shapes in TOPOLOGIES.items()
    for shape in shapes
  )


def per_host(topology: str) -> int | None:
  """GPUs of a host; None for TPUs, whose links do not end at it."""
  family, _, shape = topology.partition(":")
  return int(shape.partition("x")[0]) if family in _GPUS else None


def compiler_options(device: Any) -> dict[str, Any]:
  """What a compiler needs to do without the devices that it compiles for."""
  if device.platform == "tpu":
    return {}
  return _GPU_OPTIONS | {"xla_gpu_kernel_cache_file": _kernel_cache()}


@functools.cache
def _kernel_cache() -> str:
  """A file for GPU kernels: most are those of the step compiled before."""
  folder = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return os.path.join(folder, "kernels")


def usable_bytes(device: Any, chip: chips.Chip) -> float:
  """Of a device's memory, what JAX may fill."""
  return chip.hbm_bytes * (1 if device.platform == "tpu" else _GPU_SHARE)
