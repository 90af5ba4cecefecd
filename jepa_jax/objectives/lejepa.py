"""LeJEPA: views of an image agree, and features are normally distributed.

Every view's projection is drawn to the mean of the global views' projections;
what keeps them from collapsing is SIGReg alone. No teacher, no predictor, no
stopped gradient.

Reference: Balestriero and LeCun 2025, arXiv:2511.08544.
"""

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax import keys, models, objectives
from jepa_jax.objectives import regularizers
from jepa_jax.objectives import views as views_lib


class Projector(nn.Module):
  """Perceptron of three layers, normalised over the batch: [n, D] -> [n, P]."""

  hidden: int
  outputs: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Statistics are those of x, for it is never used without a batch."""
    for i in range(2):
      x = nn.Dense(self.hidden, name=f"dense{i}")(x)
      mean, variance = x.mean(axis=0), x.var(axis=0)
      scale = self.param(f"scale{i}", nn.initializers.ones, (self.hidden,))
      bias = self.param(f"bias{i}", nn.initializers.zeros, (self.hidden,))
      x = nn.relu((x - mean) * jax.lax.rsqrt(variance + 1e-5) * scale + bias)
    return nn.Dense(self.outputs, name="project")(x)


@dataclasses.dataclass(frozen=True)
class LeJEPA(objectives.Objective):
  """See above.

  Attributes:
    encoder: whose averaged patches are projected.
    views: of an image.
    mean: of the images a channel, on a scale of 0 to 1.
    std: of the images a channel.
    hidden: width inside the projector.
    outputs: numbers that it ends in.
    weight: lambda, of SIGReg; the views' agreement has the rest.
  """

  encoder: models.Encoder
  views: views_lib.Views
  mean: tuple[float, ...]
  std: tuple[float, ...]
  hidden: int
  outputs: int
  weight: float

  whole_batch: ClassVar[bool] = True
  keys: ClassVar = {
    **views_lib.Views.keys,
    "hidden": keys.Key(2048, keys.whole(1, 2**16), "width of the projector"),
    "outputs": keys.Key(64, keys.whole(1, 2**16), "numbers that it ends in"),
    "weight": keys.Key(
      0.05, keys.number(0, 1), "of SIGReg; the views' agreement has the rest"
    ),
  }

  @classmethod
  def from_config(cls, config, kernels=None) -> "LeJEPA":
    """Builds the encoder that a config describes; see Objective."""
    return cls(
      encoder=models.Encoder(
        **config.encoder, **objectives.compute(config, kernels)
      ),
      views=views_lib.Views.from_config(config),
      mean=tuple(config.data.mean),
      std=tuple(config.data.std),
      hidden=config.method.hidden,
      outputs=config.method.outputs,
      weight=config.method.weight,
    )

  @property
  def networks(self) -> dict[str, Any]:
    """The encoder and the projector."""
    projector = Projector(self.hidden, self.outputs)
    return {"encoder": self.encoder, "projector": projector}

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Views of each image."""
    return self.views.spec(batch_size)

  def init(self, rng: jax.Array) -> objectives.Params:
    """Random parameters: {"encoder", "projector"}."""
    images = jnp.zeros((1, *self.views.image_shape))
    features = jnp.zeros((2, self.encoder.width))
    networks = self.networks
    return {
      "encoder": networks["encoder"].init(rng, images)["params"],
      "projector": networks["projector"].init(rng, features)["params"],
    }

  def loss(self, params, targets, batch, rng, buffers) -> objectives.Loss:
    """(1 - lambda) * agreement + lambda * SIGReg, the mean over views."""
    del targets, buffers
    drop_rng, direction_rng = jax.random.split(rng)
    how = dict(train=True, rngs={"dropout": drop_rng})
    work = (self.encoder, params["encoder"])
    features = jnp.concatenate(
      [
        views_lib.encode(*work, batch[name], self.mean, self.std, **how).mean(2)
        for name in self.batch_spec(1)
      ],
      axis=1,
    )  # [B, V, D], global views first
    projections = (
      self.networks["projector"]
      .apply({"params": params["projector"]}, jax.lax.collapse(features, 0, 2))
      .reshape(*features.shape[:2], -1)
    )  # [B, V, P]
    centre = projections[:, : self.views.views].mean(axis=1, keepdims=True)
    agreement = jnp.square(projections - centre).mean()
    sigreg = jax.vmap(regularizers.sigreg, in_axes=(1, None))(
      projections, direction_rng
    ).mean()
    loss = (1 - self.weight) * agreement + self.weight * sigreg
    count = jnp.float32(len(features))
    return objectives.Loss(
      total=loss * count,
      weight=count,
      metrics={"agreement": agreement, "sigreg": sigreg},
      features=features[:, 0],
    )

  def flops(self) -> int:
    """Encoder and projector both ways, of all views; pixels need none."""
    work = self.views.flops(self.encoder).values()
    widths = self.encoder.width + self.hidden + self.outputs
    count = self.views.views + self.views.local_views
    projector = 2 * self.hidden * widths * count
    return sum(3 * all_ - embedding for all_, embedding in work) + 3 * projector
