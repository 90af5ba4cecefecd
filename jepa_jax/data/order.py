"""Which image comes when: a function of (seed, position); nothing is stored."""

import numpy as np

from jepa_jax.data import sources
from jepa_jax.masks import counter_rng

_ROUNDS = 6  # of the permutation's Feistel network


def permuted(
  positions: np.ndarray, num_examples: int, seed: int, part: int = 0
) -> tuple[np.ndarray, np.ndarray]:
  """The image at each position of a run: a fresh permutation every epoch.

  A Feistel network of keyed hashes permutes the smallest power of four that
  holds all images; numbers past the end are permuted again until they fall
  inside. Nothing is stored, and no position depends on another.

  Args:
    positions: int [B], step * batch size + place in the batch, global.
    num_examples: images of an epoch, less than 2**32.
    seed: the run's seed.
    part: of a mixture; each has orders of its own.

  Returns:
    epoch and image number, int64 [B] each.

  Reference: Black & Rogaway 2002, "Ciphers with arbitrary finite domains".
  """
  epoch, value = np.divmod(np.asarray(positions, np.int64), num_examples)
  half = max(1, ((num_examples - 1).bit_length() + 1) // 2)
  key = counter_rng.stream_key(seed, counter_rng.ORDER)
  key = counter_rng.fold_in(np, key, np.asarray([part], np.uint32))
  keys = [
    counter_rng.fold_in(
      np, counter_rng.fold_in(np, key, epoch.astype(np.uint32)), round_
    )
    for round_ in np.arange(_ROUNDS, dtype=np.uint32)[:, None]
  ]
  outside = np.ones(value.shape, bool)
  while outside.any():
    left = (value[outside] >> half).astype(np.uint32)
    right = (value[outside] & (2**half - 1)).astype(np.uint32)
    for key in keys:
      mixed = counter_rng.fold_in(np, key[outside], right) & np.uint32(
        2**half - 1
      )
      left, right = right, left ^ mixed
    value[outside] = (left.astype(np.int64) << half) | right
    outside = value >= num_examples
  return epoch, value


def of_source(
  source: sources.Source, positions: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """As `permuted`, for a source that may be a mixture.

  Every SLOTS positions of a mixture hold each part's share of images, in a
  shuffled order. How many of a part came before is arithmetic over whole blocks
  and counting within one.
  """
  if not isinstance(source, sources.Mixture):
    return permuted(positions, len(source), seed)
  block, place = np.divmod(positions, source.SLOTS)
  epoch, index = np.empty_like(block), np.empty_like(block)
  for number in np.unique(block):
    here = np.flatnonzero(block == number)
    places = number * source.SLOTS + np.arange(source.SLOTS)
    slots = permuted(places, source.SLOTS, seed)[1]
    for i, part in enumerate(source.parts):
      low, high = source.slots[i : i + 2]
      members = (low <= slots) & (slots < high)
      mine = here[members[place[here]]]
      before = np.cumsum(members)[place[mine]] - 1
      nth = number * (high - low) + before
      epoch[mine], index[mine] = permuted(nth, len(part), seed, i + 1)
      index[mine] += source.starts[i]
  return epoch, index
