"""The sampler "rasterized": one quadrant predicts the other three.

Reference: Assran et al. 2023, table 6, arXiv:2301.08243.
"""

from typing import Any

import numpy as np

from jepa_jax.masks import counter_rng
from jepa_jax.masks.arrays import Array
from jepa_jax.masks.interface import Draw, Settings


def check(settings: Settings) -> None:
  """Raises ValueError where the settings allow no legal mask."""
  for key, needed in (("num_contexts", 1), ("num_targets", 3)):
    if getattr(settings, key) != needed:
      raise ValueError(
        f"masks.{key} is {getattr(settings, key)}; the rasterized sampler"
        f" predicts three quadrants from one: set it to {needed}"
      )
  least = _quadrants(settings).sum(1).min()
  if least < settings.keep:
    raise settings.no_mask(
      f"its smallest quadrant has {least} patches and a context needs"
      f" {settings.keep}",
      "lower masks.min_keep or use smaller patches",
    )


def draw(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """One quadrant of the image as context, the other three as targets."""
  del batch_key
  random = counter_rng.random_bits(xp, image_key, 1)
  first = counter_rng.uniform_below(xp, random, np.asarray([4]))
  order = (first + np.arange(4, dtype=np.int32)) & 3  # [B, 4]
  quadrants = xp.take(_quadrants(settings), order, axis=0)
  return Draw(quadrants[:, :1], quadrants[:, 1:])


def _quadrants(settings: Settings) -> np.ndarray:
  """The four quarters of the grid, bool [4, N]."""
  rows, columns = (np.arange(x) >= x // 2 for x in settings.grid)
  index = 2 * rows[:, None] + columns
  return index.reshape(-1) == np.arange(4)[:, None]
