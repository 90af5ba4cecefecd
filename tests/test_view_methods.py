"""Methods that compare views, held to their papers' formulas."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_program import config_of, make_batch

from jepa_jax import models, objectives
from jepa_jax.objectives import regularizers

RNG = jax.random.key(3)


def prepared(name):
  """An objective, parameters that are no zeros, and a batch of four."""
  config = config_of(name)
  config.encoder.depth = 1
  objective = objectives.load(name).from_config(config)
  params = jax.jit(objective.init)(jax.random.key(0))
  params = jax.tree.map(
    lambda x: x + 0.1 * jnp.cos(7 * jnp.arange(x.size).reshape(x.shape)), params
  )
  spec = types.SimpleNamespace(batch_spec=objective.batch_spec(4))
  return objective, params, make_batch(spec)


def test_lejepa_is_agreement_and_sigreg_of_every_view():
  objective, params, batch = prepared("lejepa")
  run = jax.jit(lambda p, b: objective.loss(p, {}, b, RNG, {}))
  found = run(params, batch)
  features = []  # of a view after the other, [B, D]
  for name in ("views", "local_views"):
    for view in np.moveaxis(batch[name], 1, 0):
      images = models.normalize_images(view, objective.mean, objective.std)
      apply = jax.jit(objective.encoder.apply)
      features.append(apply({"params": params["encoder"]}, images).mean(1))
  assert len(features) == 3
  np.testing.assert_allclose(found.features, features[0], atol=1e-5)
  layers = jax.tree.map(np.asarray, params["projector"])
  x = np.concatenate(features)
  for i in range(2):
    x = x @ layers[f"dense{i}"]["kernel"] + layers[f"dense{i}"]["bias"]
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    x = np.maximum(x * layers[f"scale{i}"] + layers[f"bias{i}"], 0)
  x = x @ layers["project"]["kernel"] + layers["project"]["bias"]
  x = x.reshape(3, 4, -1)
  centre = (x[0] + x[1]) / 2
  agreement = np.mean([np.square(view - centre).mean() for view in x])
  _, directions = jax.random.split(RNG)
  sigreg = np.mean(
    [regularizers.sigreg(jnp.asarray(view), directions) for view in x]
  )
  np.testing.assert_allclose(
    found.total / found.weight, 0.95 * agreement + 0.05 * sigreg, rtol=1e-4
  )


def test_local_views_of_no_whole_number_of_patches_are_refused():
  config = config_of("lejepa")
  config.method.local_size = 25
  with pytest.raises(ValueError, match="25 is not a multiple of patch size 8"):
    objectives.load("lejepa").from_config(config)
