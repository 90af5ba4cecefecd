"""Terms against collapse, held to closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

from jepa_jax.objectives import regularizers


def test_variance_is_the_shortfall_of_the_deviation():
  x = np.random.default_rng(0).standard_normal((400, 3))
  x = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
  features = jnp.asarray(x * [0.25, 0.5, 3.0])
  np.testing.assert_allclose(
    regularizers.variance(features), (0.75 + 0.5 + 0) / 3, atol=2e-4
  )
  # Of constant features the slope is finite.
  slope = jax.grad(regularizers.variance)(jnp.ones((7, 3)))
  assert np.isfinite(slope).all()


def test_covariance_is_that_of_numpy_off_the_diagonal():
  x = np.random.default_rng(1).standard_normal((9, 4)) @ np.triu(
    np.ones((4, 4))
  )
  matrix = np.cov(x.T)
  expected = (np.square(matrix).sum() - np.square(np.diag(matrix)).sum()) / 4
  np.testing.assert_allclose(
    regularizers.covariance(jnp.asarray(x)), expected, rtol=1e-5
  )


def _epps_pulley(x, limit):
  """The statistic by adaptive quadrature."""

  def integrand(t):
    difference = np.exp(1j * t * x).mean() - np.exp(-(t**2) / 2)
    return np.abs(difference) ** 2 * np.exp(-(t**2) / 2)

  return len(x) * integrate.quad(integrand, -limit, limit)[0]


@pytest.mark.parametrize("shift, scale", [(0, 1), (0.7, 1), (0, 0.2), (0, 2.5)])
def test_sigreg_of_one_feature_is_epps_pulley(shift, scale):
  x = np.random.default_rng(2).standard_normal(60) * scale + shift
  # In one dimension a direction is 1 or -1, which changes nothing.
  ours = regularizers.sigreg(
    jnp.asarray(x)[:, None], jax.random.key(0), directions=3
  )
  np.testing.assert_allclose(ours, _epps_pulley(x, 3), rtol=3e-3)
  # What lies beyond |t| = 3 weighs next to nothing.
  np.testing.assert_allclose(ours, _epps_pulley(x, 12), rtol=0.05)


def test_sigreg_falls_to_that_of_a_normal_sample():
  """Descent on it makes standard normal features of any others."""
  rng = np.random.default_rng(3)
  normal = [
    float(
      regularizers.sigreg(
        jnp.asarray(rng.standard_normal((n, 5)), jnp.float32), jax.random.key(n)
      )
    )
    for n in (50, 500)
  ]
  x = jnp.asarray(0.1 * rng.standard_normal((100, 5)) ** 3 + 1, jnp.float32)
  start = regularizers.sigreg(x, jax.random.key(0))
  slope = jax.jit(jax.grad(regularizers.sigreg))
  for step in range(200):
    x -= 2.0 * slope(x, jax.random.key(step))
  end = regularizers.sigreg(x, jax.random.key(0))
  assert end < max(normal) < 1.5 < 10 < start
  np.testing.assert_allclose(x.mean(axis=0), 0, atol=0.1)
  np.testing.assert_allclose(np.cov(x.T), np.eye(5), atol=0.25)
