"""What a train step costs on TPUs and GPUs, as their compilers estimate it.

The compilers run without a TPU or GPU; nothing here is measured.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import math
import pathlib
import re
import tempfile
from typing import Any, NamedTuple

import ml_collections

from jepa_jax import objectives
from jepa_jax.planning import chips, hlo, topologies
from jepa_jax.training import program as program_lib
from jepa_jax.training import sharding

NOTE = "compiler estimate, not measured"

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
    compiled = lowered.compile(
      compiler_options=topologies.compiler_options(devices[0])
    )
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
    flops: operations; on GPUs, those of matrix products and attention.
    accessed: bytes that operations read and write, on the chip or off it, as
      XLA counts them; on GPUs, memory.
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
    devices: to compile for, of one topology.

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
    memory = hlo.memory_traffic(compiled.text)
    analysis = compiled.executable.cost_analysis()
    if analysis is None:  # for a GPU that is not there
      return Cost(hlo.product_flops(compiled.text), memory, memory)
    return Cost(analysis["flops"], analysis["bytes accessed"], memory)

  networks = objectives.load(config.objective).from_config(config).networks
  networks = [name for name in networks if "depth" in config.get(name, {})]
  every = config.compute.remat_every if config.compute.remat != "none" else 1
  fewest = fewest_blocks(config, every)
  base = {name: fewest if name == "encoder" else 2 for name in networks}
  least = rest = shallow(base)
  parts = {}
  for name, depth in base.items():
    block = (shallow(base | {name: depth + every}) - least) * (1 / every)
    apart = 0 if name == "encoder" else depth
    parts[name] = block * (config[name].depth - apart)
    rest -= block * (depth - apart)
  parts["rest"] = rest
  return {name: cost * config.accumulate_steps for name, cost in parts.items()}


def fewest_blocks(config: ml_collections.ConfigDict, every: int) -> int:
  """The least depth of the encoder that the objective takes.

  One that averages blocks needs as many; so it is asked.

  Args:
    config: see jepa_jax.config.
    every: the depth is a multiple of it.
  """
  objective = objectives.load(config.objective)
  c = config.copy_and_resolve_references()
  for depth in range(every, config.encoder.depth, every):
    c.encoder.depth = depth
    with contextlib.suppress(ValueError):
      objective.from_config(c)
      return depth
  return every * max(1, config.encoder.depth // every)


def bound(
  parts: dict[str, Cost], link_bytes: float, network_bytes: float, chip: Any
) -> tuple[float, str]:
  """The least seconds of a step, and what sets them.

  The parts of a step follow each other, and each takes the time of its
  operations or of its traffic with main memory, whichever is longer.
  Communication may hide behind all of them.

  Args:
    parts: see costs.
    link_bytes: that a device receives within its slice or host.
    network_bytes: that it receives from other hosts.
    chip: see planning.chips.

  Returns:
    (seconds, "compute", "memory", "links" or "network").

  Reference: Williams, Waterman and Patterson 2009, "Roofline",
    doi:10.1145/1498765.1498785.
  """
  compute = [part.flops / chip.bfloat16_flops for part in parts.values()]
  memory = [part.memory / chip.hbm_bandwidth for part in parts.values()]
  seconds = sum(map(max, compute, memory))
  limit = "compute" if sum(compute) >= sum(memory) else "memory"
  links = link_bytes / chip.link_bandwidth
  network = network_bytes and network_bytes / chip.network_bandwidth
  return max((seconds, limit), (links, "links"), (network, "network"))


def held(memory: Any) -> Row:
  """The bytes of a device that a program holds, of its memory_analysis.

  total_bytes is the most that is alive at once, the chip's own memory (at most
  128 MiB of buffers) included and gaps between buffers not (some 2 %, by the
  reports of --xla_dump_to); temporary_bytes is what of it is no argument and no
  output. temp_size_in_bytes would not do: libtpu 0.0.42 counts up to half more
  there than its buffer assignment holds, and for ViT-H/14 on v4:2x2x4, which
  fits (see README), more than a chip has. The compiler of GPUs states no peak,
  and its temporary buffers lie in one allocation of that size.
  """
  kept = memory.argument_size_in_bytes + memory.output_size_in_bytes
  kept -= memory.alias_size_in_bytes
  peak = getattr(memory, "peak_memory_in_bytes", 0)
  peak = peak or kept + memory.temp_size_in_bytes
  return {
    "argument_bytes": memory.argument_size_in_bytes,
    "temporary_bytes": peak - kept,
    "output_bytes": memory.output_size_in_bytes,
    "donated_bytes": memory.alias_size_in_bytes,
    "total_bytes": peak,
  }


def known(config: ml_collections.ConfigDict, topology: str) -> Row:
  """What is known of a step before it is compiled.

  Args:
    config: see jepa_jax.config.
    topology: see topologies.devices_of.

  Returns:
    The first values of a row of `step`, with state_bytes of a device, and
    least_seconds, those of the operations that the model needs.

  Raises:
    ValueError: the config or the topology is wrong, or the chip is unknown.
  """
  devices = topologies.devices_of(topology)
  import jax

  chip = chips.find(devices[0])
  if chip is None or chip.hbm_bytes is None:
    raise ValueError(
      f"nothing is known of the chip {devices[0].device_kind} of {topology}; "
      "add it to planning/chips.py."
    )
  host = topologies.per_host(topology)
  if host and len(devices) > host and chip.network_bandwidth is None:
    raise ValueError(
      f"{topology} has {len(devices) // host} hosts, and how fast {chip.name} "
      f"talk between hosts is not known; give one host, such as "
      f"{topology.partition('x')[0]}."
    )
  mesh = sharding.make_mesh(config.mesh, devices)
  program = program_lib.build(config, mesh)
  share = lambda s: math.prod(s.sharding.shard_shape(s.shape))
  needed = program.objective.flops()
  needed = needed and needed * config.batch_size / len(devices)
  return {
    "topology": topology,
    "chips": len(devices) // chip.devices,
    "devices": len(devices),
    "mesh": dict(mesh.shape),
    "remat": config.compute.remat,
    "remat_every": config.compute.remat_every,
    "accumulate_steps": config.accumulate_steps,
    "hbm_bytes": topologies.usable_bytes(devices[0], chip),
    "state_bytes": sum(
      share(s) * s.dtype.itemsize for s in jax.tree.leaves(program.state_spec)
    ),
    "model_flops": needed,
    "least_seconds": needed and needed / chip.bfloat16_flops,
    "note": NOTE,
  }


def step(
  config: ml_collections.ConfigDict,
  topology: str,
  say: Callable[[Row], None] = lambda row: None,
) -> Row:
  """What one step and the whole run cost on a slice or on GPUs.

  Args:
    config: see jepa_jax.config.
    topology: see topologies.devices_of.
    say: called with what `known` returns, before the first compilation.

  Returns:
    A row; see docs/planning.md. Bytes, operations and collectives are of one
    device.
  """
  row = known(config, topology)
  say(row)
  if row["state_bytes"] > row["hbm_bytes"]:  # the least that it needs
    return row | {"fits": False, "total_bytes": row["state_bytes"]}
  devices = topologies.devices_of(topology)
  chip = chips.find(devices[0])
  try:
    compiled = compile_step(config, devices)
  except DoesNotFit as error:
    return row | {
      "fits": False,
      "total_bytes": error.needs,
      "hbm_bytes": error.has or row["hbm_bytes"],
    }
  row |= held(compiled.executable.memory_analysis())
  row["fits"] = row["total_bytes"] <= row["hbm_bytes"]
  if not row["fits"]:
    return row
  talk = hlo.collectives(compiled.text, topologies.per_host(topology))
  parts = costs(config, devices)
  total = functools.reduce(Cost.__add__, parts.values())
  seconds, limit = bound(
    parts, sum(c.bytes for c in talk), sum(c.network_bytes for c in talk), chip
  )
  steps = compiled.program.total_steps
  hours = seconds * steps / 3600
  needed = row["model_flops"]
  return row | {
    "compiled_flops": total.flops,
    "flops_ratio": needed and total.flops / needed,
    "bytes_accessed": total.accessed,
    "memory_bytes": total.memory,
    "parts": {name: dataclasses.asdict(p) for name, p in parts.items()},
    "collectives": _by_kind(talk),
    "bound_seconds": seconds,
    "limited_by": limit,
    "images_per_second_per_chip": config.batch_size / seconds / row["chips"],
    "utilisation": needed and needed / seconds / chip.bfloat16_flops,
    "steps": steps,
    "hours": hours,
    "chip_hours": hours * row["chips"],
  }


def _by_kind(talk: list[Any]) -> list[Row]:
  """Sums collectives of a kind and type."""
  sums: dict[tuple[str, str], Row] = {}
  for c in talk:
    key = (c.kind, " ".join(c.dtypes))
    row = sums.setdefault(
      key,
      {
        "kind": c.kind,
        "dtype": key[1],
        "bytes": 0.0,
        "network_bytes": 0.0,
        "times": 0,
      },
    )
    row["bytes"] += c.bytes
    row["network_bytes"] += c.network_bytes
    row["times"] += c.times
  return sorted(
    sums.values(), key=lambda row: -row["bytes"] - row["network_bytes"]
  )
