"""Random bits that are a pure function of what they are for.

A key is folded from integers (seed, epoch, image); the n-th uint32 of a key is
a hash of key + n. Nothing is stored and nothing depends on what was drawn
before, so any process computes any image's randomness, in any order. The
arithmetic is on uint32 alone and gives the same bits in NumPy, `jax.numpy` and
TensorFlow: `xp` is the namespace.

Not for cryptography. Two keys collide with probability 2**-32, and then share
their bits, which harms nothing here.
"""

import functools
from typing import Any

import numpy as np

from jepa_jax.masks.arrays import Array

# Streams: what a run's seed is used for. No two uses may share one.
ORDER, AUGMENT, MASK_IMAGE, MASK_BATCH, OBJECTIVE = range(1, 6)

_PERMUTATIONS = 256  # fixed random ones that `permutation` composes

_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: spreads consecutive integers


def _mix(xp: Any, x: Array) -> Array:
  """Bijective mixer of uint32: xor-shift-multiply, twice."""
  x = x ^ xp.right_shift(x, np.uint32(16))
  x = x * np.uint32(0x7FEB352D)
  x = x ^ xp.right_shift(x, np.uint32(15))
  x = x * np.uint32(0x846CA68B)
  return x ^ xp.right_shift(x, np.uint32(16))


def fold_in(xp: Any, key: Array, value: Array) -> Array:
  """Derives keys from keys and integers, all uint32 arrays that broadcast."""
  return _mix(xp, key ^ _mix(xp, value + np.uint32(_GOLDEN)))


def stream_key(seed: int, stream: int) -> np.ndarray:
  """The key, uint32 [1], of one use (`stream`) of a run's seed."""
  low, high = seed % 2**32, seed // 2**32 % 2**32
  key = np.zeros(1, np.uint32)
  for value in (low, high, stream):
    key = fold_in(np, key, np.asarray([value], np.uint32))
  return key


def random_bits(xp: Any, key: Array, count: int) -> Array:
  """Random uint32 of each key: [...] -> [..., count]."""
  steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN % 2**32
  return _mix(xp, key[..., None] + _mix(np, steps.astype(np.uint32)))


def uniform_below(xp: Any, random: Array, bound: Array) -> Array:
  """Uniform int32 in [0, bound) from random uint32; bound at most 2**16.

  Takes the high 16 bits, so a value's probability is off by under
  bound / 2**16 of itself: 0.02 % for a corner on a 14 x 14 grid.
  """
  high = xp.right_shift(random, np.uint32(16))
  product = high * xp.astype(bound, np.uint32)
  return xp.astype(xp.right_shift(product, np.uint32(16)), np.int32)


def random_ranks(xp: Any, random: Array) -> Array:
  """Distinct int32 >= 0 in random order, from random uint32 [..., N].

  The low bits are the index, so that no two are equal.
  """
  n = random.shape[-1]
  id_bits = max(n - 1, 1).bit_length()
  high = xp.right_shift(random, np.uint32(id_bits + 1))
  rank = xp.astype(high * np.uint32(2**id_bits), np.int32)
  return rank + np.arange(n, dtype=np.int32)


def permutation(xp: Any, key: Array, n: int) -> Array:
  """Random permutations of n <= 2**16 items: keys [B] -> int32 [B, n].

  Composes two of 256 fixed random permutations, each rotated by a random
  offset, which needs no sorting. That reaches 2**16 n**2 of the n!
  permutations; each item is equally likely at every position, each pair of
  items nearly so at every pair of positions.
  """
  random = random_bits(xp, key, 4)
  table = _permutations(n).reshape(-1)
  result = np.arange(n, dtype=np.int32)
  for i in (0, 2):
    row = uniform_below(xp, random[:, i : i + 1], np.asarray([_PERMUTATIONS]))
    offset = uniform_below(xp, random[:, i + 1 : i + 2], np.asarray([n]))
    result = xp.take(table, row * np.int32(2 * n) + offset + result, axis=0)
  return result


@functools.cache
def _permutations(n: int) -> np.ndarray:
  random = random_bits(np, np.arange(_PERMUTATIONS, dtype=np.uint32), n)
  rows = np.argsort(random, axis=1, kind="stable").astype(np.int32)
  return np.tile(rows, 2)  # a rotated row is contiguous
