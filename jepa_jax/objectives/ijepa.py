"""I-JEPA: predict, from a context, the target encoder's output elsewhere.

Reference: Assran et al. 2023, section 3, arXiv:2301.08243.
"""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections

from jepa_jax import config_table, masks, models, objectives
from jepa_jax.models import flops
from jepa_jax.objectives import regularizers

# The released code normalises targets with PyTorch's default epsilon.
_TARGET_NORM_EPSILON = 1e-5


def normalize_targets(features: jax.Array) -> jax.Array:
  """LayerNorm without parameters over the last axis, in float32."""
  x = features.astype(jnp.float32)
  x = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.square(x).mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(variance + _TARGET_NORM_EPSILON)


def standardize_positions(features: jax.Array) -> jax.Array:
  """[B, N, D] with mean 0 and variance 1 over B, each position by itself."""
  x = features - features.mean(axis=0)
  return x * jax.lax.rsqrt(jnp.square(x).mean(axis=0) + _TARGET_NORM_EPSILON)


def check_layers(config: ml_collections.ConfigDict, name: str) -> None:
  """Raises a ValueError where method.NAME is more blocks than there are."""
  if config.method[name] > config.encoder.depth:
    raise ValueError(
      f"method.{name} is {config.method[name]} and encoder.depth "
      f"{config.encoder.depth}; average no more blocks than there are."
    )


def elementwise_loss(difference: jax.Array, name: str) -> jax.Array:
  """Smooth L1 with beta 1 ("smooth_l1") or the squared error ("l2")."""
  if name == "l2":
    return jnp.square(difference)
  size = jnp.abs(difference)
  return jnp.where(size < 1.0, 0.5 * jnp.square(difference), size - 0.5)


def masked_mean(x: jax.Array, valid: jax.Array | None) -> jax.Array:
  """Mean over the valid patches of each image: [B, ..., D] -> [B, D]."""
  valid = jnp.ones(x.shape[:-1], bool) if valid is None else valid
  valid = valid[..., None]
  patches = tuple(range(1, x.ndim - 1))
  total = jnp.where(valid, x, 0.0).sum(axis=patches)
  return total / jnp.maximum(valid.sum(axis=patches), 1)


def pool_context(context: jax.Array, batch: objectives.Batch) -> jax.Array:
  """Mean over the context's patches, without tokens: [B, S, K, D] -> [B, D]."""
  count = batch["context_ids"].shape[-1]  # tokens stand before the patches
  context = context[..., -count:, :].astype(jnp.float32)
  return masked_mean(context, batch.get("context_valid"))


@dataclasses.dataclass(frozen=True)
class IJEPA(objectives.Objective):
  """The objective of the paper.

  Attributes:
    encoder: of the context; the target encoder has its moving average.
    predictor: from context features to target features.
    image_shape: (H, W, C).
    shapes: static sizes of the masks.
    mean: of the images a channel, on a scale of 0 to 1.
    std: of the images a channel.
    loss_name: "smooth_l1" as released or "l2" as in the paper.
    target_layers: last blocks of the target encoder whose outputs are averaged.
    target_sees: "image"; or "block", for a target encoder that is given the
      patches of each target block alone (the paper's Table 11).
    target_norm: "layer", as released; "position" to standardise each feature
      over the batch, position by position, so that what all images share there
      is no target; or "none".
    variance: weight of regularizers.variance of the averaged context features.
    covariance: weight of regularizers.covariance of the same.
    sigreg: weight of regularizers.sigreg of the same.
    position_noise: standard deviation of normal noise that makes the positions
      of the targets uncertain for the predictor.
    context_grayscale: probability that an image is grey for the context
      encoder, and in colour for the target encoder.

  What is of the batch ("position", variance, covariance and sigreg) is of a
  microbatch where accumulate_steps cuts it.

  Reference: Bar et al. 2024 (position_noise), arXiv:2308.00566; Mo and Tong
    2024 (variance and covariance), arXiv:2410.19560;
    Balestriero and LeCun 2025 (SIGReg), arXiv:2511.08544.

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
  target_layers: int = 1
  target_sees: str = "image"
  target_norm: str = "layer"
  variance: float = 0.0
  covariance: float = 0.0
  sigreg: float = 0.0
  position_noise: float = 0.0
  context_grayscale: float = 0.0

  keys: ClassVar = config_table.IJEPA
  normalize: ClassVar = staticmethod(normalize_targets)
  # Whether the predictor sees the encoder's class token and registers too.
  tokens_predict: ClassVar[bool] = False

  @classmethod
  def from_config(
    cls,
    config: ml_collections.ConfigDict,
    kernels: models.Kernels | None = None,
  ) -> "IJEPA":
    """Builds the networks that a config describes."""
    shape = objectives.image_shape(config)
    compute = objectives.compute(config, kernels)
    grid = models.patch_grid(*shape[:2], config.encoder.patch_size)
    if "target_layers" in cls.keys:
      check_layers(config, "target_layers")
      if (config.method.target_sees, config.method.target_norm) == (
        "block", "position"
      ):  # fmt: skip
        raise ValueError(
          'method.target_norm="position" needs the features of all positions '
          'and method.target_sees="block" has those of the targets; change one.'
        )
    return cls(
      encoder=models.Encoder(**config.encoder, **compute),
      predictor=models.Predictor(
        **config.predictor, output_width=cls.target_width(config), **compute
      ),
      image_shape=shape,
      shapes=masks.mask_shapes(config.masks, grid),
      mean=tuple(config.data.mean),
      std=tuple(config.data.std),
      loss_name=config.loss,
      **{name: config.method[name] for name in cls.keys},
    )

  @staticmethod
  def target_width(config: ml_collections.ConfigDict) -> int:
    """Numbers that are predicted a patch."""
    return config.encoder.width

  @property
  def networks(self) -> dict[str, Any]:
    """The context encoder and the predictor."""
    return {"encoder": self.encoder, "predictor": self.predictor}

  @property
  def grid(self) -> tuple[int, int]:
    """(h, w) of the patches."""
    height, width, _ = self.image_shape
    return models.patch_grid(height, width, self.encoder.patch_size)

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Images and masks; without the validities nothing is padded."""
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

  def init(self, rng: jax.Array) -> objectives.Params:
    """Random parameters: {"encoder": ..., "predictor": ...}."""
    encoder_rng, predictor_rng = jax.random.split(rng)
    images = jnp.zeros((1, *self.image_shape))
    ids = jnp.zeros((1, 1, 1), jnp.int32)
    context = jnp.zeros((1, 1, 1, self.encoder.width))
    return {
      "encoder": self.encoder.init(encoder_rng, images, ids)["params"],
      "predictor": self.predictor.init(
        predictor_rng, context, ids, ids, self.grid
      )["params"],
    }

  def averaged(self, params: objectives.Params) -> objectives.Params:
    """The target encoder follows the context encoder."""
    return {"encoder": params["encoder"]}

  def targets(
    self,
    target_params: objectives.Params,
    batch: objectives.Batch,
    buffers: Any,
  ) -> jax.Array:
    """The target encoder's features of the target patches, [B, M, T, D]."""
    del buffers
    ids = batch["target_ids"]
    by_position = self.target_norm == "position"  # needs all images everywhere
    if self.target_sees == "block":
      chosen = {"patch_ids": ids, "valid": batch.get("target_valid")}
    else:
      chosen = {"query_ids": None if by_position else ids}
    features = self.encoder.apply(
      {"params": target_params["encoder"]},
      models.normalize_images(batch["image"], self.mean, self.std),
      layers=self.target_layers,
      **chosen,
    ).astype(jnp.float32)
    if self.target_layers > 1:
      outputs = (*features.shape[:-1], self.target_layers, -1)
      features = normalize_targets(features.reshape(outputs)).mean(axis=-2)
    if by_position:
      features = models.gather_patches(standardize_positions(features), ids)
    return features

  def loss(
    self,
    params: objectives.Params,
    targets: jax.Array,
    batch: objectives.Batch,
    rng: jax.Array,
    buffers: Any,
  ) -> objectives.Loss:
    """Error of the predictions of all target blocks from all contexts.

    Args:
      params: {"encoder", "predictor"}.
      targets: [B, M, T, D], not yet normalised.
      batch: as batch_spec says.
      rng: key for dropout, stochastic depth and SIGReg's directions.
      buffers: unused.

    Returns:
      The loss over B * S * M * T * D elements.
    """
    del buffers
    context_ids, target_ids = batch["context_ids"], batch["target_ids"]
    context_valid = batch.get("context_valid")
    target_valid = batch.get("target_valid")
    context = self.encoder.apply(
      {"params": params["encoder"]},
      self.context_images(batch["image"], rng),
      context_ids,
      context_valid,
      train=True,
      all_tokens=self.tokens_predict,
      rngs={"dropout": rng},
    )  # [B, S, K, D], or more than K with tokens
    predictions = self.predictor.apply(
      {"params": params["predictor"]},
      context,
      context_ids,
      target_ids,
      self.grid,
      context_valid,
      target_valid,
      target_noise=self.noise(rng, target_ids.shape),
      train=True,
    ).astype(jnp.float32)  # [B, S, M, T, D]

    if target_valid is None:
      target_valid = jnp.ones(target_ids.shape, bool)
    layer_norm = self.target_norm == "layer"
    goals = self.normalize(targets) if layer_norm else targets
    errors = elementwise_loss(predictions - goals[:, None], self.loss_name)
    errors = jnp.where(target_valid[:, None, ..., None], errors, 0.0)
    num_contexts, width = predictions.shape[1], predictions.shape[-1]
    patches = target_valid.sum().astype(jnp.float32)

    def mean_norm(x: jax.Array, valid: jax.Array) -> jax.Array:
      norms = jnp.where(valid, jnp.linalg.norm(x, axis=-1), 0.0)
      return norms.sum() / (patches * (x.size // targets.size))

    total, weight = errors.sum(), patches * num_contexts * width
    terms = self.regularization(context, batch, rng)
    return objectives.Loss(
      total=total + weight * sum(getattr(self, k) * x for k, x in terms.items())
      if terms
      else total,
      weight=weight,
      metrics={
        "prediction_norm": mean_norm(predictions, target_valid[:, None]),
        "target_norm": mean_norm(targets, target_valid),
        **terms,
      },
      features=self.watched(targets, context, batch),
    )

  def context_images(self, images: jax.Array, rng: jax.Array) -> jax.Array:
    """Normalised images as the context encoder sees them."""
    x = models.normalize_images(images, self.mean, self.std)
    if not self.context_grayscale or x.shape[-1] != 3:
      return x
    luma = jnp.asarray([0.299, 0.587, 0.114])  # as in data.grayscale
    mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
    grey = ((x * std + mean) @ luma)[..., None]
    shape = (len(x), 1, 1, 1)
    chosen = jax.random.bernoulli(
      jax.random.fold_in(rng, 3), self.context_grayscale, shape
    )
    return jnp.where(chosen, (grey - mean) / std, x)

  def noise(self, rng: jax.Array, shape: tuple[int, ...]) -> jax.Array | None:
    """Normal noise [..., D] for target patches, None where there is none."""
    if not self.position_noise:
      return None
    shape = (*shape, self.encoder.width)
    draw = jax.random.normal(jax.random.fold_in(rng, 2), shape)
    return self.position_noise * draw

  def regularization(
    self, context: jax.Array, batch: objectives.Batch, rng: jax.Array
  ) -> dict[str, jax.Array]:
    """Terms that have a weight, of the context's features."""
    terms = {
      "variance": regularizers.variance,
      "covariance": regularizers.covariance,
      "sigreg": lambda x: regularizers.sigreg(x, jax.random.fold_in(rng, 1)),
    }
    pooled = pool_context(context, batch)
    return {k: term(pooled) for k, term in terms.items() if getattr(self, k)}

  def watched(
    self, targets: jax.Array, context: jax.Array, batch: objectives.Batch
  ) -> jax.Array:
    """Features [B, D] that show a collapse: the targets, averaged.

    Where each is standardised they cannot, and the context's are taken.
    """
    if self.target_norm == "position":
      return pool_context(context, batch)
    return masked_mean(targets, batch.get("target_valid"))

  def facts(self) -> dict[str, Any]:
    """Sizes and padding of the masks."""
    return {"masks": self.shapes}

  def flops(self) -> int:
    """Target encoder forward, context encoder and predictor both ways.

    Pixels need no gradient, so the patch embedding has one product less. Slots
    of the masks that are padded are counted.
    """
    shapes, channels = self.shapes, self.image_shape[-1]
    context = shapes.context_patches
    per_context = 3 * flops.encoder(self.encoder, context, channels)
    per_context -= flops.embedding(self.encoder, context, channels)
    if self.tokens_predict:
      context += self.encoder.num_tokens
    per_context += 3 * flops.predictor(
      self.predictor, context, shapes.target_patches, shapes.num_targets
    )
    return self.target_flops() + shapes.num_contexts * per_context

  def target_flops(self) -> int:
    """Operations that make the targets of an image."""
    rows, columns = self.grid
    if self.target_sees == "block":
      patches = self.shapes.target_patches
      block = flops.encoder(self.encoder, patches, self.image_shape[-1])
      return self.shapes.num_targets * block
    return flops.encoder(
      self.encoder,
      rows * columns,
      self.image_shape[-1],
      queries=None
      if self.target_norm == "position"
      else self.shapes.num_targets * self.shapes.target_patches,
    )
