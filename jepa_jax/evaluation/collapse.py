"""Is the encoder collapsing? Three numbers, and one sentence when they say so.

The loss of a joint-embedding method cannot tell: predicting a constant is
easy. These look at the features themselves. All are jnp, safe inside jit, and
meant for average-pooled features of some 128 images: a few milliseconds there,
so compute them at the steps that log rather than at every step.

Axes: B images, D encoder width.
"""

from collections.abc import Mapping
import math

import jax
import jax.numpy as jnp
from jax.scipy import special


def feature_std(features: jax.Array) -> jax.Array:
  """Standard deviation over the images, averaged over the D features.

  Args:
    features: [B, D], any float type, computed in float32.

  Returns:
    Scalar, at least 0, in the features' own unit. 0: all images look the same.

  Raises:
    ValueError: features is not a matrix.
  """
  return jnp.mean(jnp.std(_matrix(features), axis=0))


def effective_rank(features: jax.Array) -> jax.Array:
  """Exponential of the entropy of the normalised singular values (RankMe).

  A collapsed encoder scores near 1, a healthy one a good part of D. The number
  of images bounds it too, so compare at equal B only.

  Differs: the features are centred first. All images share a large mean, which
    otherwise hides the rest: a random ViT scores 1.7 on Fashion-MNIST and 4.5
    on scenes uncentred, 6 and 37 centred. What rounding leaves of constant
    features counts as zero, and 0 log 0 is 0, where the paper adds 1e-7 to
    every share. An SVD, not the cheaper eigenvalues of the Gram matrix: squared
    in float32, the small singular values drown.

  Args:
    features: [B, D], any float type, computed in float32.

  Returns:
    Scalar in [1, min(B - 1, D)]; 1 where all images have the same features.

  Raises:
    ValueError: features is not a matrix.

  Reference: Garrido et al. 2023, eq. 3, arXiv:2210.02885.
  """
  features = _matrix(features)
  centred = features - jnp.mean(features, axis=0)
  values = jnp.linalg.svd(centred, compute_uv=False)
  rounding = jnp.finfo(jnp.float32).eps * jnp.linalg.norm(features)
  values = jnp.where(values > rounding, values, 0)
  total = jnp.sum(values)
  shares = values / jnp.where(total == 0, 1, total)
  return jnp.exp(jnp.sum(special.entr(shares)))


def mean_cosine(features: jax.Array) -> jax.Array:
  """Mean cosine similarity over all pairs of different images.

  Uses sum_{i != j} u_i . u_j = |sum_i u_i|^2 - sum_i |u_i|^2, so no [B, B].

  Args:
    features: [B, D] with B > 1; any float type, computed in float32.

  Returns:
    Scalar in [-1 / (B - 1), 1]. 1: every image points the same way.

  Raises:
    ValueError: features is not a matrix, or holds a single image.
  """
  features = _matrix(features)
  count = features.shape[0]
  if count < 2:
    raise ValueError(
      f"mean_cosine got {count} image; it compares different images and "
      "needs at least 2: pass a larger batch."
    )
  norms = jnp.linalg.norm(features, axis=1, keepdims=True)
  units = features / jnp.where(norms == 0, 1, norms)
  total = jnp.sum(jnp.square(jnp.sum(units, axis=0)))
  return (total - jnp.sum(jnp.square(units))) / (count * (count - 1))


METRICS = {
  "feature_std": feature_std,
  "effective_rank": effective_rank,
  "mean_cosine": mean_cosine,
}


def collapse_metrics(features: jax.Array) -> dict[str, jax.Array]:
  """All METRICS by name; `features` is [B, D] with B > 1."""
  return {name: metric(features) for name, metric in METRICS.items()}


def collapse_warning(
  metrics: Mapping[str, float],
  thresholds: Mapping[str, float],
) -> str:
  """A sentence for the log when the metrics say collapse, otherwise "".

  Args:
    metrics: any of feature_std, effective_rank and mean_cosine; further keys
      are ignored, so a whole row of the run's metrics will do.
    thresholds: the limits, by the same names: config.collapse. A metric
      without a limit is not judged.

  Returns:
    What is wrong, with value and limit, and what to try; "" when all is well.

  Raises:
    ValueError: a threshold's name is not one of the three metrics.
  """
  unknown = sorted(set(thresholds) - set(METRICS))
  if unknown:
    raise ValueError(
      f"unknown collapse threshold {unknown[0]!r}; known: {', '.join(METRICS)}"
    )
  found = []
  for name, limit in thresholds.items():
    if name not in metrics:
      continue
    value = float(metrics[name])
    words = name.replace("_", " ").replace("std", "standard deviation")
    if not math.isfinite(value):
      found.append(f"{words} is {value}")
    elif name == "mean_cosine" and value > limit:
      found.append(f"{words} between images {value:.5g} is above {limit:g}")
    elif name != "mean_cosine" and value < limit:
      found.append(f"{words} {value:.3g} is below {limit:g}")
  if not found:
    return ""
  return (
    "COLLAPSE: the encoder says (nearly) the same of every image: "
    + "; ".join(found)
    + ". A low loss means nothing now. Try a lower learning rate, a longer "
    "warm-up or a momentum nearer 1, and check masks and input."
  )


def _matrix(features: jax.Array) -> jax.Array:
  """`features` in float32, after checking that it is [B, D]."""
  if features.ndim != 2:
    raise ValueError(
      f"collapse metrics got features of shape {tuple(features.shape)}; they "
      "need [images, features]: average over the patches first."
    )
  return features.astype(jnp.float32)
