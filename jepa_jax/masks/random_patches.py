"""The sampler "random": targets are random sets of patches.

Reference: Assran et al. 2023, table 6, arXiv:2301.08243.
"""

import math
from typing import Any

import numpy as np

from jepa_jax.masks import counter_rng
from jepa_jax.masks.arrays import Array
from jepa_jax.masks.interface import Draw, Settings


def check(settings: Settings) -> None:
  """Raises ValueError where the settings allow no legal mask."""
  sizes = _sizes(settings)
  if sizes.min() < 1:
    raise settings.no_mask(
      f"masks.target_scale {settings.target_scale} gives targets of 0 patches",
      "raise it or use smaller patches",
    )
  rest = math.prod(settings.grid) - settings.num_targets * sizes.max()
  if rest < settings.keep:
    raise settings.no_mask(
      f"{settings.num_targets} disjoint targets of up to {sizes.max()}"
      f" patches leave {rest} and a context needs {settings.keep}",
      "lower masks.num_targets, masks.target_scale or masks.min_keep",
    )


def draw(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """Disjoint random sets of patches as targets, the rest as context.

  A target has a share of the grid uniform in target_scale (the paper: one
  target of .6). Several contexts are the same set in one random order, each
  cut to K patches from another position.
  """
  del batch_key
  m, n = settings.num_targets, math.prod(settings.grid)
  table = _sizes(settings)
  random = counter_rng.random_bits(xp, image_key, m)
  level = xp.astype(xp.right_shift(random, np.uint32(16)), np.int32)
  sizes = xp.take(table, level, axis=0)  # [B, M]
  rank = counter_rng.permutation(
    xp, counter_rng.fold_in(xp, image_key, np.uint32([1])), n
  )
  # Target i takes the ranks from i * (largest size) on.
  start = np.arange(m, dtype=np.int32)[:, None] * table.max()
  ranks, end = rank[:, None], start + sizes[..., None]
  targets = (ranks >= start) & (ranks < end)  # [B, M, N]
  context = ~xp.any(targets, axis=1)[:, None]
  # The context's patches counted by descending rank, which skips the targets
  # of higher ranks.
  order = np.int32(n - 1) - rank
  for i in range(1, m):
    order = order - xp.where(rank < start[i], sizes[:, i : i + 1], 0)
  order, s = order[:, None], settings.num_contexts
  if s > 1:
    count = n - xp.sum(sizes, axis=1, dtype=np.int32)[:, None, None]
    order = order + np.arange(s, dtype=np.int32)[:, None] * count // s
    order = xp.where(order < count, order, order - count)
  return Draw(xp.broadcast_to(context, order.shape), targets, order)


def _sizes(settings: Settings) -> np.ndarray:
  """Patches of a random target for each value of 16 random bits, int32."""
  low, high = settings.target_scale
  share = low + (np.arange(2**16) + 0.5) / 2**16 * (high - low)
  return np.round(math.prod(settings.grid) * share).astype(np.int32)
