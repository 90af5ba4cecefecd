"""Supervised learning of labels: a baseline, and fine-tuning.

The encoder's averaged patches are classified by a linear head. From weights
that are there (`init_from`) this is fine-tuning, with a learning rate that
falls from block to block.

Reference: Assran et al. 2023, appendix A, arXiv:2301.08243; He et al. 2022,
appendix A.1, arXiv:2111.06377.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax import keys, models, objectives
from jepa_jax.models import flops


@dataclasses.dataclass(frozen=True)
class Supervised(objectives.Objective):
  """Cross-entropy of an image's class.

  Attributes:
    encoder: whose averaged patches are classified.
    image_shape: (H, W, C).
    mean: of the images a channel, on a scale of 0 to 1.
    std: of the images a channel.
    classes: how many there are.
    label_smoothing: share of the target that all classes get alike.
    mixup: alpha of the Beta distribution of mixing shares; 0: off.
    cutmix: the same where a rectangle is pasted. With both, each batch gets
      one of them.
    layer_decay: learning rate of a block over that of the next one.
    average: whether a moving average of the weights is evaluated.
  """

  encoder: models.Encoder
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  classes: int
  label_smoothing: float
  mixup: float
  cutmix: float
  layer_decay: float
  average: bool

  keys: ClassVar = {
    "classes": keys.Key(1000, keys.whole(2, 10**6), "classes of data.label"),
    "label_smoothing": keys.Key(
      0.1,
      keys.number(0, 1, "most"),
      "share of a target that all classes get alike",
    ),
    "mixup": keys.Key(
      0.0, keys.number(0, 100), "alpha of mixing two images; 0: off"
    ),
    "cutmix": keys.Key(
      0.0, keys.number(0, 100), "alpha of pasting a rectangle; 0: off"
    ),
    "layer_decay": keys.Key(
      1.0,
      keys.number(0, 1, "least"),
      "learning rate of a block over that of the next one",
    ),
    "average": keys.Key(
      False,
      keys.Flag(),
      "whether a moving average of all weights, with `momentum`, is evaluated",
    ),
  }

  @classmethod
  def from_config(cls, config, kernels=None) -> "Supervised":
    """Builds the encoder that a config describes; see Objective."""
    return cls(
      encoder=models.Encoder(
        **config.encoder, **objectives.compute(config, kernels)
      ),
      image_shape=objectives.image_shape(config),
      mean=tuple(config.data.mean),
      std=tuple(config.data.std),
      **config.method,
    )

  @property
  def networks(self) -> dict[str, Any]:
    """The encoder, and the head that makes logits of [B, D]."""
    head = nn.Dense(self.classes, kernel_init=nn.initializers.normal(0.02))
    return {"encoder": self.encoder, "head": head}

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Images and the number of their class."""
    spec = jax.ShapeDtypeStruct
    return {
      "image": spec((batch_size, *self.image_shape), jnp.uint8),
      "label": spec((batch_size,), jnp.int32),
    }

  def init(self, rng: jax.Array) -> objectives.Params:
    """Random parameters: {"encoder", "head"}."""
    images = jnp.zeros((1, *self.image_shape))
    features = jnp.zeros((1, self.encoder.width))
    networks = self.networks
    return {
      "encoder": networks["encoder"].init(rng, images)["params"],
      "head": networks["head"].init(rng, features)["params"],
    }

  def averaged(self, params: objectives.Params) -> objectives.Params:
    """Everything, or nothing."""
    return params if self.average else {}

  def learning_rate_scale(self, params: objectives.Params) -> Any:
    """layer_decay ** (blocks above): the embedding's is the smallest."""
    if self.layer_decay == 1:
      return None
    depth = self.encoder.depth

    def scale(path, x):
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      if name.startswith("encoder/transformer/"):  # [L, ...]
        above = depth - jnp.arange(depth)
        return self.layer_decay ** above.reshape(-1, *[1] * (x.ndim - 1))
      top = name.startswith(("head/", "encoder/norm/"))
      return self.layer_decay ** (0 if top else depth + 1)

    return jax.tree_util.tree_map_with_path(scale, params)

  def loss(self, params, targets, batch, rng, buffers) -> objectives.Loss:
    """Cross-entropy with the label, or with both labels of a mixed image."""
    del targets, buffers
    drop_rng, mix_rng = jax.random.split(rng)
    images = models.normalize_images(batch["image"], self.mean, self.std)
    shares = jax.nn.one_hot(batch["label"], self.classes)
    if self.mixup or self.cutmix:
      images, shares = mix(mix_rng, images, shares, self.mixup, self.cutmix)
    smooth = self.label_smoothing
    shares = (1 - smooth) * shares + smooth / self.classes
    features = self.encoder.apply(
      {"params": params["encoder"]},
      images,
      train=True,
      rngs={"dropout": drop_rng},
    )
    features = features.astype(jnp.float32).mean(axis=1)  # [B, D]
    logits = self.networks["head"].apply({"params": params["head"]}, features)
    errors = -(shares * jax.nn.log_softmax(logits)).sum(axis=-1)
    right = logits.argmax(axis=-1) == shares.argmax(axis=-1)
    return objectives.Loss(
      total=errors.sum(),
      weight=jnp.float32(len(errors)),
      metrics={"accuracy": right.mean()},
      features=features,
    )

  def logits(self, params: Any, features: Any) -> Any:
    """Those of the head."""
    return self.networks["head"].apply({"params": params}, features)

  def flops(self) -> int:
    """Encoder and head both ways; pixels need no gradient."""
    height, width, channels = self.image_shape
    rows, columns = models.patch_grid(height, width, self.encoder.patch_size)
    encoder = flops.encoder(self.encoder, rows * columns, channels)
    embedding = flops.embedding(self.encoder, rows * columns, channels)
    return 3 * (encoder + 2 * self.encoder.width * self.classes) - embedding


def mix(
  rng: jax.Array,
  images: jax.Array,
  shares: jax.Array,
  mixup: float,
  cutmix: float,
) -> tuple[jax.Array, jax.Array]:
  """Mixes each image of a batch, and its label, with another one.

  Args:
    rng: key.
    images: [B, H, W, C]; image i is mixed with image B - 1 - i.
    shares: [B, K], how much of each class a label is.
    mixup: alpha; lambda ~ Beta(alpha, alpha) is the share of the image itself.
    cutmix: alpha; a rectangle of area 1 - lambda comes from the other image,
      cut at the border. With both, the batch gets one of them, at even odds.

  Returns:
    Images and shares, as given.

  Reference: Zhang et al. 2018, arXiv:1710.09412; Yun et al. 2019,
    arXiv:1905.04899.
  """
  choose, strength, place = jax.random.split(rng, 3)
  odds = 0.5 if mixup and cutmix else float(cutmix > 0)
  pasted = jax.random.bernoulli(choose, odds)
  alpha = jnp.where(pasted, cutmix or 1.0, mixup or 1.0)
  share = jax.random.beta(strength, alpha, alpha)
  height, width = images.shape[1:3]
  side = jnp.sqrt(1 - share)
  centre = jax.random.uniform(place, (2,))

  def inside(size: int, centre: jax.Array) -> jax.Array:
    """Which of `size` rows or columns the rectangle has."""
    at = jnp.arange(size)
    low, high = (centre - side / 2) * size, (centre + side / 2) * size
    return (at >= jnp.round(low)) & (at < jnp.round(high))

  rectangle = inside(height, centre[0])[:, None] & inside(width, centre[1])
  own = jnp.where(pasted, 1.0 - rectangle, share)[..., None]  # [H, W, 1]
  share = own.mean()
  return (
    own * images + (1 - own) * images[::-1],
    share * shares + (1 - share) * shares[::-1],
  )
