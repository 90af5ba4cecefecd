"""Trains an experiment once for every setting of a grid and every seed.

    python -m jepa_jax.sweep --config experiments/quickstart.py \\
      --over masks.num_targets=1,2,4 --seeds 3 --workdir DIR

A run is a process of its own in a folder of its own under DIR. The same command
goes on after a stop: finished runs are not done again, and values may be added.
DIR gets results.jsonl, a line a run, and sweep.html. Flags that are not listed
here, such as --config.total="500 steps", are every run's.

Exit codes: 0 done, 1 runs failed, 2 something in the input is wrong, 75 stopped
by a signal.
"""

import argparse
import itertools
import json
import pathlib
import re
import shlex
import sys

from jepa_jax import command, keys, paths
from jepa_jax import runs as runs_lib


def split_values(text: str) -> list[str]:
  """ "1,2" -> ["1", "2"]; commas in brackets and quotes divide nothing."""
  values, depth, quote, start = [], 0, "", 0
  for i, letter in enumerate(text):
    if quote:
      quote = "" if letter == quote else quote
    elif letter in "\"'":
      quote = letter
    else:
      depth += (letter in "([{") - (letter in ")]}")
      if letter == "," and depth == 0:
        values.append(text[start:i])
        start = i + 1
  return [value.strip() for value in (*values, text[start:])]


def plan(
  over: list[str], seeds: int, overrides: list[str], workdir: pathlib.Path
) -> list[runs_lib.Run]:
  """All runs of a sweep: every combination of values, seed after seed.

  All cells have their first run before any has its second, so that a sweep
  that is stopped says something of each.

  Args:
    over: "key=value,value" each, or "key+key=value+value,value+value" for keys
      that change together.
    seeds: runs a cell, with seeds from 0 on.
    overrides: "--config.key=value" of every run.
    workdir: of the sweep.

  Raises:
    ValueError: a key without values, twice, or that is also an override.
  """
  axes: list[list[dict[str, str]]] = []
  fixed = {x.removeprefix("--config.").partition("=")[0] for x in overrides}
  for text in over:
    key, equals, values = text.partition("=")
    names = [x.strip().removeprefix("config.") for x in key.split("+")]
    # As many parts as there are keys: 1e+3 is one value of one key.
    found = [
      tuple(x.strip() for x in value.split("+", len(names) - 1))
      for value in split_values(values)
    ]
    if not equals or any(len(x) < len(names) or "" in x for x in found):
      raise ValueError(
        f'--over "{text}" needs a key and values, such as '
        "masks.num_targets=1,2,4, or keys that change together, such as "
        "masks.name+masks.num_targets=corrected+4,block+1."
      )
    for name in names:
      if name in fixed or name == "seed":
        other = "--seeds" if name == "seed" else "another flag"
        raise ValueError(
          f'--over "{text}": {name} is set by {other} too; give it once.'
        )
      fixed.add(name)
    if len({*found}) < len(found):
      raise ValueError(f'--over "{text}" has a value twice.')
    axes.append([dict(zip(names, value)) for value in found])
  if any(x.startswith("--config.seed=") for x in overrides):
    raise ValueError("--config.seed is set; --seeds says how many there are.")
  runs = []
  for seed in range(seeds):
    for values in itertools.product(*axes):
      cell = {k: v for part in values for k, v in part.items()}
      changed = [f"--config.{k}={v}" for k, v in cell.items()]
      name = ",".join([*cell.values(), f"seed{seed}"])
      runs.append(
        runs_lib.Run(
          cell,
          seed,
          workdir / re.sub(r"[^\w.,=+-]+", "_", name),
          (*overrides, *changed, f"--config.seed={seed}"),
        )
      )
  if len({run.folder for run in runs}) < len(runs):
    raise ValueError("values differ only in signs that a folder cannot have.")
  return runs


def collect(runs: list[runs_lib.Run], workdir: pathlib.Path, words: str) -> str:
  """Writes results.jsonl and sweep.html of what is done; the table as text."""
  from jepa_jax.evaluation import comparison
  from jepa_jax.training import log

  cells: dict[str, list[pathlib.Path]] = {}
  lines = []
  for run in runs:
    if run.done:
      cells.setdefault(run.name, []).append(run.folder)
      path = run.folder / "evaluations.json"
      rows = json.loads(path.read_text()) if path.exists() else []
      row = {**run.cell, "seed": run.seed, "evaluations": rows}
      lines.append(json.dumps(row) + "\n")
  if not lines:
    return "no run has finished"
  compared = [comparison.cell(name, paths) for name, paths in cells.items()]
  log.write_whole(workdir / "results.jsonl", "".join(lines))
  page = comparison.page(workdir.name, words, compared)
  log.write_whole(workdir / "sweep.html", page)
  return comparison.as_text(comparison.table(compared))


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  workdir = paths.local(arguments.workdir, "--workdir")
  runs = plan(arguments.over, arguments.seeds, arguments.overrides, workdir)
  for run in {run.name: run for run in runs}.values():
    command.load_config(arguments.config_file, list(run.overrides))
  if arguments.print_commands:
    for run in runs:
      print(shlex.join(run.command(arguments.config_file)))
    return 0
  mine = {
    "config": arguments.config_file,
    "keys": [text.partition("=")[0] for text in arguments.over],
    "overrides": sorted(arguments.overrides),
  }
  runs_lib.claim(workdir, "sweep.json", mine)
  words = shlex.join(["python", "-m", "jepa_jax.sweep", *sys.argv[1:]])
  return runs_lib.train_all(
    [(run, arguments.config_file) for run in runs],
    lambda: collect(runs, workdir, words),
    workdir / "sweep.html",
  )


if __name__ == "__main__":
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.sweep",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  keys.add_flag(
    flags,
    "--over",
    keys.Text("a config key and values", False),
    action="append",
    default=[],
    metavar="KEY=V1,V2,...",
    help="a config key and its values, or keys that change together: "
    "KEY+KEY=V1+W1,V2+W2; several give every combination",
  )
  keys.add_flag(
    flags,
    "--seeds",
    keys.whole(1, 10_000),
    default=1,
    help="runs of each combination",
  )
  keys.add_flag(
    flags, "--workdir", keys.FOLDER, required=True, help="folder of the sweep"
  )
  flags.add_argument(
    "--print_commands",
    action="store_true",
    help="print the runs' commands, a line each, and train nothing",
  )
  command.add_config_flag(flags)
  command.run(main, flags)
