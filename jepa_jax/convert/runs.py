"""Reads the networks of a run: config.json and checkpoints/.

Which there are follows from the objective's contract (see
jepa_jax.objectives): the "target" encoder is the moving average, the "context"
encoder the trained one, or a frozen one. A run that averages nothing has no
target encoder.
"""

from collections.abc import Mapping
import contextlib
import dataclasses
import pathlib
from typing import Any

from absl import logging
from etils import epath
import numpy as np

from jepa_jax import config as config_lib
from jepa_jax.convert import checked
from jepa_jax.convert import weights as weights_lib
from jepa_jax.convert.weights import Weights
from jepa_jax.training import checkpoints, digests

# Network of Weights -> that of the objective, and where its parameters may be.
_PLACES = {
  "target": ("encoder", ("target_params",)),
  "context": ("encoder", ("params", "frozen")),
  "predictor": ("predictor", ("params", "target_params", "frozen")),
}
# Of an objective that has both encoders frozen.
_BOTH_FROZEN = {
  "target": ("frozen", "encoder"),
  "context": ("frozen", "context_encoder"),
}


def workdir_of(path: pathlib.Path) -> pathlib.Path | None:
  """The workdir of a path: itself, or of workdir/checkpoints/STEP."""
  if (path / "checkpoints").is_dir():
    return path
  if path.parent.name == "checkpoints":
    return path.parent.parent
  return None


def read(path: pathlib.Path, which: str | None, step: int | None) -> Weights:
  """Loads networks of a checkpoint; the arguments are those of convert.read.

  Raises:
    ValueError: no such checkpoint, or the networks are not whole.
  """
  workdir = workdir_of(path)
  config = workdir / "config.json"
  if not config.is_file():
    raise ValueError(f"there is no {config}")
  with checked.readable("a config.json"):
    weights_lib.read_json(config)  # ValueError where it is too long
    settings = config_lib.read(config)
    config_lib.check_patches(settings)
  found = weights_lib.from_config(settings)
  places, restored = _read_newest(
    _checkpoints(path, workdir, step), which, found.predictor is not None
  )
  for name, (part, network) in places.items():
    found.networks[name] = restored[part][network]
  if "predictor" not in places:
    found = dataclasses.replace(found, predictor=None)
  if problems := found.problems():
    raise ValueError(problems)
  return found


def _read_newest(
  checkpoints: list[pathlib.Path], which: str | None, predictor: bool
) -> tuple[dict[str, tuple[str, str]], Any]:
  """What `_find` says, and those networks, of the first that is undamaged."""
  for checkpoint in checkpoints:
    try:
      with checked.readable("a checkpoint"):
        return _read(checkpoint, which, predictor)
    except _NoSuchNetworkError:
      raise
    except ValueError as error:
      text = f"step {checkpoint.name}: {' '.join(str(error).split()):.300}"
      if checkpoint is checkpoints[-1]:
        raise ValueError(text) from None
      logging.error("%s; trying the one before it", text)
  raise AssertionError("there is at least one checkpoint")


def _read(
  checkpoint: pathlib.Path, which: str | None, predictor: bool
) -> tuple[dict[str, tuple[str, str]], Any]:
  import orbax.checkpoint as ocp

  folder = epath.Path(checkpoint / "state")
  # A Checkpointer would warn that a part of a checkpoint is not a whole one.
  with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
    saved = reader.metadata(folder).tree
    places = _find(saved, which)
    if not predictor:
      places.pop("predictor", None)
    # Only these networks are read: the optimizer's moments stay on disk.
    item: dict[str, Any] = {}
    for part, network in places.values():
      item.setdefault(part, {})[network] = saved[part][network]
    read_as = ocp.RestoreArgs(restore_type=np.ndarray)
    restored = reader.restore(
      folder,
      args=ocp.args.PyTreeRestore(
        item=item,
        restore_args=_map_leaves(item, read_as),
        partial_restore=True,
      ),
    )
  digests.verify(restored, checkpoint)
  return places, restored


def _checkpoints(
  path: pathlib.Path, workdir: pathlib.Path, step: int | None
) -> list[pathlib.Path]:
  """The folder of a step, or of all where step is None, newest first."""
  steps = checkpoints.steps(workdir / "checkpoints")
  if path != workdir:
    step = int(path.name) if path.name.isdecimal() else -1
  if not steps or step not in (None, *steps):
    raise ValueError(
      f"there is no checkpoint{'' if step is None else f' of step {step}'}; "
      f"there are: {', '.join(map(str, steps)) or 'none'}"
    )
  wanted = steps[::-1] if step is None else [step]
  return [(workdir / "checkpoints" / str(s)).resolve() for s in wanted]


class _NoSuchNetworkError(ValueError):
  """What was asked for is not there, however often it is read."""


def _find(
  saved: Mapping[str, Any], which: str | None
) -> dict[str, tuple[str, str]]:
  """Network of Weights -> (part of the state, network of the objective)."""
  places = {}
  for name, (network, parts) in _PLACES.items():
    for part in parts:
      if network in (saved.get(part) or {}):
        places.setdefault(name, (part, network))
  if "context_encoder" in (saved.get("frozen") or {}):
    places |= _BOTH_FROZEN
  if which is None:
    which = "target" if "target" in places else "context"
  if which == "all":
    return places
  if which not in places:
    raise _NoSuchNetworkError(
      f'there is no "{which}" encoder; there are: {", ".join(places)}.'
    )
  return {which: places[which]}


def _map_leaves(tree: Any, value: Any) -> Any:
  if isinstance(tree, Mapping):
    return {key: _map_leaves(child, value) for key, child in tree.items()}
  return value
