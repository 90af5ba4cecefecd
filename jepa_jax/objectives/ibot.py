"""iBOT: say what a teacher says of a view's class and of its hidden patches.

The encoder sees large views with some patches behind a mask token, and small
views. One head makes of a class token, or of a patch, a distribution over
learned prototypes. The class of every view is to be that which the teacher, a
moving average, sees in another large view; a hidden patch is to be what the
teacher sees there. The teacher's outputs are centred by a running mean and
sharpened, so that they neither become one prototype nor all alike.

Reference: Zhou et al. 2022, arXiv:2111.07832; Caron et al. 2021 (DINO),
  arXiv:2104.14294.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax import keys, masks, models, objectives
from jepa_jax.objectives import views as views_lib

_TEMPERATURE = keys.number(0.001, 10.0)


class Head(nn.Module):
  """Features [..., D] to cosines [..., K] with prototypes in a narrow space."""

  hidden: int
  bottleneck: int
  prototypes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i, width in enumerate((self.hidden, self.hidden, self.bottleneck)):
      x = nn.Dense(width, name=f"dense{i}")(x)
      x = nn.gelu(x, approximate=False) if i < 2 else x
    shape = (self.bottleneck, self.prototypes)
    directions = self.param("prototypes", nn.initializers.normal(0.02), shape)
    return unit(x, -1) @ unit(directions, 0)


def unit(x: jax.Array, axis: int) -> jax.Array:
  """Vectors along an axis over their length."""
  return x * jax.lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-12)


@dataclasses.dataclass(frozen=True)
class IBOT(objectives.Objective):
  """See above.

  What is hidden of the large view v of an image is target block v.

  Attributes:
    encoder: with a class token; the teacher has its moving average.
    views: of an image.
    shapes: static sizes of the masks.
    mean: of the images a channel, on a scale of 0 to 1.
    std: of the images a channel.
    hidden: width inside the head.
    bottleneck: width of the space of the prototypes.
    prototypes: how many there are.
    temperature: of the student.
    teacher_temperature: of the teacher; less than the student's sharpens.
    centre_momentum: share of the centre that a step keeps.

  Differs: the teacher's temperature is constant, the last layer learns from
    the first step on, and the centre of patches is that of hidden ones.
  """

  encoder: models.Encoder
  views: views_lib.Views
  shapes: masks.MaskShapes
  mean: tuple[float, ...]
  std: tuple[float, ...]
  hidden: int
  bottleneck: int
  prototypes: int
  temperature: float
  teacher_temperature: float
  centre_momentum: float

  _own: ClassVar = {
    "hidden": keys.Key(2048, keys.whole(1, 2**16), "width of the head"),
    "bottleneck": keys.Key(256, keys.whole(1, 2**16), "width that it ends in"),
    "prototypes": keys.Key(8192, keys.whole(2, 2**20), "to tell apart"),
    "temperature": keys.Key(0.1, _TEMPERATURE, "of the student"),
    "teacher_temperature": keys.Key(0.04, _TEMPERATURE, "of the teacher"),
    "centre_momentum": keys.Key(
      0.9, keys.number(0, 1), "share of the centre that a step keeps"
    ),
  }
  keys: ClassVar = {**views_lib.Views.keys, **_own}

  @classmethod
  def from_config(cls, config, kernels=None) -> "IBOT":
    """Builds the networks that a config describes; see Objective."""
    views = views_lib.Views.from_config(config)
    if config.masks.num_targets != views.views:
      raise ValueError(
        f"masks.num_targets is {config.masks.num_targets} and method.views "
        f"{views.views}; they need to be equal, a block is hidden of each view."
      )
    if not config.encoder.class_token:
      raise ValueError(
        'objective "ibot" learns a class token; set encoder.class_token=True.'
      )
    shape = objectives.image_shape(config)
    grid = models.patch_grid(*shape[:2], config.encoder.patch_size)
    return cls(
      encoder=models.Encoder(
        **config.encoder, **objectives.compute(config, kernels)
      ),
      views=views,
      shapes=masks.mask_shapes(config.masks, grid),
      mean=tuple(config.data.mean),
      std=tuple(config.data.std),
      **{name: config.method[name] for name in cls._own},
    )

  @property
  def networks(self) -> dict[str, Any]:
    """The encoder, and the head of class and patches."""
    head = Head(self.hidden, self.bottleneck, self.prototypes)
    return {"encoder": self.encoder, "head": head}

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Views, and a target block for each of the large ones."""
    blocks = (batch_size, self.views.views, self.shapes.target_patches)
    spec = jax.ShapeDtypeStruct
    return self.views.spec(batch_size) | {
      "target_ids": spec(blocks, jnp.int32),
      "target_valid": spec(blocks, jnp.bool_),
    }

  def init(self, rng: jax.Array) -> objectives.Params:
    """Random parameters: {"encoder", "head"}."""
    encoder_rng, head_rng = jax.random.split(rng)
    height, width, _ = self.views.image_shape
    rows, columns = models.patch_grid(height, width, self.encoder.patch_size)
    masked = jnp.zeros((1, rows * columns), bool)
    images = jnp.zeros((1, *self.views.image_shape))
    features = jnp.zeros((1, self.encoder.width))
    networks = self.networks
    return {
      "encoder": networks["encoder"].init(encoder_rng, images, masked=masked)[
        "params"
      ],
      "head": networks["head"].init(head_rng, features)["params"],
    }

  def averaged(self, params: objectives.Params) -> objectives.Params:
    """The teacher follows encoder and head."""
    return params

  def buffers(self) -> dict[str, jax.Array]:
    """The centres: running means of the teacher's logits."""
    return {name: jnp.zeros(self.prototypes) for name in ("class", "patches")}

  def outputs(self, params, images, ids=None, **how):
    """Class token's features [B, V, D], its logits, and those of patches ids.

    Args:
      params: {"encoder", "head"}.
      images: views, uint8 [B, V, H, W, C].
      ids: [B, V, T], or None for no patches.
      **how: more arguments of the encoder.
    """
    features = views_lib.encode(
      *(self.encoder, params["encoder"], images, self.mean, self.std),
      all_tokens=True,
      **how,
    )
    head = lambda x: self.networks["head"].apply({"params": params["head"]}, x)
    classes = features[:, :, 0]
    if ids is None:
      return classes, head(classes), None
    pick = jax.vmap(models.gather_patches)
    patches = pick(features, self.encoder.num_tokens + ids)  # [B, V, T, D]
    return classes, head(classes), head(patches)

  def targets(self, target_params, batch, buffers) -> dict[str, jax.Array]:
    """The teacher's logits of the large views, [B, V, K] and [B, V, T, K]."""
    del buffers
    found = self.outputs(target_params, batch["views"], batch["target_ids"])
    return dict(zip(("features", "class", "patches"), found))

  def loss(self, params, targets, batch, rng, buffers) -> objectives.Loss:
    """Cross-entropy of classes across views, and of hidden patches in each."""
    ids, valid = batch["target_ids"], batch["target_valid"]
    large, local = jax.random.split(rng)
    height, width, _ = self.views.image_shape
    rows, columns = models.patch_grid(height, width, self.encoder.patch_size)
    hits = (ids[..., None] == jnp.arange(rows * columns)) & valid[..., None]
    _, classes, patches = self.outputs(
      params,
      batch["views"],
      ids,
      masked=jax.lax.collapse(hits.any(axis=2), 0, 2),
      train=True,
      rngs={"dropout": large},
    )
    if self.views.local_views:
      _, more, _ = self.outputs(
        params, batch["local_views"], train=True, rngs={"dropout": local}
      )
      classes = jnp.concatenate([classes, more], axis=1)
    sharp = lambda name: jax.nn.softmax(
      (targets[name] - buffers[name]) / self.teacher_temperature
    )
    soft = lambda x: jax.nn.log_softmax(x / self.temperature)
    # Of every view v against every other large view q.
    across = -jnp.einsum("bqk,bvk->bqv", sharp("class"), soft(classes))
    others = 1.0 - jnp.eye(*across.shape[1:])
    across = (across * others).sum(axis=(1, 2)) / others.sum()
    inside = -(sharp("patches") * soft(patches)).sum(axis=-1)  # [B, V, T]
    hidden = valid / jnp.maximum(valid.sum(axis=-1, keepdims=True), 1)
    inside = (inside * hidden).sum(axis=-1).mean(axis=1)
    now = {
      "class": targets["class"].mean(axis=(0, 1)),
      "patches": (targets["patches"] * hidden[..., None]).sum(2).mean((0, 1)),
    }
    keep = self.centre_momentum
    return objectives.Loss(
      total=(across + inside).sum(),
      weight=jnp.float32(len(across)),
      metrics={"class_loss": across.mean(), "patch_loss": inside.mean()},
      features=targets["features"][:, 0],
      buffers={k: keep * buffers[k] + (1 - keep) * x for k, x in now.items()},
    )

  def facts(self) -> dict[str, Any]:
    """Sizes and padding of the masks."""
    return {"masks": self.shapes}

  def flops(self) -> int:
    """Teacher forward on large views, student both ways on all."""
    work = self.views.flops(self.encoder)
    narrow = (self.encoder.width + self.hidden) * self.hidden
    narrow += (self.hidden + self.prototypes) * self.bottleneck
    large = self.views.views * (1 + self.shapes.target_patches)
    head = 2 * narrow * (4 * large + 3 * self.views.local_views)
    student = sum(3 * all_ - embedding for all_, embedding in work.values())
    return work["views"][0] + student + head
