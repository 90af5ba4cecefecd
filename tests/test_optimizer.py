"""Schedules, and what the optimizer does with them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jepa_jax import models
from jepa_jax.training import optimizer


@pytest.fixture
def schedules(config):
  config.total = "50 steps"
  config.optimizer.warmup = "10 steps"
  return optimizer.make_schedules(config)


def test_learning_rate_rises_to_its_peak_and_falls_to_its_end(schedules):
  lr = schedules.lr
  np.testing.assert_allclose(lr[0], 2e-4 + 8e-4 / 10)  # counted from 1
  assert np.argmax(lr) == 9 and lr[9] == pytest.approx(1e-3)
  assert lr[29] == pytest.approx((1e-3 + 1e-6) / 2)  # half of the cosine
  assert lr[-1] == pytest.approx(1e-6)
  assert np.all(np.diff(lr[:10]) > 0) and np.all(np.diff(lr[9:]) < 0)


@pytest.mark.parametrize("shape, middle", [("cosine", 0.22), ("linear", 0.22)])
def test_weight_decay_grows_from_start_to_end(config, shape, middle):
  config.total = "50 steps"
  config.optimizer.weight_decay_shape = shape
  decay = optimizer.make_schedules(config).weight_decay
  assert decay[-1] == pytest.approx(0.4)
  assert decay[24] == pytest.approx(middle)
  quarter = {"cosine": 0.0955, "linear": 0.04 + 0.36 * 13 / 50}[shape]
  assert decay[12] == pytest.approx(quarter, rel=0.05)


def test_momentum_is_linear_and_counts_from_zero(schedules):
  assert schedules.momentum[0] == 0.996
  assert schedules.momentum[25] == pytest.approx(0.998)


def test_lookup_is_the_nearest_float32_and_holds_the_end(schedules):
  for step in (0, 7, 49, 80):
    expected = np.float32(schedules.lr[min(step, 49)])
    assert optimizer.lookup(schedules.lr, jnp.asarray(step)) == expected


def test_biases_and_norms_do_not_decay_though_they_are_stacked():
  encoder = models.Encoder(width=28, depth=3, num_heads=7, patch_size=4)
  params = encoder.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
  decayed = optimizer.decayed(params)
  for path, decays in jax.tree_util.tree_leaves_with_path(decayed):
    assert decays == (path[-1].key == "kernel"), path
  token = {"mask_token": jnp.zeros((1, 1, 24))}
  assert optimizer.decayed(token) == {"mask_token": True}  # as released


def test_update_is_decoupled_adamw(config):
  config.total = "50 steps"
  schedules = optimizer.make_schedules(config)
  tx = optimizer.make_optimizer(config, schedules)
  params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full((3,), 2.0)}
  grads = {"kernel": jnp.full((2, 3), 5.0), "bias": jnp.full((3,), -5.0)}
  updates, _ = tx.update(grads, tx.init(params), params)
  # The first Adam step has length 1, whatever the gradient's size.
  lr, decay = schedules.lr[0], schedules.weight_decay[0]
  np.testing.assert_allclose(
    updates["kernel"], -lr * (1.0 + decay * 2.0), rtol=1e-5
  )
  np.testing.assert_allclose(updates["bias"], lr, rtol=1e-5)


def test_the_first_moment_alone_takes_its_type(config):
  config.optimizer.mu_dtype = "bfloat16"
  tx = optimizer.make_optimizer(config, optimizer.make_schedules(config))
  params = {"kernel": jnp.ones((2, 3))}
  updates, state = tx.update(params, tx.init(params), params)
  moments = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
  assert [m["kernel"].dtype for m in moments] == [jnp.bfloat16, jnp.float32]
  assert updates["kernel"].dtype == jnp.float32


def test_clipping_bounds_the_gradient(config):
  config.optimizer.clip_norm = 1.0
  config.optimizer.eps = 1e3  # makes Adam's step follow the gradient's size
  tx = optimizer.make_optimizer(config, optimizer.make_schedules(config))
  params = {"bias": jnp.zeros(4)}
  step = lambda g: tx.update({"bias": g}, tx.init(params), params)[0]["bias"]
  np.testing.assert_allclose(
    step(jnp.full(4, 50.0)), step(jnp.full(4, 0.5)), rtol=1e-4
  )


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("total", "0 steps", "at least one"),
    ("total", "2 steps", "shorter"),
    ("total", "many", "a number and a unit"),
    ("total", "3 weeks", "a number and a unit"),
  ],
)
def test_bad_durations_are_named(config, key, value, message):
  config[key] = value
  with pytest.raises(ValueError, match=message):
    optimizer.make_schedules(config)


def test_epochs_need_a_size(config):
  config.total = "3 epochs"
  config.data.num_examples = 0
  with pytest.raises(ValueError, match="num_examples"):
    optimizer.make_schedules(config)
  config.data.num_examples = 24
  assert len(optimizer.make_schedules(config).lr) == 18
