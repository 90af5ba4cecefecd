"""Probes of patches: known answers, and the maps of scenes."""

import conftest
import numpy as np
import pytest
import test_probes

from jepa_jax.data import scenes
from jepa_jax.evaluation import run
from jepa_jax.evaluation.protocols import attentive, dense
from jepa_jax.render import sampling, shading


def test_a_map_that_features_say_is_found():
  train, test = (test_probes.patches(n, n, "dense") for n in (300, 101))
  found = dense.depth(train, test)
  assert found["delta"] == 100 and found["rmse"] < 0.1
  assert found["baseline_rmse"] == pytest.approx(np.sqrt(2 / 3), rel=0.1)
  assert (found["n_test"], found["patches"]) == (101, 6)


def test_a_map_that_features_do_not_say_scores_as_its_mean():
  train, test = (test_probes.patches(n, n, "dense") for n in (300, 101))
  for side in (train, test):
    side["labels"] = side["labels"][::-1]
  found = dense.depth(train, test)
  assert found["rmse"] == pytest.approx(found["baseline_rmse"], rel=0.05)
  # Always 2: right where it is 2, wrong where it is 1 or 3.
  share = np.isclose(dense._means(test), 2, atol=0.3).mean()
  assert found["delta"] == pytest.approx(100 * share, abs=3)


def test_patches_are_classed_and_the_commonest_pixel_counts():
  train, test = (test_probes.patches(n, n, "mask") for n in (300, 101))
  test["labels"] = test["labels"].copy()
  test["labels"][:, ::4, ::4] = 5  # one of 16 pixels
  found = dense.segmentation(train, test)
  assert found["miou"] == 100 and [*found["per_class"]] == ["0", "5", "10"]
  assert found["baseline"] == pytest.approx(100 / 9, abs=1.5)  # 1/3, 0, 0


def test_intersections_over_unions_by_hand():
  true, said = np.asarray([0, 0, 0, 2, 2, 7]), np.asarray([0, 0, 2, 2, 7, 9])
  found = dense.intersections_over_unions(said, true)
  assert found == {0: 2 / 3, 2: 1 / 3, 7: 0}


def test_maps_of_another_shape_are_refused():
  side = test_probes.patches(4, 1, "mask")
  side["grid"] = (3, 2)
  with pytest.raises(ValueError, match="8 x 12 pixels do not lie on .* 3 x 2"):
    dense.segmentation(side, side)
  with pytest.raises(ValueError, match="needs .images, patches, features"):
    dense.depth({**side, "features": side["features"][:, 0]}, side)


def test_one_query_finds_the_patch_that_tells():
  """The class is that of a marked patch: their mean cannot say which."""
  train, test = (test_probes.patches(n, n, "class") for n in (400, 150))
  found = attentive.attentive_probe(train, test, rates=(1e-2,))
  assert found["top1"] > 97 and found["lr"] == 1e-2


def test_shapes_are_those_that_were_drawn():
  import tensorflow as tf

  from jepa_jax.render import examples, world

  for index in range(3):
    scene = sampling.sample_scene(0, "train", index)
    *_, owner = shading.render(scene, 40)
    example = examples.example(0, "train", index, 40)
    objects = {
      "shape": [world.SHAPES.index(x["shape"]) for x in example["objects"]],
      "size": [[*world.SIZES].index(x["size"]) for x in example["objects"]],
      "3d_coords": np.stack([x["3d_coords"] for x in example["objects"]]),
    }
    said = scenes.shapes(
      {
        "depth": tf.constant(example["depth"]),
        "objects": {k: tf.constant(v) for k, v in objects.items()},
      }
    )
    true = np.where(owner < 0, 0, 1 + np.asarray(objects["shape"])[owner])
    assert said.shape == (40, 40) and said.dtype == tf.int32
    assert np.mean(said == true) > 0.985 and len(np.unique(true)) > 1


def test_patches_of_all_encoders_reach_the_protocols(monkeypatch):
  """Each is float16, with its grid; those averaged are there as well."""
  config = conftest.small_config()
  settings = run.config_lib.evaluation("depth", protocols=("depth", "knn"))
  found = {
    split: {
      "features": {
        "trained": np.zeros((7, 28), np.float32),
        "trained patches": np.zeros((7, 25, 28), np.float16),
        "pixels": np.zeros((7, 9), np.float32),
        "pixels patches": np.zeros((7, 25, 192), np.float16),
      },
      "labels": {"depth": np.zeros((7, 40, 40, 1))},
    }
    for split in ("train", "test")
  }
  settings.update(features=("last",), baselines=("pixels",))
  widths = {"trained": 28, "pixels": 0}
  sides = run._examples(config, settings, found, widths)
  assert list(sides) == [
    ("trained", "last"), ("trained", "patches"),
    ("pixels", "pixels"), ("pixels", "patches"),
  ]  # fmt: skip
  train, _ = sides["pixels", "patches"]
  assert train["features"].shape == (7, 25, 192) and train["grid"] == (5, 5)
