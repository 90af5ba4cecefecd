"""Digests of arrays: a changed bit shows, however the arrays are laid out.

A file system's own checks are not enough: one flipped bit in a data file of a
checkpoint decodes to other parameters without a word. A digest here is of an
array's values, not of files: it is made from what is on the devices before
anything is written, and again from what was read, on any mesh.
"""

import json
import pathlib
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

_CHUNK = 1 << 16  # elements whose intermediates a CPU's cache holds


def digests(tree: Any) -> dict[str, str]:
  """A digest of each array of a tree.

  Each element's bits are mixed with its index, and the results added up modulo
  2^32 in two ways. A sum does not depend on its order, so every device adds
  up its own share. It guards against accidents, not against forgers.

  Args:
    tree: arrays, on the host or on devices; of arrays spread over processes,
      all processes take part.

  Returns:
    Path, such as "params/encoder/mask_token" -> 16 hexadecimal digits. A change
    within one element is always seen, any other but once in about 2^64.
  """
  leaves = {
    jax.tree_util.keystr(path, simple=True, separator="/"): _of_array(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }
  # One wait for the devices, not one an array.
  return {
    name: "".join(f"{int(half):08x}" for half in halves)
    for name, halves in jax.device_get(leaves).items()
  }


def read(checkpoint: pathlib.Path) -> dict[str, str] | None:
  """The digests in a checkpoint's folder; None: it was saved without.

  Raises:
    ValueError: they cannot be read.
  """
  folder = checkpoint / "record"
  if not folder.exists():
    return None
  try:
    return dict(json.loads((folder / "metadata").read_text())["digests"])
  except (OSError, ValueError, KeyError, TypeError):
    raise ValueError(f"{folder} is damaged") from None


def verify(tree: Any, checkpoint: pathlib.Path) -> None:
  """Compares what was read of a checkpoint with what was saved.

  Args:
    tree: the state that was saved, or a part of it; all processes take part.
    checkpoint: folder of the step.

  Raises:
    ValueError: they differ, or the digests cannot be read. Of a checkpoint
      that was saved without any, a warning says so.
  """
  found, expected = digests(tree), read(checkpoint)
  if expected is None:
    logging.warning(
      "checkpoint %s was saved by a version without digests: a changed bit in "
      "it would not be found",
      checkpoint.name,
    )
    return
  wrong = [name for name, x in found.items() if x != expected.get(name)]
  if wrong:
    more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
    raise ValueError(f"{wrong[0]}{more}: not the numbers that were saved")


def _of_array(leaf: Any) -> Any:
  """[2] uint32."""
  if isinstance(leaf, jax.Array):
    on_host = next(iter(leaf.devices())).platform == "cpu"
    if not (on_host and leaf.is_fully_addressable):
      return _of_jax(leaf)
  # Without a compilation for each shape, and as fast as XLA on a CPU.
  return _of_numpy(np.asarray(leaf))


def _of_numpy(x: np.ndarray) -> np.ndarray:
  bits = np.ascontiguousarray(x).reshape(-1).view(_unsigned(x.dtype))
  sums = np.zeros(2, np.uint32)
  for start in range(0, bits.size, _CHUNK):
    part = bits[start : start + _CHUNK].astype(np.uint32)
    index = np.arange(start, start + part.size, dtype=np.uint32)
    sums += np.stack(_sums(np, part, index))
  return sums


@jax.jit
def _of_jax(x: jax.Array) -> jax.Array:
  bits = jax.lax.bitcast_convert_type(
    x.astype(jnp.uint8) if x.dtype == bool else x, _unsigned(x.dtype)
  ).astype(jnp.uint32)
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    index = index * np.uint32(size) + jax.lax.broadcasted_iota(
      jnp.uint32, bits.shape, axis
    )
  return jnp.stack(_sums(jnp, bits, index))


def _unsigned(dtype: Any) -> Any:
  # Of eight bytes, each half counts as an element.
  return np.dtype(f"u{min(np.dtype(dtype).itemsize, 4)}")


def _sums(xp: Any, bits: Any, index: Any) -> list[Any]:
  """Two sums of mixed elements; bits and index are uint32, alike in shape."""
  # The last step of MurmurHash3, a bijection of 32 bits.
  mixed = bits + index * np.uint32(0x9E3779B9)
  mixed = (mixed ^ (mixed >> 16)) * np.uint32(0x85EBCA6B)
  mixed = (mixed ^ (mixed >> 13)) * np.uint32(0xC2B2AE35)
  mixed = mixed ^ (mixed >> 16)
  weighted = mixed * (index + index + np.uint32(1))
  return [xp.sum(x, dtype=np.uint32) for x in (mixed, weighted)]
