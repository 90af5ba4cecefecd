"""What both foreign formats share: strictness, and errors of one line."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import math
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors

from jepa_jax.convert import positions, table
from jepa_jax.convert import weights as weights_lib
from jepa_jax.convert.weights import Weights

# A model of 256 blocks has a header of about half a megabyte.
_MOST_HEADER_BYTES = 2**24


class Opened(NamedTuple):
  """A file of arrays, none of which is read yet.

  Attributes:
    config: text of its settings; "" where it has none.
    shapes: of its arrays.
    read: name of an array -> the array.
  """

  config: str
  shapes: dict[str, tuple[int, ...]]
  read: Callable[[str], np.ndarray]


@contextlib.contextmanager
def open_safetensors(path: pathlib.Path) -> Iterator[Opened]:
  """Opens a file whose header is of a model's size; see `readable`."""
  with path.open("rb") as file:
    promised = int.from_bytes(file.read(8), "little")
  if promised > (most := min(_MOST_HEADER_BYTES, path.stat().st_size)):
    raise ValueError(
      f"it is damaged or something else: its header promises {promised} bytes, "
      f"more than the {most} that it can have"
    )
  # The library holds every array to the bytes that the file has for it.
  with safetensors.safe_open(path, framework="numpy") as file:
    shapes = {
      key: tuple(file.get_slice(key).get_shape()) for key in file.keys()
    }
    config = (file.metadata() or {}).get("config", "")
    yield Opened(config, shapes, file.get_tensor)


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
  """Makes one line of the many kinds of errors that damaged files raise."""
  try:
    yield
  except ValueError as error:
    if "pickle" not in str(error):
      raise
    raise ValueError(
      f"it is not {what}: it holds pickled objects, which may carry code"
    ) from None
  except Exception as error:  # Every reader has its own, often many lines.
    first = (str(error).splitlines() or [""])[0][:200]
    raise ValueError(
      f"it cannot be read as {what}; it is damaged or something else "
      f"({type(error).__name__}: {first})"
    ) from None


def to_foreign(
  weights: Weights, name: str, rows: tuple[table.Row, ...]
) -> Iterator[tuple[str, np.ndarray]]:
  """The foreign arrays of a network, with its position embeddings.

  Raises:
    ValueError: it has tokens that the foreign one lacks.
  """
  if tokens := {"class_token", "registers"} & weights.networks[name].keys():
    raise ValueError(
      f"the encoder has {' and '.join(sorted(tokens))}, which the I-JEPA of "
      "others lacks; write .npz or .safetensors."
    )
  params = positions.with_positions(weights, name)
  return table.to_foreign(params, rows, weights.encoder["patch_size"])


def from_foreign(
  found: Weights,
  tables: Mapping[str, tuple[table.Row, ...]],
  open_source: Callable[[str], Mapping[str, Callable[[], Any]]],
  shapes: Mapping[str, Mapping[str, tuple[int, ...]]],
  labels: Mapping[str, str],
) -> Weights:
  """Reads networks through their tables, once all keys and shapes fit.

  Args:
    found: settings, still without networks.
    tables: name of each network -> its rows.
    open_source: name of a network -> foreign key -> function that reads its
      array.
    shapes: name of each network -> foreign key -> shape.
    labels: what stands before the keys of each network in an error.

  Returns:
    The weights with their networks.

  Raises:
    ValueError: lists all missing, extra and misshapen keys.
  """
  weights_lib.check_settings(found)
  problems = []
  for name, rows in tables.items():
    # Zeros without memory, in the shapes that the settings give.
    shape = math.prod(found.grid), found.width(name)
    empty = {"positions": jax.ShapeDtypeStruct(shape, np.float32)}
    empty = _broadcast(empty | weights_lib.abstract(found, name))
    zeros = Weights(
      networks={name: empty},
      encoder=found.encoder,
      predictor=found.predictor,
      image_size=found.image_size,
      channels=found.channels,
    )
    needed = {k: x.shape for k, x in to_foreign(zeros, name, rows)}
    if text := table.missing_and_extra(shapes[name], needed):
      problems.append(labels[name] + text)
  if problems:
    raise ValueError("; ".join(problems))
  for name, rows in tables.items():
    kind = found.predictor if name == "predictor" else found.encoder
    found.networks[name] = table.from_foreign(
      open_source(name), rows, kind["depth"]
    )
  return positions.settle_positions(found)


def _broadcast(tree: Any) -> Any:
  if isinstance(tree, Mapping):
    return {key: _broadcast(value) for key, value in tree.items()}
  return np.broadcast_to(np.float32(0), tree.shape)
