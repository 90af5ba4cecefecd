"""The mask samplers: what is drawn, before it is brought to a static size.

Each is written once, over an array namespace `xp`; see `masks`, whose axes
these are, and which offers them to users.

Reference: Assran et al. 2023, section 3 and table 6, arXiv:2301.08243.
"""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.masks import counter_rng, rectangles

Array = Any  # np.ndarray, jax.Array or tf.Tensor, as `xp` says

_RELEASED_TRIES = 20  # failed draws until the released code drops a constraint
_CORRECTED_ROUNDS = 4  # whole draws until `corrected` falls back


@dataclasses.dataclass(frozen=True)
class Settings:
  """config.masks as a hashable value, with the grid; keys as in config.py."""

  name: str
  grid: tuple[int, int]
  num_contexts: int
  num_targets: int
  context_scale: tuple[float, float]
  target_scale: tuple[float, float]
  aspect_ratio: tuple[float, float]
  allow_overlap: bool
  min_keep: int
  context_patches: int

  @property
  def keep(self) -> int:
    """Fewest patches of a legal context, for all samplers but `released`."""
    return max(self.min_keep, 1)

  def shapes(
    self, *, released: bool
  ) -> tuple[rectangles.Shapes, rectangles.Shapes]:
    """Shapes of the context and of the targets.

    A context is square, or in proportion to the grid if not `released`, so that
    scale 1 is the whole of any grid.
    """
    height, width = self.grid
    square = 1.0 if released else height / width
    enumerate_shapes = functools.partial(
      rectangles.enumerate_shapes, grid=self.grid, released=released
    )
    return (
      enumerate_shapes(self.context_scale, (square, square)),
      enumerate_shapes(self.target_scale, self.aspect_ratio),
    )

  def no_mask(self, why: str, change: str) -> ValueError:
    """The error of settings that allow no legal mask."""
    return ValueError(
      f'no legal mask of the "{self.name}" sampler on a {self.grid[0]}x'
      f"{self.grid[1]} grid: {why}; {change}"
    )


@dataclasses.dataclass(frozen=True)
class Draw:
  """What a sampler draws, before it is brought to K and T patches.

  Attributes:
    context: bool [B, S, N], the patches that each context may use.
    targets: (ids int32, valid bool), [B, M, T] each, where T is certain; or
      bool [B, M, N], the patches of each target.
    order: int32 [B, S, N]; a context's patches counted from 0 in random order,
      anything elsewhere. None if the sampler has no use for one itself.
  """

  context: Array
  targets: Any
  order: Array | None = None


def cond(xp: Any, predicate: Array, true: Callable, false: Callable) -> Any:
  """Branches on a scalar; TensorFlow's namespace has its own."""
  if xp is np:
    return true() if predicate else false()
  if xp is jnp:
    return jax.lax.cond(predicate, true, false)
  return xp.cond(predicate, true, false)


# ---------------------------------------------------------------------------
# released


def _check_released(settings: Settings) -> None:
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


def _draw_released(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """The released collator, equal in distribution.

  Block shapes are drawn once a batch. A context that keeps no more than
  min_keep patches is drawn again; after every 20 failures one target more, the
  last first, may leak into it.
  """
  m, s = settings.num_targets, settings.num_contexts
  context, target = settings.shapes(released=True)
  batch = counter_rng.draw(xp, batch_key, 2)  # [1, 2]
  random = counter_rng.draw(xp, image_key, 2 * (m + s))
  rows, columns = random[:, : m + s], random[:, m + s :]
  targets = rectangles.place(
    xp,
    target,
    rectangles.pick_shapes(xp, batch[:, :1], target),
    rows[:, :m],
    columns[:, :m],
  )
  contexts = rectangles.place(
    xp,
    context,
    rectangles.pick_shapes(xp, batch[:, 1:], context),
    rows[:, m:],
    columns[:, m:],
  )
  allowed = rectangles.cover(xp, contexts)
  if not settings.allow_overlap:
    outside = rectangles.uncovered(xp, targets)
    allowed = allowed & outside[-1][:, None]
    failed = xp.sum(allowed, axis=(2, 3), dtype=np.int32) <= settings.min_keep

    def redraw():
      again = _redraw_released(settings, xp, image_key, contexts, outside)
      return xp.where(failed[..., None, None], again, allowed)

    allowed = cond(xp, xp.any(failed), redraw, lambda: allowed)
  context = xp.reshape(allowed, (-1, s, math.prod(settings.grid)))
  return Draw(context, rectangles.patch_ids(xp, targets))


def _redraw_released(
  settings: Settings,
  xp: Any,
  image_key: Array,
  contexts: rectangles.Rectangles,
  outside: list[Array],
) -> Array:
  """Contexts [B, S, H, W] after a first attempt that failed.

  All attempts that the released code could make are laid side by side:
  20 M in all, the last one free of constraints.
  """
  m, s = settings.num_targets, settings.num_contexts
  tries = _RELEASED_TRIES * m
  key = counter_rng.fold(xp, image_key, np.asarray([1], np.uint32))
  random = xp.reshape(
    counter_rng.draw(xp, key, 2 * s * tries), (-1, 2, s, tries)
  )
  shape = contexts.shape[..., None]
  again = rectangles.place(
    xp, contexts.shapes, shape, random[:, 0], random[:, 1]
  )
  rows, columns = rectangles.extents(xp, again)  # [B, S, tries, H or W]
  # Attempt 0 was the caller's: attempt i, at index i - 1, ignores the last
  # i // 20 targets.
  number = np.arange(1, tries + 1, dtype=np.int32)
  dropped = number // _RELEASED_TRIES
  legal = []
  for d in range(m):
    span = slice(*np.searchsorted(dropped, [d, d + 1]))
    free = xp.astype(outside[m - 1 - d], np.float32)[:, None]
    kept = xp.matmul(xp.astype(rows[:, :, span], np.float32), free)
    kept = kept * xp.astype(columns[:, :, span], np.float32)
    legal.append(xp.sum(kept, axis=-1) > settings.min_keep)
  legal = xp.concatenate(legal, axis=-1)  # [B, S, tries - 1]
  index = np.arange(tries, dtype=np.int32)
  first = xp.min(xp.where(legal, index[:-1], index[-1]), axis=-1)[..., None]
  chosen = (first == index)[..., None]
  row, column = xp.any(rows & chosen, axis=2), xp.any(columns & chosen, axis=2)
  block = row[..., :, None] & column[..., None, :]
  for m_kept in range(1, m + 1):  # constraints of the first m_kept targets
    leak = first + 1 >= (m - m_kept + 1) * _RELEASED_TRIES
    block = block & (outside[m_kept - 1][:, None] | leak[..., None])
  return block


# ---------------------------------------------------------------------------
# corrected, and what derives from it


def _check_corrected(settings: Settings) -> None:
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


def _draw_corrected(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """Multi-block masks as the paper describes them.

  Every block of every image draws its own scale, aspect ratio and corner, all
  independent; a corner is uniform over every place where the block fits, last
  row and column included. No target ever leaks into a context.

  Differs: the released code draws one shape a batch; see `_draw_released`. The
  paper's contexts are square; here they have the proportions of the grid.
  """
  del batch_key
  context, targets = _multi_block(settings, xp, image_key)
  return Draw(context, rectangles.patch_ids(xp, targets))


def _multi_block(
  settings: Settings, xp: Any, image_key: Array
) -> tuple[Array, rectangles.Rectangles]:
  """Contexts, bool [B, S, N], and targets [B, M] of `corrected`.

  A draw that leaves a context fewer than min_keep patches is repeated as a
  whole, at most four times in all; then all targets take the first one's place
  and the context is everything else, which `_check_corrected` has shown to be
  enough.
  """
  _, target = settings.shapes(released=False)
  number = np.arange(_CORRECTED_ROUNDS, dtype=np.uint32)[:, None]
  key = counter_rng.fold(xp, image_key, number)  # [rounds, B]
  first, legal = _attempt_corrected(settings, xp, key[0])

  def choose(keep, new, old):
    column = lambda x: xp.reshape(keep, (-1,) + (1,) * (len(x.shape) - 1))
    return tuple(xp.where(column(a), a, b) for a, b in zip(new, old))

  def repeat():
    more, also_legal = _attempt_corrected(
      settings, xp, xp.reshape(key[1:], (-1,))
    )
    rounds = lambda x: xp.reshape(x, (_CORRECTED_ROUNDS - 1, -1, *x.shape[1:]))
    more, also_legal = [rounds(x) for x in more], rounds(also_legal)
    copies = [xp.broadcast_to(x[:, :1], x.shape) for x in first[:3]]
    free = rectangles.uncovered(xp, rectangles.Rectangles(target, *copies))[0][
      :, None
    ]
    result = (*copies, xp.broadcast_to(free, first[3].shape))
    for i in reversed(range(_CORRECTED_ROUNDS - 1)):
      result = choose(also_legal[i], [x[i] for x in more], result)
    return choose(legal, first, result)

  *placed, allowed = cond(xp, xp.all(legal), lambda: first, repeat)
  shape = (-1, settings.num_contexts, math.prod(settings.grid))
  return xp.reshape(allowed, shape), rectangles.Rectangles(target, *placed)


def _attempt_corrected(
  settings: Settings, xp: Any, key: Array
) -> tuple[tuple[Array, ...], Array]:
  """One draw: targets' (shape, top, left), [B, M] each, and contexts.

  Returns:
    (shape, top, left, contexts bool [B, S, H, W]); and whether the contexts
    are large enough, bool [B].
  """
  random = counter_rng.draw(
    xp, key, 3 * (settings.num_contexts + settings.num_targets)
  )
  context, target = settings.shapes(released=False)

  def draw(shapes, random):
    n = random.shape[1] // 3
    shape = rectangles.pick_shapes(xp, random[:, :n], shapes)
    return rectangles.place(
      xp, shapes, shape, random[:, n : 2 * n], random[:, 2 * n :]
    )

  targets = draw(target, random[:, : 3 * settings.num_targets])
  contexts = draw(context, random[:, 3 * settings.num_targets :])
  allowed = rectangles.cover(xp, contexts)
  if not settings.allow_overlap:
    allowed = allowed & rectangles.uncovered(xp, targets)[-1][:, None]
  count = xp.sum(allowed, axis=(2, 3), dtype=np.int32)
  legal = xp.all(count >= settings.keep, axis=1)
  return (targets.shape, targets.top, targets.left, allowed), legal


def _draw_block(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """Blocks as targets (the paper: one, of scale .6); context: all the rest."""
  settings = dataclasses.replace(settings, context_scale=(1.0, 1.0))
  return _draw_corrected(settings, xp, batch_key, image_key)


def _draw_union(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """As `corrected`, with the union of all blocks as the one target."""
  del batch_key
  context, targets = _multi_block(settings, xp, image_key)
  union = ~rectangles.uncovered(xp, targets)[-1]
  return Draw(context, xp.reshape(union, (-1, 1, math.prod(settings.grid))))


# ---------------------------------------------------------------------------
# random and rasterized


def _random_sizes(settings: Settings) -> np.ndarray:
  """Patches of a random target for each value of 16 random bits, int32."""
  low, high = settings.target_scale
  share = low + (np.arange(2**16) + 0.5) / 2**16 * (high - low)
  return np.round(math.prod(settings.grid) * share).astype(np.int32)


def _check_random(settings: Settings) -> None:
  sizes = _random_sizes(settings)
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


def _draw_random(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """Disjoint random sets of patches as targets; context: all the rest.

  A target has a share of the grid uniform in target_scale (the paper: one
  target of .6). Several contexts are the same set, cut to K at different places
  of one random order.
  """
  del batch_key
  m, n = settings.num_targets, math.prod(settings.grid)
  table = _random_sizes(settings)
  word = counter_rng.draw(xp, image_key, m)
  bits = xp.astype(xp.right_shift(word, np.uint32(16)), np.int32)
  sizes = xp.take(table, bits, axis=0)  # [B, M]
  rank = counter_rng.permutation(
    xp, counter_rng.fold(xp, image_key, np.uint32([1])), n
  )
  # In the order of their ranks, targets start at every max-th patch.
  start = np.arange(m, dtype=np.int32)[:, None] * table.max()
  ranks, end = rank[:, None], start + sizes[..., None]
  targets = (ranks >= start) & (ranks < end)  # [B, M, N]
  context = ~xp.any(targets, axis=1)[:, None]
  # Number of a patch among the context's, the highest rank first: less the
  # targets that lie above it.
  order = np.int32(n - 1) - rank
  for i in range(1, m):
    order = order - xp.where(rank < start[i], sizes[:, i : i + 1], 0)
  order, s = order[:, None], settings.num_contexts
  if s > 1:
    count = n - xp.sum(sizes, axis=1, dtype=np.int32)[:, None, None]
    order = order + np.arange(s, dtype=np.int32)[:, None] * count // s
    order = xp.where(order < count, order, order - count)
  return Draw(xp.broadcast_to(context, order.shape), targets, order)


def _quadrants(settings: Settings) -> np.ndarray:
  """The four quarters of the grid, bool [4, N]."""
  rows, columns = (np.arange(x) >= x // 2 for x in settings.grid)
  number = 2 * rows[:, None] + columns
  return number.reshape(-1) == np.arange(4)[:, None]


def _check_rasterized(settings: Settings) -> None:
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


def _draw_rasterized(
  settings: Settings, xp: Any, batch_key: Array, image_key: Array
) -> Draw:
  """One quadrant of the image as context, the other three as targets."""
  del batch_key
  chosen = counter_rng.below(
    xp, counter_rng.draw(xp, image_key, 1), np.asarray([4])
  )
  number = (chosen + np.arange(4, dtype=np.int32)) & 3  # [B, 4]
  quadrants = xp.take(_quadrants(settings), number, axis=0)
  return Draw(quadrants[:, :1], quadrants[:, 1:])


# ---------------------------------------------------------------------------
# The table of samplers


@dataclasses.dataclass(frozen=True)
class Sampler:
  """One row of the table of samplers.

  Attributes:
    check: raises ValueError where the settings allow no legal mask.
    draw: (settings, xp, batch key [1], image keys [B]) -> Draw.
    surplus: how a context of more than K patches is cut: "first" keeps the
      first in row-major order, "random" a random subset.
    target_quantile: T is this quantile of the targets' sizes; a larger target
      is cut to a random subset.
  """

  check: Callable[[Settings], None]
  draw: Callable[[Settings, Any, Array, Array], Draw]
  surplus: str = "random"
  target_quantile: float = 1.0


SAMPLERS: Mapping[str, Sampler] = {
  "released": Sampler(_check_released, _draw_released, surplus="first"),
  "corrected": Sampler(_check_corrected, _draw_corrected),
  "block": Sampler(_check_corrected, _draw_block),
  "random": Sampler(_check_random, _draw_random),
  "rasterized": Sampler(_check_rasterized, _draw_rasterized),
  # Four overlapping blocks rarely are as large as they could be: room for
  # the largest union would be 40 % padding.
  "union": Sampler(_check_corrected, _draw_union, target_quantile=0.95),
}
