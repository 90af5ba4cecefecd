"""The attentive probe: one learned query looks at an image's patches.

Axes: n training images, B images of a batch, N patches, D features, K classes,
R learning rates.
"""

from collections.abc import Sequence
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jepa_jax.evaluation.protocols import accuracy, linear, protocol

RATES = (3e-3, 1e-3, 3e-4)  # AdamW's, trained side by side
HEAD = 64  # features of an attention head, about
LEAST_STEPS = 400


class Pooler(nn.Module):
  """Cross-attention of one query over the patches, a perceptron, the classes.

  Attributes:
    classes: K.
  """

  classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Logits [B, K] of patches [B, N, D]."""
    width = x.shape[-1]
    heads = max(h for h in range(1, width // HEAD + 2) if width % h == 0)
    query = self.param("query", nn.initializers.normal(0.02), (1, 1, width))
    query = jnp.broadcast_to(query, (len(x), 1, width))
    pooled = query + nn.MultiHeadDotProductAttention(heads)(
      query, nn.LayerNorm(epsilon=1e-6)(x)
    )
    hidden = nn.Dense(4 * width)(nn.LayerNorm(epsilon=1e-6)(pooled))
    pooled += nn.Dense(width)(nn.gelu(hidden))
    return nn.Dense(self.classes)(nn.LayerNorm(epsilon=1e-6)(pooled[:, 0]))


def attentive_probe(
  train: protocol.Examples,
  test: protocol.Examples,
  *,
  rates: Sequence[float] = RATES,
  epochs: int = 20,
  batch: int = 256,
  holdout: float = 0.1,
  seed: int = 0,
) -> dict[str, Any]:
  """Classifies by one cross-attention query over the patches' features.

  Trained by AdamW (weight decay .01, cosine) with several learning rates at
  once; that with the best accuracy on the images held out classifies.

  Args:
    train: features [n, N, D], labels [n] integers of any values.
    test: features [B, N, D], labels [B].
    rates: learning rates to choose from.
    epochs: passes over the training images, or so many that there are
      LEAST_STEPS steps.
    batch: images of a step, at most.
    holdout: share of the training images that chooses, in (0, 1); the probe
      is not trained again with them.
    seed: of parameters, batches and the images held out.

  Returns:
    Those of accuracy.accuracies; lr; holdout_top1, None where no class has two
    images; train_top1 of the images learned from.

  Raises:
    ValueError: shapes disagree, or fewer than two classes.

  Reference: Bardes et al. 2024, section 4, arXiv:2404.08471.
  """
  protocol.check_patches(train, test)
  classes, targets = np.unique(train["labels"], return_inverse=True)
  if len(classes) < 2 or not 0 < holdout < 1 or not rates:
    raise ValueError(
      f"attentive probe got {len(classes)} class in {len(targets)} training "
      f"images, holdout={holdout}, rates={tuple(rates)}; it needs at least 2, "
      "0 < holdout < 1 and a rate."
    )
  held = linear.stratified(targets, holdout, seed)
  kept = np.flatnonzero(~held)
  size = min(batch, len(kept))
  steps = max(epochs * (len(kept) // size), LEAST_STEPS)
  model = Pooler(len(classes))
  params, state = _init(
    model, jax.random.key(seed), train["features"][:1], len(rates)
  )
  random = np.random.default_rng(seed)
  order = np.zeros(0, np.int64)
  for step in range(steps):
    if len(order) < size:
      order = random.permutation(kept)
    rows, order = order[:size], order[size:]
    factor = 0.5 * (1 + np.cos(np.pi * step / steps))
    params, state = _step(
      model, params, state, train["features"][rows], targets[rows],
      np.float32(rates) * np.float32(factor),
    )  # fmt: skip
  said = _scores(model, params, train["features"], size).argmax(axis=-1)
  right = said == targets  # [R, n]
  chooses = held if held.any() else ~held
  best = int(np.argmax(right[:, chooses].mean(axis=1)))
  scores = _scores(model, params, test["features"], size)[best]
  return {
    **accuracy.accuracies(scores, classes, train, test),
    "lr": rates[best],
    "holdout_top1": accuracy.percent(right[best, held]) if held.any() else None,
    "train_top1": accuracy.percent(right[best, kept]),
    "steps": steps,
  }


def _optimizer(lr):
  return optax.adamw(lr, weight_decay=0.01)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _init(model, rng, patches, rates):
  params = model.init(rng, jnp.asarray(patches, jnp.float32))["params"]
  params = jax.tree.map(lambda x: jnp.stack([x] * rates), params)
  return params, jax.vmap(_optimizer(0.0).init)(params)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=(1, 2))
def _step(model, params, state, patches, targets, rates):
  patches = patches.astype(jnp.float32)

  def loss(params):
    logits = model.apply({"params": params}, patches)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, targets
    ).mean()

  def update(params, state, lr):
    grads = jax.grad(loss)(params)
    updates, state = _optimizer(lr).update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.vmap(update)(params, state, rates)


@functools.partial(jax.jit, static_argnums=0)
def _apply(model, params, patches):
  patches = patches.astype(jnp.float32)
  return jax.vmap(lambda p: model.apply({"params": p}, patches))(params)


def _scores(model, params, features, size):
  """[R, n, K]; the last images fill up the last batch."""
  starts = [min(i, max(len(features) - size, 0)) for i in
            range(0, len(features), size)]  # fmt: skip
  scores = np.zeros((_rates(params), len(features), model.classes), np.float32)
  for start in starts:
    chosen = slice(start, start + size)
    scores[:, chosen] = _apply(model, params, features[chosen])
  return scores


def _rates(params):
  return len(jax.tree.leaves(params)[0])


ROW = protocol.Protocol(
  name="attentive",
  title="attentive probe",
  run=attentive_probe,
  score="top1",
  unit="%",
  higher_is_better=True,
  label="class",
  patches=True,
)
