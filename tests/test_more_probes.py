"""Protocols with grids, and health without labels: known answers."""

import numpy as np
import pytest
import test_probes

from jepa_jax.evaluation import bank, scores
from jepa_jax.evaluation.protocols import (
  health,
  knn_grid,
  linear,
  low_shot,
)


def test_a_query_never_finds_itself():
  """Labels of pairs that lie together differ: one's neighbour is wrong."""
  random = np.random.default_rng(0)
  centres = 9 * random.normal(size=(20, 5))
  features = np.repeat(centres, 2, axis=0) + 0.01 * random.normal(size=(40, 5))
  train = {"features": features.astype(np.float32), "labels": np.arange(40) % 2}
  found = knn_grid.knn_grid(train, train, neighbours=[1], temperatures=[1.0])
  assert found["train_top1"] == 0 and found["top1"] == 100
  near = np.asarray([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
  who = np.asarray([[7, 0, 2], [7, 8, 9]])  # the second is crowded out
  kept = knn_grid._others(near, who, np.asarray([0, 1]))
  assert kept[1].tolist() == [[7, 2], [7, 8]]
  assert kept[0].tolist() == [[3.0, 1.0], [3.0, 2.0]]


def test_leave_one_out_is_that_of_scikit_learn():
  neighbors = pytest.importorskip("sklearn.neighbors")
  train = test_probes.blobs(90, 7, 4, 1.5, seed=1)
  test = test_probes.blobs(41, 7, 4, 1.5, seed=2)
  units = train["features"] - train["features"].mean(0)
  units = bank.unit_rows(units / train["features"].std(0))
  other = test["features"] - train["features"].mean(0)
  other = bank.unit_rows(other / train["features"].std(0))
  for k, t in ((3, 0.07), (11, 0.5)):
    weights = lambda d, t=t: np.exp(-(d**2) / 2 / t)  # 1 - cosine = d^2 / 2
    model = neighbors.KNeighborsClassifier(k, weights=weights)
    left = [
      model.fit(np.delete(units, i, 0), np.delete(train["labels"], i)).predict(
        units[i : i + 1]
      )[0]
      for i in range(90)
    ]
    found = knn_grid.knn_grid(
      train, test, neighbours=[k], temperatures=[t], chunk=32
    )
    assert (found["k"], found["temperature"]) == (k, t)
    expected = 100 * np.mean(np.asarray(left) == train["labels"])
    assert found["train_top1"] == pytest.approx(expected, abs=1e-3)
    score = model.fit(units, train["labels"]).score(other, test["labels"])
    assert found["top1"] == pytest.approx(100 * score, abs=1e-3)


def test_the_grid_is_chosen_without_the_test_set():
  train = test_probes.blobs(150, 7, 4, 1.5, seed=1)
  test = test_probes.blobs(83, 7, 4, 1.5, seed=2)
  found = knn_grid.knn_grid(train, test, neighbours=[1, 9, 500])
  shuffled = {**test, "labels": np.roll(test["labels"], 7)}
  again = knn_grid.knn_grid(train, shuffled, neighbours=[1, 9, 500])
  assert (found["k"], found["temperature"]) == (
    again["k"], again["temperature"],
  )  # fmt: skip
  assert found["best_on_test"] >= found["top1"]
  with pytest.raises(ValueError, match=r"neighbours=\(500,\) for 150 images"):
    knn_grid.knn_grid(train, test, neighbours=[500])


def test_rankme_of_known_spectra():
  random = np.random.default_rng(0)
  basis, _ = np.linalg.qr(random.normal(size=(60, 7)))
  assert health.rankme(basis) == pytest.approx(7, rel=1e-4)
  assert health.rankme(basis[:, :1] @ np.ones((1, 7))) == pytest.approx(
    1, rel=1e-4
  )
  values = np.asarray([8, 4, 2, 1, 1, 0, 0]) / 16
  entropy = 0.5 * np.log(2) + 0.25 * np.log(4) + 0.125 * np.log(8)
  entropy += 2 * 0.0625 * np.log(16)
  found = health.rankme(basis * values)
  assert found == pytest.approx(np.exp(entropy), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_alpha_is_the_exponent_of_a_power_law(alpha):
  random = np.random.default_rng(0)
  values = np.arange(1, 41.0) ** (-alpha / 2)  # of the singular values
  left = random.normal(size=(300, 40))
  left, _ = np.linalg.qr(left - left.mean(axis=0))
  right, _ = np.linalg.qr(random.normal(size=(40, 40)))
  features = (left * values) @ right.T + 5  # centred by the measure
  assert health.alpha_req(features) == pytest.approx(alpha, rel=1e-6)
  shares = values**2 / np.sum(values**2)
  np.testing.assert_allclose(health.spectrum(features), shares, rtol=1e-9)
  assert not health.spectrum(np.ones((9, 4))).any()


@pytest.mark.parametrize("shape", [(50, 7), (7, 50), (9, 9)])
def test_eigenvalues_in_parts_are_those_of_the_whole(shape, monkeypatch):
  monkeypatch.setattr(health, "ROWS", 8)
  features = np.random.default_rng(0).normal(size=shape).astype(np.float32) + 3
  mean = features.mean(axis=0, dtype=np.float64)
  values = np.linalg.svd(features - mean, compute_uv=False) ** 2
  found = health.spectrum(features)
  np.testing.assert_allclose(found, values / values.sum(), atol=1e-12)


def test_uniformity_of_known_points():
  assert health.uniformity(np.ones((9, 4))) == pytest.approx(0)
  poles = np.asarray([[2.0, 0], [-1.0, 0]])  # their distance is 2
  assert health.uniformity(poles) == pytest.approx(-8)
  square = np.asarray([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
  expected = np.log((4 * np.exp(-4) + 2 * np.exp(-8)) / 6)
  assert health.uniformity(square) == pytest.approx(expected)


def test_collapsed_features_are_told_from_healthy_ones():
  random = np.random.default_rng(0)
  healthy = {"features": random.normal(size=(200, 30))}
  collapsed = {"features": 1 + 1e-3 * random.normal(size=(200, 30))}
  good, bad = (health.health({}, x) for x in (healthy, collapsed))
  assert good["rankme"] > 25 and bad["rankme"] < 1.5
  assert good["uniformity"] < -3 and bad["uniformity"] > -1e-3
  assert (good["n_test"], good["width"]) == (200, 30)
  assert good["spectrum"] == sorted(good["spectrum"], reverse=True)
  assert len(good["spectrum"]) == 30 and sum(good["spectrum"]) < 1.0001
  with pytest.raises(ValueError, match="2 images"):
    health.health({}, {"features": np.zeros((2, 3))})


@pytest.mark.parametrize(
  "amount, counts", [(0.1, [10, 3, 1, 1]), (5, [5, 5, 2, 1]), (1, [1] * 4)]
)
def test_a_draw_has_its_share_of_each_class(amount, counts):
  labels = np.repeat([4, -2, 9, 7], [100, 30, 2, 1])
  chosen = low_shot.draw(labels, amount, np.random.default_rng(0))
  assert [int(np.sum(labels[chosen] == x)) for x in (4, -2, 9, 7)] == counts
  assert (np.diff(chosen) > 0).all()


def test_low_shot_is_the_mean_of_draws_whose_lists_are_kept():
  train = test_probes.blobs(300, 9, 3, 0.1, seed=1)
  test = test_probes.blobs(67, 9, 3, 0.1, seed=2)
  found = low_shot.low_shot(train, test, amount=2)
  assert found["top1"] == 100 and found["n_train"] == 6
  assert len(found["lists"]) == 3 == len({tuple(x) for x in found["lists"]})
  hard = test_probes.blobs(300, 9, 3, 2.0, seed=1)
  found = low_shot.low_shot(hard, test, amount=0.05, seed=4)
  assert found["top1"] == pytest.approx(np.mean(found["draws"]), abs=1e-3)
  first = {k: v[found["lists"][0]] for k, v in hard.items()}
  alone = linear.linear_probe(first, test, seed=4)
  assert found["draws"][0] == alone["top1"]
  assert low_shot.low_shot(hard, test, amount=0.05, seed=4) == found
  with pytest.raises(ValueError, match="0 draws of 2"):
    low_shot.low_shot(train, test, amount=2, draws=0)


def test_lists_of_images_have_a_place_of_their_own():
  row = {"evaluation": "x", "protocol": "low_shot_1", "top1": 5.0}
  rows = [
    row | {"encoder": "trained", "lists": [[1, 2], [3]]},
    row | {"encoder": "random", "lists": [[1, 2], [3]]},
    {"evaluation": "x", "protocol": "knn", "top1": 7.0},
  ]
  kept, lists = scores.split_lists(rows)
  assert lists == {"x/low_shot_1": [[1, 2], [3]]}
  assert [set(x) & {"lists", "top1"} for x in kept] == [{"top1"}] * 3
  assert scores.split_lists(kept) == (kept, {})
