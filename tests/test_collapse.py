import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import config
from jepa_jax.evaluation import collapse

RANDOM = np.random.default_rng(0)
METRICS = list(collapse.METRICS.values())
LIMITS = config.defaults().collapse.to_dict()


def centred_basis(rows, columns):
  """Orthonormal columns, each of mean 0: centring leaves them alone."""
  random = RANDOM.normal(size=(rows, columns))
  return np.linalg.qr(random - random.mean(axis=0))[0]


def brute_force_rank(features):
  values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
  shares = values[values > 1e-9] / values.sum()
  return np.exp(-np.sum(shares * np.log(shares)))


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_effective_rank_of_equal_singular_values_is_their_number(mean):
  features = 3 * centred_basis(11, 7) + mean
  np.testing.assert_allclose(collapse.effective_rank(features), 7, rtol=1e-4)


@pytest.mark.parametrize("shape", [(11, 7), (7, 11)])
def test_effective_rank_of_known_singular_values(shape):
  rows, columns = shape
  values = np.array([3.0, 1.0, 1.0])
  axes = np.linalg.qr(RANDOM.normal(size=(columns, 3)))[0]
  features = centred_basis(rows, 3) * values @ axes.T + 2
  shares = values / 5
  expected = np.exp(-np.sum(shares * np.log(shares)))
  np.testing.assert_allclose(
    collapse.effective_rank(features), expected, rtol=1e-4
  )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_effective_rank_of_one_direction_is_one(scale):
  features = scale * np.outer(RANDOM.normal(size=64), RANDOM.normal(size=48))
  np.testing.assert_allclose(collapse.effective_rank(features), 1, atol=1e-3)


def test_effective_rank_keeps_small_values_beside_a_large_mean():
  decay = np.exp(-0.1 * np.arange(48))
  features = RANDOM.normal(size=(64, 48)) * decay + 100 * RANDOM.normal(size=48)
  np.testing.assert_allclose(
    collapse.effective_rank(features), brute_force_rank(features), rtol=2e-3
  )


def test_constant_features_score_the_worst_of_each_metric():
  features = np.tile(RANDOM.normal(size=(1, 7)), (11, 1))
  metrics = collapse.collapse_metrics(features)
  np.testing.assert_allclose(metrics["feature_std"], 0, atol=1e-6)
  assert metrics["effective_rank"] == 1
  np.testing.assert_allclose(metrics["mean_cosine"], 1, atol=1e-5)


def test_zero_features_are_finite():
  metrics = collapse.collapse_metrics(np.zeros((11, 7)))
  assert metrics == {"feature_std": 0, "effective_rank": 1, "mean_cosine": 0}


def test_feature_std_and_mean_cosine_are_the_brute_force_numbers():
  features = RANDOM.normal(size=(11, 7)) + 0.5
  units = features / np.linalg.norm(features, axis=1, keepdims=True)
  pairs = (units @ units.T)[~np.eye(11, dtype=bool)]
  np.testing.assert_allclose(
    collapse.mean_cosine(features), pairs.mean(), rtol=1e-4
  )
  np.testing.assert_allclose(
    collapse.feature_std(features), features.std(axis=0).mean(), rtol=1e-5
  )


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_jit_and_compute_in_float32(metric):
  features = jnp.asarray(RANDOM.normal(size=(11, 7)), jnp.bfloat16)
  result = jax.jit(metric)(features)
  assert result.shape == () and result.dtype == jnp.float32
  np.testing.assert_allclose(result, metric(features), rtol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_metrics_refuse_unpooled_features(metric):
  with pytest.raises(ValueError, match="average over the patches"):
    metric(np.zeros((2, 3, 5)))


def test_mean_cosine_needs_two_images():
  with pytest.raises(ValueError, match="at least 2"):
    collapse.mean_cosine(np.zeros((1, 5)))


def test_warning_is_silent_for_healthy_and_loud_for_constant_features():
  healthy = collapse.collapse_metrics(RANDOM.normal(size=(64, 48)))
  constant = collapse.collapse_metrics(np.ones((64, 48)))
  assert collapse.collapse_warning(healthy, LIMITS) == ""
  warning = collapse.collapse_warning({"loss": 0.1, **constant}, LIMITS)
  assert warning.startswith("COLLAPSE")
  for words in ("standard deviation", "effective rank", "cosine"):
    assert words in warning


def test_warning_judges_each_metric_alone_and_names_its_limit():
  limits = {"effective_rank": 5.0}
  assert collapse.collapse_warning({"feature_std": 0.0}, limits) == ""
  warning = collapse.collapse_warning({"effective_rank": 4.5}, limits)
  assert "effective rank 4.5 is below 5" in warning
  assert collapse.collapse_warning({"effective_rank": 5.5}, limits) == ""


def test_warning_names_non_finite_features():
  warning = collapse.collapse_warning({"mean_cosine": float("nan")}, LIMITS)
  assert "is nan" in warning


def test_every_limit_of_a_config_is_one_of_a_metric():
  assert set(LIMITS) == set(collapse.METRICS)


def test_unknown_threshold_lists_the_known_ones():
  with pytest.raises(ValueError, match="known: feature_std, effective_rank"):
    collapse.collapse_warning({}, {"rank": 2.0})


# docs/collapse.md: of each run the lowest standard deviation and rank and the
# highest cosine of its rows.
HEALTHY = {
  "seed 0": (0.169, 17.7, 0.9425),
  "seed 1": (0.174, 14.6, 0.9380),
  "seed 2": (0.165, 18.0, 0.9485),
  "lr 2e-4": (0.154, 22.1, 0.9503),
  "lr 1e-3": (0.129, 20.6, 0.9758),
  "random masks": (0.080, 20.5, 0.9887),
  "l2": (0.171, 16.9, 0.9398),
  "batch 128": (0.169, 20.2, 0.9437),
  "128 wide": (0.168, 24.0, 0.9467),
  "no EMA": (0.121, 15.3, 0.9802),
  "EMA .9": (0.077, 11.1, 0.9921),
}
COLLAPSED = {
  "no stop-gradient": (0.0079, 12.6, 0.99987),
  "lr 1": (0.0219, 4.8, 0.99989),
}


@pytest.mark.parametrize("run", [*HEALTHY, *COLLAPSED])
def test_alarms_are_of_the_runs_that_collapsed(run):
  row = {
    "loss": 0.1,
    **dict(zip(collapse.METRICS, {**HEALTHY, **COLLAPSED}[run])),
  }
  assert bool(collapse.collapse_warning(row, LIMITS)) == (run in COLLAPSED)
  if run in HEALTHY:  # far from the limits
    near = {name: 1.5 * limit for name, limit in LIMITS.items()}
    near["mean_cosine"] = 1 - 2 * (1 - LIMITS["mean_cosine"])
    assert not collapse.collapse_warning(row, near)
