import dataclasses
import json

import numpy as np
import pytest

from jepa_jax.evaluation import protocols
from jepa_jax.evaluation.protocols import (
  accuracy,
  dense,
  knn,
  linear,
  multilabel,
  protocol,
  ridge,
)

# Those of averaged features that learn from all of train; few labels and grids
# have tests of their own.
CLASSES = [
  x
  for x in protocols.PROTOCOLS.values()
  if x.label == "class"
  and x.score == "top1"
  and not x.name.startswith(("linear_", "low_shot"))
  and not (x.patches or x.logits)
]
classifies = pytest.mark.parametrize("row", CLASSES, ids=lambda row: row.name)


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


def patches(count, seed, kind):
  """Features of 2 x 3 patches that say their own number, and labels of it."""
  random = np.random.default_rng(seed)
  number = random.integers(0, 3, (count, 2, 3))
  features = np.eye(3)[number] + 0.05 * random.normal(size=(count, 2, 3, 3))
  maps = np.repeat(np.repeat(number, 4, axis=1), 4, axis=2)  # [n, 8, 12]
  labels = {
    "mask": 5 * maps,
    "dense": 1.0
    + maps[..., None]
    + 0.1 * random.normal(size=(count, 8, 12, 1)),
    "class": number[:, 0, 0],
  }[kind]
  features = features.reshape(count, 6, 3).astype(np.float16)
  if kind == "class":  # the patch that tells is marked, wherever it is
    marks = np.zeros((count, 6, 1), np.float16)
    marks[:, 0] = 3
    features = np.concatenate([features, marks], axis=-1)
    shift = np.argsort(random.random((count, 6)), axis=1)
    features = np.take_along_axis(features, shift[..., None], axis=1)
  return {"features": features, "labels": labels, "grid": (2, 3)}


@classifies
def test_separable_classes_are_told_apart(row):
  train = blobs(211, 13, 3, 0.1, seed=1, labels=[4, -2, 90])
  test = blobs(67, 13, 3, 0.1, seed=2, labels=[4, -2, 90])
  metrics = row.run(train, test)
  assert metrics["top1"] == 100
  assert (metrics["n_train"], metrics["n_test"]) == (211, 67)
  assert metrics["classes"] == 3 and "top5" not in metrics


@classifies
def test_random_labels_stay_at_chance(row):
  random = np.random.default_rng(3)
  train = blobs(300, 13, 4, 1.0, seed=1)
  test = blobs(400, 13, 4, 1.0, seed=2)
  train["labels"] = random.integers(0, 4, 300)
  test["labels"] = random.integers(0, 4, 400)
  metrics = row.run(train, test)
  assert 15 < metrics["top1"] < 35


@classifies
def test_protocols_are_deterministic_and_json(row):
  train, test = blobs(90, 5, 3, 1.5, seed=1), blobs(40, 5, 3, 1.5, seed=2)
  first = row.run(train, test)
  assert first == row.run(train, test)
  assert json.loads(json.dumps(first)) == first


@classifies
def test_top5_majority_and_per_class_are_what_they_say(row):
  train, test = blobs(400, 9, 8, 1.5, seed=1), blobs(150, 9, 8, 1.5, seed=2)
  metrics = row.run(train, test)
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
  by_hand = np.mean([*metrics["per_class"].values()])
  assert metrics["mean_per_class"] == pytest.approx(by_hand, abs=1e-2)
  assert metrics["mean_per_class"] != metrics["top1"]


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
  metrics = linear.linear_probe(train, test, strengths=[strength])
  assert metrics["converged"] and metrics["strength"] == strength
  assert metrics["top1"] == pytest.approx(100 * expected, abs=0.51)  # 2 images


def test_strength_is_chosen_for_unseen_images():
  random = np.random.default_rng(0)
  train, test = blobs(120, 5, 2, 2.0, seed=1), blobs(900, 5, 2, 2.0, seed=2)
  for examples in (train, test):  # 200 useless features: weak L2 overfits
    useless = random.normal(size=(len(examples["labels"]), 200))
    examples["features"] = np.hstack([examples["features"], useless])
  weak = linear.linear_probe(train, test, strengths=[1e-6])
  chosen = linear.linear_probe(train, test, strengths=[1e-6, 1e-3, 1.0])
  assert chosen["strength"] == 1.0
  assert chosen["top1"] > weak["top1"] + 3


def test_path_goes_past_strengths_that_do_worse():
  train, test = blobs(400, 17, 5, 0.8, seed=1), blobs(300, 17, 5, 0.8, seed=2)
  strengths = [1e4, 1e3, 1e-3]  # the first two let the bias alone decide
  chosen = linear.linear_probe(train, test, strengths=strengths)
  weak = linear.linear_probe(train, test, strengths=[1e-3])
  assert chosen["strength"] == 1e-3
  assert chosen["top1"] == pytest.approx(weak["top1"], abs=1)


def test_constant_and_huge_features_do_no_harm():
  train, test = blobs(90, 5, 3, 0.2, seed=1), blobs(40, 5, 3, 0.2, seed=2)
  for examples in (train, test):
    examples["features"] = examples["features"] * np.float32(1e4)
    examples["features"][:, 2] = 7.0
  assert linear.linear_probe(train, test)["top1"] > 95


def test_label_unseen_in_training_counts_as_an_error():
  train, test = blobs(90, 5, 3, 0.1, seed=1), blobs(40, 5, 3, 0.1, seed=2)
  test["labels"][:10] = 77
  for row in CLASSES:
    assert row.run(train, test)["top1"] == 75


def teststratified_holdout_takes_its_share_of_each_class():
  targets = np.repeat([0, 1, 2, 3], [100, 20, 2, 1])
  held_out = linear.stratified(targets, 0.15, seed=0)
  assert np.bincount(targets[held_out], minlength=4).tolist() == [15, 3, 1, 0]
  other = linear.stratified(targets, 0.15, seed=1)
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
  metrics = knn.nearest_neighbours(
    train, test, k=k, temperature=temperature, chunk=20
  )
  weighted, majority = brute_force_neighbours(train, test, k, temperature)
  assert metrics["top1"] == pytest.approx(weighted, abs=1e-3)
  assert metrics["top1_majority"] == pytest.approx(majority, abs=1e-3)


def test_what_all_images_have_in_common_moves_no_neighbour():
  train, test = blobs(150, 7, 4, 1.5, seed=1), blobs(83, 7, 4, 1.5, seed=2)
  shift = lambda x: x | {"features": x["features"] + np.float32(100)}
  expected = knn.nearest_neighbours(train, test)
  moved = knn.nearest_neighbours(shift(train), shift(test))
  assert moved["top1"] == pytest.approx(expected["top1"], abs=1e-3)


def test_more_neighbours_than_images_uses_all_images():
  train, test = blobs(12, 7, 4, 0.5, seed=1), blobs(5, 7, 4, 0.5, seed=2)
  assert knn.nearest_neighbours(train, test, k=20)["k"] == 12


def test_table_has_a_row_for_each_protocol_and_encoder():
  train, test = blobs(60, 5, 3, 0.1, seed=1), blobs(20, 5, 3, 0.1, seed=2)
  noise = np.random.default_rng(0).normal(size=(80, 6)).astype(np.float32)
  rows = protocols.table(
    "count",
    {
      ("trained", "last4"): (train, test),
      ("random", "last"): (
        {**train, "features": noise[:60]},
        {**test, "features": noise[60:]},
      ),
    },
    [linear.ROW, knn.ROW],
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
    protocols.find("svm")


@classifies
@pytest.mark.parametrize(
  "change, message",
  [
    ({"labels": np.zeros(59, np.int32)}, "do not fit"),
    ({"labels": np.zeros(60, np.float32)}, "integers"),
    ({"features": np.zeros((60, 4), np.float32)}, "one encoder"),
  ],
)
def test_wrong_inputs_name_the_encoder(row, change, message):
  train, test = blobs(60, 5, 3, 0.1, seed=1), blobs(20, 5, 3, 0.1, seed=2)
  encoders = {("random", "last"): ({**train, **change}, test)}
  with pytest.raises(ValueError, match=f"random last.*{message}"):
    protocols.table("count", encoders, [row], progress=False)


@pytest.mark.parametrize(
  "options", [{"holdout": 0.0}, {"strengths": []}, {"strengths": [0.0]}]
)
def test_linear_probe_refuses_senseless_options(options):
  train, test = blobs(60, 5, 3, 0.1, seed=1), blobs(20, 5, 3, 0.1, seed=2)
  with pytest.raises(ValueError, match="0 < holdout < 1"):
    linear.linear_probe(train, test, **options)


def test_linear_probe_needs_two_classes():
  train, test = blobs(60, 5, 1, 0.1, seed=1), blobs(20, 5, 1, 0.1, seed=2)
  with pytest.raises(ValueError, match="at least 2"):
    linear.linear_probe(train, test)


@pytest.mark.parametrize(
  "options", [{"k": 0}, {"temperature": 0.0}, {"chunk": -1}]
)
def test_nearest_neighbours_refuse_senseless_options(options):
  train, test = blobs(60, 5, 3, 0.1, seed=1), blobs(20, 5, 3, 0.1, seed=2)
  with pytest.raises(ValueError, match="must be positive"):
    knn.nearest_neighbours(train, test, **options)


# --- ridge ------------------------------------------------------------------


def numbers(count, seed, noise=0.5, width=11):
  """Correlated features with offsets, and a number that depends on them."""
  random = np.random.default_rng(seed)
  mixing = np.random.default_rng(8).normal(size=(width, width))
  features = random.normal(size=(count, width)) @ mixing * 3 + 5
  weights = np.random.default_rng(9).normal(size=width) / 5
  labels = features @ weights + noise * random.normal(size=count) - 40
  return {
    "features": features.astype(np.float32),
    "labels": labels.astype(np.float32),
  }


@pytest.mark.parametrize("strength", [10.0, 0.1, 1e-4])
@pytest.mark.parametrize("count", [307, 9])  # more and fewer than features
def test_ridge_is_the_closed_form_of_scikit_learn(strength, count):
  linear_model = pytest.importorskip("sklearn.linear_model")
  metrics_of = pytest.importorskip("sklearn.metrics")
  preprocessing = pytest.importorskip("sklearn.preprocessing")
  train, test = numbers(count, seed=1), numbers(83, seed=2)
  scaler = preprocessing.StandardScaler().fit(
    train["features"].astype(np.float64)
  )
  model = linear_model.Ridge(alpha=count * strength, solver="svd").fit(
    scaler.transform(train["features"]), train["labels"]
  )
  said = model.predict(scaler.transform(test["features"]))
  metrics = ridge.ridge(train, test, strengths=[strength])
  assert metrics["strength"] == strength
  assert metrics["r2"] == pytest.approx(
    metrics_of.r2_score(test["labels"], said), abs=1e-4
  )
  assert metrics["rmse"] == pytest.approx(
    np.sqrt(metrics_of.mean_squared_error(test["labels"], said)), rel=1e-4
  )


def test_ridge_finds_an_exact_relation_and_nothing_in_noise():
  exact = ridge.ridge(numbers(211, 1, noise=0), numbers(67, 2, noise=0))
  assert exact["r2"] > 0.99999 and exact["train_r2"] > 0.99999
  assert exact["rmse"] < 0.01 < exact["baseline_rmse"]
  train, test = numbers(211, 1), numbers(400, 2)
  for seed, examples in enumerate((train, test)):
    random = np.random.default_rng(seed)
    examples["labels"] = random.normal(size=len(examples["labels"])) + 3
  noise = ridge.ridge(train, test)
  assert abs(noise["r2"]) < 0.06
  assert noise["rmse"] == pytest.approx(noise["baseline_rmse"], rel=0.05)
  assert (noise["n_train"], noise["n_test"]) == (211, 400)


def test_strength_of_ridge_is_chosen_for_unseen_images():
  train, test = numbers(60, 1, width=50), numbers(900, 2, width=50)
  for seed, examples in enumerate((train, test)):
    random = np.random.default_rng(seed)
    examples["labels"] = examples["features"][:, 0] + random.normal(
      scale=30, size=len(examples["labels"])
    )
  weak = ridge.ridge(train, test, strengths=[1e-6])
  chosen = ridge.ridge(train, test, strengths=[1e-6, 1e-2, 10.0])
  assert chosen["strength"] == 10.0
  assert chosen["r2"] > weak["r2"] + 0.1


def test_standard_errors_are_the_spread_over_test_samples():
  train = numbers(300, 1, noise=2.0)
  found = [
    ridge.ridge(train, numbers(150, 9 + i, noise=2.0)) for i in range(80)
  ]
  assert np.mean([x["standard_error"] for x in found]) == pytest.approx(
    np.std([x["r2"] for x in found]), rel=0.3
  )
  metrics = linear.linear_probe(
    blobs(90, 5, 3, 1.5, seed=1), blobs(40, 5, 3, 1.5, seed=2)
  )
  share = metrics["top1"] / 100
  assert metrics["standard_error"] == pytest.approx(
    100 * np.sqrt(share * (1 - share) / 40), abs=1e-3
  )


def test_a_jackknife_of_a_mean_is_its_standard_error():
  values = np.random.default_rng(0).normal(size=accuracy.GROUPS)
  found = accuracy.jackknife(lambda kept: values[kept].mean(), len(values))
  expected = values.std(ddof=1) / np.sqrt(len(values))
  assert found == pytest.approx(expected, rel=1e-6)


def test_few_test_images_have_no_standard_error():
  """One image; and two, of which one has no class to be scored by."""
  train, one = patches(300, 0, "mask"), patches(1, 1, "mask")
  assert dense.segmentation(train, one)["standard_error"] is None
  features = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
  known = {"features": features, "labels": (features[:, :2] > 0).astype(int)}
  two = {"features": features[:2], "labels": np.asarray([[1, 1], [0, 0]])}
  found = multilabel.multilabel(known, two, strengths=[1e-2])
  assert found["standard_error"] is None and np.isfinite(found["mAP"])


def test_standard_errors_of_means_over_classes_are_over_images():
  """mIoU and mAP vary from one draw of test images to the next by so much."""
  train = patches(300, 0, "mask")
  many = patches(4000, 1, "mask")
  noise = np.random.default_rng(2).normal(size=many["features"].shape)
  many["features"] = (many["features"] + 0.7 * noise).astype(np.float16)
  draw = lambda side, i: {
    k: v[100 * i : 100 * (i + 1)] if len(v) == 4000 else v
    for k, v in side.items()
  }
  found = [dense.segmentation(train, draw(many, i)) for i in range(40)]
  assert np.mean([x["standard_error"] for x in found]) == pytest.approx(
    np.std([x["miou"] for x in found]), rel=0.3
  )
  random = np.random.default_rng(3)
  classes = random.integers(0, 2, (12_300, 3))
  features = classes @ random.normal(size=(3, 6)) + random.normal(
    size=(12_300, 6)
  )
  side = lambda rows: {
    "features": features[rows].astype(np.float32), "labels": classes[rows]
  }  # fmt: skip
  found = [
    multilabel.multilabel(
      side(slice(0, 300)), side(slice(300 + 200 * i, 500 + 200 * i)),
      strengths=[1e-2],
    )
    for i in range(60)
  ]  # fmt: skip
  assert np.mean([x["standard_error"] for x in found]) == pytest.approx(
    np.std([x["mAP"] for x in found]), rel=0.3
  )


@pytest.mark.parametrize(
  "change, options, message",
  [
    ({}, {"holdout": 1.0}, "0 < holdout < 1"),
    ({}, {"strengths": [-1.0]}, "above 0"),
    ({"labels": np.full(60, np.nan)}, {}, "not finite"),
    ({"labels": np.full(60, 3)}, {}, "all the same"),
    ({"labels": np.asarray(["a"] * 60)}, {}, "numbers"),
    ({"labels": np.zeros(59)}, {}, "do not fit"),
  ],
)
def test_ridge_refuses_what_has_no_answer(change, options, message):
  train, test = numbers(60, 1), numbers(20, 2)
  with pytest.raises(ValueError, match=message):
    ridge.ridge({**train, **change}, test, **options)


# --- several classes --------------------------------------------------------


def tagged(count, seed, width=9, noise=1.0):
  """Features, and for each of 4 classes whether a direction of them is up."""
  random = np.random.default_rng(seed)
  features = random.normal(size=(count, width)).astype(np.float32)
  scores = features @ np.random.default_rng(5).normal(size=(width, 4))
  scores += noise * random.normal(size=scores.shape) - [0, 1, 2, 3]
  return {"features": features, "labels": (scores > 0).astype(np.int32)}


def test_average_precision_is_that_of_scikit_learn():
  metrics = pytest.importorskip("sklearn.metrics")
  random = np.random.default_rng(0)
  labels = (random.random((57, 5)) < 0.3).astype(int)
  labels[:, 3] = 0
  scores = random.integers(0, 9, (57, 5))  # with ties
  found = multilabel.average_precisions(scores, labels)
  assert np.isnan(found[3])
  for k in (0, 1, 2, 4):
    expected = metrics.average_precision_score(labels[:, k], scores[:, k])
    assert found[k] == pytest.approx(expected, abs=1e-12)


def test_average_precision_by_hand():
  # Ranks of the class: 1, 3 of 4: (1/1 + 2/3) / 2.
  scores = np.asarray([[4.0], [3.0], [2.0], [1.0]])
  labels = np.asarray([[1], [0], [1], [0]])
  assert multilabel.average_precisions(scores, labels)[0] == pytest.approx(
    5 / 6
  )


def test_several_classes_are_told_apart_or_stay_at_chance():
  clear = multilabel.multilabel(
    tagged(900, 1, noise=0), tagged(300, 2, noise=0)
  )
  assert clear["mAP"] > 98 and clear["train_mAP"] > 98
  assert (clear["n_train"], clear["n_test"], clear["classes"]) == (900, 300, 4)
  train, test = tagged(900, 1), tagged(900, 2)
  for examples in (train, test):
    np.random.default_rng(3).shuffle(examples["labels"])
  blind = multilabel.multilabel(train, test)
  assert blind["mAP"] == pytest.approx(blind["chance"], abs=6)
  assert blind["chance"] == pytest.approx(100 * test["labels"].mean())


def test_a_logistic_regression_a_class_agrees_with_scikit_learn():
  linear_model = pytest.importorskip("sklearn.linear_model")
  train, test = tagged(307, 1), tagged(211, 2)
  mean, scale = train["features"].mean(0), train["features"].std(0)
  found = multilabel.multilabel(train, test, strengths=[1e-2])
  for k in range(4):
    model = linear_model.LogisticRegression(C=1 / (307 * 1e-2), tol=1e-8).fit(
      (train["features"] - mean) / scale, train["labels"][:, k]
    )
    said = model.decision_function((test["features"] - mean) / scale)
    (expected,) = multilabel.average_precisions(
      said[:, None], test["labels"][:, k : k + 1]
    )
    assert found["per_class"][str(k)] == pytest.approx(100 * expected, abs=0.5)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"labels": np.zeros(90, np.int32)}, r"\[images, classes\]"),
    ({"labels": np.zeros((90, 4), np.int32)}, "no class that only a part"),
    ({"labels": np.eye(5, dtype=np.int32)[np.arange(90) % 5]}, "same columns"),
  ],
)
def test_what_several_classes_cannot_be_learned_of(change, message):
  with pytest.raises(ValueError, match=message):
    multilabel.multilabel({**tagged(90, 1), **change}, tagged(40, 2))


@pytest.mark.parametrize(
  "labels, kind, expected",
  [
    ([[0, 1, 0], [1, 0, 0]], "class", [1, 0]),
    ([[0.0, 1.0], [1.0, 0.0]], "class", [1, 0]),
    ([[0, 1, 1], [1, 0, 0]], "classes", [[0, 1, 1], [1, 0, 0]]),
    ([[0, 1, 1], [1, 0, 0]], "class", "2 classes of 3.*use multilabel"),
    ([[1, 0], [0, 0]], "class", "0 classes of 2"),
    ([[0.0, 0.25]], "class", "0.25; as classes each needs to be 0 or 1"),
    ([[0, 7]], "classes", "hold 7;"),
    ([3, 1], "class", [3, 1]),
    ([0.5, 0.25], "number", [0.5, 0.25]),
  ],
)
def test_labels_become_what_a_kind_of_protocol_takes(labels, kind, expected):
  if isinstance(expected, str):
    with pytest.raises(ValueError, match=expected):
      protocol.fit(np.asarray(labels), kind)
  else:
    assert protocol.fit(np.asarray(labels), kind).tolist() == expected


# --- rows -------------------------------------------------------------------


def mean_norm(train, test, *, seed):
  del seed
  assert "labels" not in train
  return {"norm": float(np.linalg.norm(test["features"], axis=1).mean())}


NORM = protocol.Protocol(
  name="norm",
  title="mean norm",
  run=mean_norm,
  score="norm",
  unit="px",
  higher_is_better=False,
  label="none",
)


@pytest.mark.parametrize("row", protocols.PROTOCOLS.values())
def test_rows_say_what_their_protocols_return(row):
  make = {
    "class": lambda n, seed: blobs(n, 5, 3, 1.0, seed),
    "classes": tagged,
    "number": numbers,
    "none": lambda n, seed: {"features": blobs(n, 5, 3, 1.0, seed)["features"]},
    "dense": lambda n, seed: patches(n, seed, "dense"),
    "mask": lambda n, seed: patches(n, seed, "mask"),
  }[row.label]
  if row.patches and row.label == "class":
    make = lambda n, seed: patches(n, seed, "class")
  if row.logits:
    make = lambda n, seed: {
      **blobs(n, 5, 3, 1.0, seed),
      "logits": np.random.default_rng(seed).normal(size=(n, 3)),
    }
  kind = protocols.PATCHES if row.patches else "last"
  if row.test_variants:
    plain, noise = make, np.random.default_rng(0).normal(size=(90, 5))
    make = lambda n, seed: (
      (examples := plain(n, seed))
      | {
        "variants": {
          name: examples["features"] + i * noise[:n]
          for i, name in enumerate(row.test_variants)
        }
      }
    )
  (said,) = protocols.table(
    "x",
    {("trained", kind): (make(90, 1), make(40, 2))},
    [row],
    progress=False,
  )
  assert said["score"] == row.score and np.isfinite(said[said["score"]])
  known = row.label == "none" or row.patches  # or all of them are right
  assert known or said["standard_error"] > 0
  assert (said["protocol"], said["title"]) == (row.name, row.title)
  assert json.loads(json.dumps(said)) == said


def test_a_protocol_may_live_elsewhere():
  row = protocols.find(f"{__name__}:NORM")
  assert row is NORM
  features = {"features": np.full((7, 4), 2.0, np.float32)}
  (said,) = protocols.table(
    "x", {("trained", "last"): (features, features)}, [row], progress=False
  )
  assert said["norm"] == 4 and said["protocol"] == "norm"
  assert not said["higher_is_better"] and said["unit"] == "px"


@pytest.mark.parametrize(
  "name, message",
  [
    ("no_such_module:ROW", "cannot be imported"),
    ("json:ROW", "cannot be imported"),
    ("json:dumps", "needs a Protocol"),
    ("ridg", 'did you mean "ridge"'),
  ],
)
def test_what_is_no_protocol_is_named(name, message):
  with pytest.raises(ValueError, match=message):
    protocols.find(name)


@pytest.mark.parametrize(
  "dtype, rank, takers",
  [
    (np.int32, 0, {"class", "number", "none"}),
    (np.float32, 0, {"number", "none"}),
    (object, 0, {"class", "none"}),
    (np.int32, 1, {"class", "classes", "none"}),  # or one-hot: by its values
    (object, 1, {"classes", "none"}),
    (np.float32, 3, {"dense", "none"}),
  ],
)
def test_kinds_of_label_take_their_types(dtype, rank, takers):
  rows = [dataclasses.replace(NORM, label=kind) for kind in protocol.KINDS]
  assert {row.label for row in rows if row.takes(dtype, rank)} == takers


def test_accuracies_of_classes_go_by_their_names():
  train, test = blobs(90, 5, 3, 0.1, seed=1), blobs(40, 5, 3, 0.1, seed=2)
  (row,) = protocols.table(
    "x",
    {("trained", "last"): (train, test)},
    [knn.ROW],
    names=["ant", "bee", "cat"],
    progress=False,
  )
  assert row["per_class"] == {"ant": 100, "bee": 100, "cat": 100}
  counts = np.bincount(test["labels"]).tolist()
  names = ["ant", "bee", "cat"]
  assert row["confusion"] == {x: {x: n} for x, n in zip(names, counts)}
  assert row["classes"] == 3


def test_what_each_class_is_taken_for_by_hand():
  """Rows are the true classes; one that training lacks is a row as well."""
  train = {"labels": np.asarray([3, 5, 9])}
  test = {"labels": np.asarray([3, 3, 3, 5, 9, 9, 7])}
  scores = np.eye(3)[[0, 1, 1, 1, 0, 2, 2]]
  found = accuracy.accuracies(scores, np.asarray([3, 5, 9]), train, test)
  assert found["confusion"] == {
    "3": {"3": 1, "5": 2},
    "5": {"5": 1},
    "7": {"9": 1},
    "9": {"3": 1, "9": 1},
  }
  many = np.arange(accuracy.CONFUSED + 1)
  sides = {"labels": many}, {"labels": many}
  found = accuracy.accuracies(np.eye(len(many)), many, *sides)
  assert "confusion" not in found and len(found["per_class"]) == len(many)
