"""The train step: a contract that every objective keeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import objectives
from jepa_jax.objectives import ijepa
from jepa_jax.training import program as program_lib
from jepa_jax.training import sharding


def build(config):
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  return program_lib.build(config, mesh)


def make_batch(program, seed=0):
  """A random batch as the program declares it; every block is padded."""
  rng = np.random.default_rng(seed)
  batch = {}
  patches = 25
  for name, spec in program.batch_spec.items():
    if spec.dtype == jnp.uint8:
      batch[name] = rng.integers(0, 256, spec.shape, dtype=np.uint8)
    elif spec.dtype == jnp.bool_:
      batch[name] = np.arange(spec.shape[-1]) < rng.integers(
        2, spec.shape[-1] + 1, (*spec.shape[:-1], 1)
      )
    else:
      order = rng.permuted(
        np.tile(np.arange(patches), (*spec.shape[:-1], 1)), axis=-1
      )
      batch[name] = order[..., : spec.shape[-1]].astype(np.int32)
  return batch


@pytest.fixture(params=sorted(objectives.OBJECTIVES))
def objective_config(request, config):
  config.objective = request.param
  return config


def test_step_moves_parameters_and_counts(objective_config):
  program = build(objective_config)
  state = program.init(0)
  before = jax.tree.map(np.asarray, state)
  state, metrics, features = program.step(state, make_batch(program))
  assert int(state.step) == 1
  assert features.shape == (4, 28)
  assert all(np.isfinite(float(x)) for x in metrics.values())
  moved = jax.tree.map(
    lambda a, b: float(np.abs(a - np.asarray(b)).max()),
    before.params,
    state.params,
  )
  assert all(x > 0 for x in jax.tree.leaves(moved)), moved
  # After one step the first moment is 1 - b1 times the gradient.
  first_moment = state.opt_state[0].mu
  share = 1 - objective_config.optimizer.b1
  for name, part in {"": first_moment, **first_moment}.items():
    squares = sum(
      np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(part)
    )
    logged = metrics[f"grad_norm/{name}".removesuffix("/")]
    assert float(logged) == pytest.approx(np.sqrt(squares) / share, rel=1e-5)


def test_step_compiles_once(objective_config):
  program = build(objective_config)
  state = program.init(0)
  for seed in range(3):
    state, _, _ = program.step(state, make_batch(program, seed))
  assert program.step._cache_size() == 1


def test_state_spec_is_what_init_gives(objective_config):
  program = build(objective_config)
  state = program.init(0)
  assert jax.tree.structure(state) == jax.tree.structure(program.state_spec)
  for leaf, spec in zip(
    jax.tree.leaves(state), jax.tree.leaves(program.state_spec)
  ):
    assert leaf.shape == spec.shape and leaf.dtype == spec.dtype
    assert leaf.sharding.is_equivalent_to(spec.sharding, leaf.ndim)


def test_seed_decides_the_parameters(objective_config):
  program = build(objective_config)
  a, b, c = (jax.tree.leaves(program.init(s).params) for s in (0, 0, 1))
  assert all(np.array_equal(x, y) for x, y in zip(a, b))
  assert not all(np.array_equal(x, y) for x, y in zip(a, c))


def test_target_is_the_moving_average(objective_config):
  program = build(objective_config)
  state = program.init(0)
  old = jax.tree.map(np.asarray, state.target_params)
  for step in range(2):
    state, metrics, _ = program.step(state, make_batch(program, step))
    momentum = program.schedules.momentum[step]
    assert float(metrics["momentum"]) == pytest.approx(momentum)
    old = jax.tree.map(
      lambda t, p, m=momentum: m * t + (1 - m) * np.asarray(p),
      old,
      program.objective.tracked(state.params),
    )
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(state.target_params)):
      np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
  "slices, side_by_side", [(2, 1), (4, 1), (1, 2), (2, 2)]
)
def test_slices_give_the_gradient_of_the_whole(
  objective_config, slices, side_by_side
):
  # The batch's images have unequal numbers of targets: a mean of means would
  # not do.
  whole = build(objective_config)
  objective_config.accumulate_steps = slices
  objective_config.compute.parts = side_by_side
  parts = build(objective_config)
  batch = make_batch(whole)
  a, metrics_a, features_a = whole.step(whole.init(0), batch)
  b, metrics_b, features_b = parts.step(parts.init(0), batch)
  assert float(metrics_a["loss"]) == pytest.approx(
    float(metrics_b["loss"]), rel=1e-5
  )
  assert float(metrics_a["grad_norm"]) == pytest.approx(
    float(metrics_b["grad_norm"]), rel=1e-4
  )
  np.testing.assert_allclose(features_a, features_b, atol=1e-5)
  first_moment = lambda s: jax.tree.leaves(s.opt_state)
  for x, y in zip(first_moment(a), first_moment(b)):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-7)


def test_training_on_one_batch_learns_it(objective_config):
  objective_config.total = "60 steps"
  program = build(objective_config)
  state, batch = program.init(0), make_batch(program)
  losses = []
  for _ in range(40):
    state, metrics, _ = program.step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.6 * losses[0]


def test_a_mesh_that_does_not_divide_the_batch_is_refused(config):
  class Mesh:
    size = 3

  with pytest.raises(ValueError, match="nearest batch sizes: 3, 6"):
    program_lib.build(config, Mesh())


def test_a_mesh_that_does_not_fit_the_devices_is_refused(config):
  config.mesh.fsdp = 3
  with pytest.raises(ValueError, match="does not fit 2 devices"):
    sharding.make_mesh(config.mesh, [None, None])


# What I-JEPA alone promises.


def losses_by_hand(objective, params, batch):
  """The definition, image by image, without padding."""
  images = ijepa.normalize_images(batch["image"], objective.mean, objective.std)
  total, count = 0.0, 0
  for i in range(len(images)):
    image = images[i : i + 1]
    features = objective.encoder.apply({"params": params["encoder"]}, image)
    mean = features.mean(-1, keepdims=True)
    std = jnp.sqrt(features.var(-1, keepdims=True) + 1e-5)
    targets = ((features - mean) / std)[0]
    ids = batch["context_ids"][i, 0][batch["context_valid"][i, 0]][None, None]
    context = objective.encoder.apply({"params": params["encoder"]}, image, ids)
    for m in range(batch["target_ids"].shape[1]):
      wanted = batch["target_ids"][i, m][batch["target_valid"][i, m]]
      predicted = objective.predictor.apply(
        {"params": params["predictor"]},
        context,
        ids,
        wanted[None, None],
        (5, 5),
      )[0, 0, 0]
      error = np.abs(np.asarray(predicted - targets[wanted]))
      error = np.where(error < 1, 0.5 * error**2, error - 0.5)
      total += error.sum()
      count += error.size
  return total / count


def test_loss_is_the_definition_without_padding(config):
  program = build(config)
  state = program.init(0)
  keys = iter(jax.random.split(jax.random.key(9), 200))
  params = jax.tree.map(
    lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), state.params
  )
  batch = make_batch(program)
  loss = program.objective.loss(
    params, {"encoder": params["encoder"]}, batch, jax.random.key(0)
  )
  expected = losses_by_hand(program.objective, params, batch)
  assert float(loss.total / loss.weight) == pytest.approx(expected, rel=1e-4)


def test_no_gradient_reaches_the_target_encoder(config):
  program = build(config)
  state = program.init(0)
  batch = make_batch(program)

  def total(target_params):
    return program.objective.loss(
      state.params, target_params, batch, jax.random.key(0)
    ).total

  grads = jax.grad(total)(state.target_params)
  assert all(not np.any(g) for g in jax.tree.leaves(grads))


def test_on_a_cpu_the_context_waits_for_the_targets(config):
  program = build(config)
  text = program.step.lower(program.state_spec, program.batch_spec)
  text = text.compile().as_text()
  # What it waits for: whether a target's feature is above infinity.
  assert "constant(inf)" in text and "direction=GT" in text


def test_l2_is_the_squared_error():
  x = jnp.asarray([-3.0, 0.5, 0.0, 1.0])
  np.testing.assert_allclose(
    ijepa.elementwise_loss(x, "l2"), [9.0, 0.25, 0.0, 1.0]
  )
  np.testing.assert_allclose(
    ijepa.elementwise_loss(x, "smooth_l1"), [2.5, 0.125, 0.0, 0.5]
  )


def test_images_are_normalised_once():
  images = np.asarray([[[[0, 255]]]], np.uint8)
  out = ijepa.normalize_images(jnp.asarray(images), (0.5, 0.2), (0.25, 0.4))
  np.testing.assert_allclose(out[0, 0, 0], [-2.0, 2.0], atol=1e-6)
  np.testing.assert_array_equal(ijepa.normalize_images(out, (9,), (9,)), out)


def test_unknown_objectives_are_named():
  with pytest.raises(ValueError, match="known: ijepa"):
    objectives.load("ijepa2")
  with pytest.raises(ValueError, match="cannot be imported"):
    objectives.load("jepa_jax.objectives.ijepa:Nothing")
  assert objectives.load("jepa_jax.objectives.ijepa:IJEPA") is ijepa.IJEPA
