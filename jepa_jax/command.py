"""What every command shares: its flags, its process and its errors.

`--config FILE[:variant]` names an experiment, `--config.key=value` overrides
any key of it. What is wrong with the input ends in one line on standard error
and exit code 2, without a traceback.
"""

import argparse
from collections.abc import Callable
import importlib.util
import os
import pathlib
import re
import sys
import traceback

import ml_collections

from jepa_jax import allocator, keys, launch
from jepa_jax import config as config_lib
from jepa_jax.training import distributed

EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: start the same command again


def run(
  main: Callable[[argparse.Namespace], int | None],
  parser: argparse.ArgumentParser,
  *,
  tune_allocator: bool = False,
) -> None:
  """Parses the command line, calls main with it and exits.

  Args:
    main: takes the parsed flags, with the loaded config as `config` where the
      parser has --config; returns an exit code, None for 0.
    parser: the command's own flags.
    tune_allocator: sets the allocator for train steps on a CPU.
  """
  try:
    arguments, rest = parser.parse_known_args()
    overrides = [a for a in rest if a.startswith("--config.")]
    unknown = [a for a in rest if not a.startswith("--config.")]
    if unknown or (overrides and not hasattr(arguments, "config")):
      known = [o for a in parser._actions for o in a.option_strings]
      raise keys.unknown("flag", (unknown or overrides)[0], known)
    if hasattr(arguments, "config"):
      arguments.config = load_config(arguments.config, overrides)
    if tune_allocator:
      allocator.set_for_training()
    if getattr(arguments, "processes", 1) != 1:
      sys.exit(launch.processes(arguments))
    if hasattr(arguments, "coordinator"):
      distributed.join(arguments)
    code = main(arguments) or 0
    distributed.part(code)
  except distributed.GivenUp as error:
    print(f"{error}; its message says why.", file=sys.stderr)
    code = distributed.EXIT_LOST
    distributed.part(code)
  except Exception as error:
    if distributed.lost(error):
      distributed.leave_lost(error)
    expected = isinstance(error, (ValueError, OSError, FloatingPointError))
    if expected and not os.environ.get("JEPA_JAX_TRACEBACK"):
      code = fail(error)
    else:
      traceback.print_exc()
      code = 1
    distributed.leave(code)
  sys.exit(code)


def fail(error: Exception) -> int:
  """Prints an error as one line and returns the exit code for it."""
  text = " ".join(str(error).split()) or type(error).__name__
  print(f"{type(error).__name__}: {text}", file=sys.stderr)
  return EXIT_BAD_INPUT


def add_config_flag(parser: argparse.ArgumentParser) -> None:
  """Adds --config; overrides of its keys come with it."""
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE[:VARIANT]",
    help="experiment, a Python file with get_config(variant); "
    "--config.key=value overrides a key; --config.evaluations.NAME=LABEL adds "
    "an evaluation, without a label it takes one away, and "
    "--config.evaluations= all of them",
  )


def load_config(
  path: str, overrides: list[str] | tuple[str, ...] = ()
) -> ml_collections.ConfigDict:
  """Loads an experiment.

  Args:
    path: "FILE" or "FILE:variant".
    overrides: "--config.key=value" each.

  Returns:
    The config, locked.

  Raises:
    ValueError: no such file, no get_config, an unknown key or a value of the
      wrong type.
  """
  file, _, variant = path.partition(":")
  if not pathlib.Path(file).is_file():
    folder = pathlib.Path(file).parent
    near = sorted(str(p) for p in folder.glob("*.py")) or ["none"]
    raise ValueError(
      f'no config file "{file}"; in {folder}: {", ".join(near)}.'
    )
  spec = importlib.util.spec_from_file_location("experiment", file)
  module = importlib.util.module_from_spec(spec)
  # An experiment may import its neighbours.
  folder = str(pathlib.Path(file).resolve().parent)
  if folder not in sys.path:
    sys.path.append(folder)
  spec.loader.exec_module(module)
  if not hasattr(module, "get_config"):
    raise ValueError(f'config file "{file}" defines no get_config().')
  config = module.get_config(variant) if variant else module.get_config()
  config_lib.check_names(config)
  # The objective first, for it decides which other keys there are.
  first = lambda override: not override.startswith("--config.objective=")
  for override in sorted(overrides, key=first):
    if first(override):
      config_lib.fill_method(config)
    _override(config, override)
  config_lib.fill_method(config)
  given = {x.removeprefix("--config.").partition("=")[0] for x in overrides}
  if given & _DATA_KEYS and "data.num_examples" not in given:
    config.data.num_examples = 0  # the experiment's are of other data
  return config.lock()


# What decides how many images an epoch has.
_DATA_KEYS = {"data.source", "data.name", "data.split", "data.num_scenes"}


def _override_evaluations(
  config: ml_collections.ConfigDict, name: str, text: str
) -> None:
  """ "" takes evaluations, or the one of a name, away; a label adds one."""
  if not name and text:
    raise ValueError(
      f'--config.evaluations is "{text}"; give "" to evaluate nothing, or '
      "--config.evaluations.NAME=LABEL to add one."
    )
  if text:
    config.evaluations[name] = config_lib.evaluation(text)
  elif not name:
    config.evaluations = ml_collections.ConfigDict()
  else:
    config_lib.choose("evaluation", name, list(config.evaluations))
    del config.evaluations[name]


def _override(config: ml_collections.ConfigDict, override: str) -> None:
  name, equals, text = override.removeprefix("--config.").partition("=")
  if equals and re.fullmatch(r"evaluations(\.\w+)?", name):
    _override_evaluations(config, name.partition(".")[2], text)
    return
  known = config_lib.keys_of(config)
  if not equals:
    raise ValueError(f"{override} needs a value: --config.{name}=...")
  if name not in known:
    raise keys.unknown("config key", name, list(known))
  value = keys.read(known[name].kind, f"--config.{name}", text)
  *parents, leaf = name.split(".")
  node = config
  for parent in parents:
    node = node[parent]
  with config.ignore_type():  # the kind has seen to it
    node[leaf] = value
