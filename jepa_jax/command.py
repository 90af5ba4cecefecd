"""What every command shares: its flags, its process and its errors.

`--config FILE[:variant]` names an experiment, `--config.key=value` overrides
any key of it. What is wrong with the input ends in one line on standard error
and exit code 2, without a traceback.
"""

import argparse
from collections.abc import Callable, Mapping
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import sys
import textwrap
import traceback
from typing import NoReturn

import ml_collections

from jepa_jax import allocator, keys, known_keys, launch, paths
from jepa_jax import config as config_lib
from jepa_jax.training import distributed

# TensorFlow and XLA tell their errors alone, unless told otherwise; what else
# they say cuts through progress bars. Read when they are imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: start the same command again


def run(
  main: Callable[[argparse.Namespace], int | None],
  parser: argparse.ArgumentParser,
  *,
  tune_allocator: bool = False,
  needs: Mapping[str, str] | None = None,
) -> None:
  """Parses the command line, calls main with it and exits.

  Args:
    main: takes the parsed flags, with the loaded config as `config` where the
      parser has --config and it is given, and what it was made of as
      `config_file` and `overrides`; returns an exit code, None for 0.
    parser: the command's own flags.
    tune_allocator: sets the allocator for train steps on a CPU.
    needs: flag -> the flag without which it says nothing.
  """
  # Names of files may hold bytes of no encoding.
  if hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")
  try:
    parser.error = _usage_error
    arguments, rest = parser.parse_known_args()
    overrides = [a for a in rest if a.startswith("--config.")]
    unknown = [a for a in rest if not a.startswith("--config.")]
    _check_equal_signs(rest)
    if unknown or (overrides and not hasattr(arguments, "config")):
      known = [o for a in parser._actions for o in a.option_strings]
      raise keys.unknown("flag", (unknown or overrides)[0], known)
    _check_needs(arguments, parser, needs or {})
    if tune_allocator:
      allocator.set_for_training()
    if hasattr(arguments, "config"):
      arguments.config_file, arguments.overrides = arguments.config, overrides
      if arguments.config is not None:
        arguments.config = load_config(arguments.config, overrides)
    allocator.say()
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


def _usage_error(message: str) -> NoReturn:
  """What argparse calls, which would print the usage and more lines."""
  # "argument --rounds: --rounds is 0; ..." of keys.flag names it twice.
  raise ValueError(re.sub(r"^argument (\S+?)(/\S+)?: (?=\1 )", "", message))


def _check_needs(
  arguments: argparse.Namespace,
  parser: argparse.ArgumentParser,
  needs: Mapping[str, str],
) -> None:
  """Raises a ValueError for a flag without the one that it is about."""

  def given(flag: str) -> bool:
    name = flag.removeprefix("--")
    return getattr(arguments, name, None) != parser.get_default(name)

  for flag, other in needs.items():
    if given(flag) and not given(other):
      raise ValueError(f"{flag} is about {other}, which is not given.")


def _check_equal_signs(rest: list[str]) -> None:
  """Raises a ValueError for `--config.key value`."""
  for override, value in zip(rest, [*rest[1:], ""]):
    if override.startswith("--config.") and "=" not in override:
      value = "..." if value.startswith("--") or not value else value
      raise ValueError(f"{override} needs a value: {override}={value}")


def fail(error: Exception) -> int:
  """Prints an error as one line and returns the exit code for it."""
  text = paths.printable(" ".join(str(error).split()))
  text = text or type(error).__name__
  print(f"{type(error).__name__}: {text}", file=sys.stderr)
  return EXIT_BAD_INPUT


def add_config_flag(
  parser: argparse.ArgumentParser, required: bool = True
) -> None:
  """Adds --config; overrides of its keys come with it."""
  parser.add_argument(
    "--config",
    required=required,
    metavar="FILE[:VARIANT]",
    help="experiment, a Python file with get_config(variant); "
    "--config.key=value overrides a key; --config.evaluations.NAME=LABEL adds "
    "an evaluation, without a label it takes one away, and "
    "--config.evaluations= all of them",
  )
  parser.add_argument(
    "--help_config",
    action=_HelpConfig,
    nargs="?",
    metavar="KEY",
    help="say what the keys of a config are, or those that begin with KEY, and "
    "exit",
  )


class _HelpConfig(argparse.Action):
  """Prints keys with their values, as --help does flags, and exits."""

  def __call__(self, parser, namespace, values, option_string=None) -> NoReturn:
    print(help_config(values or ""))
    parser.exit()


def help_config(part: str = "") -> str:
  """What the keys of a config are.

  Args:
    part: a key, or what its name begins with or has; "" for all.

  Returns:
    Some lines for each: name and default, the values it takes, what it is.

  Raises:
    ValueError: there is no such key.
  """
  every = known_keys.of_package()
  found = (
    [row for row in every if row[0] == part]
    or [row for row in every if row[0].startswith(part)]
    or [row for row in every if part in row[0]]
  )
  if not found:
    raise keys.unknown("config key", part, [name for name, *_ in every])
  wrap = lambda text: textwrap.fill(
    text, 80, initial_indent="    ", subsequent_indent="    "
  )
  lines = []
  for name, key, objective in found:
    lines.append(
      f"{name} = {key.default!r}" + f" ({objective})" * bool(objective)
    )
    lines += [wrap(str(key.kind)), wrap(key.doc)]
  return "\n".join(lines)


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
  config = _experiment(file, variant)
  config_lib.check_names(config)
  return override(config, overrides)


def override(
  config: ml_collections.ConfigDict, overrides: list[str] | tuple[str, ...]
) -> ml_collections.ConfigDict:
  """Changes a config as the command line says; returns it, locked.

  Args:
    config: what to change.
    overrides: "--config.key=value" each.

  Raises:
    ValueError: an unknown key or a value of the wrong type.
  """
  # The objective first, for it decides which other keys there are.
  first = lambda text: not text.startswith("--config.objective=")
  for text in sorted(overrides, key=first):
    if first(text):
      config_lib.fill_method(config)
    _override(config, text)
  config_lib.fill_method(config)
  given = {x.removeprefix("--config.").partition("=")[0] for x in overrides}
  if given & _DATA_KEYS and "data.num_examples" not in given:
    config.data.num_examples = 0  # the experiment's are of other data
  config_lib.check(config)
  return config.lock()


def _experiment(file: str, variant: str) -> ml_collections.ConfigDict:
  """What get_config of a file returns; all that it raises is a ValueError."""
  try:
    spec = importlib.util.spec_from_file_location(
      "experiment",
      file,
      loader=importlib.machinery.SourceFileLoader("experiment", file),
    )
    module = importlib.util.module_from_spec(spec)
    _find_neighbours(pathlib.Path(file).resolve().parent)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "get_config", None)):
      raise ValueError("the config file defines no get_config().")
    config = module.get_config(variant) if variant else module.get_config()
  except Exception as error:
    if os.environ.get("JEPA_JAX_TRACEBACK"):
      raise
    raise ValueError(f"{_place(file, error)}: {_what(error)}") from error
  if not isinstance(config, ml_collections.ConfigDict):
    raise ValueError(
      f"{file}: get_config returns {type(config).__name__}; it needs a "
      "ConfigDict that starts from jepa_jax.config.defaults()."
    )
  return config


# Folders of experiments on sys.path, the newest first.
_folders: list[str] = []


def _find_neighbours(folder: pathlib.Path) -> None:
  """Lets an experiment import what lies beside it.

  What other folders' experiments have imported under the same names goes.
  """
  for name, module in list(sys.modules.items()):
    place = pathlib.Path(getattr(module, "__file__", None) or "").parent
    mine = str(place) in _folders and place != folder
    if mine and (folder / f"{name}.py").exists():
      del sys.modules[name]
  sys.path[:] = [known for known in sys.path if known not in _folders]
  others = [known for known in _folders if known != str(folder)]
  _folders[:] = others if str(folder) in sys.path else [str(folder), *others]
  sys.path.extend(_folders)  # the last: installed packages come first


def _place(file: str, error: Exception) -> str:
  """ "FILE, line N" of what was raised in an experiment, or below it."""
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if frame.filename == file
  ]
  if isinstance(error, SyntaxError) and error.filename == file:
    lines.append(error.lineno)
  return f"{file}, line {lines[-1]}" if lines else file


def _what(error: Exception) -> str:
  """Its message; of what nobody wrote for a user, with its type."""
  if isinstance(error, SyntaxError):
    return f"{type(error).__name__}: {error.msg}"
  if isinstance(error, ValueError):
    return str(error)
  return f"{type(error).__name__}: {error}"


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
  known = known_keys.of_config(config)
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
