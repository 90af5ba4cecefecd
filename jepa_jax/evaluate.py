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

from jepa_jax import command, config_table, keys, paths
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
  from jepa_jax.evaluation import side_by_side
  from jepa_jax.training import checkpoints as checkpoints_lib
  from jepa_jax.training import compile_cache
  from jepa_jax.training import program as program_lib

  workdir = paths.local(arguments.workdir, "--workdir")
  path = workdir / "config.json"
  if not path.exists():
    raise ValueError(f"{workdir} holds no run: there is no {path}.")
  if arguments.report_only:
    others = arguments.only or arguments.step is not None or arguments.overrides
    if others or arguments.format != "text":
      raise ValueError(
        "--report_only writes the page from what is there; give it neither "
        "--only nor --step nor --format nor --config.KEY=VALUE."
      )
    print(f"report: {paths.printable(str(report_lib.write(workdir)))}")
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
    names = _chosen(arguments, config)
    _check_step(workdir / "checkpoints", arguments.step)
    evaluation.check_data(config)
  compile_cache.use(config.compute.cache)
  program = program_lib.build(config, _mesh(config, arguments.overrides))
  with checkpoints_lib.Checkpoints(workdir / "checkpoints") as checkpoints:
    state = checkpoints.restore(program.state_spec, arguments.step)
  if not jax.process_index():
    print(f"evaluating step {int(state.step)}", file=sys.stderr)
  rows = evaluation.evaluate(program, state, names, check=check)
  evaluation.report(program, state, rows, workdir)
  if arguments.format != "text" and not jax.process_index():
    print(side_by_side.FORMATS[arguments.format](rows))


def _check_step(folder: Any, step: int | None) -> None:
  """Raises ValueError where there is no such checkpoint, None for any."""
  from jepa_jax.training import checkpoints

  found = checkpoints.steps(folder)
  if not found:
    raise ValueError(f"{folder.parent} holds no checkpoint yet.")
  if step not in (None, *found):
    raise ValueError(
      f"no checkpoint of step {step} in {folder}; there are: "
      f"{', '.join(map(str, found))}."
    )


def _chosen(arguments: argparse.Namespace, config: Any) -> list[str] | None:
  """The evaluations of --only; None for all."""
  names = arguments.only.split(",") if arguments.only else None
  for name in names or ():
    keys.choose("evaluation", name, list(config.evaluations))
  return names


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
  from jepa_jax.convert import formats
  from jepa_jax.evaluation import run as evaluation
  from jepa_jax.evaluation import scores, side_by_side
  from jepa_jax.training import compile_cache, log

  config = _asked(arguments)
  names = _chosen(arguments, config)
  out = paths.local(arguments.out, "--out")
  paths.check_writable(out)
  for path in arguments.weights:
    formats.find(path)
  models = {
    name: pretrained.load(path)
    for name, path in side_by_side.names(arguments.weights).items()
  }
  _fit(config, models, arguments)
  with distributed.first_process_first("data"):
    config = evaluation.resolve(config)
    evaluation.check(config)
    evaluation.check_data(config)
  compile_cache.use(config.compute.cache)
  rows = side_by_side.evaluate(models, config, _mesh(config, []), names, check)
  if jax.process_index():
    return
  rows, lists = scores.split_lists(rows)
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  log.write_whole(out, lines)
  if lists:
    lists_path = out.with_name(out.stem + "_low_shot.json")
    log.write_whole(lists_path, json.dumps(lists) + "\n")
  print(side_by_side.FORMATS[arguments.format](rows))
  print(f"every number: {out}", file=sys.stderr)


def _asked(arguments):
  """The config of an evaluation of weights, of --config or of --data."""
  from jepa_jax import config as config_lib
  from jepa_jax.data import pipeline
  from jepa_jax.evaluation import protocols

  if (arguments.config is None) == (not arguments.data):
    raise ValueError(
      "--weights needs --config FILE, or --data SOURCE:NAME such as "
      "tfds:cifar10 or folder:/photos; one of them."
    )
  if arguments.config is not None:
    return arguments.config
  config = config_lib.defaults()
  config.data.source, _, config.data.name = arguments.data.partition(":")
  chosen = tuple(arguments.protocols.split(","))
  for protocol in chosen:
    protocols.find(protocol, "protocol of --protocols")
  config.evaluations[arguments.label or "none"] = config_lib.evaluation(
    arguments.label,
    train=arguments.train,
    test=arguments.test,
    protocols=chosen,
  )
  config = command.override(config, arguments.overrides)
  if config.data.source != "scenes":  # counting would draw them all
    for split in {arguments.train, arguments.test}:
      pipeline.num_examples(config.data, split)  # ValueError: there is none
  return config


def _fit(config, models, arguments):
  """Gives a config what the weights say of the images that they take."""
  sizes = {model.preprocessing.image_size for model in models.values()}
  given = any(
    text.startswith("--config.data.image_size=") for text in arguments.overrides
  )
  if arguments.data and not given and len(sizes) > 1:
    raise ValueError(
      f"the weights are of images of {sorted(sizes)} pixels; give "
      "--config.data.image_size=..., the same for all."
    )
  with config.unlocked(), config.ignore_type():
    if arguments.data and not given:
      config.data.image_size = sizes.pop()
    first = next(iter(models.values())).preprocessing
    config.data.update(channels=len(first.mean), mean=first.mean, std=first.std)
    config.encoder.depth = min(m.module.depth for m in models.values())


if __name__ == "__main__":
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  keys.add_flag(flags, "--workdir", keys.FOLDER, help="folder of the run")
  keys.add_flag(
    flags,
    "--step",
    keys.STEP,
    help="step of the checkpoint; the newest by default",
  )
  flags.add_argument(
    "--report_only",
    action="store_true",
    help="evaluate nothing, write the page from what is there",
  )
  keys.add_flag(
    flags,
    "--only",
    keys.NAMES,
    help="names of evaluations, with commas; all by default",
  )
  keys.add_flag(
    flags,
    "--weights",
    keys.PATH,
    nargs="+",
    metavar="PATH",
    help="a column of the table each",
  )
  command.add_config_flag(flags, required=False)
  keys.add_flag(
    flags,
    "--data",
    keys.Text("SOURCE:NAME", False, r"\w+:[^\0\r\n]+"),
    metavar="SOURCE:NAME",
    help="in place of --config: tfds:NAME or folder:DIR",
  )
  for name in ("label", "train", "test"):
    keys.add_flag(
      flags,
      f"--{name}",
      config_table.EVALUATION[name].kind,
      default=name,
      help="of --data" + ", a split" * (name != "label"),
    )
  keys.add_flag(
    flags,
    "--protocols",
    keys.NAMES,
    default="linear,knn",
    help="of --data, with commas",
  )
  flags.add_argument(
    "--format",
    default="text",
    choices=("text", "markdown", "latex"),
    help="of the table of --weights, or of one that is printed besides",
  )
  keys.add_flag(
    flags,
    "--out",
    keys.PATH,
    default="evaluations.jsonl",
    metavar="FILE",
    help="where the rows of --weights go",
  )
  distributed.add_flags(flags)
  needs = {name: "--data" for name in ("--label", "--train", "--test")}
  needs |= {name: "--weights" for name in ("--out",)}
  needs |= {name: "--workdir" for name in ("--step", "--report_only")}
  needs["--protocols"] = "--data"
  command.run(main, flags, tune_allocator=True, needs=needs)
