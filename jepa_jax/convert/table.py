"""The table of keys, and what turns an array of one side into the other's.

Rows are (foreign key, Flax path, transform). Both directions derive from them,
and so does the list of keys and shapes that a file has to have.
"""

from collections.abc import Callable, Iterator, Mapping
import re
from typing import Any, NamedTuple

from flax import traverse_util
import numpy as np

Array = Any  # what numpy takes for an array
Params = dict[str, Any]


class Transform(NamedTuple):
  """How one array changes; the second undoes the first.

  Attributes:
    to_flax: foreign array -> Flax array of one layer.
    to_foreign: (Flax array of one layer, patch size) -> foreign array.
  """

  to_flax: Callable[[Array], Array]
  to_foreign: Callable[[Array, int], Array]


def _kernel_to_convolution(kernel: Array, patch_size: int) -> Array:
  kernel = kernel.reshape(patch_size, patch_size, -1, kernel.shape[-1])
  return kernel.transpose(3, 2, 0, 1)  # [D, C, patch, patch]


SAME = Transform(lambda x: x, lambda x, _: x)
LINEAR = Transform(lambda x: x.T, lambda x, _: x.T)
# [D, C, patch, patch] <-> [patch * patch * C, D]
PATCHES = Transform(
  lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
  _kernel_to_convolution,
)
# [1, N, D] <-> [N, D]
POSITIONS = Transform(
  lambda x: x.reshape(-1, x.shape[-1]), lambda x, _: x[None]
)


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    foreign: key; "{}" is the block's number, "{q,k,v}" three keys that are
      one array in Flax, joined along the foreign array's first axis.
    path: in the Flax parameters; below "blocks" with a leading layer axis.
    transform: see Transform.
  """

  foreign: str
  path: str
  transform: Transform

  def keys(self, depth: int) -> list[list[str]]:
    """The foreign keys: [layers][parts]."""
    layers = range(depth) if "{}" in self.foreign else [0]
    choice = re.search(r"\{([a-z]+(?:,[a-z]+)+)\}", self.foreign)
    names = choice[1].split(",") if choice else [""]
    pattern = (
      self.foreign.replace(choice[0], "{part}") if choice else (self.foreign)
    )
    pattern = pattern.replace("{}", "{layer}")
    return [[pattern.format(layer=i, part=n) for n in names] for i in layers]


def _dense(foreign: str, path: str) -> tuple[Row, Row]:
  return (
    Row(f"{foreign}.weight", f"{path}/kernel", LINEAR),
    Row(f"{foreign}.bias", f"{path}/bias", SAME),
  )


def _norm(foreign: str, path: str) -> tuple[Row, Row]:
  return (
    Row(f"{foreign}.weight", f"{path}/scale", SAME),
    Row(f"{foreign}.bias", f"{path}/bias", SAME),
  )


def _blocks(foreign: str, names: Mapping[str, str]) -> tuple[Row, ...]:
  """Rows of all blocks; names: ours -> foreign."""
  rows = ()
  for ours, theirs in names.items():
    make = _norm if ours.startswith("norm") else _dense
    rows += make(f"{foreign}.{{}}.{theirs}", f"transformer/blocks/{ours}")
  return rows


_RELEASED_BLOCK = {
  "norm1": "norm1",
  "qkv": "attn.qkv",
  "out": "attn.proj",
  "norm2": "norm2",
  "fc1": "mlp.fc1",
  "fc2": "mlp.fc2",
}
_HUGGING_FACE_BLOCK = {
  "norm1": "layernorm_before",
  "qkv": "attention.attention.{query,key,value}",
  "out": "attention.output.dense",
  "norm2": "layernorm_after",
  "fc1": "intermediate.dense",
  "fc2": "output.dense",
}

# (foreign key, Flax path, transform). Both directions derive from these.
RELEASED_ENCODER = (
  Row("pos_embed", "positions", POSITIONS),
  Row("patch_embed.proj.weight", "patch_embed/kernel", PATCHES),
  Row("patch_embed.proj.bias", "patch_embed/bias", SAME),
  *_blocks("blocks", _RELEASED_BLOCK),
  *_norm("norm", "norm"),
)
RELEASED_PREDICTOR = (
  Row("predictor_pos_embed", "positions", POSITIONS),
  Row("mask_token", "mask_token", SAME),
  *_dense("predictor_embed", "embed"),
  *_blocks("predictor_blocks", _RELEASED_BLOCK),
  *_norm("predictor_norm", "norm"),
  *_dense("predictor_proj", "project"),
)
HUGGING_FACE_ENCODER = (
  Row("embeddings.position_embeddings", "positions", POSITIONS),
  Row(
    "embeddings.patch_embeddings.projection.weight",
    "patch_embed/kernel",
    PATCHES,
  ),
  Row(
    "embeddings.patch_embeddings.projection.bias",
    "patch_embed/bias",
    SAME,
  ),
  *_blocks("encoder.layer", _HUGGING_FACE_BLOCK),
  *_norm("layernorm", "norm"),
)


def from_foreign(
  source: Mapping[str, Callable[[], Array]], table: tuple[Row, ...], depth: int
) -> Params:
  """Reads a table from foreign to Flax; rows that source lacks are left out.

  Args:
    source: foreign key -> function that reads its array; called once.
    table: rows.
    depth: number of blocks.

  Returns:
    Nested float32 parameters.
  """
  flat = {}
  for row in table:
    layers = row.keys(depth)
    if layers[0][0] not in source:
      continue
    target = None
    for i, parts in enumerate(layers):
      arrays = [np.asarray(source[key]()) for key in parts]
      array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
      array = row.transform.to_flax(array)
      if target is None:  # filled layer by layer: a stack would be a copy
        target = np.empty((len(layers), *array.shape), np.float32)
      target[i] = array
    flat[row.path] = target if "{}" in row.foreign else target[0]
  return traverse_util.unflatten_dict(flat, sep="/")


def to_foreign(
  params: Params, table: tuple[Row, ...], patch_size: int = 1
) -> Iterator[tuple[str, np.ndarray]]:
  """Reads a table from Flax to foreign.

  Args:
    params: nested parameters with "positions".
    table: rows.
    patch_size: pixels, of an encoder.

  Yields:
    (foreign key, array); a view where it can be one.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  for row in table:
    array = flat[row.path]
    stacked = "{}" in row.foreign
    for i, keys in enumerate(row.keys(len(array) if stacked else 1)):
      layer = array[i] if stacked else array
      layer = row.transform.to_foreign(layer, patch_size)
      yield from zip(keys, np.split(layer, len(keys)))


def missing_and_extra(
  given: Mapping[str, tuple[int, ...]],
  needed: Mapping[str, tuple[int, ...]],
) -> str:
  """All differences between two lists of shapes in one line; "" for none."""
  parts = []
  if missing := sorted(needed.keys() - given.keys()):
    parts.append(f"missing: {', '.join(missing)}")
  if extra := sorted(given.keys() - needed.keys()):
    parts.append(f"extra: {', '.join(extra)}")
  wrong = [
    f"{key} is {list(given[key])}, not {list(needed[key])}"
    for key in sorted(needed.keys() & given.keys())
    if tuple(given[key]) != tuple(needed[key])
  ]
  if wrong:
    parts.append(f"misshapen: {', '.join(wrong)}")
  return "; ".join(parts)
