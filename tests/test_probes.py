import json

import numpy as np
import pytest

from jepa_jax.evaluation import probes


def blobs(count, width, classes, spread, seed=0, labels=None):
  """Gaussian classes around random centres; wide and correlated features."""
  random = np.random.default_rng(seed)
  centres = np.random.default_rng(7).normal(size=(classes, width))
  mixing = np.random.default_rng(8).normal(size=(width, width))
  targets = random.integers(0, classes, count)
  noise = spread * random.normal(size=(count, width))
  features = ((centres[targets] + noise) @ mixing * 3 + 5).astype(np.float32)
  values = np.arange(classes) if labels is None else np.asarray(labels)
  return {"features": features, "labels": values[targets]}


@pytest.mark.parametrize("protocol", probes.PROTOCOLS)
def test_separable_classes_are_told_apart(protocol):
  train = blobs(211, 13, 3, 0.1, seed=1, labels=[4, -2, 90])
  test = blobs(67, 13, 3, 0.1, seed=2, labels=[4, -2, 90])
  metrics = probes.PROTOCOLS[protocol](train, test)
  assert metrics["top1"] == 100
  assert (metrics["n_train"], metrics["n_test"]) == (211, 67)
  assert metrics["classes"] == 3 and "top5" not in metrics


@pytest.mark.parametrize("protocol", probes.PROTOCOLS)
def test_random_labels_stay_at_chance(protocol):
  random = np.random.default_rng(3)
  train = blobs(300, 13, 4, 1.0, seed=1)
  test = blobs(400, 13, 4, 1.0, seed=2)
  train["labels"] = random.integers(0, 4, 300)
  test["labels"] = random.integers(0, 4, 400)
  metrics = probes.PROTOCOLS[protocol](train, test)
  assert 15 < metrics["top1"] < 35


@pytest.mark.parametrize("protocol", probes.PROTOCOLS)
def test_protocols_are_deterministic_and_json(protocol):
  train, test = blobs(90, 5, 3, 1.5, seed=1), blobs(40, 5, 3, 1.5, seed=2)
  first = probes.PROTOCOLS[protocol](train, test, per_class=True)
  assert first == probes.PROTOCOLS[protocol](train, test, per_class=True)
  assert json.loads(json.dumps(first)) == first


@pytest.mark.parametrize("protocol", probes.PROTOCOLS)
def test_top5_majority_and_per_class_are_what_they_say(protocol):
  train, test = blobs(400, 9, 8, 1.5, seed=1), blobs(150, 9, 8, 1.5, seed=2)
  metrics = probes.PROTOCOLS[protocol](train, test, per_class=True)
  assert metrics["top1"] < metrics["top5"] <= 100
  counts = np.bincount(test["labels"], minlength=8)
  commonest = np.argmax(np.bincount(train["labels"]))
  assert metrics["majority"] == pytest.approx(
    100 * counts[commonest] / 150, abs=1e-3
  )
  mean = sum(
    metrics["per_class"][str(label)] * counts[label] for label in range(8)
  )
  assert metrics["top1"] == pytest.approx(mean / 150, abs=1e-2)


@pytest.mark.parametrize("strength", [1e-1, 1e-3])
@pytest.mark.parametrize("noise", [0.3, 2.0])
def test_linear_probe_agrees_with_scikit_learn(strength, noise):
  linear_model = pytest.importorskip("sklearn.linear_model")
  preprocessing = pytest.importorskip("sklearn.preprocessing")
  train = blobs(307, 17, 5, noise, seed=1)
  test = blobs(401, 17, 5, noise, seed=2)
  scaler = preprocessing.StandardScaler().fit(train["features"])
  model = linear_model.LogisticRegression(
    C=1 / (307 * strength), max_iter=5000, tol=1e-8
  ).fit(scaler.transform(train["features"]), train["labels"])
  expected = model.score(scaler.transform(test["features"]), test["labels"])
  metrics = probes.linear_probe(train, test, strengths=[strength])
  assert metrics["converged"] and metrics["strength"] == strength
  assert metrics["top1"] == pytest.approx(100 * expected, abs=0.51)  # 2 images


def test_strength_is_chosen_for_unseen_images():
  random = np.random.default_rng(0)
  train, test = blobs(120, 5, 2, 2.0, seed=1), blobs(900, 5, 2, 2.0, seed=2)
  for examples in (train, test):  # 200 useless features: weak L2 overfits
    useless = random.normal(size=(len(examples["labels"]), 200))
    examples["features"] = np.hstack([examples["features"], useless])
  weak = probes.linear_probe(train, test, strengths=[1e-6])
  chosen = probes.linear_probe(train, test, strengths=[1e-6, 1e-3, 1.0])
  assert chosen["strength"] == 1.0
  assert chosen["top1"] > weak["top1"] + 3


def test_path_goes_past_strengths_that_do_worse():
  train, test = blobs(400, 17, 5, 0.8, seed=1), blobs(300, 17, 5, 0.8, seed=2)
  strengths = [1e4, 1e3, 1e-3]  # the first two let the bias alone decide
  chosen = probes.linear_probe(train, test, strengths=strengths)
  weak = probes.linear_probe(train, test, strengths=[1e-3])
  assert chosen["strength"] == 1e-3
  assert chosen["top1"] == pytest.approx(weak["top1"], abs=1)


def test_constant_and_huge_features_do_no_harm():
  train, test = blobs(90, 5, 3, 0.2, seed=1), blobs(40, 5, 3, 0.2, seed=2)
  for examples in (train, test):
    examples["features"] = examples["features"] * np.float32(1e4)
    examples["features"][:, 2] = 7.0
  assert probes.linear_probe(train, test)["top1"] > 95


def test_label_unseen_in_training_counts_as_an_error():
  train, test = blobs(90, 5, 3, 0.1, seed=1), blobs(40, 5, 3, 0.1, seed=2)
  test["labels"][:10] = 77
  for protocol in probes.PROTOCOLS.values():
    assert protocol(train, test)["top1"] == 75


def test_stratified_holdout_takes_its_share_of_each_class():
  targets = np.repeat([0, 1, 2, 3], [100, 20, 2, 1])
  held_out = probes._stratified(targets, 0.15, seed=0)
  assert np.bincount(targets[held_out], minlength=4).tolist() == [15, 3, 1, 0]
  other = probes._stratified(targets, 0.15, seed=1)
  assert not np.array_equal(held_out, other)


def brute_force_neighbours(train, test, k, temperature):
  weighted, majority = [], []
  bank = train["features"].astype(np.float64)
  mean, scale = bank.mean(axis=0), bank.std(axis=0)
  bank = (bank - mean) / scale
  for query in (test["features"] - mean) / scale:
    similarity = bank @ query
    similarity /= np.linalg.norm(bank, axis=1) * np.linalg.norm(query)
    nearest = np.argsort(-similarity, kind="stable")[:k]
    votes, weights = {}, {}
    for index in nearest:
      label = train["labels"][index]
      votes[label] = votes.get(label, 0) + 1
      weights[label] = weights.get(label, 0) + np.exp(
        similarity[index] / temperature
      )
    weighted.append(max(weights, key=weights.get))
    majority.append(max(votes, key=lambda v: (votes[v], weights[v])))
  return (
    100 * np.mean(np.array(weighted) == test["labels"]),
    100 * np.mean(np.array(majority) == test["labels"]),
  )


@pytest.mark.parametrize("k, temperature", [(1, 0.07), (6, 0.07), (20, 0.5)])
def test_nearest_neighbours_agree_with_brute_force(k, temperature):
  train, test = blobs(150, 7, 4, 1.5, seed=1), blobs(83, 7, 4, 1.5, seed=2)
  metrics = probes.nearest_neighbours(
    train, test, k=k, temperature=temperature, chunk=20
  )
  weighted, majority = brute_force_neighbours(train, test, k, temperature)
  assert metrics["top1"] == pytest.approx(weighted, abs=1e-3)
  assert metrics["top1_majority"] == pytest.approx(majority, abs=1e-3)


def test_what_all_images_have_in_common_moves_no_neighbour():
  train, test = blobs(150, 7, 4, 1.5, seed=1), blobs(83, 7, 4, 1.5, seed=2)
  shift = lambda x: x | {"features": x["features"] + np.float32(100)}
  expected = probes.nearest_neighbours(train, test)
  moved = probes.nearest_neighbours(shift(train), shift(test))
  assert moved["top1"] == pytest.approx(expected["top1"], abs=1e-3)


def test_more_neighbours_than_images_uses_all_images():
  train, test = blobs(12, 7, 4, 0.5, seed=1), blobs(5, 7, 4, 0.5, seed=2)
  assert probes.nearest_neighbours(train, test, k=20)["k"] == 12


def test_table_has_a_row_for_each_protocol_and_encoder():
  train, test = blobs(60, 5, 3, 0.1, seed=1), blobs(20, 5, 3, 0.1, seed=2)
  noise = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
  rows = probes.probe_table(
    "count",
    {
      ("trained", "last4"): (train, test),
      ("random", "last"): (
        {**train, "features": noise[:60]},
        {**test, "features": noise[60:]},
      ),
    },
    progress=False,
  )
  assert [(r["protocol"], r["encoder"], r["features"]) for r in rows] == [
    ("linear", "trained", "last4"),
    ("linear", "random", "last"),
    ("knn", "trained", "last4"),
    ("knn", "random", "last"),
  ]
  assert all(r["evaluation"] == "count" and r["seconds"] >= 0 for r in rows)
  assert rows[0]["top1"] == 100 and rows[1]["top1"] < 70
  json.dumps(rows)


def test_unknown_protocol_lists_the_known_ones():
  with pytest.raises(ValueError, match="known: linear, knn"):
    probes.probe_table("count", {}, protocols=["svm"])


@pytest.mark.parametrize("protocol", probes.PROTOCOLS)
@pytest.mark.parametrize(
  "change, message",
  [
    ({"labels": np.zeros(59, np.int32)}, "do not fit"),
    ({"labels": np.zeros(60, np.float32)}, "integers"),
    ({"features": np.zeros((60, 4), np.float32)}, "one encoder"),
  ],
)
def test_wrong_inputs_name_the_encoder(protocol, change, message):
  train, test = blobs(60, 5, 3, 0.1, seed=1), blobs(20, 5, 3, 0.1, seed=2)
  encoders = {("random", "last"): ({**train, **change}, test)}
  with pytest.raises(ValueError, match=f"random last.*{message}"):
    probes.probe_table("count", encoders, protocols=[protocol], progress=False)


@pytest.mark.parametrize(
  "options", [{"holdout": 0.0}, {"strengths": []}, {"strengths": [0.0]}]
)
def test_linear_probe_refuses_senseless_options(options):
  train, test = blobs(60, 5, 3, 0.1, seed=1), blobs(20, 5, 3, 0.1, seed=2)
  with pytest.raises(ValueError, match="0 < holdout < 1"):
    probes.linear_probe(train, test, **options)


def test_linear_probe_needs_two_classes():
  train, test = blobs(60, 5, 1, 0.1, seed=1), blobs(20, 5, 1, 0.1, seed=2)
  with pytest.raises(ValueError, match="at least 2"):
    probes.linear_probe(train, test)


@pytest.mark.parametrize(
  "options", [{"k": 0}, {"temperature": 0.0}, {"chunk": -1}]
)
def test_nearest_neighbours_refuse_senseless_options(options):
  train, test = blobs(60, 5, 3, 0.1, seed=1), blobs(20, 5, 3, 0.1, seed=2)
  with pytest.raises(ValueError, match="must be positive"):
    probes.nearest_neighbours(train, test, **options)
