"""Terms of a loss that keep features from collapsing.

Each is a scalar of a batch's features [B, D], 0 at best, and is added with a
weight. Where a batch comes in microbatches they are of a microbatch.

Axes: B images, D features.
"""

import jax
import jax.numpy as jnp

_VARIANCE_EPSILON = 1e-4  # under the root, whose slope at 0 is infinite
_LARGEST_FREQUENCY = 3.0  # of the characteristic functions compared


def variance(features: jax.Array) -> jax.Array:
  """How far standard deviations fall short of 1: mean over D of max(0, 1 - s).

  Reference: Bardes et al. 2022, eq. 1, arXiv:2105.04906.
  """
  deviation = jnp.sqrt(features.var(axis=0, ddof=1) + _VARIANCE_EPSILON)
  return jnp.maximum(0.0, 1.0 - deviation).mean()


def covariance(features: jax.Array) -> jax.Array:
  """Sum of the squared covariances between different features, over D.

  Reference: Bardes et al. 2022, eq. 3 and 4, arXiv:2105.04906.
  """
  count, width = features.shape
  centred = features - features.mean(axis=0)
  matrix = centred.T @ centred / (count - 1)  # [D, D]
  different = 1.0 - jnp.eye(width)
  return jnp.square(matrix * different).sum() / width


def sigreg(
  features: jax.Array,
  rng: jax.Array,
  *,
  directions: int = 256,
  knots: int = 17,
) -> jax.Array:
  """Distance of the features from a standard normal distribution (SIGReg).

  The features are projected on random directions, and each projection is held
  against a standard normal by the statistic of Epps and Pulley:

      B * integral |mean_b exp(i t x_b) - exp(-t^2 / 2)|^2 exp(-t^2 / 2) dt

  by the trapezoidal rule over |t| <= 3. The mean over the directions is
  returned. Memory is B * directions * knots numbers.

  Args:
    features: [B, D].
    rng: key of the directions; another one every step.
    directions: random unit vectors.
    knots: points of the rule from 0 to 3; negative t add the same.

  Returns:
    Scalar; about 1 for B samples of a standard normal, for any B.

  Reference: Balestriero and LeCun 2025, section 4, arXiv:2511.08544; Epps and
    Pulley 1983, doi:10.1093/biomet/70.3.723.
  """
  axes = jax.random.normal(rng, (features.shape[1], directions))
  axes = axes / jnp.linalg.norm(axes, axis=0)
  projections = features @ axes  # [B, directions]
  t = jnp.linspace(0.0, _LARGEST_FREQUENCY, knots)
  normal = jnp.exp(-jnp.square(t) / 2)
  angles = projections[..., None] * t
  real, imaginary = jnp.cos(angles).mean(axis=0), jnp.sin(angles).mean(axis=0)
  distances = jnp.square(real - normal) + jnp.square(imaginary)
  integral = 2 * jax.scipy.integrate.trapezoid(distances * normal, t)
  return len(features) * integral.mean()
