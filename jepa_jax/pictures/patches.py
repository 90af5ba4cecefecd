"""What a network says of single patches, as arrays.

Axes: n images, H W pixels, C channels, h w grid of patches, D features.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jepa_jax import models
from jepa_jax.evaluation import components

BATCH_SIZE = 32  # images a forward pass


def features(
  model: Any, images: np.ndarray, which: str | None = None, fine: int = 1
) -> np.ndarray:
  """Features of all patches.

  Args:
    model: jepa_jax.Pretrained.
    images: uint8 [n, H, W, C].
    which: "target" or "context"; None for the encoder that was loaded.
    fine: vectors along each side of a patch. Above 1 the image is moved by
      fractions of a patch, its edges repeated, and encoded once for each move;
      a number that divides the patch size.

  Returns:
    float32 [n, fine * h, fine * w, D].

  Raises:
    ValueError: fine does not divide the patch size; or as Pretrained.encode.
  """
  size = model.module.patch_size
  if fine < 1 or size % fine:
    raise ValueError(
      f"fine is {fine}; it needs to divide the patch size, {size} pixels."
    )
  encode = lambda x: np.asarray(
    model.encode(x, which, pool=None, batch_size=min(len(x), BATCH_SIZE)),
    np.float32,
  )
  if fine == 1:
    return encode(images)
  step = size // fine
  shifts = [step * i - (size - step) // 2 for i in range(fine)]
  rows = []
  for down in shifts:
    columns = [encode(_moved(images, down, right)) for right in shifts]
    rows.append(np.stack(columns, axis=3))  # [n, h, w, fine, D]
  found = np.stack(rows, axis=2)  # [n, h, fine, w, fine, D]
  n, h, _, w, _, d = found.shape
  return found.reshape(n, h * fine, w * fine, d)


def _moved(images: np.ndarray, down: int, right: int) -> np.ndarray:
  """Images as seen from a window moved by so many pixels."""
  rows, columns = (
    np.clip(np.arange(length) + by, 0, length - 1)
    for length, by in zip(images.shape[1:3], (down, right))
  )
  return images[:, rows[:, None], columns]


def foreground(vectors: np.ndarray) -> np.ndarray:
  """Which patches show things, and not what is behind them.

  They differ along the first principal component of all patches: of its two
  sides, that of which less lies on the images' edges is the foreground. The
  sides are parted where the variance within both is least (Otsu).

  Args:
    vectors: [n, h, w, D].

  Returns:
    bool [n, h, w].

  Reference: Oquab et al. 2023, section 7.5, arXiv:2304.07193; Otsu 1979.
  """
  first = components.Basis.fit(vectors).components(vectors)[..., 0]
  ordered = np.sort(first.ravel())
  count = np.arange(1, len(ordered))
  below = np.cumsum(ordered)[:-1] / count
  above = (ordered.sum() - np.cumsum(ordered)[:-1]) / count[::-1]
  between = count * count[::-1] * np.square(above - below)
  side = first > ordered[between.argmax()] if len(between) else first > 0
  edge = np.ones(side.shape[1:], bool)
  edge[1:-1, 1:-1] = False
  share = lambda x: x[:, edge].sum() / max(x.sum(), 1)
  return side if share(side) <= share(~side) else ~side


def similarity(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
  """Cosine between the features of a patch and those of all others.

  The mean of all patches is taken off first: what they have in common says
  nothing, and cosines of raw features all are high.

  Args:
    vectors: [n, h, w, D].
    query: [D], one of them.

  Returns:
    [n, h, w], -1 to 1.
  """
  mean = vectors.mean(axis=(0, 1, 2))
  vectors, query = vectors - mean, query - mean
  lengths = np.linalg.norm(vectors, axis=-1) * np.linalg.norm(query)
  return (vectors @ query) / np.maximum(lengths, 1e-12)


def attention(
  model: Any, images: np.ndarray, which: str | None = None, layer: int = -1
) -> np.ndarray:
  """How much each patch attends to each other one, by head.

  Args:
    model: jepa_jax.Pretrained.
    images: uint8 [n, H, W, C].
    which: "target" or "context"; None for the encoder that was loaded.
    layer: of the encoder's blocks; negative ones count from the last.

  Returns:
    float32 [n, heads, h, w, h, w], the attention of the patch at the first
    two axes to that at the last two; what goes to class token and registers is
    left out, so that without these it adds up to 1.

  Raises:
    ValueError: no such layer or encoder.
  """
  depth = model.module.depth
  if not -depth <= layer < depth:
    raise ValueError(
      f"layer is {layer}; the encoder has {depth} blocks, 0 to {depth - 1}."
    )
  params = model.networks.get(which or model.which)
  if params is None:
    raise ValueError(
      f'there is no "{which}" network here; there are: '
      f"{', '.join(model.networks)}."
    )
  grid = models.patch_grid(*images.shape[1:3], model.module.patch_size)
  weights = _weights(
    model.module, layer % depth, params, model.preprocessing(images)
  )
  first = weights.shape[-1] - grid[0] * grid[1]  # after the tokens
  weights = np.asarray(weights[..., first:, first:], np.float32)
  return weights.reshape(*weights.shape[:2], *grid, *grid)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _weights(module, layer, params, images):
  """[n, heads, N, N] of a block, all blocks in their plain form."""
  found = []
  plain = models.Kernels()

  def watched(qkv, valid=None, query=None):
    queries, keys = qkv[:, :, 0], qkv[:, :, 1]
    scores = jax.numpy.einsum(
      "bqhd,bkhd->bhqk", queries * qkv.shape[-1] ** -0.5, keys
    )
    found.append(jax.nn.softmax(scores.astype("float32")))
    return plain.attention(qkv, valid, query)

  kernels = dataclasses.replace(plain, attention=watched)
  module.clone(kernels=kernels, scan=False, remat="none").apply(
    {"params": params}, images
  )
  return found[layer]
