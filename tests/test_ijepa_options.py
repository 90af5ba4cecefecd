"""What may be added to I-JEPA, each held to its definition."""

from conftest import small_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_program import config_of, make_batch

from jepa_jax import config as config_lib
from jepa_jax import models, objectives
from jepa_jax.objectives import ijepa, regularizers


class Spec:
  """What make_batch reads of a program, without one."""

  def __init__(self, objective):
    self.batch_spec = objective.batch_spec(6)


def of(**method):
  config = small_config()
  config.encoder.depth = 3
  config.method.update(method)
  return objectives.load("ijepa").from_config(config)


@pytest.fixture(scope="module")
def plain():
  """The objective with its defaults, parameters, a batch and its loss."""
  objective = of()
  params = jax.jit(objective.init)(jax.random.key(0))
  params = jax.tree.map(
    lambda x: x + 0.1 * jnp.cos(7 * jnp.arange(x.size).reshape(x.shape)), params
  )
  batch = jax.tree.map(jnp.asarray, make_batch(Spec(objective)))
  return objective, params, batch, loss(objective, params, batch)


def loss(objective, params, batch):
  def run(params, batch):
    targets = objective.targets(params, batch, {})
    return targets, objective.loss(params, targets, batch, RNG, {})

  return jax.jit(run)(params, batch)


RNG = jax.random.key(3)


def pooled_by_hand(objective, params, batch):
  images = models.normalize_images(
    batch["image"], objective.mean, objective.std
  )
  ids, valid = batch["context_ids"], batch["context_valid"]
  features = objective.encoder.apply(
    {"params": params["encoder"]}, images, ids, valid
  )
  return jnp.stack([f[v].mean(axis=0) for f, v in zip(features, valid)])


def test_terms_are_added_with_their_weights(plain):
  objective, params, batch, (_, base) = plain
  x = pooled_by_hand(objective, params, batch)
  directions = jax.random.fold_in(RNG, 1)
  weights = dict(variance=2.0, covariance=3.0, sigreg=0.5)
  terms = dict(
    variance=regularizers.variance(x),
    covariance=regularizers.covariance(x),
    sigreg=regularizers.sigreg(x, directions),
  )
  _, found = loss(of(**weights), params, batch)
  for name, term in terms.items():
    np.testing.assert_allclose(found.metrics[name], term, rtol=1e-4)
    assert term > 1e-3
  expected = sum(weights[k] * terms[k] for k in weights)
  np.testing.assert_allclose(
    found.total / found.weight - base.total / base.weight, expected, rtol=1e-4
  )
  assert not {*weights} & {*base.metrics}


def test_pixels_may_be_targets_as_they_are():
  config = config_of("pixel_ijepa")
  config.method.target_norm = "none"
  config.encoder.depth = config.predictor.depth = 1
  objective = objectives.load("pixel_ijepa").from_config(config)
  params = jax.jit(objective.init)(jax.random.key(0))
  batch = jax.tree.map(jnp.asarray, make_batch(Spec(objective)))
  none = jax.tree.map(jnp.zeros_like, params["predictor"]["project"])
  params["predictor"]["project"] = none  # all predictions are 0
  targets, found = loss(objective, params, batch)
  goal = jnp.where(batch["target_valid"][..., None], targets, 0.0)
  expected = ijepa.elementwise_loss(goal, objective.loss_name).sum()
  np.testing.assert_allclose(found.total, expected, rtol=1e-4)


def whole_images(objective, params, batch, **how):
  images = models.normalize_images(
    batch["image"], objective.mean, objective.std
  )
  return objective.encoder.apply({"params": params["encoder"]}, images, **how)


def test_targets_by_position_say_what_is_special_there(plain):
  objective, params, batch, _ = plain
  features = np.asarray(whole_images(objective, params, batch))  # [B, N, D]
  expected = (features - features.mean(0)) / np.sqrt(features.var(0) + 1e-5)
  ids = batch["target_ids"]
  expected = np.stack([f[i] for f, i in zip(expected, ids)])
  targets, found = loss(of(target_norm="position"), params, batch)
  np.testing.assert_allclose(targets, expected, atol=2e-3)
  # They cannot collapse, so that something else is watched.
  pooled = pooled_by_hand(objective, params, batch)
  np.testing.assert_allclose(found.features, pooled, atol=1e-4)


def test_a_target_encoder_may_see_each_block_alone(plain):
  """Other pixels change the targets of whole images, and no others."""
  objective, params, batch, _ = plain
  alone = of(target_sees="block")
  whole = objective.targets(params, batch, {})
  found = alone.targets(params, batch, {})
  assert found.shape == whole.shape
  images = models.normalize_images(batch["image"], alone.mean, alone.std)
  ids, valid = batch["target_ids"][1, 2], batch["target_valid"][1, 2]
  ids = ids[valid]
  expected = alone.encoder.apply(
    {"params": params["encoder"]}, images[1:2], ids[None]
  )[0]
  np.testing.assert_allclose(found[1, 2][valid], expected, atol=2e-5)
  seen = jnp.zeros(images.shape[1:3], bool)
  size = alone.encoder.patch_size
  for i in ids.tolist():
    row, column = divmod(i, alone.grid[1])
    rows = slice(row * size, (row + 1) * size)
    seen = seen.at[rows, column * size : (column + 1) * size].set(True)
  other = (
    batch["image"]
    .at[1]
    .set(jnp.where(seen[..., None], batch["image"][1], 255 - batch["image"][1]))
  )
  changed = {**batch, "image": other}
  again = alone.targets(params, changed, {})[1, 2][valid]
  np.testing.assert_allclose(again, found[1, 2][valid], atol=2e-5)
  again = objective.targets(params, changed, {})[1, 2][valid]
  assert np.abs(again - whole[1, 2][valid]).max() > 1e-3
  assert alone.flops() != objective.flops()
  with pytest.raises(ValueError, match='"position" needs .*"block"'):
    of(target_sees="block", target_norm="position")


def test_the_last_blocks_are_averaged_and_normalised_or_not(plain):
  objective, params, batch, (targets, base) = plain
  features = whole_images(objective, params, batch, layers=2)
  halves = jnp.split(features, 2, axis=-1)
  mean = sum(map(ijepa.normalize_targets, halves)) / 2
  expected = models.gather_patches(mean, batch["target_ids"])
  averaged, _ = loss(of(target_layers=2), params, batch)
  np.testing.assert_allclose(averaged, expected, atol=1e-4)
  # Without a norm the loss is that of features as they are.
  unchanged, found = loss(of(target_norm="none"), params, batch)
  np.testing.assert_array_equal(unchanged, targets)
  given = of().loss
  same, _ = jax.jit(
    lambda t: (
      of(target_norm="none").loss(params, t, batch, RNG, {}).total,
      given(params, t, batch, RNG, {}).total,
    )
  )(ijepa.normalize_targets(targets))
  np.testing.assert_allclose(same, base.total, rtol=1e-4)
  assert abs(float(found.total - base.total)) > 1e-2 * float(base.total)


@pytest.mark.parametrize("objective", ["ijepa", "data2vec"])
def test_more_blocks_than_there_are_cannot_be_averaged(objective):
  config = config_lib.defaults(objective)
  name = "target_layers" if objective == "ijepa" else "layers"
  config.method[name] = 33
  with pytest.raises(ValueError, match=f"method.{name} is 33 and.*depth 32"):
    objectives.load(objective).from_config(config)


def test_a_targets_noise_goes_the_way_of_the_contexts_features(plain):
  objective, params, batch, (targets, base) = plain
  params = params["predictor"]
  features = jnp.ones((1, 1, 2, 28))
  ids = jnp.asarray([[[3, 7]]]), jnp.asarray([[[11]]])
  run = jax.jit(
    lambda p, noise: objective.predictor.apply(
      {"params": p}, features, *ids, (5, 5), target_noise=noise
    )
  )
  noise = jax.random.normal(RNG, (1, 1, 1, 28))
  embed = params["embed"]
  moved = noise[0, 0] @ embed["kernel"] + embed["bias"]
  as_token = params | {"mask_token": params["mask_token"] + moved}
  found = run(params, noise)
  np.testing.assert_allclose(found, run(as_token, None), atol=1e-4)
  assert np.abs(found - run(params, None)).max() > 1e-3
  drawn = of(position_noise=0.25).noise(RNG, (40, 50))
  assert drawn.shape == (40, 50, 28)
  np.testing.assert_allclose([drawn.mean(), drawn.std()], [0, 0.25], atol=5e-3)
  assert objective.noise(RNG, (4, 5)) is None


def test_a_share_of_contexts_is_grey(plain):
  objective, _, batch, _ = plain
  images = jnp.tile(batch["image"], (20, 1, 1, 1))
  colour = objective.context_images(images, RNG)
  found = of(context_grayscale=0.3).context_images(images, RNG)
  grey = images @ np.asarray([0.299, 0.587, 0.114]) / 255
  grey = (grey[..., None] - np.asarray(objective.mean)) / np.asarray(
    objective.std
  )
  changed = (found != colour).any(axis=(1, 2, 3))
  np.testing.assert_allclose(found[changed], grey[changed], atol=1e-4)
  assert 20 < changed.sum() < 52  # of 120
