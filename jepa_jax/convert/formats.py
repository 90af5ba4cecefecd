"""Reads and writes weights; the format follows from the path.

*.npz, *.safetensors     our own export: arrays "target/norm/scale", ...,
                         and the JSON text "config"; needs neither JAX nor
                         orbax to read
*.pth.tar, *.pth, *.pt   a checkpoint of the released code; needs torch
a folder                 of a run (config.json, checkpoints/), or a Hugging
                         Face IJepaModel (config.json, *.safetensors)
"""

import json
import os
import pathlib
import tempfile

from flax import traverse_util
import numpy as np
import safetensors
import safetensors.numpy

from jepa_jax.convert import checked, hugging_face, released, runs
from jepa_jax.convert import weights as weights_lib
from jepa_jax.convert.weights import Weights


def read(
  path: str | os.PathLike[str],
  which: str | None = "all",
  *,
  num_heads: int = 0,
  predictor_heads: int = 0,
  step: int | None = None,
) -> Weights:
  """Loads weights of any format, without ever running code of the file.

  Args:
    path: file or folder; see above.
    which: "target" or "context" for that encoder alone, "all" for all networks
      that there are, None for the encoder that is evaluated: the target
      encoder, or the context encoder of a run without a moving average. A
      Hugging Face folder has one encoder, which None gives: the published ones
      have the *context* encoder, ours name it.
    num_heads: of the encoder, which a released checkpoint does not tell; 0
      takes it from the width and depth of models.SIZES.
    predictor_heads: of the predictor; 0 for as many as the encoder.
    step: of a run; None for the newest.

  Returns:
    The weights.

  Raises:
    ValueError: one line that says what is wrong with the file: it cannot be
      read, or lists all missing, extra and misshapen keys.
  """
  path = pathlib.Path(path)
  known = (*weights_lib.ENCODERS, "all")
  if which not in (None, *known):
    raise ValueError(f'unknown which "{which}"; known: {", ".join(known)}.')
  if not path.exists():
    raise ValueError(f"there is no file or folder {path}.")
  try:
    if path.is_dir() and runs.workdir_of(path):
      found = runs.read(path, which, step)
      which = which or "all"
    elif path.is_dir():
      which = which or "all"
      found = hugging_face.read(path, which)
    elif path.name.endswith(released.SUFFIXES):
      which = which or "target"
      found = released.read(path, which, num_heads, predictor_heads)
    elif path.suffix in (".npz", ".safetensors"):
      found = _read_export(path)
    else:
      raise ValueError(_unknown_format(path))
    return found.only(which or "target")
  except ValueError as error:
    if str(path) in str(error):
      raise
    raise ValueError(f"{path}: {error}") from None


def write(
  weights: Weights, path: str | os.PathLike[str], *, prefix: str = ""
) -> None:
  """Writes weights; nothing is left behind if that fails.

  Args:
    weights: what to write; a Hugging Face folder takes one encoder.
    path: must not exist; see above. No suffix makes a Hugging Face folder.
    prefix: of a released checkpoint's keys; its training code wants
      "module.".

  Raises:
    ValueError: the path exists or its suffix is unknown, torch is missing, or
      the weights do not fit the format.
  """
  path = pathlib.Path(path)
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise ValueError(f"{path} exists; remove it or name another.")
  if problems := weights.problems():
    raise ValueError(f"the weights are not whole: {problems}.")
  if path.name.endswith(released.SUFFIXES):
    save = lambda temporary: released.write(weights, temporary, prefix)
  elif path.suffix in (".npz", ".safetensors"):
    save = lambda temporary: _write_export(weights, temporary)
  elif not path.suffix:
    save = lambda temporary: hugging_face.write(weights, temporary)
  else:
    raise ValueError(_unknown_format(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=".jepa") as folder:
    temporary = pathlib.Path(folder) / path.name
    save(temporary)
    if path.is_dir():
      path.rmdir()
    os.replace(temporary, path)


def _unknown_format(path: pathlib.Path) -> str:
  return (
    f"{path} has no known suffix; known: .npz, .safetensors, "
    f"{', '.join(released.SUFFIXES)}, and none for a folder."
  )


# Our own export.


def _read_export(path: pathlib.Path) -> Weights:
  with checked.readable(f"an export ({path.suffix})"):
    if path.suffix == ".npz":
      with np.load(path, allow_pickle=False) as archive:
        arrays = {key: archive[key] for key in archive.files}
      text = str(arrays.pop("config", ""))
    else:
      with safetensors.safe_open(path, framework="numpy") as file:
        text = (file.metadata() or {}).get("config", "")
        arrays = (
          {key: file.get_tensor(key) for key in file.keys()} if text else {}
        )
  if not text:
    raise ValueError(
      'it is no export of this project: it has no "config"; of Hugging '
      "Face weights give the folder."
    )
  networks = traverse_util.unflatten_dict(arrays, sep="/")
  found = weights_lib.from_description(text)
  settings = json.loads(text)
  absent = {name: {} for name in settings["networks"] if name not in networks}
  unknown = networks.keys() - {*weights_lib.ENCODERS, "predictor"}
  if unknown:
    raise ValueError(
      f"unknown networks: {', '.join(sorted(unknown))}; known: target, "
      "context, predictor"
    )
  found.networks.update(networks, **absent)
  if problems := found.problems():
    raise ValueError(problems)
  return found


def _write_export(weights: Weights, path: pathlib.Path) -> None:
  arrays = {}
  for name, tree in weights.networks.items():
    arrays |= weights_lib.flatten(name, tree)
  arrays = {key: np.ascontiguousarray(x) for key, x in arrays.items()}
  if path.suffix == ".npz":
    np.savez(path, config=np.array(weights.describe()), **arrays)
  else:
    safetensors.numpy.save_file(arrays, path, {"config": weights.describe()})
