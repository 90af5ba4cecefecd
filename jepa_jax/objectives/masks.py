"""Which patches are context and which are targets.

Every sampler is written once, as integer arithmetic on words of a counter-based
hash, over an array namespace `xp`: NumPy, `jax.numpy`, or the TensorFlow one of
`jepa_jax.data.masks`. The three give the same masks for the same seed, bit for
bit, because no floating point number decides anything: block shapes come from a
table made once in float64, corners from integer products.

An image's masks are a function of (seed, epoch, image). Only what the released
code draws once a batch is a function of (seed, step) instead.

Axes: B batch, S context masks, K context patches, M target blocks, T patches a
block, H x W patches of the grid, N = H * W. Patches count in row-major order.

Reference: Assran et al. 2023, section 3, arXiv:2301.08243.
"""

import dataclasses
import functools
import math
from typing import Any, Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # np.ndarray, jax.Array or tf.Tensor, as `xp` says

# Streams of random words; no two uses of a seed may share one.
ORDER, AUGMENT, MASK_IMAGE, MASK_BATCH = range(1, 5)

_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio: spreads consecutive integers
_LEVELS = 2**16  # resolution of the uniform number that picks a block's shape
_RELEASED_TRIES = 20  # failed draws until the released code drops a constraint
_CORRECTED_ROUNDS = 4  # whole draws until `corrected` falls back
_SIMULATED_BATCHES, _SIMULATED_BATCH_SIZE = 256, 128  # of the K rule


# ---------------------------------------------------------------------------
# Random words: a 32-bit mixer, the same bits in every namespace.


def _mix(xp: Any, x: Array) -> Array:
  """Bijective mixer of uint32 words (two rounds of xor-shift-multiply)."""
  x = x ^ xp.right_shift(x, np.uint32(16))
  x = x * np.uint32(0x7FEB352D)
  x = x ^ xp.right_shift(x, np.uint32(15))
  x = x * np.uint32(0x846CA68B)
  return x ^ xp.right_shift(x, np.uint32(16))


def fold(xp: Any, key: Array, value: Array) -> Array:
  """Derives a key from a key and an integer, both uint32 of any shape."""
  return _mix(xp, key ^ _mix(xp, value + np.uint32(_GOLDEN)))


def stream_key(seed: int, stream: int) -> np.ndarray:
  """Returns the uint32 [1] key of one use (`stream`) of a run's seed."""
  seed = int(seed) % 2**64
  key = np.asarray([seed % 2**32], np.uint32)
  for value in (seed // 2**32, stream):
    key = fold(np, key, np.asarray([value], np.uint32))
  return key


def words(xp: Any, key: Array, count: int) -> Array:
  """Returns `count` random uint32 words a key: [...] -> [..., count]."""
  steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN % 2**32
  return _mix(xp, key[..., None] + _mix(np, steps.astype(np.uint32)))


def _below(xp: Any, word: Array, bound: Array) -> Array:
  """Uniform int32 in [0, bound); biased by less than bound / 2**16."""
  high = xp.right_shift(word, np.uint32(16))
  product = high * xp.astype(bound, np.uint32)
  return xp.astype(xp.right_shift(product, np.uint32(16)), np.int32)


# ---------------------------------------------------------------------------
# What NumPy and JAX spell differently. TensorFlow's namespace has all of it.


def _cond(xp: Any, predicate: Array, true: Callable, false: Callable) -> Any:
  if xp is np:
    return true() if predicate else false()
  if xp is jnp:
    return jax.lax.cond(predicate, true, false)
  return xp.cond(predicate, true, false)


def _first(xp: Any, valid: Array, k: int) -> Array:
  """Indices of the first k true entries of the last axis, ascending; then 0."""
  if xp is not np and xp is not jnp:
    return xp.first(valid, k)
  order = xp.argsort(~valid, axis=-1, stable=True)[..., :k]
  count = xp.sum(valid, axis=-1, dtype=np.int32)[..., None]
  return xp.where(np.arange(k) < count, order, 0).astype(np.int32)


def _kth_largest(xp: Any, values: Array, k: int) -> Array:
  """The k-th largest entry of the last axis: [..., N] -> [..., 1]."""
  if xp is np:
    return np.partition(values, values.shape[-1] - k, -1)[..., -k, None]
  if xp is jnp:
    return jax.lax.top_k(values, k)[0][..., -1:]
  return xp.kth_largest(values, k)


# ---------------------------------------------------------------------------
# Shapes of blocks.


@dataclasses.dataclass(frozen=True, eq=False)
class BlockShapes:
  """The shapes that a block can have, and how a random word picks one.

  Attributes:
    table: int32 [2**16]; the shape's number for each value of 16 random bits.
    heights, widths, areas: int32 [shapes], in patches.
    offsets: int32 [shapes, T]; ids of a block's patches less its corner's id,
      row-major, 0 past the block's area. T is the largest area.
  """

  table: np.ndarray
  heights: np.ndarray
  widths: np.ndarray
  areas: np.ndarray
  offsets: np.ndarray

  def frequencies(self) -> dict[tuple[int, int], float]:
    """Exact probability of every (height, width)."""
    counts = np.bincount(self.table, minlength=len(self.areas)) / _LEVELS
    shapes = zip(self.heights.tolist(), self.widths.tolist())
    return dict(zip(shapes, counts.tolist()))


@functools.lru_cache(maxsize=None)
def block_shapes(
    scale: tuple[float, float],
    aspect_ratio: tuple[float, float],
    grid: tuple[int, int],
    *,
    released: bool,
) -> BlockShapes:
  """Enumerates the blocks of a scale and aspect ratio (height / width).

  Args:
    scale: smallest and largest share of the grid's area.
    aspect_ratio: smallest and largest height / width.
    grid: (H, W) in patches.
    released: one uniform number drives scale and aspect ratio, and a block as
      high or as wide as the grid loses a row or column. Otherwise the two are
      independent (8 bits each) and blocks may fill the grid.
  """
  height, width = grid
  level = np.arange(_LEVELS)
  if released:
    u_scale = u_aspect = (level + 0.5) / _LEVELS
    limits = (height - 1, width - 1)
  else:
    u_scale, u_aspect = (level // 256 + 0.5) / 256, (level % 256 + 0.5) / 256
    limits = grid
  share = scale[0] + u_scale * (scale[1] - scale[0])
  area = np.floor(height * width * share)
  aspect = aspect_ratio[0] + u_aspect * (aspect_ratio[1] - aspect_ratio[0])
  h = np.minimum(np.round(np.sqrt(area * aspect)), limits[0])
  w = np.minimum(np.round(np.sqrt(area / aspect)), limits[1])
  pairs = np.stack([h, w], -1).astype(np.int32)
  shapes, table = np.unique(pairs, axis=0, return_inverse=True)
  heights, widths = shapes.T
  areas = heights * widths
  patch = np.arange(max(areas.max(), 1), dtype=np.int32)
  columns = np.maximum(widths, 1)[:, None]
  offsets = patch // columns * width + patch % columns
  offsets = np.where(patch < areas[:, None], offsets, 0).astype(np.int32)
  return BlockShapes(
      table.reshape(-1).astype(np.int32), heights, widths, areas, offsets
  )


# ---------------------------------------------------------------------------
# Blocks on the grid.


@dataclasses.dataclass(frozen=True)
class _Blocks:
  """Blocks' shape numbers and corners, int32 arrays that broadcast together."""

  shape: Array
  top: Array
  left: Array


def _pick_shapes(xp: Any, word: Array, shapes: BlockShapes) -> Array:
  bits = xp.astype(xp.right_shift(word, np.uint32(16)), np.int32)
  return xp.take(shapes.table, bits, axis=0)


def _place(
    xp: Any, rows: Array, columns: Array, shape: Array, room: Array
) -> _Blocks:
  """Draws corners; `room` [shapes, 2] holds the number of legal rows, columns."""
  return _Blocks(
      shape,
      _below(xp, rows, xp.take(room[:, 0], shape, axis=0)),
      _below(xp, columns, xp.take(room[:, 1], shape, axis=0)),
  )


def _extents(
    xp: Any, blocks: _Blocks, shapes: BlockShapes, grid: tuple[int, int]
) -> tuple[Array, Array]:
  """Rows [..., H] and columns [..., W] that a block covers, bool."""
  extents = []
  for start, sizes, length in (
      (blocks.top, shapes.heights, grid[0]),
      (blocks.left, shapes.widths, grid[1]),
  ):
    position = np.arange(length, dtype=np.int32)
    start = start[..., None]
    size = xp.take(sizes, blocks.shape, axis=0)[..., None]
    extents.append((position >= start) & (position < start + size))
  return extents[0], extents[1]


def _uncovered(xp: Any, rows: Array, columns: Array) -> list[Array]:
  """Patches outside the first 1, 2, ... M blocks: [B, M, *] -> M x [B, H, W]."""
  outside, results = None, []
  for m in range(rows.shape[1]):
    block = ~(rows[:, m, :, None] & columns[:, m, None, :])
    outside = block if outside is None else outside & block
    results.append(outside)
  return results


def _block_ids(
    xp: Any, blocks: _Blocks, shapes: BlockShapes, width: int
) -> tuple[Array, Array]:
  """Ids and validity of the blocks' patches, [B, M] -> [B, M, T]."""
  slots = np.arange(shapes.offsets.shape[1], dtype=np.int32)
  valid = slots < xp.take(shapes.areas, blocks.shape, axis=0)[..., None]
  corner = (blocks.top * np.int32(width) + blocks.left)[..., None]
  ids = corner + xp.take(shapes.offsets, blocks.shape, axis=0)
  valid = xp.broadcast_to(valid, ids.shape)  # `released` has one shape a batch
  return xp.where(valid, ids, np.int32(0)), valid


# ---------------------------------------------------------------------------
# Samplers. Each has a check of its settings and a draw.


@dataclasses.dataclass(frozen=True)
class _Settings:
  """config.masks as a hashable value, with the grid."""

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

  def shapes(self, *, released: bool) -> tuple[BlockShapes, BlockShapes]:
    """Shapes of the context (square) and of the targets."""
    return (
        block_shapes(
            self.context_scale, (1.0, 1.0), self.grid, released=released
        ),
        block_shapes(
            self.target_scale, self.aspect_ratio, self.grid, released=released
        ),
    )


@dataclasses.dataclass(frozen=True)
class _Draw:
  """What a sampler returns, before the context is brought to K patches.

  Attributes:
    context: bool [B, S, N], the patches that a context may use.
    target_ids, target_valid: [B, M, T].
  """

  context: Array
  target_ids: Array
  target_valid: Array


def _check_released(settings: _Settings) -> None:
  context, target = settings.shapes(released=True)
  for name, shapes in (("target", target), ("context", context)):
    if shapes.areas.min() <= settings.min_keep:
      raise ValueError(
          f"no legal {name} block on a {_grid_name(settings)} grid: its"
          f" smallest has {shapes.areas.min()} patches and the released"
          f" sampler needs more than masks.min_keep={settings.min_keep} (the"
          " released code would never end); lower masks.min_keep to"
          f" {max(shapes.areas.min() - 1, 0)} or raise masks.{name}_scale"
      )


def _draw_released(
    settings: _Settings, xp: Any, batch_key: Array, image_key: Array
) -> _Draw:
  """The released collator, draw for draw in distribution.

  Shapes are drawn once a batch; a corner is uniform in [0, H - h), so the last
  row and column are never reached; a context that keeps no more than min_keep
  patches is drawn again, and after every 20 failures one target more (the last
  first) may leak into it.
  """
  m, s = settings.num_targets, settings.num_contexts
  height, width = settings.grid
  context, target = settings.shapes(released=True)
  batch = words(xp, batch_key, 2)  # [1, 2]
  room = [
      settings.grid - np.stack([x.heights, x.widths], -1)
      for x in (context, target)
  ]
  random = words(xp, image_key, 2 * (m + s))
  targets = _place(
      xp,
      random[:, :m],
      random[:, m : 2 * m],
      _pick_shapes(xp, batch[:, :1], target),
      room[1],
  )
  rows, columns = _extents(xp, targets, target, settings.grid)
  outside = _uncovered(xp, rows, columns)
  shape = _pick_shapes(xp, batch[:, 1:], context)
  contexts = _place(
      xp, random[:, 2 * m : 2 * m + s], random[:, 2 * m + s :], shape, room[0]
  )

  def mask(blocks):
    rows, columns = _extents(xp, blocks, context, settings.grid)
    whole = rows[..., :, None] & columns[..., None, :]
    return whole if settings.allow_overlap else whole & outside[-1][:, None]

  def redraw():
    return _redraw_released(
        settings, xp, image_key, shape, room[0], context, outside, failed,
        allowed,
    )

  allowed = mask(contexts)
  if not settings.allow_overlap:
    failed = xp.sum(allowed, axis=(2, 3), dtype=np.int32) <= settings.min_keep
    allowed = _cond(xp, xp.any(failed), redraw, lambda: allowed)
  ids, valid = _block_ids(xp, targets, target, width)
  return _Draw(xp.reshape(allowed, (-1, s, height * width)), ids, valid)


def _redraw_released(
    settings: _Settings,
    xp: Any,
    image_key: Array,
    shape: Array,
    room: np.ndarray,
    context: BlockShapes,
    outside: list[Array],
    failed: Array,
    allowed: Array,
) -> Array:
  """Contexts [B, S, H, W] after the released code's repeated attempts."""
  m, s = settings.num_targets, settings.num_contexts
  tries = _RELEASED_TRIES * m  # the next attempt has no constraint left
  random = words(xp, fold(xp, image_key, np.uint32([1])), 2 * s * (tries + 1))
  random = xp.reshape(random, (-1, 2, s, tries + 1))
  blocks = _place(xp, random[:, 0], random[:, 1], shape[..., None], room)
  rows, columns = _extents(xp, blocks, context, settings.grid)
  counts = []  # patches kept by each attempt, [B, S, 20] a constraint dropped
  for dropped in range(m):
    span = slice(dropped * _RELEASED_TRIES, (dropped + 1) * _RELEASED_TRIES)
    free = xp.astype(outside[m - 1 - dropped], np.float32)[:, None]
    in_row = xp.matmul(xp.astype(rows[:, :, span], np.float32), free)
    counts.append(
        xp.sum(in_row * xp.astype(columns[:, :, span], np.float32), axis=-1)
    )
  legal = xp.concatenate(counts, axis=-1) > settings.min_keep
  # The first attempt was made by the caller and failed: attempts count from 1.
  attempt = np.arange(1, tries + 1, dtype=np.int32)
  index = xp.min(xp.where(legal, attempt - 1, np.int32(tries)), axis=-1)
  chosen = index[..., None] == np.arange(tries + 1, dtype=np.int32)
  row = xp.any(rows & chosen[..., None], axis=2)
  column = xp.any(columns & chosen[..., None], axis=2)
  block = row[..., :, None] & column[..., None, :]
  dropped = xp.astype(index, np.int32)[..., None, None]
  for m_kept in range(m, 0, -1):
    limit = (m - m_kept + 1) * _RELEASED_TRIES
    block = block & (outside[m_kept - 1][:, None] | (dropped >= limit))
  return xp.where(failed[..., None, None], block, allowed)


def _check_corrected(settings: _Settings) -> None:
  context, target = settings.shapes(released=False)
  patches, keep = math.prod(settings.grid), max(settings.min_keep, 1)
  if target.areas.min() < 1:
    raise ValueError(
        f"masks.target_scale {settings.target_scale} gives blocks of 0 patches"
        f" on a {_grid_name(settings)} grid; needs at least {1 / patches:.3f}:"
        " raise it or use smaller patches"
    )
  if settings.allow_overlap:
    most, why = context.areas.min(), "its smallest context block"
  else:
    most = patches - target.areas.max()
    why = f"the largest target ({target.areas.max()} patches)"
  if most < keep:
    raise ValueError(
        f"no legal mask on a {_grid_name(settings)} grid: {why} leaves {most}"
        f" context patches and masks.min_keep needs {keep}; lower"
        " masks.min_keep or masks.target_scale, or use smaller patches"
    )


def _draw_corrected(
    settings: _Settings, xp: Any, batch_key: Array, image_key: Array
) -> _Draw:
  """Multi-block masks as the paper describes them.

  Every block of every image draws its own scale, aspect ratio and corner, all
  independent; corners are uniform over every place where the block fits, last
  row and column included. A draw whose context keeps fewer than min_keep
  patches is repeated as a whole, at most four times in all; then all targets
  take the first one's place and the context is everything else, which
  `_check_corrected` has shown to be enough. No target ever leaks.

  Differs: the released code draws one shape a batch; see `released`.
  """
  del batch_key
  m, s = settings.num_targets, settings.num_contexts
  height, width = settings.grid
  context, target = settings.shapes(released=False)
  rooms = [
      settings.grid - np.stack([x.heights, x.widths], -1) + 1
      for x in (context, target)
  ]

  def attempt(number):
    key = fold(xp, image_key, np.uint32([number]))
    random = words(xp, key, 3 * (m + s))
    blocks = []
    for shapes, room, span in (
        (target, rooms[1], random[:, : 3 * m]),
        (context, rooms[0], random[:, 3 * m :]),
    ):
      n = span.shape[1] // 3
      shape = _pick_shapes(xp, span[:, :n], shapes)
      blocks.append(
          _place(xp, span[:, n : 2 * n], span[:, 2 * n :], shape, room)
      )
    outside = _uncovered(xp, *_extents(xp, blocks[0], target, settings.grid))
    rows, columns = _extents(xp, blocks[1], context, settings.grid)
    allowed = rows[..., :, None] & columns[..., None, :]
    if not settings.allow_overlap:
      allowed = allowed & outside[-1][:, None]
    count = xp.sum(allowed, axis=(2, 3), dtype=np.int32)
    legal = xp.all(count >= max(settings.min_keep, 1), axis=1)
    place = blocks[0]
    return (place.shape, place.top, place.left, allowed), legal

  def choose(keep, first, second):
    """first where keep [B], else second, for tuples of arrays [B, ...]."""
    return tuple(
        xp.where(xp.reshape(keep, (-1,) + (1,) * (len(a.shape) - 1)), a, b)
        for a, b in zip(first, second)
    )

  def repeat():
    result, done = first, legal
    for number in range(1, _CORRECTED_ROUNDS):
      other, other_legal = attempt(number)
      result = choose(done, result, other)
      done = done | other_legal
    copies = tuple(xp.broadcast_to(x[:, :1], x.shape) for x in result[:3])
    rows, columns = _extents(xp, _Blocks(*copies), target, settings.grid)
    free = _uncovered(xp, rows, columns)[0][:, None]
    free = xp.broadcast_to(free, result[3].shape)
    return choose(done, result, copies + (free,))

  first, legal = attempt(0)
  everything_legal = xp.all(legal)
  *place, allowed = _cond(xp, everything_legal, lambda: first, repeat)
  ids, valid = _block_ids(xp, _Blocks(*place), target, width)
  return _Draw(xp.reshape(allowed, (-1, s, height * width)), ids, valid)


@dataclasses.dataclass(frozen=True)
class _Sampler:
  """One row of the table of samplers.

  Attributes:
    check: raises ValueError where the settings allow no legal mask.
    draw: (settings, xp, batch key, image keys) -> _Draw.
    surplus: how a context of more than K patches is cut: "first" keeps the
      first in row-major order, "random" a random subset.
  """

  check: Callable[[_Settings], None]
  draw: Callable[[_Settings, Any, Array, Array], _Draw]
  surplus: str


SAMPLERS: Mapping[str, _Sampler] = {
    "released": _Sampler(_check_released, _draw_released, "first"),
    "corrected": _Sampler(_check_corrected, _draw_corrected, "random"),
}


# ---------------------------------------------------------------------------
# The public functions.


@dataclasses.dataclass(frozen=True)
class MaskShapes:
  """Static sizes of the masks, and how much of them is padding on average.

  Attributes:
    num_contexts: S.
    context_patches: K.
    num_targets: M.
    target_patches: T.
    context_padding: mean share of the K slots that hold no patch.
    target_padding: mean share of the T slots that hold no patch.
  """

  num_contexts: int
  context_patches: int
  num_targets: int
  target_patches: int
  context_padding: float
  target_padding: float


def mask_shapes(config: Any, grid: tuple[int, int]) -> MaskShapes:
  """Static sizes of the masks that a configuration gives on a grid.

  K rule, where `context_patches` is 0: the mean, over simulated batches of 128
  images, of the batch's smallest context. That is what the released code, which
  cuts every context to the batch's smallest, trains on with 128 images a
  device; few images have fewer, and they are padded. T is the largest area
  that a target can have, so no target is ever cut.

  Args:
    config: config.masks.
    grid: (H, W) in patches.

  Returns:
    The sizes. Depends on nothing but the arguments.

  Raises:
    ValueError: unknown sampler, settings out of range, or no legal mask.
  """
  return _mask_shapes(_settings(config, grid))


def sample(
    config: Any,
    grid: tuple[int, int],
    *,
    seed: int,
    step: Array,
    epoch: Array,
    index: Array,
    xp: Any = jnp,
) -> dict[str, Array]:
  """Draws the masks of a batch.

  Works inside `jax.jit`; give `seed`, `config` and `grid` statically.

  Args:
    config: config.masks.
    grid: (H, W) in patches.
    seed: the run's seed.
    step: scalar integer; decides what the sampler draws once a batch.
    epoch: [B] or scalar integer, the epoch of each image.
    index: [B] integer, the number of each image in its source.
    xp: array namespace: `jax.numpy`, `numpy` or that of `data.masks`.

  Returns:
    context_ids int32 [B, S, K] ascending, padded with 0 at the end;
    context_valid bool [B, S, K]; target_ids int32 [B, M, T], row-major;
    target_valid bool [B, M, T].

  Raises:
    ValueError: as `mask_shapes`.
  """
  settings = _settings(config, grid)
  shapes = _mask_shapes(settings)
  draw, image_key = _draw(settings, seed, step, epoch, index, xp)
  context = draw.context
  if SAMPLERS[settings.name].surplus == "random":
    context = _random_subset(xp, context, shapes.context_patches, image_key)
  k = shapes.context_patches
  count = xp.sum(context, axis=-1, dtype=np.int32)[..., None]
  return {
      "context_ids": _first(xp, context, k),
      "context_valid": np.arange(k, dtype=np.int32) < count,
      "target_ids": draw.target_ids,
      "target_valid": draw.target_valid,
  }


def _draw(
    settings: _Settings,
    seed: int,
    step: Array,
    epoch: Array,
    index: Array,
    xp: Any,
) -> tuple[_Draw, Array]:
  index = xp.astype(xp.asarray(index), np.uint32)
  epoch = xp.astype(xp.asarray(epoch), np.uint32)
  step = xp.reshape(xp.astype(xp.asarray(step), np.uint32), (1,))
  batch_key = fold(xp, stream_key(seed, MASK_BATCH), step)
  image_key = fold(xp, stream_key(seed, MASK_IMAGE), epoch)
  image_key = fold(xp, image_key, index)
  draw = SAMPLERS[settings.name].draw(settings, xp, batch_key, image_key)
  return draw, image_key


def _random_subset(xp: Any, valid: Array, k: int, key: Array) -> Array:
  """Keeps k of the true entries of [B, S, N], each subset equally likely."""
  s, n = valid.shape[1], valid.shape[2]
  id_bits = np.uint32(max(n - 1, 1)).item().bit_length()
  random = words(xp, fold(xp, key, np.uint32([2**16])), s * n)
  # A random number with the patch's id below it: no ties, fits int32 >= 0.
  random = xp.right_shift(random, np.uint32(1 + id_bits))
  rank = xp.reshape(random * np.uint32(2**id_bits), (-1, s, n))
  rank = xp.astype(rank, np.int32) + np.arange(n, dtype=np.int32)
  rank = xp.where(valid, rank, np.int32(-1))
  return valid & (rank >= _kth_largest(xp, rank, k))


def _grid_name(settings: _Settings) -> str:
  return f"{settings.grid[0]}x{settings.grid[1]}"


def _settings(config: Any, grid: tuple[int, int]) -> _Settings:
  """Checks the ranges of config.masks and makes it hashable."""
  pair = lambda key: tuple(float(x) for x in config[key])
  settings = _Settings(
      name=config["name"],
      grid=(int(grid[0]), int(grid[1])),
      num_contexts=int(config["num_contexts"]),
      num_targets=int(config["num_targets"]),
      context_scale=pair("context_scale"),
      target_scale=pair("target_scale"),
      aspect_ratio=pair("aspect_ratio"),
      allow_overlap=bool(config["allow_overlap"]),
      min_keep=int(config["min_keep"]),
      context_patches=int(config["context_patches"]),
  )
  if settings.name not in SAMPLERS:
    raise ValueError(
        f'unknown mask sampler "{settings.name}"; known:'
        f" {', '.join(sorted(SAMPLERS))}"
    )
  for key, most in (
      ("context_scale", 1.0),
      ("target_scale", 1.0),
      ("aspect_ratio", math.inf),
  ):
    low, high = getattr(settings, key)
    if not 0 < low <= high <= most:
      raise ValueError(
          f"masks.{key} is ({low:g}, {high:g}); it needs 0 < min <= max"
          + (" <= 1" if most == 1 else "")
      )
  patches = math.prod(settings.grid)
  for key, low, high in (
      ("num_contexts", 1, math.inf),
      ("num_targets", 1, math.inf),
      ("min_keep", 0, patches),
      ("context_patches", 0, patches),
  ):
    if not low <= getattr(settings, key) <= high:
      raise ValueError(
          f"masks.{key} is {getattr(settings, key)}; on a"
          f" {_grid_name(settings)} grid it must be in [{low}, {high}]"
      )
  return settings


@functools.lru_cache(maxsize=None)
def _mask_shapes(settings: _Settings) -> MaskShapes:
  SAMPLERS[settings.name].check(settings)
  sizes, target_valid = [], []
  for step in range(_SIMULATED_BATCHES):
    index = np.arange(_SIMULATED_BATCH_SIZE)
    draw, _ = _draw(settings, 0, step, np.full(index.shape, step), index, np)
    sizes.append(draw.context.sum(-1))
    target_valid.append(draw.target_valid.mean())
  sizes = np.stack(sizes)  # [batches, B, S]
  k = settings.context_patches or round(float(sizes.min((1, 2)).mean()))
  return MaskShapes(
      num_contexts=settings.num_contexts,
      context_patches=k,
      num_targets=draw.target_ids.shape[1],
      target_patches=draw.target_ids.shape[2],
      context_padding=float(1 - np.minimum(sizes, k).mean() / k),
      target_padding=float(1 - np.mean(target_valid)),
  )
