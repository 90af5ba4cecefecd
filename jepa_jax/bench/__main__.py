"""The command; see jepa_jax.bench."""

import argparse
import json
import os
import sys
from typing import Any

from jepa_jax import bench, command, config_table, keys
from jepa_jax.bench import data, loop, masks, step


def use_cores(count: int) -> int:
  """Limits this process to some cores, for all threads that start later.

  To be called before TensorFlow is imported, which sizes its pools by it.

  Args:
    count: cores; 0 for all that the process may use.

  Returns:
    How many it has now.
  """
  if not hasattr(os, "sched_setaffinity"):
    raise ValueError("limiting a process to some cores needs Linux.")
  allowed = sorted(os.sched_getaffinity(0))
  if not 0 <= count <= len(allowed):
    raise ValueError(f"--cores is {count}; this process has {len(allowed)}.")
  chosen = allowed[-count:]  # all for 0; the first one serves interrupts
  os.sched_setaffinity(0, chosen)
  return len(chosen)


def show(rows: list[bench.Row]) -> str:
  """A table of rows; a single row as a line a value."""

  def text(value: Any) -> str:
    if isinstance(value, float):
      return f"{value:,.0f}" if 1000 <= value < 1e7 else f"{value:.4g}"
    return "" if value is None else str(value)

  names = list(dict.fromkeys(name for row in rows for name in row))
  if len(rows) == 1:
    width = max(map(len, names))
    return "\n".join(f"{n:{width}}  {text(rows[0][n])}" for n in names)
  cells = [names] + [[text(row.get(n)) for n in names] for row in rows]
  widths = [max(map(len, column)) for column in zip(*cells)]
  return "\n".join(
    "  ".join(f"{cell:>{w}}" for cell, w in zip(line, widths)) for line in cells
  )


class _Grid(keys.Sides):
  """Patches, written as HxW."""

  def __str__(self) -> str:
    return f"HxW, each {self.kind}"

  def parse(self, text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def parser(what: str) -> argparse.ArgumentParser:
  """The flags of one benchmark, of "masks", "data", "step" or "loop"."""
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.bench",
    description=bench.__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )

  def add_number(name: str, least: int, **options: Any) -> None:
    keys.add_flag(flags, name, keys.whole(least, 10**7), **options)

  flags.add_argument("what", choices=("masks", "data", "step", "loop"))
  flags.add_argument("--json", action="store_true", help="a JSON list of rows")
  add_number("--rounds", 1, default=5, help="of timing")
  if what == "loop":
    command.add_config_flag(flags)
    add_number("--steps", 0, default=0, help="a round; 0: as many as a log row")
    return flags
  if what == "step":
    command.add_config_flag(flags)
    add_number("--steps", 1, default=4, help="a round")
    keys.add_flag(
      flags,
      "--profile",
      keys.FOLDER,
      metavar="DIR",
      help="writes a trace of further steps, for xprof and TensorBoard",
    )
    return flags
  add_number("--batch_size", 1, default=128, help="images")
  add_number("--batches", 0, default=0, help="timed a round")
  if what == "masks":
    keys.add_flag(
      flags,
      "--sampler",
      config_table.KEYS["masks.name"].kind,
      nargs="+",
      default=[],
      help="default: all there are",
    )
    keys.add_flag(
      flags,
      "--grid",
      _Grid(keys.whole(1, 1024, "patches")),
      nargs="+",
      default=[(16, 16), (14, 14)],
      metavar="HxW",
      help="patches",
    )
  elif what == "data":
    only_one = flags.add_mutually_exclusive_group()
    only_one.add_argument(
      "--config",
      default=argparse.SUPPRESS,
      metavar="FILE[:VARIANT]",
      help="times the pipeline of this experiment instead",
    )
    only_one.add_argument(
      "--resume",
      action="store_true",
      help=f"times the first batch from step {data.RESUME_STEP:,} of a run "
      f"over {data.IMAGENET:,} small records instead",
    )
    keys.add_flag(
      only_one,
      "--files",
      keys.whole(0, 10**7),
      default=0,
      help="times the listing of a folder of so many images instead, a "
      "multiple of 1000",
    )
    add_number("--cores", 0, default=0, help="to run on; 0: all there are")
    add_number("--images", 1, default=512, help="JPEGs to make")
  return flags


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  if arguments.what == "masks":
    use_cores(1)
    rows = masks.measure(
      arguments.sampler,
      arguments.grid,
      batch_size=arguments.batch_size,
      rounds=arguments.rounds,
      batches=arguments.batches or 100,
    )
  elif arguments.what == "step":
    rows = step.measure(
      arguments.config,
      rounds=arguments.rounds,
      steps=arguments.steps,
      profile=arguments.profile or "",
    )
  elif arguments.what == "loop":
    rows = loop.measure(
      arguments.config, rounds=arguments.rounds, steps=arguments.steps
    )
  else:
    cores = use_cores(arguments.cores)
    if arguments.resume:
      rows = data.resume(batch_size=arguments.batch_size)
    elif arguments.files:
      rows = data.listing(arguments.files)
    else:
      rows = data.measure(
        getattr(arguments, "config", None),
        cores=cores,
        images=arguments.images,
        batch_size=arguments.batch_size,
        rounds=arguments.rounds,
        batches=arguments.batches or 8,
      )
  print(json.dumps(rows, indent=2) if arguments.json else show(rows))
  return 0


if __name__ == "__main__":
  chosen = next((a for a in sys.argv[1:] if a[:1] != "-"), "")
  command.run(main, parser(chosen), tune_allocator=True)
