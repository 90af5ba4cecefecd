"""Lists the checkpoints of a run, or verifies them against their digests.

    python -m jepa_jax.checkpoints verify|list DIR

DIR is a workdir or its checkpoints folder; nothing in it is changed, and a run
may go on meanwhile. Exit codes: 0 all is well, 1 a checkpoint is damaged, 2
something in the input is wrong.
"""

import argparse
import datetime
import os
import pathlib
import time
from typing import Any

from jepa_jax import command, keys, paths

_DAMAGED = 1


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  folder = paths.local(arguments.folder, "DIR")
  if (folder / "checkpoints").is_dir():
    folder = folder / "checkpoints"
  if not folder.is_dir():
    raise ValueError(f"there is no folder {folder}; name that of a run.")
  os.environ["JAX_PLATFORMS"] = "cpu"  # an accelerator may be in use
  from jepa_jax.training import checkpoints

  if not (steps := checkpoints.steps(folder)):
    raise ValueError(f"there are no checkpoints in {folder}.")
  act = {"list": _list, "verify": _verify}[arguments.action]
  return max([act(folder / str(step)) for step in steps])


def _list(checkpoint: pathlib.Path) -> int:
  saved = datetime.datetime.fromtimestamp(checkpoint.stat().st_mtime)
  digests = (checkpoint / "record").exists()
  print(
    f"step {checkpoint.name}: {_mebibytes(checkpoint)}, saved "
    f"{saved.astimezone().isoformat(' ', 'seconds')}, "
    f"{'with' if digests else 'without'} digests"
  )
  return 0


def _verify(checkpoint: pathlib.Path) -> int:
  from absl import logging
  import jax

  from jepa_jax.training import digests

  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)  # Orbax warns of what is as it should
  started = time.perf_counter()
  try:
    state = _read(checkpoint / "state")
    record = digests.read(checkpoint)
    if record is not None:
      digests.verify(state, checkpoint)
      if missing := len(record["digests"]) - len(jax.tree.leaves(state)):
        raise ValueError(f"{missing} arrays are missing")
  except Exception as error:  # Orbax raises many for damaged files.
    text = " ".join(str(error).split())
    print(f"step {checkpoint.name}: DAMAGED: {text:.300}")
    return _DAMAGED
  finally:
    logging.set_verbosity(verbosity)
  what = (
    "can be read; it was saved without digests"
    if record is None
    else f"whole, {len(record['digests'])} arrays"
  )
  seconds = time.perf_counter() - started
  print(
    f"step {checkpoint.name}: {what} ({_mebibytes(checkpoint)} in "
    f"{seconds:.1f} s)"
  )
  return 0


def _read(folder: pathlib.Path) -> Any:
  """A state as nested dicts and lists of NumPy arrays."""
  import jax
  import numpy as np
  import orbax.checkpoint as ocp

  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(folder.resolve()).item_metadata.tree
    return reader.restore(
      folder.resolve(),
      args=ocp.args.PyTreeRestore(
        restore_args=jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
        )
      ),
    )


def _mebibytes(checkpoint: pathlib.Path) -> str:
  files = [p for p in checkpoint.rglob("*") if p.is_file()]
  return f"{sum(p.stat().st_size for p in files) / 2**20:.1f} MiB"


if __name__ == "__main__":
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.checkpoints",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add_argument("action", choices=("list", "verify"))
  keys.add_flag(
    flags,
    "folder",
    keys.FOLDER,
    metavar="DIR",
    help="workdir, or its checkpoints folder",
  )
  command.run(main, flags)
