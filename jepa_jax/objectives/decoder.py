"""A decoder: images that have a given representation (RCDM).

A diffusion model learns to draw the image that a frozen I-JEPA has made one
vector of. What its samples for one vector share is in the vector; what differs
between them is not.

Reference: Bordes et al. 2022, arXiv:2112.09164; Assran et al. 2023, section 8
  and appendix E, arXiv:2301.08243.
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_collections

from jepa_jax import keys, masks, models, objectives
from jepa_jax.models import flops
from jepa_jax.objectives import diffusion, ijepa

_KEPT = 0.99  # a step, of the running moments of the representations
_EPSILON = 1e-6
_side = keys.whole(1, 4096, "pixels")


@dataclasses.dataclass(frozen=True)
class Decoder(objectives.Objective):
  """See above.

  Attributes:
    encoder: of both frozen encoders.
    predictor: frozen; None where the representation is not predicted.
    unet: what is learned; its moving average is what draws.
    image_shape: (H, W, C) that the encoders see.
    size: (H, W) that is drawn.
    shapes: static sizes of the masks.
    mean: of the images a channel, for the encoders.
    std: of the images a channel.
    condition: "prediction", the predictor's output averaged over one block;
      "target", the target encoder's averaged over the image; "patch", that of
      one patch.
    steps: of the diffusion.
    drop: probability that the representation is not given.
    pixels: "unit", drawn pixels go from -1 to 1; "data", they have the mean and
      deviation of the images.

  Differs: representations are brought to mean 0 and deviation 1, by running
  moments, for those of all images are much alike. They are not given with
  probability `drop`. The variance of a step is not learned.
  """

  encoder: models.Encoder
  predictor: models.Predictor | None
  unet: models.UNet
  image_shape: tuple[int, int, int]
  size: tuple[int, int]
  shapes: masks.MaskShapes
  mean: tuple[float, ...]
  std: tuple[float, ...]
  condition: str
  steps: int
  drop: float
  pixels: str

  keys: ClassVar = {
    "condition": keys.Key(
      "prediction",
      keys.Choice(("prediction", "target", "patch")),
      "what is decoded: the predictor's output averaged over a block, the "
      "target encoder's averaged over an image, or that of a patch",
    ),
    "image_size": keys.Key(
      128, keys.Sides(_side), "that is drawn, pixels, or (height, width)"
    ),
    "steps": keys.Key(1000, keys.whole(21, 10**6), "of the diffusion"),
    "drop": keys.Key(
      0.1,
      keys.number(0, 1, "most"),
      "probability that the representation is not given",
    ),
    "pixels": keys.Key(
      "unit",
      keys.Choice(("unit", "data")),
      "scale of what is drawn: -1 to 1, or by data.mean and data.std",
    ),
    "channels": keys.Key(256, keys.whole(4, 2**14), "of the first level"),
    "multipliers": keys.Key(
      (1, 1, 2, 3, 4),
      keys.Many(keys.whole(1, 64), 1),
      "channels of each level, each of half the side, over the first one's",
    ),
    "blocks": keys.Key(2, keys.whole(1, 64), "residual blocks a level"),
    "attention": keys.Key(
      (32, 16, 8), keys.Many(_side), "sides of levels that have attention"
    ),
    "num_heads": keys.Key(4, keys.whole(1, 256), "of attention"),
    "patch_size": keys.Key(
      1, keys.whole(1, 64), "pixels a side of one place of the first level"
    ),
  }
  # Whose frozen networks come of one pretraining: init_which="all" for them.
  frozen: tuple[str, ...] = ("encoder", "context_encoder", "predictor")

  @classmethod
  def from_config(
    cls,
    config: ml_collections.ConfigDict,
    kernels: models.Kernels | None = None,
  ) -> "Decoder":
    """Builds the networks that a config describes."""
    method, shape = config.method, objectives.image_shape(config)
    compute = objectives.compute(config, kernels)
    predicts = method.condition == "prediction"
    grid = models.patch_grid(*shape[:2], config.encoder.patch_size)
    unet = (
      *("channels", "multipliers", "blocks", "attention", "num_heads"),
      "patch_size",
    )
    return cls(
      encoder=models.Encoder(**config.encoder, **compute),
      predictor=models.Predictor(
        **config.predictor, output_width=config.encoder.width, **compute
      )
      if predicts
      else None,
      unet=models.UNet(
        **{name: method[name] for name in unet},
        remat=config.compute.remat != "none",
        dtype=compute["dtype"],
        kernels=compute["kernels"],
      ),
      image_shape=shape,
      size=models.height_and_width(method.image_size),
      shapes=masks.mask_shapes(config.masks, grid),
      mean=tuple(config.data.mean),
      std=tuple(config.data.std),
      condition=method.condition,
      steps=method.steps,
      drop=method.drop,
      pixels=method.pixels,
      frozen=cls.frozen if predicts else ("encoder",),
    )

  @property
  def networks(self) -> dict[str, Any]:
    """The frozen ones, and the U-Net."""
    found = {"encoder": self.encoder, "unet": self.unet}
    if self.predictor is not None:
      found |= {"context_encoder": self.encoder, "predictor": self.predictor}
    return found

  @property
  def grid(self) -> tuple[int, int]:
    """(h, w) of the patches."""
    height, width, _ = self.image_shape
    return models.patch_grid(height, width, self.encoder.patch_size)

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Images, random bits, and masks where they are needed."""
    spec, shapes = jax.ShapeDtypeStruct, self.shapes
    found = {
      "image": spec((batch_size, *self.image_shape), jnp.uint8),
      "key": spec((batch_size, 2), jnp.uint32),
    }
    if self.condition != "prediction":
      return found
    context = (batch_size, shapes.num_contexts, shapes.context_patches)
    targets = (batch_size, shapes.num_targets, shapes.target_patches)
    return found | {
      "context_ids": spec(context, jnp.int32),
      "context_valid": spec(context, jnp.bool_),
      "target_ids": spec(targets, jnp.int32),
      "target_valid": spec(targets, jnp.bool_),
    }

  def init(self, rng: jax.Array) -> objectives.Params:
    """Random parameters of all networks."""
    rngs = jax.random.split(rng, 4)
    images = jnp.zeros((1, *self.image_shape))
    ids = jnp.zeros((1, 1, 1), jnp.int32)
    width = self.encoder.width
    drawn = jnp.zeros((1, *self.size, self.image_shape[-1]))
    condition = (jnp.zeros(1), jnp.zeros((1, width)), jnp.ones(1, bool))
    inputs = {
      "encoder": (images,),
      "unet": (drawn, *condition),
      "context_encoder": (images,),
      "predictor": (jnp.zeros((1, 1, 1, width)), ids, ids, self.grid),
    }
    return {
      name: network.init(key, *inputs[name])["params"]
      for key, (name, network) in zip(rngs, self.networks.items())
    }

  def averaged(self, params: objectives.Params) -> objectives.Params:
    """The U-Net."""
    return params

  def buffers(self) -> dict[str, jax.Array]:
    """Running moments of the representations, [D] each."""
    width = self.encoder.width
    return {"mean": jnp.zeros(width), "square": jnp.ones(width)}

  def targets(
    self,
    target_params: objectives.Params,
    batch: objectives.Batch,
    buffers: Any,
  ) -> jax.Array:
    """The representations, float32 [B, D]."""
    del buffers
    images = models.normalize_images(batch["image"], self.mean, self.std)
    if self.condition == "prediction":
      return self._predictions(target_params, images, batch)
    features = self.encoder.apply(
      {"params": target_params["encoder"]}, images
    ).astype(jnp.float32)
    if self.condition == "target":
      return features.mean(axis=1)
    return models.gather_patches(features, self.places(batch)[0])[:, 0]

  def places(self, batch: objectives.Batch) -> tuple[jax.Array, jax.Array]:
    """The patches that a representation is of, drawn by the batch's key.

    Returns:
      ids int32 [B, T] and which of them are valid, bool [B, T].
    """
    predicts, patches = self.condition == "prediction", math.prod(self.grid)
    count = batch["target_ids"].shape[1] if predicts else patches
    one = jax.vmap(lambda key: jax.random.randint(key, (1,), 0, count))
    ids = one(_keys(batch, 0))
    if predicts:
      names = "target_ids", "target_valid"
      return tuple(models.gather_patches(batch[x], ids)[:, 0] for x in names)
    if self.condition == "target":
      ids = jnp.tile(jnp.arange(patches), (len(ids), 1))
    return ids, jnp.ones(ids.shape, bool)

  def _predictions(self, networks, images, batch) -> jax.Array:
    """Averaged prediction of one block of each image, [B, D]."""
    ids, valid = (x[:, None] for x in self.places(batch))  # [B, 1, T]
    context_ids, context_valid = (
      batch[name][:, :1] for name in ("context_ids", "context_valid")
    )
    context = self.encoder.apply(
      {"params": networks["context_encoder"]},
      images,
      context_ids,
      context_valid,
    )
    predictions = self.predictor.apply(
      {"params": networks["predictor"]},
      *(context, context_ids, ids, self.grid, context_valid, valid),
    ).astype(jnp.float32)[:, 0]  # [B, 1, T, D]
    return ijepa.masked_mean(predictions, valid)

  def loss(self, params, targets, batch, rng, buffers) -> objectives.Loss:
    """Squared error of the noise that the U-Net finds in noisy images."""
    del rng  # an image's noise is its own, whatever batch it is in
    images = self.drawn(batch["image"])
    level = jax.vmap(lambda key: jax.random.randint(key, (), 0, self.steps))(
      _keys(batch, 1)
    )
    noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(
      _keys(batch, 2)
    )
    known = jax.vmap(lambda key: ~jax.random.bernoulli(key, self.drop))(
      _keys(batch, 3)
    )
    signal = jnp.asarray(diffusion.linear_signal(self.steps), jnp.float32)
    noisy = diffusion.add_noise(images, noise, signal[level])
    found = self.unet.apply(
      {"params": params["unet"]},
      *(noisy, level, standardized(targets, buffers), known),
    )
    errors = jnp.square(found - noise)
    of_image = errors.mean(axis=(1, 2, 3))
    late = level >= self.steps // 2
    moments = {"mean": targets, "square": jnp.square(targets)}
    return objectives.Loss(
      total=errors.sum(),
      weight=jnp.float32(errors.size),
      metrics={
        "noise_error/first_half": jnp.where(late, 0, of_image).mean(),
        "noise_error/second_half": jnp.where(late, of_image, 0).mean(),
      },
      features=targets,
      buffers={
        name: _KEPT * buffers[name] + (1 - _KEPT) * x.mean(axis=0)
        for name, x in moments.items()
      },
    )

  def drawn(self, images: jax.Array) -> jax.Array:
    """Images uint8 [B, H, W, C] as they are to be drawn: [B, h, w, C]."""
    mean, std = self.scale
    shape = (len(images), *self.size, images.shape[-1])
    images = jax.image.resize(images.astype(jnp.float32), shape, "linear")
    return (images / 255 - mean) / std

  @property
  def scale(self) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation of drawn pixels, on a scale of 0 to 1."""
    unit = self.pixels == "unit"
    mean, std = (0.5, 0.5) if unit else (self.mean, self.std)
    return jnp.asarray(mean), jnp.asarray(std)

  def samples(
    self,
    params: Any,
    buffers: dict[str, jax.Array],
    representations: jax.Array | None,
    keys: jax.Array,
    *,
    steps: int = 200,
    eta: float = 1.0,
    guidance: float = 1.0,
  ) -> jax.Array:
    """Draws images.

    Args:
      params: of the U-Net.
      buffers: of the state.
      representations: [n, D] as `targets` makes them; None draws images of no
        representation.
      keys: [n], an image each.
      steps: of sampling, at most those of the diffusion.
      eta: see diffusion.sample.
      guidance: 1 for the distribution that was learned; above it, what sets a
        representation apart is exaggerated.

    Returns:
      uint8 [n, h, w, C].

    Reference: Ho and Salimans 2022, arXiv:2207.12598 (guidance).
    """
    count, known = len(keys), representations is not None
    if not known:
      representations = buffers["mean"] * jnp.ones((count, 1))
    given = standardized(representations, buffers)

    def noise(x, level, known):
      flags = jnp.full(count, known)
      return self.unet.apply({"params": params}, x, level, given, flags)

    def predict(x, level):
      found = noise(x, level, known)
      if known and guidance != 1:
        blind = noise(x, level, False)
        found = blind + guidance * (found - blind)
      return found

    mean, std = self.scale
    images = diffusion.sample(
      predict,
      keys,
      (count, *self.size, self.image_shape[-1]),
      diffusion.linear_signal(self.steps),
      steps=steps,
      eta=eta,
      limits=((0 - mean) / std, (1 - mean) / std),
    )
    return jnp.round(255 * (images * std + mean)).astype(jnp.uint8)

  def flops(self) -> int:
    """Frozen networks forward, the U-Net both ways."""
    channels, shapes = self.image_shape[-1], self.shapes
    if self.condition == "prediction":
      total = flops.encoder(self.encoder, shapes.context_patches, channels)
      total += flops.predictor(
        self.predictor, shapes.context_patches, shapes.target_patches, 1
      )
    else:
      rows, columns = self.grid
      total = flops.encoder(self.encoder, rows * columns, channels)
    plain = self.unet.clone(kernels=models.Kernels(), remat=False)
    inputs = (
      jnp.zeros((1, *self.size, channels)),
      *(jnp.zeros(1), jnp.zeros((1, self.encoder.width)), jnp.ones(1, bool)),
    )
    params = jax.eval_shape(plain.init, jax.random.key(0), *inputs)
    return total + 3 * flops.products(plain.apply, params, *inputs)


def standardized(
  representations: jax.Array, buffers: dict[str, jax.Array]
) -> jax.Array:
  """[B, D] with mean 0 and deviation 1 over images, by running moments."""
  mean = buffers["mean"]
  variance = jnp.maximum(buffers["square"] - jnp.square(mean), 0.0)
  return (representations - mean) * jax.lax.rsqrt(variance + _EPSILON)


def _keys(batch: objectives.Batch, use: int) -> jax.Array:
  """A key an image, [B], for one use."""
  keys = jax.random.wrap_key_data(batch["key"].astype(jnp.uint32))
  return jax.vmap(lambda key: jax.random.fold_in(key, use))(keys)
