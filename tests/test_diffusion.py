"""Diffusion against closed forms, and the U-Net that says the noise."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import models
from jepa_jax.objectives import diffusion

SIGNAL = diffusion.linear_signal(1000)


def test_the_linear_schedule():
  added = 1 - SIGNAL / np.append(1.0, SIGNAL[:-1])
  np.testing.assert_allclose(added[[0, -1]], [1e-4, 0.02], rtol=1e-9)
  np.testing.assert_allclose(np.diff(added), 0.0199 / 999, rtol=1e-6)
  assert SIGNAL[-1] == pytest.approx(4.04e-5, rel=2e-3)  # Ho et al.: about 0
  # Fewer steps end with about as much noise.
  assert 0.3 < np.log(diffusion.linear_signal(50)[-1] / SIGNAL[-1]) / -1 < 3
  with pytest.raises(ValueError, match="of 20 steps"):
    diffusion.linear_signal(20)


def test_noise_of_many_steps_is_noise_of_one():
  # q(x_t | x_0) is the product of the steps' Gaussians, computed one by one.
  added = 1 - SIGNAL / np.append(1.0, SIGNAL[:-1])
  mean, variance = 1.7, 0.0
  for beta in added[:400]:
    mean *= math.sqrt(1 - beta)
    variance = (1 - beta) * variance + beta
  signal = jnp.full(1, SIGNAL[399], jnp.float32)
  one = jnp.ones((1, 2, 3, 1))
  x = diffusion.add_noise(1.7 * one, 0 * one, signal)
  np.testing.assert_allclose(x, mean, rtol=1e-5)
  x = diffusion.add_noise(0 * one, one, signal)
  np.testing.assert_allclose(x, math.sqrt(variance), rtol=1e-5)
  noisy = diffusion.add_noise(1.7 * one, 0.3 * one, signal)
  back = diffusion.remove_noise(noisy, 0.3 * one, signal)
  np.testing.assert_allclose(back, 1.7, rtol=1e-5)


@pytest.mark.parametrize("s, t", [(4, 5), (100, 300), (998, 999)])
def test_the_posterior_is_bayes_rule(s, t):
  # x_s ~ N(sqrt(a_s) x_0, 1 - a_s), x_t | x_s ~ N(sqrt(k) x_s, 1 - k).
  x_0, x_t, kept = 0.8, -1.1, SIGNAL[t] / SIGNAL[s]
  precision = 1 / (1 - SIGNAL[s]) + kept / (1 - kept)
  pull = math.sqrt(SIGNAL[s]) * x_0 / (1 - SIGNAL[s])
  pull += math.sqrt(kept) * x_t / (1 - kept)
  found = diffusion.posterior(
    np.full((1, 3), x_0), np.full((1, 3), x_t), SIGNAL[t : t + 1],
    SIGNAL[s : s + 1],
  )  # fmt: skip
  np.testing.assert_allclose(found[0], pull / precision, rtol=1e-5)
  np.testing.assert_allclose(found[1], 1 / precision, rtol=1e-5)


# Data that are normal: the best guess of the noise is linear, and known.
MEAN = np.array([0.7, -0.4], np.float32)
SPREAD, AXES = (
  np.array([0.75, 0.15], np.float32),
  np.array([[0.8, -0.6], [0.6, 0.8]], np.float32),
)
COVARIANCE = AXES @ np.diag(SPREAD) @ AXES.T


def best(noisy, time):
  signal = jnp.asarray(SIGNAL, jnp.float32)[time[0]]
  away = (noisy - jnp.sqrt(signal) * MEAN) @ AXES
  whole = signal * SPREAD + 1 - signal
  return jnp.sqrt(1 - signal) * (away / whole) @ AXES.T


@pytest.mark.parametrize("steps, eta", [(0, 1.0), (0, 0.0), (150, 0.5)])
def test_samples_of_normal_data_have_its_mean_and_covariance(steps, eta):
  draw = lambda rng: diffusion.sample(
    best, rng, (4000, 2), SIGNAL, steps=steps, eta=eta
  )
  x = np.asarray(jax.jit(draw)(jax.random.key(3)))
  np.testing.assert_allclose(x.mean(axis=0), MEAN, atol=0.04)
  np.testing.assert_allclose(np.cov(x.T), COVARIANCE, atol=0.04)


def test_a_step_of_ancestral_sampling_draws_from_the_posterior():
  # Of a diffusion of two steps, t and s; the second ends in x_0 said of x_s.
  signal, count = SIGNAL[[10, 300]], 20_000
  draw = lambda rng: diffusion.sample(
    lambda noisy, time: 0.25 * noisy, rng, (count, 1), signal, eta=1.0
  )
  rng = jax.random.key(0)
  start = jax.random.normal(jax.random.fold_in(rng, 0), (count, 1))
  image_of = lambda x, i: diffusion.remove_noise(x, 0.25 * x, signal[i : i + 1])
  mean, variance = diffusion.posterior(
    image_of(start, 1), start, signal[1:], signal[:1]
  )
  drawn = draw(rng) / image_of(jnp.ones((1, 1)), 0) - mean
  assert float(drawn.mean()) == pytest.approx(
    0, abs=4 * (variance[0] / count) ** 0.5
  )
  assert float(drawn.var()) == pytest.approx(float(variance[0]), rel=0.05)


def test_an_image_with_a_key_of_its_own_is_the_same_in_any_batch():
  keys = jax.random.split(jax.random.key(1), 3)
  draw = lambda keys: diffusion.sample(
    best, keys, (len(keys), 2), SIGNAL, steps=5, eta=1.0,
    limits=(-1.0, 1.0),
  )  # fmt: skip
  whole, part = draw(keys), draw(keys[1:])
  np.testing.assert_allclose(whole[1:], part, rtol=1e-5)
  assert np.abs(whole).max() <= 1
  with pytest.raises(ValueError, match="got 1001 steps"):
    diffusion.sample(best, keys, (3, 2), SIGNAL, steps=1001)


def parameters(network, side, width):
  init = lambda: network.init(
    jax.random.key(0), jnp.zeros((1, side, side, 3)), jnp.zeros(1),
    jnp.zeros((1, width)), jnp.ones(1, bool),
  )  # fmt: skip
  tree = jax.eval_shape(init)["params"]
  return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))


# Settings of the published networks and their parameters: 422 M and 553 M in
# table 11 of Dhariwal and Nichol 2021, arXiv:2105.05233. Here to the last one.
@pytest.mark.parametrize(
  "side, multipliers, classes, published",
  [
    (128, (1, 1, 2, 3, 4), 1000, 421_529_606),
    pytest.param(
      256, (1, 1, 2, 2, 4, 4), 0, 552_814_086, marks=pytest.mark.slow
    ),
  ],
)
def test_parameters_are_as_many_as_published(
  side, multipliers, classes, published
):
  network = models.UNet(256, multipliers, 2, (32, 16, 8))
  embedding = 4 * 256
  count = parameters(network, side, 1280)
  count -= 1280 * embedding + embedding + embedding  # representation, "unknown"
  count += classes * embedding  # theirs knows classes
  count += 3 * (9 * 256 + 1)  # and says a variance beside the noise
  assert count == published


@pytest.fixture(scope="module")
def small():
  network = models.UNet(8, (1, 2), 1, (4,), num_heads=2, patch_size=3)
  keys = jax.random.split(jax.random.key(0), 2)
  images = jax.random.normal(keys[0], (2, 24, 12, 1))
  level, condition = jnp.array([3, 700]), jax.random.normal(keys[1], (2, 5))
  known = jnp.array([True, False])
  inputs = (images, level, condition, known)
  shapes = jax.eval_shape(network.init, keys[0], *inputs)["params"]
  # What begins small would hide what it lets through.
  params = jax.tree.map(
    lambda x: (0.3 * np.sin(np.arange(math.prod(x.shape)))).reshape(x.shape),
    shapes,
  )
  run = jax.jit(lambda *inputs: network.apply({"params": params}, *inputs))
  return run, inputs


def test_what_the_network_looks_at(small):
  run, (images, level, condition, known) = small
  out = run(images, level, condition, known)
  assert out.shape == images.shape and out.dtype == jnp.float32
  # An unknown condition changes nothing, a known one and the level do.
  other = run(images, level, condition + 1, known)
  np.testing.assert_array_equal(out[1], other[1])
  assert np.abs(out[0] - other[0]).max() > 1e-3
  assert np.abs(out - run(images, level + 90, condition, known)).max() > 1e-4
  # Every pixel sees every other, by attention; images see no other image.
  moved = run(images.at[0, 0, 0].add(5), level, condition, known)
  assert (moved[0] != out[0]).all()
  np.testing.assert_allclose(moved[1], out[1], atol=1e-5)


def test_images_that_cannot_be_halved_are_refused(small):
  run, (_, level, condition, known) = small
  with pytest.raises(ValueError, match="multiples of 6 pixels.*9x12"):
    run(jnp.zeros((2, 9, 12, 1)), level, condition, known)
