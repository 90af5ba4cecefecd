"""Evaluations from a config to rows: data, labels, protocols, scores."""

import dataclasses
import types

import conftest
import ml_collections
import numpy as np
from PIL import Image
import pytest

from jepa_jax import config as config_lib
from jepa_jax.data import folder as folder_lib
from jepa_jax.evaluation import encoders, protocols, scores
from jepa_jax.evaluation import run as evaluation
from jepa_jax.evaluation.protocols import protocol
from jepa_jax.training import distributed, sharding
from jepa_jax.training import program as program_lib


@pytest.fixture
def run_config(config, scenes_dir):
  """A tiny run on scenes; the encoder's parameters are random."""
  config.data.data_dir = scenes_dir
  config.data.num_scenes = (240, 100)
  config.encoder.depth = 4
  return config


def noise(root, count=80):
  """PNGs of noise in two classes: nothing can be learned of them."""
  random = np.random.default_rng(0)
  for i in range(count):
    path = root / f"{'yes' if i % 2 else 'no'}/{i:03}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = random.integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(pixels).save(path)
  return root


@pytest.fixture(scope="module")
def compiled():
  """A program and its state: evaluations differ by their config alone."""
  config = conftest.small_config()
  config.encoder.depth = 4
  program = program_lib.build(config, sharding.make_mesh(config.mesh))
  return program, program.init(config.seed)


@pytest.fixture
def evaluate(compiled):
  program, state = compiled

  def run(config):
    evaluation.check(config)
    evaluation.check_data(config)
    frozen = ml_collections.FrozenConfigDict(config)
    return evaluation.evaluate(
      dataclasses.replace(program, config=frozen), state
    )

  return run


def test_the_distance_of_the_nearest_object_is_regressed(run_config, evaluate):
  run_config.evaluations.near = config_lib.evaluation(
    "nearest", protocols=("ridge",)
  )
  run_config.evaluations.near.features = ("last",)
  rows = evaluate(run_config)
  assert [(r["encoder"], r["features"]) for r in rows] == [
    ("trained", "last"),
    ("random", "last"),
    ("pixels", "pixels"),
  ]
  for row in rows:
    assert (row["score"], row["n_train"], row["n_test"]) == ("r2", 240, 100)
    assert row["rmse"] == pytest.approx(
      row["baseline_rmse"] * np.sqrt(1 - row["r2"]), rel=0.05
    )
  # Even a random encoder sees a part of it; distances vary by about one unit.
  assert 0.1 < rows[0]["r2"] < 1 and 0.3 < rows[2]["r2"] < 1
  assert 0.4 < rows[0]["baseline_rmse"] < 3
  assert scores.scores(rows) == {"eval/near/ridge last": rows[0]["r2"]}


def test_noise_is_classified_at_chance(run_config, evaluate, tmp_path, capsys):
  root = noise(tmp_path / "images")
  run_config.evaluations.noise = config_lib.evaluation(
    "label",
    train="train[:50%]",
    test="train[50%:]",
    source="folder",
    name=str(root),
    protocols=("knn",),
  )
  rows = evaluate(run_config)
  for row in rows:
    assert 25 < row["top1"] < 75, row
    assert set(row["per_class"]) == {"no", "yes"}
    assert 70 <= row["n_train"] + row["n_test"] < 80  # a tenth is "test"
  said = capsys.readouterr().err
  assert "learns from" in said and "(train[50%:])" in said and str(root) in said


@pytest.mark.parametrize(
  "train, test, shared",
  [
    ("train", "train", 74),
    ("train[:60%]", "train[40%:]", 14),
    ("all", "test", 6),
  ],
)
def test_sides_that_share_images_are_refused(
  run_config, tmp_path, train, test, shared
):
  root = noise(tmp_path / "images")
  run_config.evaluations.noise = config_lib.evaluation(
    "label", train=train, test=test, source="folder", name=str(root)
  )
  with pytest.raises(ValueError, match="share.* images") as error:
    evaluation.check_data(run_config)
  assert f"share {shared} images" in str(error.value)
  run_config.evaluations = {
    "count": config_lib.evaluation("count", test="train")
  }
  with pytest.raises(ValueError, match="share 240 images"):
    evaluation.check_data(run_config)


def test_images_are_decoded_once_for_all_encoders_and_labels(
  run_config, evaluate, tmp_path, monkeypatch
):
  reads = []
  read = folder_lib.FolderSource.read
  monkeypatch.setattr(
    folder_lib.FolderSource,
    "read",
    lambda self, index: reads.extend(index.tolist()) or read(self, index),
  )
  root = noise(tmp_path / "images", 30)
  for name in ("one", "two"):
    run_config.evaluations[name] = config_lib.evaluation(
      "label", source="folder", name=str(root), protocols=("knn",)
    )
  rows = evaluate(run_config)
  assert [r["evaluation"] for r in rows] == ["one"] * 5 + ["two"] * 5
  batch = 4  # the last of each split is padded
  sizes = [
    len(folder_lib.FolderSource(str(root), x)) for x in ("train", "test")
  ]
  assert len(reads) == sum(-(-size // batch) * batch for size in sizes)


@pytest.mark.parametrize(
  "label, protocol_name, message",
  [
    (
      "nearest",
      "linear",
      'near.*"nearest" is float32.*classes.*fits \\(ridge',
    ),
    ("depth", "ridge", '"depth" is float32 of shape \\(40, 40, 1\\).*numbers'),
    ("file_name", "ridge", '"file_name" is string.*numbers.*\\(linear, knn, '),
    ("colour", "knn", 'no label "colour"'),
  ],
)
def test_a_label_that_does_not_fit_is_refused_before_any_step(
  run_config, label, protocol_name, message
):
  run_config.evaluations.near = config_lib.evaluation(
    label, protocols=(protocol_name,)
  )
  evaluation.check(run_config)
  with pytest.raises(ValueError, match=message) as error:
    evaluation.check_data(run_config)
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("protocols", ("svm",), 'protocol of evaluation near "svm"; known: linear'),
    ("features", ("first",), "known: last, last4"),
    ("features", ("last4",), 'encoder of 3; leave "last4" out'),
    ("baselines", ("human",), "known: random, pixels"),
  ],
)
def test_misuse_is_named_without_any_data(run_config, key, value, message):
  run_config.encoder.depth = 3
  run_config.evaluations.near = config_lib.evaluation("nearest")
  run_config.evaluations.near.features = ("last",)
  run_config.evaluations.near[key] = value
  with pytest.raises(ValueError, match=message):
    evaluation.check(run_config)


def test_the_score_of_the_best_checkpoint_is_known_before_training(run_config):
  run_config.evaluations.near = config_lib.evaluation(
    "nearest", protocols=("ridge",)
  )
  run_config.checkpoint.best_metric = "near/ridge/last4"
  evaluation.check(run_config)
  run_config.checkpoint.best_metric = "near/linear/last"
  with pytest.raises(ValueError, match="known: near/ridge/last, near/ridge/la"):
    evaluation.check(run_config)


def test_an_objective_without_an_encoder_is_not_evaluated(run_config):
  with pytest.raises(ValueError, match='no network "encoder".*: decoder, head'):
    encoders.check(run_config, {"decoder": None, "head": None})


def spread(train, test, *, seed):
  del seed
  assert "labels" not in train and "labels" not in test
  return {"spread": float(np.std(test["features"]))}


SPREAD = protocol.Protocol(
  name="spread",
  title="spread",
  run=spread,
  score="spread",
  unit="",
  higher_is_better=False,
  label="none",
)


def test_a_protocol_from_elsewhere_needs_no_label(run_config, evaluate):
  run_config.evaluations.near = config_lib.evaluation(
    "", protocols=(f"{__name__}:SPREAD",)
  )
  rows = evaluate(run_config)
  assert all(row["spread"] > 0 for row in rows)
  assert scores.best(rows, run_config) == -rows[0]["spread"]


def test_patches_are_probed_beside_what_is_averaged(run_config, evaluate):
  run_config.evaluations.near = config_lib.evaluation(
    "shapes", protocols=("segmentation", "health", "lidar")
  )
  run_config.evaluations.near.features = ("last",)
  rows = evaluate(run_config)
  assert [(r["protocol"], r["encoder"], r["features"]) for r in rows] == [
    ("segmentation", "trained", "patches"),
    ("segmentation", "random", "patches"),
    ("segmentation", "pixels", "pixels"),
    ("health", "trained", "last"),
    ("health", "random", "last"),
    ("health", "pixels", "pixels"),
    ("lidar", "trained", "last"),
    ("lidar", "random", "last"),
    ("lidar", "pixels", "pixels"),
  ]
  assert all(r["views"] == 10 and r["lidar"] > 1 for r in rows[6:])
  assert rows[6]["lidar"] != rows[8]["lidar"]
  assert all(0 < row["miou"] < 100 for row in rows[:3])
  run_config.checkpoint.best_metric = "near/segmentation/patches"
  evaluation.check(run_config)
  assert scores.best(rows, run_config) == rows[0]["miou"]


def test_the_best_checkpoint_is_chosen_by_the_row():
  row = {"evaluation": "x", "features": "last", "encoder": "trained"}
  rows = [
    {
      **row,
      "protocol": "a",
      "score": "top1",
      "higher_is_better": True,
      "top1": 4.0,
    },
    {
      **row,
      "protocol": "b",
      "score": "rmse",
      "higher_is_better": False,
      "rmse": 3.0,
    },
    {**row, "protocol": "a", "encoder": "random", "score": "top1", "top1": 9.0},
  ]
  choose = lambda name: types.SimpleNamespace(
    checkpoint=types.SimpleNamespace(best_metric=name)
  )
  assert scores.best(rows, choose("")) == 4
  assert scores.best(rows, choose("x/b/last")) == -3
  with pytest.raises(ValueError, match="known: x/a/last, x/b/last"):
    scores.best(rows, choose("x/c/last"))
  assert scores.best([], choose("")) is None
  assert scores.scores(rows) == {"eval/x/a last": 4, "eval/x/b last": 3}


def test_protocols_of_shipped_experiments_and_defaults_are_in_the_table():
  assert set(config_lib.evaluation("x").protocols) <= set(protocols.PROTOCOLS)


def test_images_that_cannot_be_read_are_counted_aloud(
  run_config, evaluate, tmp_path, capsys
):
  root = noise(tmp_path / "images")
  broken = [root / "no/000.png", root / "yes/003.png"]
  for path in broken:
    path.write_bytes(path.read_bytes()[:60])
  run_config.evaluations.noise = config_lib.evaluation(
    "label", source="folder", name=str(root), protocols=("knn",)
  )
  run_config.evaluations.noise.baselines = ()
  run_config.evaluations.noise.features = ("last",)
  (row,) = evaluate(run_config)
  assert (row["skipped"], row["n_train"] + row["n_test"]) == (2, 78)
  said = capsys.readouterr().err
  assert all(f"skipped unreadable image {path}: " in said for path in broken)
  assert "leave out" in said and "which cannot be read" in said


def test_an_evaluation_ends_between_batches_and_between_probes(
  run_config, compiled
):
  program, state = compiled
  run_config.evaluations.count = config_lib.evaluation("count")
  frozen = ml_collections.FrozenConfigDict(run_config)
  program = dataclasses.replace(program, config=frozen)
  batches = (240 + 100) // 4
  for last in (3, batches + 2):
    calls = []

    def check(calls=calls, last=last):
      calls.append(1)
      if len(calls) == last:
        raise distributed.Stopped

    with pytest.raises(distributed.Stopped):
      evaluation.evaluate(program, state, check=check)
    assert len(calls) == last
