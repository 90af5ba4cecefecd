"""The train step: a contract that every objective keeps."""

import functools

from conftest import build, small_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import config as config_lib
from jepa_jax import models, objectives
from jepa_jax.objectives import ijepa
from jepa_jax.training import program as program_lib
from jepa_jax.training import sharding

OUTSIDE = "outside_objective:Outside"
OBJECTIVES = [*sorted(objectives.OBJECTIVES), OUTSIDE]


def make_batch(program, seed=0):
  """A random batch as the program declares it; every block is padded."""
  rng = np.random.default_rng(seed)
  batch = {}
  patches = 25
  for name, spec in program.batch_spec.items():
    if spec.dtype == jnp.uint8:
      # Ramps, of which a patch tells the next; noise tells nothing of itself.
      *lead, h, w, c = spec.shape  # images or views of them
      slopes = rng.uniform(-2, 2, (2, *lead, 1, 1, c))
      rows, columns, _ = np.mgrid[:h, :w, :1] - h // 2
      ramps = 128 + slopes[0] * rows + slopes[1] * columns
      batch[name] = ramps.astype(np.uint8)
    elif spec.dtype == jnp.bool_:
      batch[name] = np.arange(spec.shape[-1]) < rng.integers(
        2, spec.shape[-1] + 1, (*spec.shape[:-1], 1)
      )
    elif len(spec.shape) == 1:
      batch[name] = rng.integers(0, 9, spec.shape, dtype=np.int32)
    else:
      order = rng.permuted(
        np.tile(np.arange(patches), (*spec.shape[:-1], 1)), axis=-1
      )
      batch[name] = order[..., : spec.shape[-1]].astype(np.int32)
  return batch


# What an objective's test sets beside its defaults.
CHANGES = {
  "supervised": {"method.classes": 9, "encoder.depth": 5},
  "mae": {"encoder.class_token": True},
  "data2vec": {"method.layers": 2, "encoder.registers": 2},
  "cae": {
    "masks.num_targets": 1,
    "method.tokens": 13,
    "method.decoder_depth": 1,
    "predictor.depth": 2,
  },
  "ibot": {
    "masks.num_targets": 2,
    "encoder.class_token": True,
    "encoder.registers": 1,
    "method.local_views": 1,
    "method.local_size": 24,
    "method.hidden": 20,
    "method.bottleneck": 12,
    "method.prototypes": 15,
  },
  "lejepa": {
    "method.local_views": 1,
    "method.local_size": 24,
    "method.hidden": 20,
    "method.outputs": 12,
  },
  "decoder": {
    "method.image_size": 20,
    "method.channels": 12,
    "method.multipliers": (1, 2),
    "method.blocks": 1,
    "method.attention": (5,),
    "method.num_heads": 3,
    "method.patch_size": 2,
    "method.drop": 0.5,
  },
}


def config_of(name):
  config = small_config()
  config.objective = name
  if name != "ijepa":  # whose depth other tests share
    config.encoder.depth = 3
  config_lib.fill_method(config)
  config.update_from_flattened_dict(CHANGES.get(name, {}))
  config.total = "60 steps"
  return config


# The contract that every objective keeps; one compilation serves all of it.


# A compilation of each is dear: CI tries all of them.
FEW = ("ijepa", "pixel_ijepa", "mae", OUTSIDE)
CONTRACT = [
  name if name in FEW else pytest.param(name, marks=pytest.mark.slow)
  for name in OBJECTIVES
]


@pytest.fixture(scope="module", params=CONTRACT)
def program(request):
  return build(config_of(request.param))


def test_step_moves_parameters_and_counts(program):
  state = program.init(0)
  before = jax.tree.map(np.asarray, state)
  state, metrics, features = program.step(state, make_batch(program))
  assert int(state.step) == 1
  assert features.shape == (4, 28)
  assert all(np.isfinite(float(x)) for x in metrics.values())
  scale = program.objective.learning_rate_scale(before.params)
  if scale is None:
    scale = jax.tree.map(lambda x: 1.0, before.params)
  moved = jax.tree.map(
    lambda a, b, s: (np.abs(a - np.asarray(b)).max() > 0) == (s > 0),
    before.params,
    state.params,
    scale,
  )
  assert all(jax.tree.leaves(moved)), moved
  # After one step the first moment is 1 - b1 times the gradient.
  first_moment = state.opt_state[0].mu
  share = 1 - program.config.optimizer.b1
  for name, part in {"": first_moment, **first_moment}.items():
    squares = sum(
      np.square(np.asarray(x, np.float64)).sum() for x in jax.tree.leaves(part)
    )
    logged = metrics[f"grad_norm/{name}".removesuffix("/")]
    assert float(logged) == pytest.approx(np.sqrt(squares) / share, rel=1e-5)


def test_step_compiles_once(program):
  state = program.init(0)
  for seed in range(3):
    state, _, _ = program.step(state, make_batch(program, seed))
  assert program.step._cache_size() == 1


def test_state_spec_is_what_init_gives(program):
  state = program.init(0)
  assert jax.tree.structure(state) == jax.tree.structure(program.state_spec)
  for leaf, spec in zip(
    jax.tree.leaves(state), jax.tree.leaves(program.state_spec)
  ):
    assert leaf.shape == spec.shape and leaf.dtype == spec.dtype
    assert leaf.sharding.is_equivalent_to(spec.sharding, leaf.ndim)


def test_seed_decides_the_parameters(program):
  a, b, c = (jax.tree.leaves(program.init(s).params) for s in (0, 0, 1))
  assert all(np.array_equal(x, y) for x, y in zip(a, b))
  assert not all(np.array_equal(x, y) for x, y in zip(a, c))


def test_target_is_the_moving_average(program):
  state = program.init(0)
  old = jax.tree.map(np.asarray, state.target_params)
  for step in range(2):
    state, metrics, _ = program.step(state, make_batch(program, step))
    # Where nothing is averaged there is no momentum to log.
    assert ("momentum" in metrics) == bool(old)
    momentum = program.schedules.momentum[step]
    assert float(metrics.get("momentum", momentum)) == pytest.approx(momentum)
    old = jax.tree.map(
      lambda t, p, m=momentum: m * t + (1 - m) * np.asarray(p),
      old,
      program.objective.averaged(state.params),
    )
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(state.target_params)):
      np.testing.assert_allclose(a, b, atol=1e-6)


def test_networks_are_where_the_contract_says(program):
  objective, state = program.objective, program.init(0)
  assert {*state.params} | {*state.frozen} == {*objective.networks}
  assert not {*state.params} & {*state.frozen}
  moments = state.opt_state[0].mu
  assert {*moments} == {*state.params}
  for name in objective.networks:
    assert state.network(name) is (
      state.target_params.get(name)
      or state.params.get(name)
      or state.frozen[name]
    )
  with pytest.raises(ValueError, match='no network "speech"'):
    state.network("speech")


def test_operations_are_stated_by_the_objectives_of_the_package(program):
  flops = program.objective.flops()
  if program.config.objective == OUTSIDE:
    assert flops is None
    return
  compiled = program.step.lower(program.state_spec, program.batch_spec)
  counted = compiled.compile().cost_analysis()["flops"] / 4
  # XLA counts norms, activations and the optimizer too.
  assert flops < counted < 1.35 * flops


def test_microbatches_give_the_gradient_of_the_whole(program):
  # The batch's images have unequal numbers of targets: a mean of means would
  # not do.
  config = config_of(program.config.objective)
  config.accumulate_steps = 2
  if program.objective.whole_batch:
    with pytest.raises(ValueError, match="statistic of the whole batch"):
      build(config)
    return
  parts = build(config)
  batch = make_batch(program)
  a, metrics_a, features_a = program.step(program.init(0), batch)
  b, metrics_b, features_b = parts.step(parts.init(0), batch)
  assert float(metrics_a["loss"]) == pytest.approx(
    float(metrics_b["loss"]), rel=1e-5
  )
  assert float(metrics_a["grad_norm"]) == pytest.approx(
    float(metrics_b["grad_norm"]), rel=1e-4
  )
  np.testing.assert_allclose(features_a, features_b, atol=1e-5)
  for x, y in zip(
    jax.tree.leaves((a.opt_state, a.buffers)),
    jax.tree.leaves((b.opt_state, b.buffers)),
  ):
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-7)


def test_training_on_one_batch_learns_it(program):
  state, batch = program.init(0), make_batch(program)
  losses = []
  for _ in range(55):
    state, metrics, _ = program.step(state, batch)
    losses.append(float(metrics["loss"]))
  if state.buffers:  # of which the targets have become others
    untrained = state.replace(params=program.init(0).params)
    losses[0] = float(program.step(untrained, batch)[1]["loss"])
  assert losses[-1] < 0.7 * losses[0]


def test_frozen_networks_stay_and_buffers_go_on():
  program = build(config_of(OUTSIDE))
  state = program.init(0)
  teacher = jax.tree.map(np.asarray, state.frozen)
  batch = make_batch(program)
  (_, features) = program.objective.targets(state.frozen, batch, state.buffers)
  expected = 0.1 * np.asarray(features).mean(axis=0)
  state, _, _ = program.step(state, batch)
  jax.tree.map(np.testing.assert_array_equal, teacher, state.frozen)
  np.testing.assert_allclose(state.buffers["centre"], expected, rtol=1e-4)


def test_learning_rates_are_scaled_by_pattern(config):
  config.optimizer.lr_scale = (("encoder/norm", 0.0), ("encoder", 0.5))
  slow, fast = build(config), build(small_config())
  batch = make_batch(fast)
  start = jax.tree.map(np.asarray, fast.init(0).params)
  ends = [p.step(p.init(0), batch)[0].params for p in (slow, fast)]
  change = lambda end, *path: np.asarray(functools.reduce(
    lambda tree, key: tree[key], path, jax.tree.map(np.subtract, end, start)
  ))  # fmt: skip
  assert not change(ends[0], "encoder", "norm", "scale").any()
  for path, factor in (
    (("encoder", "patch_embed", "kernel"), 0.5),
    (("predictor", "project", "kernel"), 1.0),
  ):
    a, b = (change(end, *path) for end in ends)
    np.testing.assert_allclose(a, factor * b, atol=1e-7)
    assert b.any()


def test_a_pattern_that_decides_nothing_is_named(config):
  config.optimizer.lr_scale = (("encodr", 0.1),)
  with pytest.raises(ValueError, match='"encodr", which decides for no'):
    build(config)


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
  encode, predict = (  # compiled whole, not operation by operation
    jax.jit(network.apply, static_argnums=4 if name == "predictor" else ())
    for name, network in objective.networks.items()
  )
  images = models.normalize_images(
    batch["image"], objective.mean, objective.std
  )
  total, count = 0.0, 0
  for i in range(len(images)):
    image = images[i : i + 1]
    features = encode({"params": params["encoder"]}, image)
    mean = features.mean(-1, keepdims=True)
    std = jnp.sqrt(features.var(-1, keepdims=True) + 1e-5)
    targets = ((features - mean) / std)[0]
    ids = batch["context_ids"][i, 0][batch["context_valid"][i, 0]][None, None]
    context = encode({"params": params["encoder"]}, image, ids)
    for m in range(batch["target_ids"].shape[1]):
      wanted = batch["target_ids"][i, m][batch["target_valid"][i, m]]
      predicted = predict(
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
  config.encoder.depth = 2
  program = build(config)
  state = program.init(0)
  keys = iter(jax.random.split(jax.random.key(9), 200))
  params = jax.tree.map(
    lambda x: x + 0.2 * jax.random.normal(next(keys), x.shape), state.params
  )
  batch = {name: x[:2] for name, x in make_batch(program).items()}
  for name in ("target_ids", "target_valid"):
    batch[name] = batch[name][:, :2]  # each block has a size to compile for
  objective = program.objective
  targets = jax.jit(objective.targets)(params, batch, {})
  loss = jax.jit(objective.loss)(params, targets, batch, jax.random.key(0), {})
  expected = losses_by_hand(program.objective, params, batch)
  assert float(loss.total / loss.weight) == pytest.approx(expected, rel=1e-4)


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
  out = models.normalize_images(jnp.asarray(images), (0.5, 0.2), (0.25, 0.4))
  np.testing.assert_allclose(out[0, 0, 0], [-2.0, 2.0], atol=1e-6)
  np.testing.assert_array_equal(models.normalize_images(out, (9,), (9,)), out)


def test_unknown_objectives_are_named():
  with pytest.raises(ValueError, match="known: ijepa, pixel_ijepa"):
    objectives.load("ijepa2")
  with pytest.raises(ValueError, match="cannot be imported"):
    objectives.load("jepa_jax.objectives.ijepa:Nothing")
  with pytest.raises(ValueError, match="no subclass of Objective"):
    objectives.load("jepa_jax.objectives.ijepa:normalize_targets")
  with pytest.raises(ValueError, match="lacks from_config, batch_spec, init, "):
    objectives.load("jepa_jax.objectives:Objective")
  assert objectives.load("jepa_jax.objectives.ijepa:IJEPA") is ijepa.IJEPA
