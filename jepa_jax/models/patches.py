"""Images as patches, and where the patches lie."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def height_and_width(size: int | Sequence[int]) -> tuple[int, int]:
  """(H, W) of an image's size, which is one number where it is square.

  Args:
    size: pixels; a number, or height and width.

  Raises:
    ValueError: neither.
  """
  sides = (size, size) if isinstance(size, int) else tuple(size)
  if len(sides) != 2 or not all(isinstance(x, int) and x > 0 for x in sides):
    raise ValueError(
      f"image size {size} needs to be a number of pixels, or (height, width)."
    )
  return sides


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
  """Rows and columns of the patch grid.

  Args:
    height: of the image, pixels.
    width: of the image, pixels.
    patch_size: side of a square patch, pixels.

  Returns:
    (h, w).

  Raises:
    ValueError: the patch size does not divide the image.
  """
  for side in (height, width):
    if patch_size < 1 or side % patch_size:
      most = min(side, 4096)  # an image may be said to be of any size
      divisors = [p for p in range(2, most + 1) if side % p == 0]
      nearest = sorted(divisors, key=lambda p: abs(p - patch_size))[:2]
      raise ValueError(
        f"image size {side} is not a multiple of patch size {patch_size}; "
        "nearest patch sizes that divide it: "
        f"{', '.join(str(p) for p in sorted(nearest))}."
      )
  return height // patch_size, width // patch_size


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
  """Cuts images into flattened patches.

  Args:
    images: [B, H, W, C].
    patch_size: side of a patch, pixels.

  Returns:
    [B, N, patch_size * patch_size * C]; patches in row-major order, the
    pixels of a patch in the order row, column, channel.

  Raises:
    ValueError: images is not of rank 4, or the patch size does not divide it.
  """
  if images.ndim != 4:
    raise ValueError(
      f"images have shape {images.shape}; they need to be [B, H, W, C]."
    )
  b, height, width, c = images.shape
  h, w = patch_grid(height, width, patch_size)
  x = images.reshape(b, h, patch_size, w, patch_size, c)
  x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, h, w, patch, patch, C]
  return x.reshape(b, h * w, patch_size * patch_size * c)


def check_pixels(dtype: Any) -> None:
  """Refuses a type of images with a ValueError, unless uint8 or a float."""
  if dtype != jnp.uint8 and not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(
      f"images are {dtype}; they need to be uint8 (0 to 255), floats that are "
      "normalised, or floats from 0 to 1 with unit_range=True."
    )


def normalize_images(
  images: jax.Array,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  *,
  unit_range: bool = False,
  dtype: Any = jnp.float32,
) -> jax.Array:
  """Brings images to zero mean and unit variance, on the device.

  Args:
    images: [B, H, W, C]; uint8 is normalised, float is taken as normalised.
    mean: a value a channel, on a scale of 0 to 1.
    std: a value a channel, on a scale of 0 to 1.
    unit_range: floats go from 0 to 1 and are normalised too.
    dtype: of the result, float32 or float64.

  Returns:
    [B, H, W, C] of dtype.

  Raises:
    ValueError: other integers, whose range nobody knows.
  """
  check_pixels(images.dtype)
  is_float = images.dtype != jnp.uint8
  if is_float and not unit_range:
    return images.astype(dtype)
  most = 1.0 if is_float else 255.0
  scale = 1.0 / (most * np.asarray(std, dtype))
  shift = np.asarray(mean, dtype) / np.asarray(std, dtype)
  return images.astype(dtype) * scale - shift


def sincos_positions(
  grid: tuple[int, int], width: int, dtype: Any = np.float32
) -> np.ndarray:
  """Fixed 2-D sine-cosine position embeddings.

  The first half of the channels encodes the column, the second the row; each
  half holds the sines of all frequencies, then the cosines.

  Args:
    grid: (h, w), rows and columns; they need not be equal.
    width: channels, a multiple of 4.
    dtype: of the result.

  Returns:
    [N, width] of dtype, row-major.

  Raises:
    ValueError: width is not a multiple of 4.

  Reference: Vaswani et al. 2017, section 3.5, arXiv:1706.03762, once an axis.
  """
  if width % 4:
    raise ValueError(
      f"width {width} is not a multiple of 4, as 2-D sine-cosine positions "
      f"need; nearest: {width - width % 4 or 4}, {width - width % 4 + 4}."
    )
  h, w = grid
  frequencies = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
  rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")

  def encode(positions: np.ndarray) -> np.ndarray:
    angles = np.outer(positions.reshape(-1), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

  return np.concatenate([encode(columns), encode(rows)], axis=1).astype(dtype)


def gather_patches(x: jax.Array, ids: jax.Array) -> jax.Array:
  """Picks patches by index.

  Args:
    x: [B, N, ...].
    ids: [B, *any] integers in [0, N).

  Returns:
    [B, *any, ...].
  """
  return jax.vmap(lambda row, index: row[index])(x, ids)
