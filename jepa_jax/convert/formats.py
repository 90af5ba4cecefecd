"""Reads and writes weights; the format follows from the path.

*.npz, *.safetensors     our own export: arrays "target/norm/scale", ...,
                         and the JSON text "config"; needs neither JAX nor
                         orbax to read
*.pth.tar, *.pth, *.pt   a checkpoint of the released code; needs torch
a folder                 of a run (config.json, checkpoints/), or a Hugging
                         Face IJepaModel (config.json, *.safetensors)
"""

from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import math
import os
import pathlib
import tempfile
from typing import Any
import zipfile

from flax import traverse_util
import numpy as np
import safetensors.numpy

from jepa_jax import paths
from jepa_jax.convert import checked, hub, hugging_face, released, runs, table
from jepa_jax.convert import weights as weights_lib
from jepa_jax.convert.weights import Weights

# What Pretrained.export writes.
EXPORTED = "encoder.stablehlo"
EXPORTED_WEIGHTS = "encoder.npz"
_STABLEHLO_IS = (
  "what export writes for processes without this project, which read it by "
  "jax.export.deserialize; to load weights here, write them with python -m "
  "jepa_jax.convert."
)


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
  known = (*weights_lib.ENCODERS, "all")
  if which not in (None, *known):
    raise ValueError(f'unknown which "{which}"; known: {", ".join(known)}.')
  path = find(path)
  try:
    if path.name == EXPORTED or (path / EXPORTED).exists():
      raise ValueError(f"it is {_STABLEHLO_IS}")
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
    _check_heads(found, num_heads, predictor_heads)
    return found.only(which or "target")
  except ValueError as error:
    if str(path) in str(error):
      raise
    raise ValueError(f"{path}: {error}") from None


def find(path: str | os.PathLike[str]) -> pathlib.Path:
  """Where weights are, fetched from the hub if need be; ValueError if not."""
  path = paths.local(path, "path of weights")
  if not path.exists():
    if not hub.is_name(path):
      raise ValueError(f"there is no file or folder {path}.")
    path = hub.download(str(path))
  return path


def _check_heads(weights: Weights, *given: int) -> None:
  """Refuses another number of heads than a file says it has."""
  for settings, heads in zip((weights.encoder, weights.predictor), given):
    if settings and heads and heads != settings["num_heads"]:
      raise ValueError(
        f"{heads} heads were asked for, and its settings have "
        f"{settings['num_heads']}; leave out the number."
      )


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
  path = check_destination(path, prefix=prefix)
  if problems := weights.problems():
    raise ValueError(f"the weights are not whole: {problems}.")
  if path.name.endswith(released.SUFFIXES):
    save = lambda temporary: released.write(weights, temporary, prefix)
  elif path.suffix:
    save = lambda temporary: _write_export(weights, temporary)
  else:
    save = lambda temporary: hugging_face.write(weights, temporary)
  path.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=".jepa") as folder:
    temporary = pathlib.Path(folder) / path.name
    save(temporary)
    if path.is_dir():
      path.rmdir()
    os.replace(temporary, path)


def check_destination(
  path: str | os.PathLike[str], *, prefix: str = ""
) -> pathlib.Path:
  """The path of a file to write; ValueError where `write` would not."""
  path = paths.local(path, "path of the export")
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise ValueError(f"{path} exists; remove it or name another.")
  is_released = path.name.endswith(released.SUFFIXES)
  if not is_released and path.suffix not in ("", ".npz", ".safetensors"):
    raise ValueError(_unknown_format(path))
  if prefix and not is_released:
    raise ValueError(
      f'a prefix "{prefix}" is for keys of a released checkpoint, '
      f"{', '.join(released.SUFFIXES)}, and {path} is none."
    )
  if not path.is_dir():
    paths.check_writable(path)
  return path


def _unknown_format(path: pathlib.Path) -> str:
  return (
    f"{path} has no known suffix; known: .npz, .safetensors, "
    f"{', '.join(released.SUFFIXES)}, and none for a folder."
  )


# Our own export.


def _read_export(path: pathlib.Path) -> Weights:
  open_file = _open_npz if path.suffix == ".npz" else checked.open_safetensors
  with checked.readable(f"an export ({path.suffix})"), open_file(path) as file:
    if problem := _no_export(file.config, file.shapes):
      raise ValueError(problem)
    found = weights_lib.from_description(file.config)
    for name, tree in found.networks.items():
      if f"{name}/mask_token" in file.shapes:
        tree["mask_token"] = None  # some encoders have one
    # All shapes, before memory is taken for any array.
    if problems := table.missing_and_extra(file.shapes, found.needed()):
      raise ValueError(problems)
    arrays = {
      key: np.asarray(file.read(key), np.float32) for key in file.shapes
    }
  networks = traverse_util.unflatten_dict(arrays, sep="/")
  return dataclasses.replace(found, networks=networks)


def _no_export(config: str, shapes: Mapping[str, Any]) -> str:
  if any(key.startswith("unet/") for key in shapes):
    return "it is a decoder, for jepa_jax.pictures.decoders.load"
  if config:
    return ""
  if any(key.startswith("encoder/") for key in shapes):
    return f"it is {_STABLEHLO_IS}"
  return (
    'it is no export of this project: it has no "config"; of Hugging Face '
    "weights give the folder."
  )


@contextlib.contextmanager
def _open_npz(path: pathlib.Path) -> Iterator[checked.Opened]:
  with np.load(path, allow_pickle=False) as archive:
    if not isinstance(archive, np.lib.npyio.NpzFile):
      raise ValueError("it is no archive of arrays")
    shapes, promised = {}, 0
    for key in archive.files:
      shapes[key], size = _npy_header(archive.zip, key)
      promised += size
    # Random numbers do not compress; an archive bomb promises a thousandfold.
    if promised > (most := 20 * path.stat().st_size):
      raise ValueError(
        f"it promises {promised} bytes of arrays, more than the {most} that "
        "such a file can hold"
      )
    config = str(archive["config"]) if "config" in shapes else ""
    shapes.pop("config", None)
    yield checked.Opened(config, shapes, archive.__getitem__)


def _npy_header(
  archive: zipfile.ZipFile, key: str
) -> tuple[tuple[int, ...], int]:
  """Shape and bytes of an array, as it says and as its archive says."""
  name = key if key in archive.namelist() else f"{key}.npy"
  with archive.open(name) as file:
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
      raise ValueError(f"{key} is an array of version {version}")
    read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
    shape, _, dtype = read(file)
  size = math.prod(shape) * dtype.itemsize
  held = archive.getinfo(name).file_size
  if size > held:
    raise ValueError(f"{key} promises {size} bytes and has {held}")
  return shape, size


def _write_export(weights: Weights, path: pathlib.Path) -> None:
  arrays = {}
  for name, tree in weights.networks.items():
    arrays |= weights_lib.flatten(name, tree)
  arrays = {key: np.ascontiguousarray(x) for key, x in arrays.items()}
  if path.suffix == ".npz":
    np.savez(path, config=np.array(weights.describe()), **arrays)
  else:
    safetensors.numpy.save_file(arrays, path, {"config": weights.describe()})
