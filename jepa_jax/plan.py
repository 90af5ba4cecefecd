"""Plans a run on TPUs or NVIDIA GPUs, with none at hand.

    python -m jepa_jax.plan --config FILE:variant --topology v5e:8x8
    python -m jepa_jax.plan --config FILE:variant --topology h100:8x4

compiles the very step that training runs, with the compiler of that hardware,
and says what a chip holds, computes, reads and sends, and the least time that
takes. Every figure is the compiler's estimate or follows from one: none is
measured. Needs the extra "tpu", or "gpu-plan". What needs no compiler is said
before it starts.
"""

import argparse
from collections.abc import Callable, Iterator
import json
import math
import sys

import ml_collections
import tqdm

from jepa_jax import command, keys
from jepa_jax.planning import estimate, topologies
from jepa_jax.training import sharding

_GIB = 2**30


def search(
  config: ml_collections.ConfigDict,
  topology: str,
  say: Callable[[estimate.Row], None] = lambda row: None,
) -> Iterator[estimate.Row]:
  """The smallest slice of a family that fits, and what is best on it.

  Slices grow until one holds the step with its state split, over eight devices
  or over all, and everything computed again. On that one follow what computes
  less again, and a copy of the state on every device.

  Args:
    config: see jepa_jax.config; its mesh and remat are replaced.
    topology: the largest slice to try.
    say: see estimate.step.

  Yields:
    A row for every try, as plan does.
  """
  family, shapes = slices(topology)

  def attempt(
    shape: str, fsdp: int, remat: str, every: int = 1
  ) -> estimate.Row:
    c = config.copy_and_resolve_references()
    with c.unlocked():
      c.mesh.update(data=-1, fsdp=fsdp)
      c.compute.update(remat=remat, remat_every=every)
    return estimate.step(c, f"{family}:{shape}", say)

  images = config.batch_size // config.accumulate_steps
  for shape in shapes:
    devices = len(topologies.devices_of(f"{family}:{shape}"))
    if images % devices:
      continue
    for fsdp in sorted({min(8, devices), devices}):
      row = attempt(shape, fsdp, "full")
      yield row
      if row["fits"]:
        yield attempt(shape, fsdp, "full", 2)
        for remat in ("dots", "products", "none"):
          yield attempt(shape, fsdp, remat)
        if fsdp > 1:
          yield attempt(shape, 1, "full")
        return


def slices(topology: str) -> tuple[str, tuple[str, ...]]:
  """The family of a topology, and its shapes up to that one, smallest first.

  Raises:
    ValueError: it is not one of topologies.TOPOLOGIES.
  """
  family, _, largest = topology.partition(":")
  shapes = topologies.TOPOLOGIES.get(family, ())
  if largest not in shapes:
    raise ValueError(
      f'--search grows slices up to a known topology, and "{topology}" is '
      f"none; known: {topologies.known_topologies()}."
    )
  return family, shapes[: shapes.index(largest) + 1]


def best(rows: list[estimate.Row]) -> estimate.Row | None:
  """The row of those that fit with the most images a second."""
  rows = [row for row in rows if row["fits"]]
  speed = lambda row: row["images_per_second_per_chip"] * row["chips"]
  return max(rows, key=speed, default=None)


def show(rows: list[estimate.Row]) -> str:
  """A table, a line a row."""
  names = ("topology", "mesh", "remat", "args", "temps", "total", "HBM GiB")
  names += ("FLOPs", "bound s", "limit", "MFU", "img/s/chip", "hours")
  table = [(*names, "chip-hours")]
  for row in rows:
    remat = row["remat"]
    if row["remat_every"] > 1 and remat != "none":
      remat += f"/{row['remat_every']}"
    mesh = "x".join(str(n) for n in row["mesh"].values())
    gib = lambda name: f"{row[name] / _GIB:.2f}" if row.get(name) else ""
    line = (row["topology"], mesh, remat, gib("argument_bytes"))
    line += (gib("temporary_bytes"), gib("total_bytes"), gib("hbm_bytes"))
    if row["fits"]:
      line += (
        f"{row['flops_ratio'] or math.nan:.3f}",
        _short(row["bound_seconds"]),
        row["limited_by"],
        f"{row['utilisation'] or math.nan:.0%}",
        _short(row["images_per_second_per_chip"]),
        _short(row["hours"]),
        _short(row["chip_hours"]),
      )
    else:
      line += ("does not fit",)
    table.append(line)
  widths = [
    max(len(line[i]) for line in table if i < len(line))
    for i in range(len(table[0]))
  ]
  return "\n".join(
    "  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths)) for line in table
  )


def _short(value: float) -> str:
  """Three digits that count, so that tiny models do not show as 0."""
  return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def details(row: estimate.Row) -> str:
  """One row in full, a line a value."""
  lines = []
  for name, value in row.items():
    if isinstance(value, float):
      value = f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}"
    elif isinstance(value, int) and not isinstance(value, bool):
      value = f"{value:,}"
    elif name == "collectives":
      value = "; ".join(
        f"{c['kind']} {c['dtype']} {c['bytes'] / 1e6:,.1f} MB"
        + f" and {c['network_bytes'] / 1e6:,.1f} MB between hosts"
        * (c["network_bytes"] > 0)
        + f" in {c['times']}"
        for c in value
      )
    elif name == "parts":
      value = "; ".join(
        f"{part} {c['flops'] / 1e12:.3g} TFLOP {c['memory'] / 1e9:.3g} GB"
        for part, c in value.items()
      )
    lines.append(f"{name:28} {value}")
  return "\n".join(lines)


def plans(arguments: argparse.Namespace) -> Iterator[estimate.Row]:
  """The rows that the command's flags ask for, one by one."""
  for topology in arguments.topology:
    if arguments.search:
      yield from search(arguments.config, topology, announce)
    else:
      yield estimate.step(arguments.config, topology, announce)


def announce(row: estimate.Row) -> None:
  """Says on standard error what is known before the compiler starts."""
  mesh = "x".join(str(n) for n in row["mesh"].values())
  text = f"{row['topology']}: {row['chips']} chips, mesh {mesh}, "
  text += f"{row['state_bytes'] / _GIB:.2f} GiB of state a device of "
  text += f"{row['hbm_bytes'] / _GIB:.1f}"
  if row["least_seconds"]:
    text += f", at least {_short(row['least_seconds'])} s a step"
  tqdm.tqdm.write(f"{text}; compiling for minutes", file=sys.stderr)


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  rows: list[estimate.Row] = []
  # All of them before the first is compiled for, which takes minutes.
  for topology in arguments.topology:
    slices(topology) if arguments.search else topologies.check(topology)
  for topology in arguments.topology * (not arguments.search):
    sharding.make_mesh(arguments.config.mesh, topologies.devices_of(topology))
  # On a terminal, a line for every row as it comes: each takes minutes.
  with tqdm.tqdm(plans(arguments), unit=" plans", disable=None) as bar:
    for row in bar:
      if not bar.disable:
        head, line = show([row]).splitlines()
        bar.write(line if rows else f"{head}\n{line}", file=sys.stderr)
      rows.append(row)
  if arguments.json:
    print(json.dumps(rows, indent=2))
    return 0
  print(f"{estimate.NOTE[0].upper()}{estimate.NOTE[1:]}.")
  print(show(rows) if len(rows) > 1 else details(rows[0]))
  if arguments.search:
    chosen = best(rows)
    print("best:\n" + details(chosen) if chosen else "nothing fits")
  return 0


if __name__ == "__main__":
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.plan",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  command.add_config_flag(flags)
  keys.add_flag(
    flags,
    "--topology",
    keys.Text("FAMILY:SHAPE", False, r"\w+:\w+"),
    action="append",
    required=True,
    metavar="FAMILY:SHAPE",
    help="a TPU slice, such as v5e:8x8, or GPUs a host x hosts, such as "
    "h100:8x4; may be given again",
  )
  flags.add_argument(
    "--search",
    action="store_true",
    help="the smallest slice of the family that fits, up to the one given, "
    "and the best mesh and remat on it",
  )
  flags.add_argument("--json", action="store_true", help="a JSON list of rows")
  command.run(main, flags)
