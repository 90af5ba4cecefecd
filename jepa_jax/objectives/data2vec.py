"""data2vec for images: predict a teacher's features of the whole image.

The encoder sees all patches, the masked ones as a mask token; a linear layer
says at each of them what the encoder's moving average says of the whole image:
its last blocks' outputs, each normalised, averaged and normalised again.

Reference: Baevski et al. 2022, section 3, arXiv:2202.03555.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax import keys, masks, models, objectives
from jepa_jax.models import flops
from jepa_jax.objectives import ijepa


@dataclasses.dataclass(frozen=True)
class Data2Vec(objectives.Objective):
  """See above.

  What is masked is the union of the target blocks; contexts play no part.

  Attributes:
    encoder: of the masked image; the teacher has its moving average.
    image_shape: (H, W, C).
    shapes: static sizes of the masks.
    mean: of the images a channel, on a scale of 0 to 1.
    std: of the images a channel.
    layers: of the teacher, whose outputs are averaged; the last ones.
    beta: where the smooth L1 loss turns from square to linear; 0: L2.
  """

  encoder: models.Encoder
  image_shape: tuple[int, int, int]
  shapes: masks.MaskShapes
  mean: tuple[float, ...]
  std: tuple[float, ...]
  layers: int
  beta: float

  keys: ClassVar = {
    "layers": keys.Key(
      6, keys.whole(1, 256), "last blocks of the teacher that are averaged"
    ),
    "beta": keys.Key(
      2.0,
      keys.number(0, 100),
      "where the loss turns from square to linear; 0: all square",
    ),
  }

  @classmethod
  def from_config(cls, config, kernels=None) -> "Data2Vec":
    """Builds the encoder that a config describes; see Objective."""
    shape = objectives.image_shape(config)
    grid = models.patch_grid(*shape[:2], config.encoder.patch_size)
    ijepa.check_layers(config, "layers")
    return cls(
      encoder=models.Encoder(
        **config.encoder, **objectives.compute(config, kernels)
      ),
      image_shape=shape,
      shapes=masks.mask_shapes(config.masks, grid),
      mean=tuple(config.data.mean),
      std=tuple(config.data.std),
      **config.method,
    )

  @property
  def networks(self) -> dict[str, Any]:
    """The encoder, and the layer that predicts, [.., D] -> [.., D]."""
    init = nn.initializers.normal(0.02)
    head = nn.Dense(self.encoder.width, kernel_init=init)
    return {"encoder": self.encoder, "head": head}

  @property
  def num_patches(self) -> int:
    """N."""
    height, width, _ = self.image_shape
    rows, columns = models.patch_grid(height, width, self.encoder.patch_size)
    return rows * columns

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Images and target blocks."""
    shapes, spec = self.shapes, jax.ShapeDtypeStruct
    targets = (batch_size, shapes.num_targets, shapes.target_patches)
    return {
      "image": spec((batch_size, *self.image_shape), jnp.uint8),
      "target_ids": spec(targets, jnp.int32),
      "target_valid": spec(targets, jnp.bool_),
    }

  def init(self, rng: jax.Array) -> objectives.Params:
    """Random parameters: {"encoder", "head"}."""
    images = jnp.zeros((1, *self.image_shape))
    masked = jnp.zeros((1, self.num_patches), bool)
    features = jnp.zeros((1, self.encoder.width))
    networks = self.networks
    return {
      "encoder": self.encoder.init(rng, images, masked=masked)["params"],
      "head": networks["head"].init(rng, features)["params"],
    }

  def averaged(self, params: objectives.Params) -> objectives.Params:
    """The teacher follows the encoder."""
    return {"encoder": params["encoder"]}

  def masked(self, batch: objectives.Batch) -> jax.Array:
    """Patches of some target block, bool [B, N]."""
    ids, valid = batch["target_ids"], batch["target_valid"]
    hits = ids[..., None] == jnp.arange(self.num_patches)  # [B, M, T, N]
    return (hits & valid[..., None]).any(axis=(1, 2))

  def targets(self, target_params, batch, buffers) -> jax.Array:
    """The teacher's averaged features of all patches, [B, N, D]."""
    del buffers
    features = self.encoder.apply(
      {"params": target_params["encoder"]},
      models.normalize_images(batch["image"], self.mean, self.std),
      layers=self.layers,
      normalize=False,
    )  # [B, N, layers * D]
    outputs = features.reshape(*features.shape[:2], self.layers, -1)
    outputs = ijepa.normalize_targets(outputs).mean(axis=2)
    return ijepa.normalize_targets(outputs)

  def loss(self, params, targets, batch, rng, buffers) -> objectives.Loss:
    """Smooth L1 error over the masked patches."""
    del buffers
    masked = self.masked(batch)
    features = self.encoder.apply(
      {"params": params["encoder"]},
      models.normalize_images(batch["image"], self.mean, self.std),
      masked=masked,
      train=True,
      rngs={"dropout": rng},
    ).astype(jnp.float32)
    predictions = self.networks["head"].apply(
      {"params": params["head"]}, features
    )
    errors = smooth_l1(predictions - targets, self.beta)
    return objectives.Loss(
      total=jnp.where(masked[..., None], errors, 0.0).sum(),
      weight=masked.sum().astype(jnp.float32) * targets.shape[-1],
      metrics={"masked": masked.mean()},
      features=targets.mean(axis=1),
    )

  def facts(self) -> dict[str, Any]:
    """Sizes and padding of the masks."""
    return {"masks": self.shapes}

  def flops(self) -> int:
    """Teacher forward, encoder and head both ways."""
    patches, channels = self.num_patches, self.image_shape[-1]
    encoder = flops.encoder(self.encoder, patches, channels)
    head = 2 * patches * self.encoder.width**2
    embedding = flops.embedding(self.encoder, patches, channels)
    return 4 * encoder + 3 * head - embedding


def smooth_l1(difference: jax.Array, beta: float) -> jax.Array:
  """x^2 / (2 beta) below beta, |x| - beta / 2 above; beta 0: x^2 / 2."""
  size = jnp.abs(difference)
  if not beta:
    return 0.5 * jnp.square(size)
  return jnp.where(
    size < beta, 0.5 * jnp.square(size) / beta, size - 0.5 * beta
  )
