"""Views of an image: what the methods that compare them share."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections

from jepa_jax import keys, models, objectives
from jepa_jax.models import flops


@dataclasses.dataclass(frozen=True)
class Views:
  """Several crops of each image; the local ones are small and show little.

  Attributes:
    image_shape: (H, W, C) of a global view.
    views: global views an image.
    local_views: local views an image.
    local_size: side of a local view, pixels.
  """

  image_shape: tuple[int, int, int]
  views: int
  local_views: int
  local_size: int

  keys: ClassVar = {
    "views": keys.Key(2, keys.whole(2, 64), "global views an image"),
    "local_views": keys.Key(6, keys.whole(0, 64), "local views an image"),
    "local_size": keys.Key(
      96, keys.whole(1, 8192), "side of a local view, pixels"
    ),
  }

  @classmethod
  def from_config(cls, config: ml_collections.ConfigDict) -> "Views":
    """What config.method says of them.

    Raises:
      ValueError: patches do not divide a local view.
    """
    method, size = config.method, config.method.local_size
    if method.local_views:
      models.patch_grid(size, size, config.encoder.patch_size)
    shape = objectives.image_shape(config)
    return cls(shape, method.views, method.local_views, size)

  def spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays [B, V, H, W, C] of a batch."""
    *_, channels = self.image_shape
    local = (self.local_views, self.local_size, self.local_size, channels)
    shapes = {"views": (self.views, *self.image_shape), "local_views": local}
    return {
      name: jax.ShapeDtypeStruct((batch_size, *shape), jnp.uint8)
      for name, shape in shapes.items()
      if shape[0]
    }

  def flops(self, encoder: models.Encoder) -> dict[str, tuple[int, int]]:
    """Operations on an image's views: forward, and of these the embedding's."""
    found = {}
    for name, spec in self.spec(1).items():
      _, count, height, width, channels = spec.shape
      rows, columns = models.patch_grid(height, width, encoder.patch_size)
      work = (encoder, rows * columns, channels)
      found[name] = (
        count * flops.encoder(*work),
        count * flops.embedding(*work),
      )
    return found


def encode(
  encoder: models.Encoder,
  params: Any,
  images: jax.Array,
  mean: tuple[float, ...],
  std: tuple[float, ...],
  **how: Any,
) -> jax.Array:
  """Features float32 [B, V, N, D] of views [B, V, H, W, C].

  Args:
    encoder: the network.
    params: its parameters.
    images: the views, uint8.
    mean: see models.normalize_images.
    std: see models.normalize_images.
    **how: more arguments of the encoder, for B * V images.
  """
  flat = jax.lax.collapse(images, 0, 2)
  features = encoder.apply(
    {"params": params}, models.normalize_images(flat, mean, std), **how
  )
  return features.astype(jnp.float32).reshape(
    *images.shape[:2], *features.shape[1:]
  )
