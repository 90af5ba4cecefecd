"""What a train step costs on a TPU slice, as its compiler estimates it.

The compiler runs without a TPU; nothing here is measured.
"""

import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import ml_collections

from jepa_jax import objectives
from jepa_jax.planning import chips, hlo
from jepa_jax.training import program as program_lib
from jepa_jax.training import sharding

NOTE = "compiler estimate, not measured"

# Family -> shapes of its slices, smallest first. Others compile as well.
# Reference: https://cloud.google.com/tpu/docs/system-architecture-tpu-vm.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
TOPOLOGIES = {
  "v4": _CUBES,
  "v5e": _FLAT,
  "v5p": _CUBES,
  "v6e": _FLAT,
  "tpu7x": _CUBES,
}
Row = dict[str, Any]


class DoesNotFit(Exception):
  """The compiler ran out of a chip's memory.

  Attributes:
    needs: bytes, None where the compiler does not say.
    has: bytes.
  """

  def __init__(self, needs: float | None, has: float | None):
    super().__init__("the step does not fit in the memory of a chip")
    self.needs, self.has = needs, has


def devices_of(topology: str) -> list[Any]:
  """Devices of a slice that is not there.

  Args:
    topology: "family:shape", such as "v5e:8x8".

  Returns:
    Devices to compile for.

  Raises:
    ValueError: libtpu is missing, or does not know the topology.
  """
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
  family, _, shape = topology.partition(":")
  options: dict[str, Any] = {}
  if family == "v4":
    # Both cores of a chip work as one device, as they do on such a host.
    options["chip_config_name"] = "megacore"
  if set(shape.split("x")) == {"1"}:
    # Older compilers take four chips a host for granted.
    options["chips_per_host_bounds"] = (1, 1, 1)
  try:
    found = topologies.get_topology_desc(topology, platform="tpu", **options)
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      f'unknown topology "{topology}" ({str(error).splitlines()[0]}); known: '
      f"{known_topologies()}."
    ) from None
  return list(found.devices)


def known_topologies() -> str:
  """All of TOPOLOGIES, for messages."""
  return ", ".join(
    f"{family}:{shape}"
    for family, shapes in TOPOLOGIES.items()
    for shape in shapes
  )


class Compiled(NamedTuple):
  """A compiled train step: its Program, what JAX made of it, its HLO text."""

  program: Any
  executable: Any
  text: str


def compile_step(
  config: ml_collections.ConfigDict, devices: list[Any]
) -> Compiled:
  """Compiles the train step of a config for some devices.

  Raises:
    DoesNotFit: it needs more memory than a device has.
  """
  import jax

  mesh = sharding.make_mesh(config.mesh, devices)
  program = program_lib.build(config, mesh)
  lowered = program.step.lower(program.state_spec, program.batch_spec)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise DoesNotFit(*needed_and_available(str(error))) from None
  try:
    text = compiled.as_text()
  except jax.errors.JaxRuntimeError:
    text = _dumped(lowered)
  return Compiled(program, compiled, text)


def _dumped(lowered: Any) -> str:
  """What as_text would say, by compiling once more.

  jaxlib 0.10 cannot read the asynchronous operations of libtpu's programs for
  v6e and TPU7x, while libtpu itself writes them down.
  """
  with tempfile.TemporaryDirectory() as folder:
    lowered.compile(
      compiler_options={
        "xla_dump_to": folder,
        "xla_dump_hlo_as_text": True,
        "xla_dump_hlo_module_re": "jit_step",
      }
    )
    # Without "before" or "after" something else in its name.
    (path,) = pathlib.Path(folder).glob("*jit_step*.after_optimizations.txt")
    return path.read_text()


def needed_and_available(message: str) -> list[float | None]:
  """Bytes needed and available, of the compiler's message."""
  units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  found = re.findall(r"([\d.]+)([KMGT])\b", message)
  sizes = [float(number) * units[unit] for number, unit in found[:2]]
  return [*sizes, None, None][:2]


@dataclasses.dataclass(frozen=True)
class Cost:
  """Of one device and one step.

  Attributes:
    flops: operations.
    accessed: bytes that operations read and write, on the chip or off it, as
      XLA counts them.
    memory: bytes to and from the device's main memory; see hlo.memory_traffic.
  """

  flops: float
  accessed: float
  memory: float

  def __add__(self, other: "Cost") -> "Cost":
    return Cost(
      self.flops + other.flops,
      self.accessed + other.accessed,
      self.memory + other.memory,
    )

  def __mul__(self, factor: float) -> "Cost":
    return Cost(
      self.flops * factor, self.accessed * factor, self.memory * factor
    )

  def __sub__(self, other: "Cost") -> "Cost":
    return self + other * -1


def costs(
  config: ml_collections.ConfigDict, devices: list[Any]
) -> dict[str, Cost]:
  """Costs of the blocks of every network, and of the rest of a step.

  XLA counts the body of a loop once, however often it runs. So shallow steps
  are compiled without loops, one of them with more blocks for each network;
  what a block more costs, times the blocks, is taken for the depth of the
  config. Beside the encoder, a network's first and last blocks, where less is
  computed, stay in the rest. Microbatches are taken to cost the same, the
  optimizer included, which they share.

  Args:
    config: see jepa_jax.config; a network whose section there, of the network's
      name, has a `depth` counts as one of blocks.
    devices: to compile for.

  Returns:
    Network -> its cost, and "rest", of one device.
  """

  def shallow(depths: dict[str, int]) -> Cost:
    c = config.copy_and_resolve_references()
    with c.unlocked():
      for name, depth in depths.items():
        c[name].depth = depth
      c.compute.scan = False
      c.evaluations = ml_collections.ConfigDict()  # may ask for more layers
      c.batch_size //= c.accumulate_steps
      c.accumulate_steps = 1
    compiled = compile_step(c, devices)
    analysis = compiled.executable.cost_analysis()
    memory = hlo.memory_traffic(compiled.text)
    return Cost(analysis["flops"], analysis["bytes accessed"], memory)

  networks = objectives.load(config.objective).from_config(config).networks
  networks = [name for name in networks if "depth" in config.get(name, {})]
  every = config.compute.remat_every if config.compute.remat != "none" else 1
  base = {name: every if name == "encoder" else 2 for name in networks}
  least = rest = shallow(base)
  parts = {}
  for name, depth in base.items():
    block = (shallow(base | {name: depth + every}) - least) * (1 / every)
    apart = 0 if name == "encoder" else depth
    parts[name] = block * (config[name].depth - apart)
    rest -= block * (depth - apart)
  parts["rest"] = rest
  return {name: cost * config.accumulate_steps for name, cost in parts.items()}


def bound(
  parts: dict[str, Cost], link_bytes: float, chip: Any
) -> tuple[float, str]:
  """The least seconds of a step, and what sets them.

  The parts of a step follow each other, and each takes the time of its
  operations or of its traffic with main memory, whichever is longer.
  Communication may hide behind all of them.

  Args:
    parts: see costs.
    link_bytes: that a device receives.
    chip: see planning.chips.

  Returns:
    (seconds, "compute", "memory" or "links").

  Reference: Williams, Waterman and Patterson 2009, "Roofline",
    doi:10.1145/1498765.1498785.
  """
  compute = [part.flops / chip.bfloat16_flops for part in parts.values()]
  memory = [part.memory / chip.hbm_bandwidth for part in parts.values()]
  seconds = sum(map(max, compute, memory))
  links = link_bytes / chip.link_bandwidth
  if links > seconds:
    return links, "links"
  return seconds, "compute" if sum(compute) >= sum(memory) else "memory"


def held(memory: Any) -> Row:
  """The bytes of a device that a program holds, of its memory_analysis.

  total_bytes is the most that is alive at once, the chip's own memory (at most
  128 MiB of buffers) included and gaps between buffers not (some 2 %, by the
  reports of --xla_dump_to); temporary_bytes is what of it is no argument and no
  output. temp_size_in_bytes would not do: libtpu 0.0.42 counts up to half more
  there than its buffer assignment holds, and for ViT-H/14 on v4:2x2x4, which
  fits (see README), more than a chip has.
  """
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
  kept -= memory.alias_size_in_bytes
  return {
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": memory.peak_memory_in_bytes - kept,
    "output_bytes": memory.output_size_in_bytes,
    "donated_bytes": memory.alias_size_in_bytes,
    "total_bytes": memory.peak_memory_in_bytes,
  }


def step(config: ml_collections.ConfigDict, topology: str) -> Row:
  """What one step and the whole run cost on a slice.

  Args:
    config: see jepa_jax.config.
    topology: see devices_of.

  Returns:
    A row; see README. Bytes, operations and collectives are of one device.
  """
  devices = devices_of(topology)
  chip = chips.find(devices[0])
  if chip is None or chip.hbm_bytes is None:
    raise ValueError(
      f"nothing is known of the chip {devices[0].device_kind} of {topology}; "
      "add it to planning/chips.py."
    )
  mesh = sharding.make_mesh(config.mesh, devices)
  row: Row = {
    "topology": topology,
    "chips": len(devices) // chip.devices,
    "devices": len(devices),
    "mesh": dict(mesh.shape),
    "remat": config.compute.remat,
    "remat_every": config.compute.remat_every,
    "accumulate_steps": config.accumulate_steps,
    "hbm_bytes": chip.hbm_bytes,
    "note": NOTE,
  }
  try:
    compiled = compile_step(config, devices)
  except DoesNotFit as error:
    return row | {
      "fits": False,
      "total_bytes": error.needs,
      "hbm_bytes": error.has or chip.hbm_bytes,
    }
  program, memory = compiled.program, compiled.executable.memory_analysis()
  row |= {"fits": True} | held(memory)
  talk = hlo.collectives(compiled.text)
  parts = costs(config, devices)
  needed = program.objective.flops()
  needed = needed and needed * config.batch_size
  total = functools.reduce(Cost.__add__, parts.values())
  seconds, limit = bound(parts, sum(c.bytes for c in talk), chip)
  hours = seconds * program.total_steps / 3600
  return row | {
    "model_flops": needed and needed / len(devices),
    "compiled_flops": total.flops,
    "flops_ratio": needed and total.flops * len(devices) / needed,
    "bytes_accessed": total.accessed,
    "memory_bytes": total.memory,
    "parts": {name: dataclasses.asdict(p) for name, p in parts.items()},
    "collectives": _by_kind(talk),
    "bound_seconds": seconds,
    "limited_by": limit,
    "images_per_second_per_chip": config.batch_size / seconds / row["chips"],
    "utilisation": needed
    and needed / len(devices) / seconds / chip.bfloat16_flops,
    "steps": program.total_steps,
    "hours": hours,
    "chip_hours": hours * row["chips"],
  }


def _by_kind(talk: list[Any]) -> list[Row]:
  """Sums collectives of a kind and type."""
  sums: dict[tuple[str, str], Row] = {}
  for c in talk:
    key = (c.kind, " ".join(c.dtypes))
    row = sums.setdefault(
      key, {"kind": c.kind, "dtype": key[1], "bytes": 0.0, "times": 0}
    )
    row["bytes"] += c.bytes
    row["times"] += c.times
  return sorted(sums.values(), key=lambda row: -row["bytes"])
