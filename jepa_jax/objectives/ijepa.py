"""I-JEPA: predict, from a context, the target encoder's output elsewhere.

Reference: Assran et al. 2023, section 3, arXiv:2301.08243.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from jepa_jax import masks, models, objectives
from jepa_jax.models import cpu

# The released code normalises targets with PyTorch's default epsilon.
_TARGET_NORM_EPSILON = 1e-5


def normalize_images(
  images: jax.Array, mean: tuple[float, ...], std: tuple[float, ...]
) -> jax.Array:
  """Brings images to zero mean and unit variance, on the device.

  Args:
    images: [B, H, W, C]; uint8 is normalised, float is taken as normalised.
    mean: a value a channel, on a scale of 0 to 1.
    std: a value a channel, on a scale of 0 to 1.

  Returns:
    [B, H, W, C] float32.
  """
  if images.dtype != jnp.uint8:
    return images.astype(jnp.float32)
  scale = 1.0 / (255.0 * np.asarray(std, np.float32))
  shift = np.asarray(mean, np.float32) / np.asarray(std, np.float32)
  return images.astype(jnp.float32) * scale - shift


def normalize_targets(features: jax.Array) -> jax.Array:
  """LayerNorm without parameters over the last axis, in float32."""
  x = features.astype(jnp.float32)
  x = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.square(x).mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(variance + _TARGET_NORM_EPSILON)


def elementwise_loss(difference: jax.Array, name: str) -> jax.Array:
  """Smooth L1 with beta 1 ("smooth_l1") or the squared error ("l2")."""
  if name == "l2":
    return jnp.square(difference)
  size = jnp.abs(difference)
  return jnp.where(size < 1.0, 0.5 * jnp.square(difference), size - 0.5)


@dataclasses.dataclass(frozen=True)
class IJEPA:
  """The objective of the paper.

  Attributes:
    encoder: of the context; the target encoder has its moving average.
    predictor: from context features to target features.
    image_shape: (H, W, C).
    shapes: static sizes of the masks.
    mean: of the images a channel, on a scale of 0 to 1.
    std: of the images a channel.
    loss_name: "smooth_l1" as released or "l2" as in the paper.

  Differs: the loss is the mean over targets that are not padding; where a
  batch has one block size, as with the released sampler, that is the mean
  over everything.
  """

  encoder: models.Encoder
  predictor: models.Predictor
  image_shape: tuple[int, int, int]
  shapes: masks.MaskShapes
  mean: tuple[float, ...]
  std: tuple[float, ...]
  loss_name: str

  @classmethod
  def from_config(cls, config: ml_collections.ConfigDict) -> "IJEPA":
    """Builds the networks that a config describes."""
    data = config.data
    compute = dict(
      dtype=jnp.dtype(config.compute.dtype),
      scan=config.compute.scan,
      remat=config.compute.remat,
      remat_every=config.compute.remat_every,
      attention=config.compute.attention,
    )
    grid = models.patch_grid(
      data.image_size, data.image_size, config.encoder.patch_size
    )
    return cls(
      encoder=models.Encoder(**config.encoder, **compute),
      predictor=models.Predictor(
        **config.predictor, output_width=config.encoder.width, **compute
      ),
      image_shape=(data.image_size, data.image_size, data.channels),
      shapes=masks.mask_shapes(config.masks, grid),
      mean=tuple(data.mean),
      std=tuple(data.std),
      loss_name=config.loss,
    )

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a batch, in the names of the pipeline."""
    shapes = self.shapes
    context = (batch_size, shapes.num_contexts, shapes.context_patches)
    targets = (batch_size, shapes.num_targets, shapes.target_patches)
    spec = jax.ShapeDtypeStruct
    return {
      "image": spec((batch_size, *self.image_shape), jnp.uint8),
      "context_ids": spec(context, jnp.int32),
      "context_valid": spec(context, jnp.bool_),
      "target_ids": spec(targets, jnp.int32),
      "target_valid": spec(targets, jnp.bool_),
    }

  def init(self, rng: jax.Array) -> dict[str, Any]:
    """Random parameters: {"encoder": ..., "predictor": ...}."""
    encoder_rng, predictor_rng = jax.random.split(rng)
    images = jnp.zeros((1, *self.image_shape))
    ids = jnp.zeros((1, 1, 1), jnp.int32)
    context = jnp.zeros((1, 1, 1, self.encoder.width))
    return {
      "encoder": self.encoder.init(encoder_rng, images, ids)["params"],
      "predictor": self.predictor.init(
        predictor_rng, context, ids, ids, self._grid
      )["params"],
    }

  def tracked(self, params: dict[str, Any]) -> dict[str, Any]:
    """The target encoder follows the context encoder."""
    return {"encoder": params["encoder"]}

  def loss(
    self,
    params: dict[str, Any],
    target_params: dict[str, Any],
    batch: dict[str, jax.Array],
    rng: jax.Array,
  ) -> objectives.Loss:
    """Error of the predictions of all target blocks from all contexts.

    Args:
      params: {"encoder", "predictor"}.
      target_params: {"encoder"}, of the target encoder.
      batch: as batch_spec says; without the validities nothing is padded.
      rng: key for dropout and stochastic depth.

    Returns:
      The loss over B * S * M * T * D elements.
    """
    images = normalize_images(batch["image"], self.mean, self.std)
    context_ids, target_ids = batch["context_ids"], batch["target_ids"]
    context_valid = batch.get("context_valid")
    target_valid = batch.get("target_valid")

    features = self.encoder.apply(
      {"params": target_params["encoder"]}, images, wanted=target_ids
    ).astype(jnp.float32)  # [B, M, T, D]
    targets = jax.lax.stop_gradient(normalize_targets(features))

    context = self.encoder.apply(
      {"params": params["encoder"]},
      images,
      cpu.after(context_ids, features),
      context_valid,
      train=True,
      rngs={"dropout": rng},
    )  # [B, S, K, D]
    predictions = self.predictor.apply(
      {"params": params["predictor"]},
      context,
      context_ids,
      target_ids,
      self._grid,
      context_valid,
      target_valid,
      train=True,
    ).astype(jnp.float32)  # [B, S, M, T, D]

    if target_valid is None:
      target_valid = jnp.ones(target_ids.shape, bool)
    errors = elementwise_loss(predictions - targets[:, None], self.loss_name)
    errors = jnp.where(target_valid[:, None, ..., None], errors, 0.0)
    num_contexts, width = predictions.shape[1], predictions.shape[-1]
    patches = target_valid.sum().astype(jnp.float32)

    def mean_norm(x: jax.Array, valid: jax.Array) -> jax.Array:
      norms = jnp.where(valid, jnp.linalg.norm(x, axis=-1), 0.0)
      return norms.sum() / (patches * (x.size // targets.size))

    seen = target_valid[..., None]
    pooled = jnp.where(seen, features, 0.0).sum(axis=(1, 2))
    pooled /= jnp.maximum(seen.sum(axis=(1, 2)), 1)

    metrics = jax.lax.stop_gradient(
      {
        "prediction_norm": mean_norm(predictions, target_valid[:, None]),
        "target_norm": mean_norm(features, target_valid),
      }
    )
    return objectives.Loss(
      total=errors.sum(),
      weight=patches * num_contexts * width,
      metrics=metrics,
      features=jax.lax.stop_gradient(pooled),
    )

  @property
  def _grid(self) -> tuple[int, int]:
    height, width, _ = self.image_shape
    return models.patch_grid(height, width, self.encoder.patch_size)
