"""What every command shares: its flags, its process and its errors.

`--config FILE[:variant]` names an experiment, `--config.key=value` overrides
any key of it. What is wrong with the input ends in one line on standard error
and exit code 2, without a traceback.
"""

import argparse
import ast
from collections.abc import Callable
import ctypes
import difflib
import glob
import importlib.util
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import traceback
from typing import Any

import ml_collections

from jepa_jax.training import distributed

EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: start the same command again


def run(
  main: Callable[[argparse.Namespace], int | None],
  parser: argparse.ArgumentParser,
) -> None:
  """Parses the command line, calls main with it and exits.

  Args:
    main: takes the parsed flags, with the loaded config as `config` where the
      parser has --config; returns an exit code, None for 0.
    parser: the command's own flags.
  """
  tune_cpu()
  try:
    arguments, rest = parser.parse_known_args()
    overrides = [a for a in rest if a.startswith("--config.")]
    unknown = [a for a in rest if not a.startswith("--config.")]
    if unknown or (overrides and not hasattr(arguments, "config")):
      known = [o for a in parser._actions for o in a.option_strings]
      raise ValueError(_unknown("flag", (unknown or overrides)[0], known))
    if hasattr(arguments, "config"):
      arguments.config = load_config(arguments.config, overrides)
    if getattr(arguments, "processes", 1) != 1:
      sys.exit(launch(arguments))
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


def launch(arguments: argparse.Namespace) -> int:
  """Runs this command as several processes on the CPU of this machine.

  Signals are passed on to all of them. Where one of them ends badly, the
  others follow by themselves, or are ended after a minute.

  Args:
    arguments: parsed flags, with those of distributed.add_flags.

  Returns:
    The exit code of all, or else of the one that was to blame.

  Raises:
    ValueError: flags that do not fit together.
  """
  count = arguments.processes
  if count < 1 or arguments.coordinator or arguments.num_processes:
    raise ValueError(
      f"got --processes {count}; it needs at least 1, and neither "
      "--coordinator nor --num_processes beside it."
    )
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  # The last of two equal flags counts.
  flags = ["--processes=1", f"--coordinator={address}"]
  flags += [f"--num_processes={count}"]
  children = [
    subprocess.Popen(
      [sys.executable, *sys.orig_argv[1:], *flags, f"--process_id={i}"],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      # A terminal's Ctrl-C reaches them through this process alone.
      start_new_session=True,
    )
    for i in range(count)
  ]

  def pass_on(number: int, frame: Any) -> None:
    del frame
    for child in children:
      child.send_signal(number)

  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, pass_on)
  deadline = math.inf
  while any(child.poll() is None for child in children):
    if any(child.returncode not in (None, 0) for child in children):
      deadline = min(deadline, time.monotonic() + 60)
    if time.monotonic() > deadline:
      for child in children:
        child.kill()
    time.sleep(0.1)
  codes = [child.returncode for child in children]
  for i, code in enumerate(codes):
    if code < 0:
      name = signal.Signals(-code).name
      print(f"process {i} was ended by {name}", file=sys.stderr)
  blamed = [c for c in codes if c > 0 and c != distributed.EXIT_LOST]
  return max(blamed, default=distributed.EXIT_LOST if any(codes) else 0)


def add_config_flag(parser: argparse.ArgumentParser) -> None:
  """Adds --config; overrides of its keys come with it."""
  parser.add_argument(
    "--config",
    required=True,
    metavar="FILE[:VARIANT]",
    help="experiment, a Python file with get_config(variant); "
    "--config.key=value overrides a key",
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
  for override in overrides:
    _override(config, override)
  return config.lock()


def _override(config: ml_collections.ConfigDict, override: str) -> None:
  name, equals, text = override.removeprefix("--config.").partition("=")
  keys = flatten(config)
  if not equals or name not in keys:
    raise ValueError(
      f"{override} needs a value: --config.{name}=..."
      if not equals
      else _unknown("config key", name, list(keys))
    )
  old = keys[name]
  try:
    if isinstance(old, str):
      value: Any = text
    elif isinstance(old, bool):
      value = {"true": True, "1": True, "false": False, "0": False}[
        text.lower()
      ]
    else:
      value = ast.literal_eval(text)
      if isinstance(old, tuple):
        value = tuple(value)
      elif isinstance(old, int) and isinstance(value, float):
        value = int(value) if value.is_integer() else value
    *parents, leaf = name.split(".")
    node = config
    for parent in parents:
      node = node[parent]
    node[leaf] = value
  except (KeyError, SyntaxError, TypeError, ValueError):
    raise ValueError(
      f'--config.{name} is "{text}"; it needs a value of type '
      f"{type(old).__name__}, such as {old!r}."
    ) from None


def flatten(
  config: ml_collections.ConfigDict | dict[str, Any], prefix: str = ""
) -> dict[str, Any]:
  """Dotted key -> value of every leaf."""
  leaves: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, (ml_collections.ConfigDict, dict)):
      leaves.update(flatten(value, f"{prefix}{key}."))
    else:
      leaves[prefix + key] = value
  return leaves


def _unknown(what: str, name: str, known: list[str]) -> str:
  near = difflib.get_close_matches(name.split("=")[0], known, n=3, cutoff=0.5)
  hint = f"nearest: {', '.join(near)}." if near else f"known: {known}."
  return f'unknown {what} "{name}"; {hint}'


# Of `tune_cpu`: nothing is mapped beside the heap, however large it is.
_ONE_HEAP = "glibc.malloc.mmap_max=0"


def tune_cpu() -> None:
  """Allocator settings that serve a CPU; restarts Python to make them.

  glibc gives a step's buffers back to the kernel and faults every page in
  again in the next step; told not to, and to keep one arena for all threads,
  it ends the page faults: 1,000 of 2 MiB a step were left with an arena a
  thread, and up to a third of its time with them. The price is memory: freed
  holes of which a little was taken are not used again for the largest buffer,
  and some steps in there are two to five of it. glibc reads its settings
  before Python starts, hence the restart. Nothing is done where the
  environment sets GLIBC_TUNABLES already, or where an accelerator is found.
  """
  accelerators = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/accel*")
  accelerators += glob.glob("/dev/vfio/[0-9]*")
  platforms = os.environ.get("JAX_PLATFORMS", "")
  on_cpu = platforms == "cpu" or not (platforms or accelerators)
  if (
    on_cpu and sys.platform == "linux" and ("GLIBC_TUNABLES" not in os.environ)
  ):
    os.environ["GLIBC_TUNABLES"] = ":".join(
      [
        "glibc.malloc.hugetlb=1",
        _ONE_HEAP,
        "glibc.malloc.trim_threshold=100000000000",
        "glibc.malloc.arena_max=1",
      ]
    )
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def fill_holes() -> None:
  """Takes for good the holes that compiling has left in the tuned heap.

  glibc looks for memory along lists of free pieces, sorted by size. A compiler
  leaves thousands of pieces between 4 KiB and 1 MiB, and each product of a step
  asks for buffers among them: 3 % of a step went into walking the lists (by
  `perf record` of the steps of tests/speed.py, on Zen 3). They are filled from
  the largest on; what is left for buffers is one large piece.
  Takes some 50 ms. Nothing is done without the settings of `tune_cpu`. To be
  called once, when the step is compiled: what it takes stays taken.
  """
  if _ONE_HEAP not in os.environ.get("GLIBC_TUNABLES", ""):
    return
  libc = ctypes.PyDLL(None)  # keeps other Python threads out meanwhile
  libc.malloc.argtypes = libc.free.argtypes = [ctypes.c_size_t]
  libc.malloc.restype = ctypes.c_size_t
  head = ctypes.sizeof(ctypes.c_size_t)

  size = 2**20
  while size > 2**12:
    size = int(size * 0.97) // 16 * 16 + head  # fills a piece to the byte
    row: list[int] = []
    # Three in a row come from memory that is no hole of this size. The limit, a
    # GiB, is for other threads, which may take what lies between.
    for _ in range(2**30 // size):
      piece = libc.malloc(size)
      if row and piece != row[-1] + size + head:
        row = []
      row.append(piece)
      if len(row) == 3:
        break
    for piece in row:
      libc.free(piece)

  # Small things that stay would be cut from the step's largest buffers, now
  # that no hole is left for them: they get a piece of their own.
  size = 2**26 + head
  room = libc.malloc(size)
  for _ in range(100):
    if libc.malloc(2**20) == room + size + head:  # what keeps it apart
      break
  libc.free(room)
