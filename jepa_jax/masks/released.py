"""The sampler "released": the released code's masks, equal in distribution.

Reference: Assran et al. 2023, section 3 and table 6, arXiv:2301.08243.
"""

import math
from typing import Any

import numpy as np

from jepa_jax.masks import arrays, counter_rng, rectangles
from jepa_jax.masks.arrays import Array
from jepa_jax.masks.interface import Draw, Settings

_ATTEMPTS = 20  # failed, until the released code drops a constraint


def check(settings: Settings) -> None:
  """Raises ValueError where the settings allow no legal mask."""
  context, target = settings.shapes(released=True)
  for name, shapes in (("context", context), ("target", target)):
    least = shapes.areas.min()
    if least <= settings.min_keep:
      raise settings.no_mask(
        f"its smallest {name} block has {least} patches and it needs more"
        f" than masks.min_keep={settings.min_keep} (the released code would"
        " never end)",
        f"set masks.min_keep below {least} or raise masks.{name}_scale"
        if least
        else f"raise masks.{name}_scale or use smaller patches",
      )


def draw(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """The released collator, equal in distribution.

  Block shapes are drawn once a batch. A context that keeps no more than
  min_keep patches is drawn again; after every 20 failures one target more, the
  last first, may leak into it.
  """
  m, s = settings.num_targets, settings.num_contexts
  context, target = settings.shapes(released=True)
  batch = counter_rng.random_bits(xp, batch_key, 2)  # [1, 2]
  random = counter_rng.random_bits(xp, image_key, 2 * (m + s))
  rows, columns = random[:, : m + s], random[:, m + s :]
  shape = rectangles.sample_shapes(xp, batch[:, :1], target)
  targets = rectangles.place(xp, target, shape, rows[:, :m], columns[:, :m])
  shape = rectangles.sample_shapes(xp, batch[:, 1:], context)
  contexts = rectangles.place(xp, context, shape, rows[:, m:], columns[:, m:])
  allowed = rectangles.cover(xp, contexts)
  if not settings.allow_overlap:
    outside = rectangles.uncovered(xp, targets)
    allowed = allowed & outside[-1][:, None]
    failed = xp.sum(allowed, axis=(2, 3), dtype=np.int32) <= settings.min_keep

    def redraw():
      again = _redraw(settings, xp, image_key, contexts, outside)
      return xp.where(failed[..., None, None], again, allowed)

    allowed = arrays.cond(xp, xp.any(failed), redraw, lambda: allowed)
  context = xp.reshape(allowed, (-1, s, math.prod(settings.grid)))
  return Draw(context, rectangles.patch_ids(xp, targets))


def _redraw(
  settings: Settings,
  xp: Any,
  image_key: Array,
  contexts: rectangles.Rectangles,
  outside: list[Array],
) -> Array:
  """Contexts after a first attempt that failed, bool [B, S, H, W].

  Computes all attempts that the released code could make at once, 20 M of them,
  and takes the first legal one, or the last, which has no constraints.

  Args:
    settings: of the masks.
    xp: array namespace.
    image_key: uint32 [B].
    contexts: the first attempt, whose shapes stay; [B, S].
    outside: M arrays [B, H, W], patches outside the first 1, ... M targets.
  """
  m, s = settings.num_targets, settings.num_contexts
  attempts = _ATTEMPTS * m
  key = counter_rng.fold_in(xp, image_key, np.asarray([1], np.uint32))
  random = xp.reshape(
    counter_rng.random_bits(xp, key, 2 * s * attempts), (-1, 2, s, attempts)
  )
  shape = contexts.shape[..., None]
  again = rectangles.place(
    xp, contexts.shapes, shape, random[:, 0], random[:, 1]
  )
  rows, columns = rectangles.extents(xp, again)  # [B, S, attempts, H or W]
  # Attempt 0 was the caller's: attempt i, at index i - 1, ignores the last
  # i // 20 targets.
  dropped = np.arange(1, attempts + 1, dtype=np.int32) // _ATTEMPTS
  legal = []
  for d in range(m):
    same = slice(*np.searchsorted(dropped, [d, d + 1]))
    free = xp.astype(outside[m - 1 - d], np.float32)[:, None]
    kept = xp.matmul(xp.astype(rows[:, :, same], np.float32), free)
    kept = kept * xp.astype(columns[:, :, same], np.float32)
    legal.append(xp.sum(kept, axis=-1) > settings.min_keep)
  legal = xp.concatenate(legal, axis=-1)  # [B, S, attempts - 1]
  index = np.arange(attempts, dtype=np.int32)
  first = xp.min(xp.where(legal, index[:-1], index[-1]), axis=-1)[..., None]
  chosen = (first == index)[..., None]
  row, column = xp.any(rows & chosen, axis=2), xp.any(columns & chosen, axis=2)
  context = row[..., :, None] & column[..., None, :]
  for m_kept in range(1, m + 1):  # constraints of the first m_kept targets
    leak = first + 1 >= (m - m_kept + 1) * _ATTEMPTS
    context = context & (outside[m_kept - 1][:, None] | leak[..., None])
  return context
