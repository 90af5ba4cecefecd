"""Context autoencoder: features of what is hidden first, then its tokens.

The encoder sees the context alone. A regressor, by cross-attention, says the
encoder's own features of the target patches (alignment); a decoder that sees
nothing but these says which token each patch is. Tokens come from a tokenizer,
see OnlineKMeans.

Reference: Chen et al. 2022, arXiv:2202.03026.
"""

import dataclasses
import importlib
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax import keys, masks, models, objectives
from jepa_jax.models import flops, transformer
from jepa_jax.objectives import ijepa, mae


class Regressor(nn.Module):
  """Cross-attention from the target patches to the context, and to themselves.

  Attributes:
    width: D of the encoder; its other attributes as Transformer's.
    depth: blocks; each sees the same context.
    grid: (h, w) of an image's patches.
    settings: arguments of Transformer.
  """

  width: int
  depth: int
  grid: tuple[int, int]
  settings: tuple[tuple[str, Any], ...]

  @nn.compact
  def __call__(self, context, context_valid, target_ids, target_valid):
    """[B, K, D] and bool [B, K], ids and bool [B, T] -> [B, T, D]."""
    token = self.param(
      "mask_token", transformer.KERNEL_INIT, (1, 1, self.width)
    )
    places = models.sincos_positions(self.grid, self.width)
    x = (token + jnp.asarray(places)[target_ids]).astype(context.dtype)
    count = context.shape[1]
    valid = jnp.concatenate([context_valid, target_valid], axis=1)
    for i in range(self.depth):
      (x,) = transformer.Transformer(
        depth=1, **dict(self.settings), name=f"block{i}"
      )(
        jnp.concatenate([context, x], axis=1),
        valid,
        select=lambda x: x[:, count:],
      )
    return x


class Decoder(nn.Module):
  """Self-attention over regressed features: [B, T, D] -> logits [B, T, V].

  Attributes:
    depth: blocks.
    tokens: V.
    grid: (h, w) of an image's patches.
    settings: arguments of Transformer.
  """

  depth: int
  tokens: int
  grid: tuple[int, int]
  settings: tuple[tuple[str, Any], ...]

  @nn.compact
  def __call__(self, x, target_ids, target_valid):
    """See above."""
    places = models.sincos_positions(self.grid, x.shape[-1])
    x = x + jnp.asarray(places, x.dtype)[target_ids]
    (x,) = transformer.Transformer(depth=self.depth, **dict(self.settings))(
      x, target_valid
    )
    x = transformer.LayerNorm(dtype=x.dtype, name="norm")(x)
    return nn.Dense(self.tokens, name="project")(x.astype(jnp.float32))


@dataclasses.dataclass(frozen=True)
class OnlineKMeans:
  """Tokens of patches: the nearest of centres that follow the data.

  A stand-in for DALL-E's tokenizer, which is a network with weights of its own.
  Patches are normalised each; a centre is the running mean of those that it is
  nearest to. A tokenizer of yours has the same three methods and is named as
  "my_module:Class", which is called with (tokens, patch_shape).

  Attributes:
    tokens: how many there are.
    patch_shape: (side, side, C) of a patch, pixels.

  Reference: van den Oord et al. 2017, appendix A.1, arXiv:1711.00937.
  """

  tokens: int
  patch_shape: tuple[int, int, int]
  keep: ClassVar[float] = 0.99  # share of a mean that a step keeps

  def buffers(self) -> dict[str, jax.Array]:
    """First state: smooth random centres, for patches of images are smooth."""
    side, _, channels = self.patch_shape
    shape = (self.tokens, side, side, channels)
    noise = jax.random.normal(jax.random.key(0), shape)
    noise = 0.2 * noise + noise.mean(axis=-1, keepdims=True)  # mostly grey
    frequency = jnp.abs(jnp.fft.fftfreq(side))
    fall = 1 / jnp.maximum(frequency + frequency[:, None], 1 / side)
    spectrum = jnp.fft.fft2(noise, axes=(1, 2)) * fall[:, :, None]
    smooth = jnp.fft.ifft2(spectrum, axes=(1, 2)).real
    smooth = smooth.reshape(self.tokens, -1)
    return {
      "sums": mae.normalize_pixels(smooth),
      "counts": jnp.ones(self.tokens),
    }

  def ids(self, patches: jax.Array, buffers: Any) -> jax.Array:
    """The token of each patch: [..., pixels] -> int32 [...]."""
    centres = buffers["sums"] / buffers["counts"][:, None]
    x = mae.normalize_pixels(patches)
    nearness = x @ centres.T - jnp.square(centres).sum(axis=-1) / 2
    return nearness.argmax(axis=-1).astype(jnp.int32)

  def update(
    self, patches: jax.Array, ids: jax.Array, valid: jax.Array, buffers: Any
  ) -> Any:
    """The next state, from patches [B, T, pixels] of a batch."""
    hits = jax.nn.one_hot(ids, self.tokens) * valid[..., None]
    scale = self.tokens / math.prod(ids.shape)  # so that counts stay about 1
    new = {
      "sums": jnp.einsum("btv,btp->vp", hits, mae.normalize_pixels(patches)),
      "counts": hits.sum(axis=(0, 1)),
    }
    mix = lambda old, new: self.keep * old + (1 - self.keep) * scale * new
    return jax.tree.map(mix, buffers, new)


def _tokenizer(name: str) -> Any:
  module, _, attribute = name.rpartition(":")
  try:
    return getattr(importlib.import_module(module), attribute)
  except (AttributeError, ImportError, ValueError) as error:
    raise ValueError(
      f'method.tokenizer "{name}" cannot be imported: {error}; give '
      "my_module:Class."
    ) from None


@dataclasses.dataclass(frozen=True)
class CAE(objectives.Objective):
  """See above.

  Attributes:
    encoder: of the context.
    image_shape: (H, W, C).
    shapes: static sizes of the masks.
    mean: of the images a channel, on a scale of 0 to 1.
    std: of the images a channel.
    regressor: from the context's features to the targets'.
    decoder: from regressed features to tokens.
    tokenizer: says which token a patch is.
    alignment: weight of the regressor's squared error.

  Differs: blocks of the regressor have one norm for queries and keys, and
    positions are added once.
  """

  encoder: models.Encoder
  image_shape: tuple[int, int, int]
  shapes: masks.MaskShapes
  mean: tuple[float, ...]
  std: tuple[float, ...]
  regressor: Regressor
  decoder: Decoder
  tokenizer: Any
  alignment: float

  keys: ClassVar = {
    "tokens": keys.Key(8192, keys.whole(2, 2**20), "how many there are"),
    "tokenizer": keys.Key(
      "jepa_jax.objectives.cae:OnlineKMeans",
      keys.Text("my_module:Class", False),
      "what says which token a patch is",
    ),
    "decoder_depth": keys.Key(
      4, keys.whole(1, 256), "blocks; the regressor has predictor.depth"
    ),
    "alignment": keys.Key(
      2.0, keys.number(0, 1e6), "weight of the regressed features' error"
    ),
  }

  @classmethod
  def from_config(cls, config, kernels=None) -> "CAE":
    """Builds the networks that a config describes; see Objective."""
    for name in ("num_contexts", "num_targets"):
      if config.masks[name] != 1:
        raise ValueError(
          f'masks.{name} is {config.masks[name]}; objective "cae" needs 1.'
        )
    shape, method = objectives.image_shape(config), config.method
    size = config.encoder.patch_size
    grid = models.patch_grid(*shape[:2], size)
    compute = objectives.compute(config, kernels)
    settings = tuple(
      dict(
        num_heads=config.encoder.num_heads,
        mlp_ratio=config.encoder.mlp_ratio,
        **compute,
      ).items()
    )
    make = _tokenizer(method.tokenizer)
    return cls(
      encoder=models.Encoder(**config.encoder, **compute),
      image_shape=shape,
      shapes=masks.mask_shapes(config.masks, grid),
      mean=tuple(config.data.mean),
      std=tuple(config.data.std),
      regressor=Regressor(
        config.encoder.width, config.predictor.depth, grid, settings
      ),
      decoder=Decoder(method.decoder_depth, method.tokens, grid, settings),
      tokenizer=make(method.tokens, (size, size, shape[-1])),
      alignment=method.alignment,
    )

  @property
  def networks(self) -> dict[str, Any]:
    """Encoder, regressor and decoder."""
    return {
      "encoder": self.encoder,
      "regressor": self.regressor,
      "decoder": self.decoder,
    }

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Images, a context and a target."""
    spec, found = jax.ShapeDtypeStruct, {}
    sizes = {
      "context": self.shapes.context_patches,
      "target": self.shapes.target_patches,
    }
    for name, size in sizes.items():
      found[f"{name}_ids"] = spec((batch_size, 1, size), jnp.int32)
      found[f"{name}_valid"] = spec((batch_size, 1, size), jnp.bool_)
    return {"image": spec((batch_size, *self.image_shape), jnp.uint8), **found}

  def init(self, rng: jax.Array) -> objectives.Params:
    """Random parameters: {"encoder", "regressor", "decoder"}."""
    rngs = jax.random.split(rng, 3)
    features = jnp.zeros((1, 1, self.encoder.width))
    ids, valid = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
    inputs = {
      "encoder": (jnp.zeros((1, *self.image_shape)), ids),
      "regressor": (features, valid, ids, valid),
      "decoder": (features, ids, valid),
    }
    return {
      name: self.networks[name].init(key, *inputs[name])["params"]
      for key, name in zip(rngs, inputs)
    }

  def buffers(self) -> Any:
    """The tokenizer's."""
    return self.tokenizer.buffers()

  def loss(self, params, targets, batch, rng, buffers) -> objectives.Loss:
    """Cross-entropy of the tokens, and error of the regressed features."""
    del targets
    apply = lambda name, *args, **how: self.networks[name].apply(
      {"params": params[name]}, *args, **how
    )
    images = models.normalize_images(batch["image"], self.mean, self.std)
    context_ids, context_valid, ids, valid = (
      batch[f"{name}_{what}"][:, 0]
      for name in ("context", "target")
      for what in ("ids", "valid")
    )
    context = apply(
      *("encoder", images, context_ids, context_valid),
      train=True,
      rngs={"dropout": rng},
    )  # [B, K, D]
    latents = apply("regressor", context, context_valid, ids, valid)
    logits = apply("decoder", latents, ids, valid)  # [B, T, V]
    # Of the same encoder, which learns nothing from them.
    goals = jax.lax.stop_gradient(apply("encoder", images, ids, valid))
    patches = models.gather_patches(
      models.patchify(images, self.encoder.patch_size), ids
    )
    tokens = self.tokenizer.ids(patches, buffers)
    said = jax.nn.log_softmax(logits)
    errors = -jnp.take_along_axis(said, tokens[..., None], axis=-1)[..., 0]
    distances = jnp.square((latents - goals).astype(jnp.float32)).mean(axis=-1)
    count = valid.sum().astype(jnp.float32)
    mean = lambda x: jnp.where(valid, x, 0.0).sum() / count
    return objectives.Loss(
      total=(mean(errors) + self.alignment * mean(distances)) * count,
      weight=count,
      metrics={
        "token_loss": mean(errors),
        "alignment": mean(distances),
        "token_accuracy": mean(logits.argmax(axis=-1) == tokens),
      },
      features=ijepa.masked_mean(context.astype(jnp.float32), context_valid),
      buffers=self.tokenizer.update(patches, tokens, valid, buffers),
    )

  def facts(self) -> dict[str, Any]:
    """Sizes and padding of the masks."""
    return {"masks": self.shapes}

  def flops(self) -> int:
    """Encoder on both parts, the first both ways; regressor and decoder.

    A tokenizer's are not counted.
    """
    width, channels = self.encoder.width, self.image_shape[-1]
    hidden = int(self.encoder.mlp_ratio * width + 1e-6)
    k, t = self.shapes.context_patches, self.shapes.target_patches
    both = flops.encoder(self.encoder, k, channels)
    both += self.regressor.depth * flops.block(k + t, width, hidden, queries=t)
    both += self.decoder.depth * flops.block(t, width, hidden)
    both += 2 * t * width * self.decoder.tokens
    goals = flops.encoder(self.encoder, t, channels)
    return 3 * both - flops.embedding(self.encoder, k, channels) + goals
