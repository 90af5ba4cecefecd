"""Evaluates a run or any weights, without training anything.

    python -m jepa_jax.evaluate --workdir DIR [--step N] [--only NAME,...]
    python -m jepa_jax.evaluate --weights PATH [PATH ...] --config FILE
    python -m jepa_jax.evaluate --weights PATH --data tfds:cifar10 --label label

Of a run the config is its own, and its report is written again. Weights are
what jepa_jax.load reads: runs, exports, released checkpoints, Hugging Face
folders; their evaluations are a config's, or one of --data, and come as one
table with a column for each. --config.KEY=VALUE changes what an evaluation may
have otherwise: mesh, data_dir, batch_size, evaluations.

The encoder evaluated is the target encoder, its patches averaged, beside the
same architecture with random parameters and the raw pixels.
"""

import argparse
import json
import sys
from typing import Any

from jepa_jax import command, paths
from jepa_jax.training import distributed

# What changes no weight of a run, nor what they are given to see.
_FREE_KEYS = (
  "batch_size",
  "compute.",
  "data.data_dir",
  "data.max_unreadable",
  "data.prefetch",
  "data.threads",
  "evaluations",
  "mesh.",
  "sharding",
)


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  of_run = arguments.workdir is not None
  if of_run == bool(arguments.weights):
    raise ValueError(
      "give --workdir of a run, or --weights with --config or --data."
    )
  with distributed.Stopper() as stopper:
    try:
      (_evaluate_run if of_run else _compare)(arguments, stopper.interrupt)
    except distributed.Stopped:
      print(
        "stopped: what was written before is as it was, and the same command "
        "begins again",
        file=sys.stderr,
      )
      return command.EXIT_PREEMPTED
  distributed.barrier("evaluated")
  return 0


def _evaluate_run(arguments, check):
  """Evaluates a checkpoint of a run and writes the run's report."""
  import jax

  from jepa_jax import config as config_lib
  from jepa_jax.evaluation import report as report_lib
  from jepa_jax.evaluation import run as evaluation
  from jepa_jax.training import checkpoints as checkpoints_lib
  from jepa_jax.training import compile_cache
  from jepa_jax.training import program as program_lib

  workdir = paths.local(arguments.workdir, "--workdir")
  path = workdir / "config.json"
  if not path.exists():
    raise ValueError(f"{workdir} holds no run: there is no {path}.")
  if arguments.report_only:
    print(f"report: {report_lib.write(workdir)}")
    return
  if arguments.config is not None or arguments.data:
    raise ValueError(
      "--workdir has its own config; change it by --config.KEY=VALUE, or give "
      f"--weights {workdir} in place of --workdir."
    )
  for text in arguments.overrides:
    key = text.removeprefix("--config.").partition("=")[0]
    if not key.startswith(_FREE_KEYS):
      raise ValueError(
        f"--config.{key} is a part of the run, and its weights would not fit; "
        f"an evaluation may change: {', '.join(_FREE_KEYS)}."
      )
  with distributed.first_process_first("data"):
    config = command.override(config_lib.read(path), arguments.overrides)
    config = evaluation.resolve(config)
    evaluation.check(config)
    evaluation.check_data(config)
  compile_cache.use(config.compute.cache)
  program = program_lib.build(config, _mesh(config, arguments.overrides))
  with checkpoints_lib.Checkpoints(workdir / "checkpoints") as checkpoints:
    state = checkpoints.restore(program.state_spec, arguments.step)
  if state is None:
    raise ValueError(f"{workdir} holds no checkpoint yet.")
  names = arguments.only.split(",") if arguments.only else None
  if not jax.process_index():
    print(f"evaluating step {int(state.step)}", file=sys.stderr)
  rows = evaluation.evaluate(program, state, names, check=check)
  evaluation.report(program, state, rows, workdir)


def _mesh(config: Any, overrides: list[str]) -> Any:
  """The run's mesh where it fits the devices, else all of them side by side."""
  import jax

  from jepa_jax.training import sharding

  try:
    return sharding.make_mesh(config.mesh)
  except ValueError as error:
    if any(text.startswith("--config.mesh.") for text in overrides):
      raise
    if not jax.process_index():
      print(f"{error} The batch is split over all of them.", file=sys.stderr)
  with config.unlocked():
    config.mesh.update(data=-1, fsdp=1)
  return sharding.make_mesh(config.mesh)


def _compare(arguments, check):
  """Evaluates several weights side by side and prints the table."""
  import jax

  from jepa_jax import pretrained
  from jepa_jax.evaluation import run as evaluation
  from jepa_jax.evaluation import side_by_side
  from jepa_jax.training import compile_cache, log

  models = {
    name: pretrained.load(path)
    for name, path in side_by_side.names(arguments.weights).items()
  }
  config = _config_for(models, arguments)
  with distributed.first_process_first("data"):
    config = evaluation.resolve(config)
    evaluation.check(config)
    evaluation.check_data(config)
  names = arguments.only.split(",") if arguments.only else None
  compile_cache.use(config.compute.cache)
  rows = side_by_side.evaluate(models, config, _mesh(config, []), names, check)
  if jax.process_index():
    return
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  log.write_whole(paths.local(arguments.out, "--out"), lines)
  print(side_by_side.FORMATS[arguments.format](rows))
  print(f"every number: {arguments.out}", file=sys.stderr)


def _config_for(models, arguments):
  """The config of an evaluation of weights, of --config or of --data."""
  from jepa_jax import config as config_lib

  if (arguments.config is None) == (not arguments.data):
    raise ValueError(
      "--weights needs --config FILE, or --data SOURCE:NAME such as "
      "tfds:cifar10 or folder:/photos; one of them."
    )
  config = arguments.config
  if config is None:
    config = config_lib.defaults()
    config.data.source, _, config.data.name = arguments.data.partition(":")
    sizes = {model.preprocessing.image_size for model in models.values()}
    if len(sizes) > 1 and not any(
      text.startswith("--config.data.image_size=")
      for text in arguments.overrides
    ):
      raise ValueError(
        f"the weights are of images of {sorted(sizes)} pixels; give "
        "--config.data.image_size=..., the same for all."
      )
    config.data.image_size = sizes.pop()[0]
    config.evaluations[arguments.label or "none"] = config_lib.evaluation(
      arguments.label,
      train=arguments.train,
      test=arguments.test,
      protocols=tuple(arguments.protocols.split(",")),
    )
    config = command.override(config, arguments.overrides)
  with config.unlocked():
    first = next(iter(models.values())).preprocessing
    config.data.update(channels=len(first.mean), mean=first.mean, std=first.std)
    config.encoder.depth = min(m.module.depth for m in models.values())
  return config


if __name__ == "__main__":
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add_argument("--workdir", help="folder of the run")
  flags.add_argument(
    "--step", type=int, help="step of the checkpoint; the newest by default"
  )
  flags.add_argument(
    "--report_only",
    action="store_true",
    help="evaluate nothing, write the page from what is there",
  )
  flags.add_argument(
    "--only",
    default="",
    help="names of evaluations, with commas; all by default",
  )
  flags.add_argument(
    "--weights", nargs="+", metavar="PATH", help="a column of the table each"
  )
  command.add_config_flag(flags, required=False)
  flags.add_argument(
    "--data",
    default="",
    metavar="SOURCE:NAME",
    help="in place of --config: tfds:NAME or folder:DIR",
  )
  flags.add_argument("--label", default="label", help="of --data")
  flags.add_argument("--train", default="train", help="split of --data")
  flags.add_argument("--test", default="test", help="split of --data")
  flags.add_argument(
    "--protocols", default="linear,knn", help="of --data, with commas"
  )
  flags.add_argument(
    "--format",
    default="text",
    choices=("text", "markdown", "latex"),
    help="of the table of --weights",
  )
  flags.add_argument(
    "--out",
    default="evaluations.jsonl",
    metavar="FILE",
    help="where the rows of --weights go",
  )
  distributed.add_flags(flags)
  command.run(main, flags, tune_allocator=True)
