"""Methods that compare views, held to their papers' formulas."""

import dataclasses
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


def test_ibot_is_two_cross_entropies_with_a_centred_teacher():
  objective, _, batch = prepared("ibot")
  rng = np.random.default_rng(0)
  b, v, t, k = 4, 2, batch["target_ids"].shape[-1], objective.prototypes
  targets = {
    "class": rng.standard_normal((b, v, k)),
    "patches": rng.standard_normal((b, v, t, k)),
    "features": rng.standard_normal((b, v, 28)),
  }
  student = {
    "class": rng.standard_normal((b, 3, k)),
    "patches": rng.standard_normal((b, v, t, k)),
  }
  centres = {name: rng.standard_normal(k) for name in objective.buffers()}
  said = iter(
    [
      (None, student["class"][:, :2], student["patches"]),
      (None, student["class"][:, 2:], None),
    ]
  )

  class Fixed(type(objective)):
    def outputs(self, *args, **how):
      return next(said)

  fields = {
    f.name: getattr(objective, f.name) for f in dataclasses.fields(objective)
  }
  found = Fixed(**fields).loss({}, targets, batch, RNG, centres)

  def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)

  total = 0.0
  valid, means = batch["target_valid"], []
  for i in range(b):
    sharp = softmax((targets["class"][i] - centres["class"]) / 0.04)
    said_of = np.log(softmax(student["class"][i] / 0.1))
    pairs = [(q, s) for q in range(2) for s in range(3) if q != s]
    total += np.mean([-sharp[q] @ said_of[s] for q, s in pairs])
    for j in range(v):
      hidden = valid[i, j]
      logits = targets["patches"][i, j][hidden]
      sharp = softmax((logits - centres["patches"]) / 0.04)
      said_of = np.log(softmax(student["patches"][i, j][hidden] / 0.1))
      total += -(sharp * said_of).sum(axis=1).mean() / v
      means.append(logits.mean(axis=0))
  np.testing.assert_allclose(found.total, total, rtol=1e-4)
  assert float(found.weight) == b
  now = {"patches": np.mean(means, axis=0)}
  now["class"] = targets["class"].mean(axis=(0, 1))
  for name, centre in centres.items():
    expected = 0.9 * centre + 0.1 * now[name]
    np.testing.assert_allclose(found.buffers[name], expected, rtol=1e-4)


def test_ibots_student_does_not_see_what_is_hidden():
  objective, params, batch = prepared("ibot")
  ids, valid = batch["target_ids"], batch["target_valid"]
  changed = dict(batch, views=batch["views"].copy())
  for i, v, t in np.argwhere(valid):
    row, column = divmod(int(ids[i, v, t]), 5)
    cell = np.s_[i, v, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    changed["views"][cell] = 255 - changed["views"][cell]
  targets = jax.jit(lambda b: objective.targets(params, b, {}))(batch)
  run = jax.jit(
    lambda b: objective.loss(params, targets, b, RNG, objective.buffers())
  )
  a, b = run(batch), run(changed)
  np.testing.assert_allclose(a.total, b.total, rtol=1e-5)
  changed["local_views"] = 255 - batch["local_views"]
  assert abs(float(run(changed).total - a.total)) > 1e-4 * float(a.total)


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("masks.num_targets", 3, "num_targets is 3 and method.views 2"),
    ("encoder.class_token", False, "set encoder.class_token=True"),
  ],
)
def test_what_ibot_lacks_is_said(key, value, message):
  config = config_of("ibot")
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    objectives.load("ibot").from_config(config)
