"""Rectangles on the grid of patches: shapes, corners, patch ids.

Written over an array namespace `xp` (NumPy, `jax.numpy`, or the TensorFlow one
of `jepa_jax.data.tf_masks`). The random part is integer arithmetic: a
rectangle's shape comes from a table made once in float64, its corner from a
product of integers. So all namespaces draw the same rectangles.

Axes as in `jepa_jax.masks`.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from jepa_jax.masks import counter_rng
from jepa_jax.masks.arrays import Array

_LEVELS = 2**16  # resolution of the uniform number that picks a shape


@dataclasses.dataclass(frozen=True, eq=False)
class Shapes:
  """The shapes that a rectangle can have, and how likely each is.

  Attributes:
    grid: (H, W) of the patches.
    table: int32 [2**16]; index of the shape for each value of 16 random bits.
    heights, widths, areas: int32 [shapes], in patches.
    num_corners: int32 [shapes, 2]; rows and columns that the top left corner
      may lie in.
    offsets: int32 [shapes, T]; ids of a rectangle's patches less its corner's
      id, row-major, 0 past the rectangle's area. T is the largest area.
  """

  grid: tuple[int, int]
  table: np.ndarray
  heights: np.ndarray
  widths: np.ndarray
  areas: np.ndarray
  num_corners: np.ndarray
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
  """Enumerates the rectangles of a range of scales and aspect ratios.

  Args:
    scale: smallest and largest share of the grid's area.
    aspect_ratio: smallest and largest height over width.
    grid: (H, W) in patches.
    released: as the released code does it: one uniform number drives scale and
      aspect ratio, a rectangle as high (wide) as the grid loses a row (column),
      and none reaches the last row (column). Otherwise scale and aspect ratio
      are independent (8 bits each), rectangles may fill the grid, and corners
      lie wherever the rectangle fits.
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
    num_corners=(np.asarray(grid) - sizes + (not released)).astype(np.int32),
    offsets=np.where(patch < areas[:, None], offsets, 0).astype(np.int32),
  )


@dataclasses.dataclass(frozen=True)
class Rectangles:
  """Rectangles on a grid: indices of their shapes, and corners.

  Attributes:
    shapes: the table that `shape` is an index of.
    shape, top, left: int32 arrays that broadcast.
  """

  shapes: Shapes
  shape: Array
  top: Array
  left: Array


def sample_shapes(xp: Any, random: Array, shapes: Shapes) -> Array:
  """Indices of random shapes, int32, from random uint32."""
  level = xp.astype(xp.right_shift(random, np.uint32(16)), np.int32)
  return xp.take(shapes.table, level, axis=0)


def place(
  xp: Any, shapes: Shapes, shape: Array, row: Array, column: Array
) -> Rectangles:
  """Rectangles at random corners; row and column are random uint32."""
  rows = xp.take(shapes.num_corners[:, 0], shape, axis=0)
  columns = xp.take(shapes.num_corners[:, 1], shape, axis=0)
  return Rectangles(
    shapes,
    shape,
    counter_rng.uniform_below(xp, row, rows),
    counter_rng.uniform_below(xp, column, columns),
  )


def extents(xp: Any, rects: Rectangles) -> tuple[Array, Array]:
  """Rows that each covers, bool [..., H], and columns, bool [..., W]."""
  covered = []
  for start, sizes, length in (
    (rects.top, rects.shapes.heights, rects.shapes.grid[0]),
    (rects.left, rects.shapes.widths, rects.shapes.grid[1]),
  ):
    position = np.arange(length, dtype=np.int32)
    size = xp.take(sizes, rects.shape, axis=0)
    covered.append(
      (position >= start[..., None]) & (position < (start + size)[..., None])
    )
  return covered[0], covered[1]


def cover(xp: Any, rects: Rectangles) -> Array:
  """Patches that each rectangle covers, bool [..., H, W]."""
  rows, columns = extents(xp, rects)
  return rows[..., :, None] & columns[..., None, :]


def uncovered(xp: Any, rects: Rectangles) -> list[Array]:
  """Patches outside the first 1, 2, ... M: [B, M] -> M x [B, H, W]."""
  rows, columns = extents(xp, rects)
  outside, results = None, []
  for m in range(rows.shape[1]):
    free = ~(rows[:, m, :, None] & columns[:, m, None, :])
    outside = free if outside is None else outside & free
    results.append(outside)
  return results


def patch_ids(xp: Any, rects: Rectangles) -> tuple[Array, Array]:
  """Ids, int32 row-major, and validity of the patches: [B, M] -> [B, M, T].

  Ids past a rectangle's area are 0.
  """
  shapes = rects.shapes
  slots = np.arange(shapes.offsets.shape[1], dtype=np.int32)
  valid = slots < xp.take(shapes.areas, rects.shape, axis=0)[..., None]
  corner = rects.top * np.int32(shapes.grid[1]) + rects.left
  ids = corner[..., None] + xp.take(shapes.offsets, rects.shape, axis=0)
  valid = xp.broadcast_to(valid, ids.shape)  # `released` has one shape a batch
  return xp.where(valid, ids, np.int32(0)), valid
