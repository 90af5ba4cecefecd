"""Supervised learning: mixed images, and rates that fall with depth."""

from conftest import build
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_program import config_of, make_batch

from jepa_jax import config as config_lib
from jepa_jax import objectives
from jepa_jax.evaluation import protocols
from jepa_jax.evaluation import run as evaluation
from jepa_jax.objectives import supervised


@pytest.fixture(scope="module")
def objective():
  config = config_of("supervised")
  config.method.layer_decay = 0.5
  return objectives.load("supervised").from_config(config)


def test_rates_fall_from_block_to_block(objective):
  params = objective.init(jax.random.key(0))
  scale = objective.learning_rate_scale(params)
  assert scale["head"]["kernel"] == scale["encoder"]["norm"]["bias"] == 1
  assert scale["encoder"]["patch_embed"]["kernel"] == 0.5**6
  blocks = jax.tree.leaves(scale["encoder"]["transformer"])
  for x in blocks:
    np.testing.assert_allclose(x.ravel(), 0.5 ** np.arange(5, 0, -1))
  leaves = jax.tree.leaves(params["encoder"]["transformer"])
  assert [x.ndim for x in blocks] == [x.ndim for x in leaves]


def test_loss_is_the_smoothed_cross_entropy(objective):
  config = config_of("supervised")
  program = build(config)
  batch = make_batch(program)
  params = objective.init(jax.random.key(1))
  logits = jnp.arange(9.0)
  params["head"] = {"kernel": jnp.zeros((28, 9)), "bias": logits}
  loss = objective.loss(params, {}, batch, jax.random.key(0), {})
  log_shares = np.asarray(logits) - np.log(np.exp(np.arange(9)).sum())
  right = log_shares[batch["label"]].mean()
  expected = -(0.9 * right + 0.1 * log_shares.mean())
  np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-5)
  expected = (batch["label"] == 8).mean()
  np.testing.assert_allclose(loss.metrics["accuracy"], expected)


def mixed(mixup, cutmix, key):
  """Images of ones and of zeros in turns: what is left of itself shows."""
  images = jnp.broadcast_to(
    jnp.array([1.0, 0, 0, 0])[:, None, None, None], (4, 24, 16, 3)
  )
  return supervised.mix(jax.random.key(key), images, jnp.eye(4), mixup, cutmix)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_labels_are_mixed_as_the_pixels_are(mixup, cutmix):
  kinds, shares_seen = set(), []
  for key in range(60):
    images, shares = mixed(mixup, cutmix, key)
    own = float(shares[0, 0])
    np.testing.assert_allclose(images[0].mean(), own, atol=1e-4)
    np.testing.assert_allclose(images[3].mean(), 1 - own, atol=1e-4)
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-4)
    np.testing.assert_allclose(shares[0, 3], 1 - own, atol=1e-4)
    assert not images[1:3].any()
    values = np.unique(np.asarray(images[0]))
    if values.size == 1 and 0 < values[0] < 1:
      kinds.add("mixup")
    if values.size == 2:
      assert [*values] == [0, 1]
      kinds.add("cutmix")
      holes = np.argwhere(np.asarray(images[0, :, :, 0]) == 0)
      height, width = np.ptp(holes, axis=0) + 1
      assert len(holes) == height * width  # a rectangle
    shares_seen.append(own)
  named = {"mixup": mixup, "cutmix": cutmix}
  assert kinds == {name for name, alpha in named.items() if alpha}
  assert np.std(shares_seen) > 0.1


def test_the_head_is_evaluated_as_it_was_trained(objective):
  """Logits of averaged features are those of the loss; right are counted."""
  params = objective.init(jax.random.key(3))["head"]
  features = np.random.default_rng(0).normal(size=(6, 28)).astype(np.float32)
  logits = np.asarray(objective.logits(params, features))
  expected = features @ params["kernel"] + params["bias"]
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-6)
  labels = logits.argmax(axis=1)
  labels[:2] = (labels[:2] + 1) % 9
  side = {"features": features, "labels": labels, "logits": logits}
  encoders = {
    ("trained", "last"): (side, side),
    ("random", "last"): ({**side}, {"features": features, "labels": labels}),
  }
  (row,) = protocols.table(
    "x", encoders, [protocols.find("head")], progress=False
  )
  assert row["top1"] == pytest.approx(100 * 4 / 6, abs=1e-3)


def test_only_what_has_a_head_is_asked_for_it():
  config = config_of("ijepa")
  config.evaluations.x = config_lib.evaluation("count", protocols=("head",))
  with pytest.raises(
    ValueError, match='objective "ijepa" has none; use linear'
  ):
    evaluation.check(config)
