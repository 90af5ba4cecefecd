"""Rectangular blocks on the grid of patches: shapes, places, patch ids.

Written over an array namespace `xp` (NumPy, `jax.numpy`, or the TensorFlow one
of `jepa_jax.data.tf_masks`). The random part is integer arithmetic: a block's
shape comes from a table made once in float64, its corner from a product of
integers. So all namespaces place the same blocks.

Axes as in `jepa_jax.masks`.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from jepa_jax.masks import counter_rng

Array = Any  # np.ndarray, jax.Array or tf.Tensor, as `xp` says

_LEVELS = 2**16  # resolution of the uniform number that picks a block's shape


@dataclasses.dataclass(frozen=True, eq=False)
class Shapes:
  """The shapes that a block can have, and how a random word picks one.

  Attributes:
    grid: (H, W) of the patches.
    table: int32 [2**16]; the shape's number for each value of 16 random bits.
    heights, widths, areas: int32 [shapes], in patches.
    rooms: int32 [shapes, 2]; how many rows, columns a corner may lie in.
    offsets: int32 [shapes, T]; ids of a block's patches less its corner's id,
      row-major, 0 past the block's area. T is the largest area.
  """

  grid: tuple[int, int]
  table: np.ndarray
  heights: np.ndarray
  widths: np.ndarray
  areas: np.ndarray
  rooms: np.ndarray
  offsets: np.ndarray

  def frequencies(self) -> dict[tuple[int, int], float]:
    """Exact probability of every (height, width)."""
    counts = np.bincount(self.table, minlength=len(self.areas)) / _LEVELS
    shapes = zip(self.heights.tolist(), self.widths.tolist())
    return dict(zip(shapes, counts.tolist()))


@functools.cache
def enumerate_shapes(
  scale: tuple[float, float],
  aspect_ratio: tuple[float, float],
  grid: tuple[int, int],
  *,
  released: bool,
) -> Shapes:
  """Enumerates the blocks of a range of scales and aspect ratios.

  Args:
    scale: smallest and largest share of the grid's area.
    aspect_ratio: smallest and largest height over width.
    grid: (H, W) in patches.
    released: as the released code does it: one uniform number drives scale and
      aspect ratio, a block as high (wide) as the grid loses a row (column), and
      no corner lies so far down (right) that the last row (column) is reached.
      Otherwise scale and aspect ratio are independent (8 bits each), blocks may
      fill the grid, and corners lie wherever the block fits.
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
  sizes, table = np.unique(pairs, axis=0, return_inverse=True)
  heights, widths = sizes.T
  areas = heights * widths
  patch = np.arange(max(areas.max(), 1), dtype=np.int32)
  columns = np.maximum(widths, 1)[:, None]
  offsets = patch // columns * width + patch % columns
  return Shapes(
    grid=grid,
    table=table.reshape(-1).astype(np.int32),
    heights=heights,
    widths=widths,
    areas=areas,
    rooms=(np.asarray(grid) - sizes + (not released)).astype(np.int32),
    offsets=np.where(patch < areas[:, None], offsets, 0).astype(np.int32),
  )


@dataclasses.dataclass(frozen=True)
class Rectangles:
  """Rectangles on a grid: numbers of their shapes, and corners.

  Attributes:
    shapes: what `shape` counts.
    shape, top, left: int32 arrays that broadcast together.
  """

  shapes: Shapes
  shape: Array
  top: Array
  left: Array


def pick_shapes(xp: Any, word: Array, shapes: Shapes) -> Array:
  """Number of the shape that each random word picks, int32."""
  bits = xp.astype(xp.right_shift(word, np.uint32(16)), np.int32)
  return xp.take(shapes.table, bits, axis=0)


def place(
  xp: Any, shapes: Shapes, shape: Array, row: Array, column: Array
) -> Rectangles:
  """Places blocks of the given shapes; row and column are random words."""
  rows = xp.take(shapes.rooms[:, 0], shape, axis=0)
  columns = xp.take(shapes.rooms[:, 1], shape, axis=0)
  return Rectangles(
    shapes,
    shape,
    counter_rng.below(xp, row, rows),
    counter_rng.below(xp, column, columns),
  )


def extents(xp: Any, blocks: Rectangles) -> tuple[Array, Array]:
  """Rows, bool [..., H], and columns, bool [..., W], that each block covers."""
  covered = []
  for start, sizes, length in (
    (blocks.top, blocks.shapes.heights, blocks.shapes.grid[0]),
    (blocks.left, blocks.shapes.widths, blocks.shapes.grid[1]),
  ):
    position = np.arange(length, dtype=np.int32)
    size = xp.take(sizes, blocks.shape, axis=0)
    covered.append(
      (position >= start[..., None]) & (position < (start + size)[..., None])
    )
  return covered[0], covered[1]


def cover(xp: Any, blocks: Rectangles) -> Array:
  """Patches that each block covers, bool [..., H, W]."""
  rows, columns = extents(xp, blocks)
  return rows[..., :, None] & columns[..., None, :]


def uncovered(xp: Any, blocks: Rectangles) -> list[Array]:
  """Patches outside the first 1, 2, ... M blocks: [B, M] -> M x [B, H, W]."""
  rows, columns = extents(xp, blocks)
  outside, results = None, []
  for m in range(rows.shape[1]):
    free = ~(rows[:, m, :, None] & columns[:, m, None, :])
    outside = free if outside is None else outside & free
    results.append(outside)
  return results


def patch_ids(xp: Any, blocks: Rectangles) -> tuple[Array, Array]:
  """Ids, int32 row-major, and validity of blocks' patches: [B, M] -> [B, M, T].

  Ids past a block's area are 0.
  """
  shapes = blocks.shapes
  slots = np.arange(shapes.offsets.shape[1], dtype=np.int32)
  valid = slots < xp.take(shapes.areas, blocks.shape, axis=0)[..., None]
  corner = blocks.top * np.int32(shapes.grid[1]) + blocks.left
  ids = corner[..., None] + xp.take(shapes.offsets, blocks.shape, axis=0)
  valid = xp.broadcast_to(valid, ids.shape)  # `released` has one shape a batch
  return xp.where(valid, ids, np.int32(0)), valid
