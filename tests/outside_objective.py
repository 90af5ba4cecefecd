"""An objective of somebody else: all of the contract, none of the package.

Labels are learned beside the features of a frozen random encoder, from which a
running mean is taken. Two settings are its own. Named in a config as
"outside_objective:Outside".
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax import keys, models, objectives


@dataclasses.dataclass(frozen=True)
class Outside(objectives.Objective):
  encoder: models.Encoder
  image_shape: tuple[int, int, int]
  classes: int
  keep: float
  frozen: tuple[str, ...] = ("teacher",)
  keys: ClassVar = {
    "classes": keys.Key(11, keys.whole(2, 1000), "of the labels"),
    "keep": keys.Key(0.9, keys.number(0.0, 1.0), "of the mean, every step"),
  }

  @classmethod
  def from_config(cls, config, kernels=None):
    data, compute = config.data, config.compute
    encoder = models.Encoder(
      **config.encoder,
      dtype=jnp.dtype(compute.dtype),
      scan=compute.scan,
      **({} if kernels is None else {"kernels": kernels}),
    )
    shape = (data.image_size, data.image_size, data.channels)
    return cls(encoder, shape, config.method.classes, config.method.keep)

  @property
  def networks(self):
    head = nn.Dense(self.classes)
    return {"encoder": self.encoder, "teacher": self.encoder, "head": head}

  def batch_spec(self, batch_size):
    return {
      "image": jax.ShapeDtypeStruct((batch_size, *self.image_shape), jnp.uint8),
      "label": jax.ShapeDtypeStruct((batch_size,), jnp.int32),
    }

  def init(self, rng):
    rngs = jax.random.split(rng, 3)
    images = jnp.zeros((1, *self.image_shape))
    features = jnp.zeros((1, self.encoder.width))
    inputs = {"encoder": images, "teacher": images, "head": features}
    return {
      name: self.networks[name].init(key, inputs[name])["params"]
      for key, name in zip(rngs, inputs)
    }

  def averaged(self, params):
    return {"head": params["head"]}

  def buffers(self):
    return {"centre": jnp.zeros(self.encoder.width)}

  def learning_rate_scale(self, params):
    scale = jax.tree.map(lambda x: 1.0, params)
    scale["encoder"]["patch_embed"]["bias"] = 0.0
    return scale

  def _pooled(self, params, batch):
    images = models.normalize_images(batch["image"], (0.5,) * 3, (0.2,) * 3)
    features = self.encoder.apply({"params": params}, images)
    return features.astype(jnp.float32).mean(axis=1)

  def targets(self, target_params, batch, buffers):
    features = self._pooled(target_params["teacher"], batch)
    return features - buffers["centre"], features

  def loss(self, params, targets, batch, rng, buffers):
    centred, features = targets
    pooled = self._pooled(params["encoder"], batch)
    logits = nn.Dense(self.classes).apply({"params": params["head"]}, pooled)
    log_shares = jax.nn.log_softmax(logits)
    label = batch["label"] % self.classes
    right = jnp.take_along_axis(log_shares, label[:, None], axis=1)
    new = features.mean(axis=0)
    centre = self.keep * buffers["centre"] + (1 - self.keep) * new
    return objectives.Loss(
      total=jnp.square(pooled - centred).mean(axis=1).sum() - right.sum(),
      weight=jnp.float32(len(label)),
      metrics={"accuracy": (logits.argmax(axis=1) == label).mean()},
      features=pooled,
      buffers={"centre": centre},
    )
