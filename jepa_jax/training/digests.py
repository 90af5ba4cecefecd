"""Digests of arrays: a changed bit shows, however the arrays are laid out.

A file system's own checks are not enough: one flipped bit in a data file of a
checkpoint decodes to other parameters without a word. A digest here is of an
array's values, not of files: it is made from what is on the devices before
anything is written, and again from what was read, on any mesh.
"""

from collections.abc import Sequence
import functools
import hashlib
import json
import pathlib
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.training import distributed

_CHUNK = 1 << 16  # elements whose intermediates a CPU's cache holds


def digests(tree: Any) -> dict[str, str]:
  """A digest of each array of a tree.

  Each element's bits are mixed with its index, and the results added up modulo
  2^32 in two ways. A sum does not depend on its order, so every process adds
  up the shares that it has. It guards against accidents, not against forgers.

  Args:
    tree: arrays, all on the host or all on devices; all processes of a run
      take part for those on devices.

  Returns:
    Path, such as "params/encoder/mask_token" -> 16 hexadecimal digits. A change
    within one element is always seen, any other but once in about 2^64.
  """
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  # One wait for the devices, not one an array, and one message to the others:
  # a collective an array might be met in another order by another process.
  parts = jax.device_get([_of_array(leaf) for leaf in leaves.values()])
  sums = np.stack([sum(x, np.zeros(2, np.uint32)) for x in parts])
  if any(isinstance(leaf, jax.Array) for leaf in leaves.values()):
    sums = distributed.add_up(sums)
  return {
    name: "".join(f"{int(half):08x}" for half in halves)
    for name, halves in zip(leaves, sums)
  }


def seal(record: dict[str, Any]) -> dict[str, Any]:
  """What a checkpoint holds beside its state, with a digest of itself."""
  return record | {"sha256": _sha256(record)}


def read(checkpoint: pathlib.Path) -> dict[str, Any] | None:
  """The record in a checkpoint's folder; None: it was saved without.

  Returns:
    "digests": those of the state; "losses": [[step, loss], ...] that the next
    row of the log averages; "config": of the run.

  Raises:
    ValueError: it is damaged.
  """
  folder = checkpoint / "record"
  if not folder.exists():
    return None
  try:
    record = json.loads((folder / "metadata").read_text())
    if record.pop("sha256") == _sha256(record):
      return record
  except (OSError, ValueError, KeyError, TypeError, AttributeError):
    pass
  raise ValueError(f"{folder} is damaged")


def _sha256(record: dict[str, Any]) -> str:
  text = json.dumps(record, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def verify(tree: Any, checkpoint: pathlib.Path) -> None:
  """Compares what was read of a checkpoint with what was saved.

  Args:
    tree: the state that was saved, or a part of it; all processes take part.
    checkpoint: folder of the step.

  Raises:
    ValueError: they differ, or the digests cannot be read. Of a checkpoint
      that was saved without any, a warning says so.
  """
  found, record = digests(tree), read(checkpoint)
  if record is None:
    logging.warning(
      "checkpoint %s was saved by a version without digests: a changed bit in "
      "it would not be found",
      checkpoint.name,
    )
    return
  wrong = [
    name for name, x in found.items() if x != record["digests"].get(name)
  ]
  if wrong:
    more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
    raise ValueError(f"{wrong[0]}{more}: not the numbers that were saved")


def _of_array(leaf: Any) -> list[Any]:
  """[2] uint32 of each share that this process alone has to count."""
  if not isinstance(leaf, jax.Array):
    leaf = np.asarray(leaf)
    return [_of_numpy(leaf, (0,) * leaf.ndim, leaf.shape)]
  sums = []
  for shard in leaf.addressable_shards:
    if shard.replica_id:
      continue
    starts = tuple(part.start or 0 for part in shard.index)
    if shard.device.platform == "cpu":
      # Without a compilation for each shape, and as fast as XLA's.
      sums.append(_of_numpy(np.asarray(shard.data), starts, leaf.shape))
    else:
      starts = np.asarray(starts, np.uint32)
      sums.append(_of_jax(shard.data, starts, leaf.shape))
  return sums


def _of_numpy(
  x: np.ndarray, starts: tuple[int, ...], shape: tuple[int, ...]
) -> np.ndarray:
  bits = np.ascontiguousarray(x).view(_unsigned(x.dtype))
  if x.shape == shape:  # or single elements at the end of some rows
    bits, starts, shape = bits.reshape(-1), (0,), (bits.size,)
  first, *rest = starts
  rows = max(1, _CHUNK // max(1, bits[:1].size))
  sums = np.zeros(2, np.uint32)
  for row in range(0, len(bits), rows):
    part = bits[row : row + rows].astype(np.uint32)
    sums += np.stack(_sums(np, part, (first + row, *rest), shape))
  return sums


@functools.partial(jax.jit, static_argnums=2)
def _of_jax(x: jax.Array, starts: Any, shape: tuple[int, ...]) -> jax.Array:
  x = x.astype(jnp.uint8) if x.dtype == bool else x
  bits = jax.lax.bitcast_convert_type(x, _unsigned(x.dtype))
  return jnp.stack(_sums(jnp, bits.astype(jnp.uint32), starts, shape))


def _unsigned(dtype: Any) -> Any:
  # Of eight bytes, each half counts as an element.
  return np.dtype(f"u{min(np.dtype(dtype).itemsize, 4)}")


def _sums(
  xp: Any, bits: Any, starts: Sequence[Any], shape: tuple[int, ...]
) -> list[Any]:
  """Two sums of mixed elements.

  Args:
    xp: numpy or jax.numpy.
    bits: uint32, a part of an array.
    starts: index of the part's first element in the array.
    shape: of the array.
  """
  index = xp.zeros((1,) * bits.ndim, np.uint32)
  for axis, (size, whole) in enumerate(zip(bits.shape, shape)):
    along = xp.arange(size, dtype=np.uint32) + xp.uint32(starts[axis])
    along = along.reshape((-1,) + (1,) * (bits.ndim - 1 - axis))
    index = index * np.uint32(whole) + along
  # The last step of MurmurHash3, a bijection of 32 bits.
  mixed = bits + index * np.uint32(0x9E3779B9)
  mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
  mixed = mixed ^ (mixed >> 16)
  weighted = mixed * (index + index + np.uint32(1))
  return [xp.sum(x, dtype=np.uint32) for x in (mixed, weighted)]
