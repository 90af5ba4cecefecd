"""A workdir belongs to one run: what its config.json says against a config."""

import json
import os
import pathlib
import sys
from typing import Any

from jepa_jax import config as config_lib
from jepa_jax.training import checkpoints, log

# What may differ between the starts of one run without changing its result.
FREE_KEYS = (
  "log_every",
  "checkpoint.",
  "collapse.",
  "evaluat",
  "data.data_dir",
  "data.max_unreadable",
  "data.prefetch",
  "data.threads",
  "mesh.",
  "sharding",
  "profile.",
  "compute.scan",
  "compute.remat",
  "compute.cache",
)


def describe(config: Any) -> dict[str, Any]:
  """A config as plain JSON values."""
  return json.loads(json.dumps(config.to_dict()))


def check(
  claim: dict[str, Any], workdir: pathlib.Path, accept: bool = False
) -> list[str]:
  """What differs from the config of the run that the workdir holds.

  Args:
    claim: the config as JSON values.
    workdir: may be missing.
    accept: whether the run may go on with other settings.

  Raises:
    ValueError: it differs and may not, or the workdir cannot be one.
  """
  there = next(p for p in (workdir, *workdir.absolute().parents) if p.exists())
  if not there.is_dir():
    raise ValueError(f"workdir {workdir} is a file; name a folder.")
  if not os.access(there, os.R_OK | os.W_OK | os.X_OK):
    raise ValueError(
      f"workdir {workdir} cannot be written: {there} may not be; use another."
    )
  path = workdir / "config.json"
  if not path.exists():
    return []
  try:
    old = config_lib.flatten(describe(config_lib.read(path)))
  except ValueError:
    old = config_lib.flatten(_rebuild_config(path))
  new = config_lib.flatten(claim)
  changed = [
    f"{key}={old.get(key)!r} there, {new.get(key)!r} here"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and not key.startswith(FREE_KEYS)
  ]
  if changed and not accept:
    raise ValueError(
      f"workdir {workdir} holds a run of another config ("
      f"{'; '.join(changed)}); use another workdir or that config, or go on "
      "from its newest checkpoint with --accept_changes."
    )
  return changed


def check_data(
  found: dict[str, Any], workdir: pathlib.Path, accept: bool = False
) -> list[str]:
  """What differs from the data that the run of a workdir began with.

  Args:
    found: data.fingerprint.fingerprint of now; data.json holds that of then.
    workdir: may be missing.
    accept: whether the run may go on with other data.

  Raises:
    ValueError: it differs and may not.
  """
  path = workdir / "data.json"
  if not path.exists():
    return []
  try:
    before = json.loads(path.read_text())
    then, same = int(before["images"]), before == found
  except (KeyError, OverflowError, RecursionError, TypeError, ValueError):
    print(f"{path} is damaged: written anew", file=sys.stderr)
    return []
  if same:
    return []
  now = found["images"]
  changed = (
    f"{then:,} training images then, {now:,} now"
    if then != now
    else f"{now:,} training images as before, of other names or sizes"
  )
  if not accept:
    raise ValueError(
      f"the data of {workdir} changed since its run began ({changed}), and so "
      "would the order, and perhaps the length, of training; put them back, "
      "use another workdir, or go on with --accept_changes."
    )
  return [changed]


def _rebuild_config(path: pathlib.Path) -> dict[str, Any]:
  """Writes a damaged config.json anew, from what checkpoints know of it."""
  claim = checkpoints.claim_of_newest(path.parent / "checkpoints")
  if claim is None:
    raise ValueError(
      f"{path} cannot be read; remove it or use another workdir."
    )
  print(f"{path} is damaged: taken from a checkpoint", file=sys.stderr)
  log.write_whole(path, json.dumps(claim, indent=2) + "\n")
  return describe(config_lib.read(path))
