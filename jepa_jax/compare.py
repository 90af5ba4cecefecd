"""Trains several experiments for the same compute and holds them side by side.

    python -m jepa_jax.compare --configs experiments/rivals.py:mae,scenes \\
      experiments/rivals.py:ijepa,scenes --budget 3e15FLOPs --seeds 3 \\
      --workdir DIR

Trunk and data must be the same. The budget is in operations, of the least that
a method's train step needs (--budget), or in time on this machine (--minutes;
a pilot of some steps measures how fast each method is). The number of steps
follows from it, and all durations of a config that are a share of the total.
The encoder is evaluated at several points of the way, before the learning rate
has come to its end but for the last.

A run is a process of its own in a folder of its own under DIR. The same command
goes on after a stop. DIR gets results.jsonl, a line a run, and compare.html:
the table, and accuracy against operations and against seconds.

Exit codes: 0 done, 1 runs failed, 2 something in the input is wrong, 75 stopped
by a signal.
"""

import argparse
import dataclasses
import json
import pathlib
import shlex
import sys
from typing import Any

from jepa_jax import command, keys, paths
from jepa_jax import config as config_lib
from jepa_jax import runs as runs_lib

_PILOT_STEPS = 40
# What makes the trunk and the data: the same in all that are compared.
_SAME = (
  *(f"encoder.{k}" for k in ("width", "depth", "num_heads", "mlp_ratio")),
  *("encoder.patch_size", "evaluations"),
  *(f"data.{k}" for k in ("source", "name", "split", "image_size", "channels")),
)


@dataclasses.dataclass(frozen=True)
class Method:
  """One of the experiments.

  Attributes:
    name: for readers and folders.
    file: as --config takes it.
    batch_size: images a step.
    flops: least operations of a step.
  """

  name: str
  file: str
  batch_size: int
  flops: int


def methods(files: list[str], overrides: list[str]) -> list[Method]:
  """The experiments, found comparable.

  Raises:
    ValueError: one is there twice, states no operations, has no evaluations,
      or another trunk or data than the first.
  """
  from jepa_jax import objectives

  found: list[Method] = []
  first: dict[str, Any] = {}
  for file in files:
    config = command.load_config(file, overrides)
    leaves = config_lib.flatten(config.to_dict())
    same = {k: v for k, v in leaves.items() if k.startswith(_SAME)}
    first = first or same
    for key in first.keys() | same.keys():
      if first.get(key) != same.get(key):
        raise ValueError(
          f"{key} is {same.get(key)} in {file} and {first.get(key)} in "
          f"{files[0]}; trunk, data and evaluations need to be the same."
        )
    if not config.evaluations:
      raise ValueError(f"{file} has no evaluations, so nothing to compare.")
    flops = objectives.load(config.objective).from_config(config).flops()
    if not flops:
      raise ValueError(
        f'objective "{config.objective}" of {file} does not state its '
        "operations; give it a method `flops`."
      )
    path, _, variant = file.partition(":")
    name = ":".join(filter(None, (pathlib.Path(path).stem, variant)))
    size = config.batch_size
    found.append(Method(name, file, size, flops * size))
  if len({method.name for method in found}) < len(found):
    raise ValueError("--configs has an experiment twice; name each once.")
  return found


def operations(text: str) -> float:
  """ "3e15FLOPs" or "3e15" -> 3e15.

  Raises:
    ValueError: it is no positive number.
  """
  try:
    value = float(text.lower().removesuffix("flops"))
  except ValueError:
    value = 0.0
  if not 0 < value < float("inf"):
    raise ValueError(f'--budget is "{text}"; it needs operations: 3e15FLOPs.')
  return value


def speed(method: Method, workdir: pathlib.Path, overrides: list[str]) -> float:
  """Steps a second of a short run, which is kept for the next time.

  Raises:
    ValueError: it failed.
  """
  folder = workdir / "pilots" / method.name.replace("/", "_")
  flags = (
    *overrides,
    f"--config.total={_PILOT_STEPS} steps",
    "--config.optimizer.warmup=1 steps",
    "--config.log_every=10 steps",
    "--config.evaluations=",
  )
  run = runs_lib.Run({}, 0, folder, flags)
  if not run.done:
    folder.parent.mkdir(exist_ok=True)
    if code := runs_lib.train(run, method.file):
      raise ValueError(f"the pilot {folder} ended with code {code}.")
  images = json.loads((folder / "run.json").read_text())["images_per_second"]
  return images / method.batch_size


def plan(
  arguments: argparse.Namespace, workdir: pathlib.Path, found: list[Method]
) -> list[tuple[Method, runs_lib.Run]]:
  """All runs, every method's first before any has its second.

  Raises:
    ValueError: a budget of no step, or a pilot that failed.
  """
  runs, overrides = [], arguments.overrides
  for method in found:
    if arguments.minutes:
      steps = arguments.minutes * 60 * speed(method, workdir, overrides)
    else:
      steps = operations(arguments.budget) / method.flops
    if (steps := round(steps)) < arguments.points:
      raise ValueError(
        f"the budget is {steps} steps of {method.name} (a step has "
        f"{method.flops:.3g} FLOPs); make it larger."
      )
    every = -(-steps // arguments.points)
    for seed in range(arguments.seeds):
      folder = workdir / f"{method.name},seed{seed}".replace("/", "_")
      flags = (
        *overrides,
        f"--config.total={steps} steps",
        f"--config.evaluate_every={every if every < steps else 0} steps",
        f"--config.seed={seed}",
      )
      runs.append((method, runs_lib.Run({}, seed, folder, flags)))
  return sorted(runs, key=lambda pair: pair[1].seed)


def points(method: Method, run: runs_lib.Run) -> dict[str, list[tuple]]:
  """Metric -> (operations, seconds of training, score) of a finished run."""
  from jepa_jax.evaluation import curves

  metrics, _ = curves.read((run.folder / "metrics.jsonl").read_bytes())
  images = json.loads((run.folder / "run.json").read_text())
  step_time = method.batch_size / images["images_per_second"]
  return {
    name.removeprefix("eval/"): [
      (int(step) * method.flops, int(step) * step_time, float(value))
      for step, value in zip(*series)
    ]
    for name, series in metrics.items()
    if name.startswith("eval/")
  }


def collect(
  runs: list[tuple[Method, runs_lib.Run]], workdir: pathlib.Path, words: str
) -> str:
  """Writes results.jsonl and compare.html of what is done; the table."""
  from jepa_jax.evaluation import comparison
  from jepa_jax.training import log

  done: dict[Method, list[runs_lib.Run]] = {}
  for method, run in runs:
    if run.done:
      done.setdefault(method, []).append(run)
  if not done:
    return "no run has finished"
  ways = {
    m.name: [points(m, run) for run in group] for m, group in done.items()
  }
  rows = [
    {"method": m.name, "seed": run.seed, "points": way}
    for m, group in done.items()
    for run, way in zip(group, ways[m.name])
  ]
  cells = [
    comparison.cell(m.name, [run.folder for run in group])
    for m, group in done.items()
  ]
  lines = comparison.table(cells)
  lines[0][2:2] = ["GFLOPs a step", "PFLOPs", "minutes"]
  for line, m in zip(lines[1:], done):
    way = next(iter(ways[m.name][0].values()))
    seconds = [next(iter(w.values()))[-1][1] for w in ways[m.name]]
    line[2:2] = [
      f"{m.flops / 1e9:.4g}",
      f"{way[-1][0] / 1e15:.4g}",
      f"{sum(seconds) / len(seconds) / 60:.3g}",
    ]
  text = "".join(json.dumps(row) + "\n" for row in rows)
  log.write_whole(workdir / "results.jsonl", text)
  page = comparison.page(
    workdir.name, words, cells, lines, comparison.compute_charts(ways)
  )
  log.write_whole(workdir / "compare.html", page)
  return comparison.as_text(lines)


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  if bool(arguments.budget) == bool(arguments.minutes):
    raise ValueError("give --budget or --minutes: one of them.")
  workdir = paths.local(arguments.workdir, "--workdir")
  found = methods(arguments.configs, arguments.overrides)
  if arguments.budget:
    plan(arguments, workdir, found)  # ValueError before anything is written
  mine = {
    "configs": arguments.configs,
    "budget": arguments.budget,
    "minutes": arguments.minutes,
    "points": arguments.points,
    "overrides": sorted(arguments.overrides),
  }
  runs_lib.claim(workdir, "compare.json", mine)
  runs = plan(arguments, workdir, found)
  words = shlex.join(["python", "-m", "jepa_jax.compare", *sys.argv[1:]])
  return runs_lib.train_all(
    [(run, method.file) for method, run in runs],
    lambda: collect(runs, workdir, words),
    workdir / "compare.html",
  )


if __name__ == "__main__":
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.compare",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.set_defaults(config=None)  # --config.key=value is every run's
  keys.add_flag(
    flags,
    "--configs",
    keys.PATH,
    nargs="+",
    required=True,
    metavar="FILE[:VARIANT]",
    help="the experiments",
  )
  keys.add_flag(
    flags,
    "--budget",
    keys.Text("operations, such as 3e15FLOPs"),
    default="",
    help="of a run's training, such as 3e15FLOPs",
  )
  keys.add_flag(
    flags,
    "--minutes",
    keys.number(0.0, 1e6),
    default=0.0,
    help="of a run's training, instead",
  )
  keys.add_flag(
    flags, "--seeds", keys.whole(1, 10_000), default=1, help="runs of each"
  )
  keys.add_flag(
    flags,
    "--points",
    keys.whole(1, 1000),
    default=4,
    help="evaluations on the way of a run",
  )
  keys.add_flag(
    flags,
    "--workdir",
    keys.FOLDER,
    required=True,
    help="folder of the comparison",
  )
  command.run(main, flags)
