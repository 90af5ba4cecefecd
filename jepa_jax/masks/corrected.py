"""The samplers "corrected", "block" and "union": rectangles as in the paper.

Reference: Assran et al. 2023, section 3 and table 6, arXiv:2301.08243.
"""

import dataclasses
import math
from typing import Any

import numpy as np

from jepa_jax.masks import arrays, counter_rng, rectangles
from jepa_jax.masks.arrays import Array
from jepa_jax.masks.interface import Draw, Settings

_ROUNDS = 4  # whole draws until the fallback


def check(settings: Settings) -> None:
  """Raises ValueError where the settings allow no legal mask."""
  context, target = settings.shapes(released=False)
  if target.areas.min() < 1:
    raise settings.no_mask(
      f"masks.target_scale {settings.target_scale} gives blocks of 0 patches",
      "raise it or use smaller patches",
    )
  if settings.allow_overlap:
    most, why = context.areas.min(), "the smallest context block has"
  else:
    most = math.prod(settings.grid) - target.areas.max()
    why = f"a target of {target.areas.max()} patches leaves"
  if most < settings.keep:
    raise settings.no_mask(
      f"{why} {most} and a context needs {settings.keep}",
      "lower masks.min_keep or masks.target_scale, or use smaller patches",
    )


def draw(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """Multi-block masks as the paper describes them.

  Every rectangle of every image draws its own scale, aspect ratio and corner,
  all independent; a corner is uniform over all positions where the rectangle
  fits, last row and column included. No target ever leaks into a context.

  Differs: the released code draws one shape a batch; see `released`. The
  paper's contexts are square; here they have the proportions of the grid.
  """
  del batch_key
  context, targets = _multi_block(settings, xp, image_key)
  return Draw(context, rectangles.patch_ids(xp, targets))


def draw_block(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """Rectangles as targets (the paper: one of scale .6), the rest as context."""
  settings = dataclasses.replace(settings, context_scale=(1.0, 1.0))
  return draw(settings, xp, batch_key, image_key)


def draw_union(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """As `corrected`, with the union of all targets as the one target."""
  del batch_key
  context, targets = _multi_block(settings, xp, image_key)
  union = ~rectangles.uncovered(xp, targets)[-1]
  return Draw(context, xp.reshape(union, (-1, 1, math.prod(settings.grid))))


def _multi_block(
  settings: Settings, xp: Any, image_key: Array
) -> tuple[Array, rectangles.Rectangles]:
  """Contexts, bool [B, S, N], and targets [B, M] of `corrected`.

  Where a context keeps fewer than min_keep patches, all of the image's masks
  are drawn again, up to three times. After that all targets get the first
  one's corner and shape, and the context is every other patch, which is enough
  (`check`).
  """
  _, target = settings.shapes(released=False)
  rounds = np.arange(_ROUNDS, dtype=np.uint32)[:, None]
  key = counter_rng.fold_in(xp, image_key, rounds)  # [rounds, B]
  first, legal = _attempt(settings, xp, key[0])

  def choose(keep, new, old):
    expand = lambda x: xp.reshape(keep, (-1,) + (1,) * (len(x.shape) - 1))
    return tuple(xp.where(expand(a), a, b) for a, b in zip(new, old))

  def repeat():
    again, again_legal = _attempt(settings, xp, xp.reshape(key[1:], (-1,)))
    by_round = lambda x: xp.reshape(x, (_ROUNDS - 1, -1, *x.shape[1:]))
    again, again_legal = [by_round(x) for x in again], by_round(again_legal)
    copies = [xp.broadcast_to(x[:, :1], x.shape) for x in first[:3]]
    fallback = rectangles.Rectangles(target, *copies)
    free = rectangles.uncovered(xp, fallback)[0][:, None]
    result = (*copies, xp.broadcast_to(free, first[3].shape))
    for i in reversed(range(_ROUNDS - 1)):
      result = choose(again_legal[i], [x[i] for x in again], result)
    return choose(legal, first, result)

  *placed, allowed = arrays.cond(xp, xp.all(legal), lambda: first, repeat)
  shape = (-1, settings.num_contexts, math.prod(settings.grid))
  return xp.reshape(allowed, shape), rectangles.Rectangles(target, *placed)


def _attempt(
  settings: Settings, xp: Any, key: Array
) -> tuple[tuple[Array, ...], Array]:
  """Draws targets and contexts once.

  Returns:
    (shape, top, left, contexts): of the targets, int32 [B, M] each, and bool
    [B, S, H, W]; and whether all contexts are large enough, bool [B].
  """
  random = counter_rng.random_bits(
    xp, key, 3 * (settings.num_contexts + settings.num_targets)
  )
  context, target = settings.shapes(released=False)

  def place(shapes, random):
    n = random.shape[1] // 3
    shape = rectangles.sample_shapes(xp, random[:, :n], shapes)
    return rectangles.place(
      xp, shapes, shape, random[:, n : 2 * n], random[:, 2 * n :]
    )

  targets = place(target, random[:, : 3 * settings.num_targets])
  contexts = place(context, random[:, 3 * settings.num_targets :])
  allowed = rectangles.cover(xp, contexts)
  if not settings.allow_overlap:
    allowed = allowed & rectangles.uncovered(xp, targets)[-1][:, None]
  count = xp.sum(allowed, axis=(2, 3), dtype=np.int32)
  legal = xp.all(count >= settings.keep, axis=1)
  return (targets.shape, targets.top, targets.left, allowed), legal
