import re
import types

import numpy as np
from PIL import Image
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from jepa_jax import config as config_lib
from jepa_jax.data import labels, pipeline, scenes
from jepa_jax.evaluation import label_checks
from jepa_jax.evaluation import run as evaluation

SPECIES = ["newt", "ant", "über-bee"]


class LabelledPictures(tfds.core.GeneratorBasedBuilder):
  """Grey images with labels of every type."""

  VERSION = tfds.core.Version("1.0.0")

  def _info(self):
    features = {
      "image": tfds.features.Image(encoding_format="png"),
      "species": tfds.features.Text(),
      "kind": tfds.features.ClassLabel(names=["soft", "hard"]),
      "number": tfds.features.Scalar(tf.int64),
      "height": tfds.features.Scalar(tf.float64),
      "old": tfds.features.Scalar(tf.bool),
      "tags": tfds.features.Sequence(tf.int64),
      "words": tfds.features.Sequence(tfds.features.Text()),
      "kinds": tfds.features.Sequence(
        tfds.features.ClassLabel(names=["soft", "hard", "odd"])
      ),
      "one_hot": tfds.features.Tensor(shape=(3,), dtype=tf.float32),
      "flags": tfds.features.Tensor(shape=(4,), dtype=tf.bool),
    }
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    ranges = {"train": range(13), "test": range(13, 18)}
    return {k: self._generate_examples(v) for k, v in ranges.items()}

  def _generate_examples(self, numbers):
    for i in numbers:
      yield (
        i,
        {
          "image": np.full((9, 9, 3), i, np.uint8),
          # One name is of test images alone.
          "species": SPECIES[i % 2 if i < 13 else 2],
          "kind": i % 2,
          "number": i - 5,
          "height": i / 20,
          "old": i > 7,
          "tags": list(range(i % 3)),
          "words": ["x", "y"][: i % 3],
          "kinds": [2, 0][: i % 3],
          "one_hot": np.eye(3, dtype=np.float32)[i % 3],
          "flags": [i % 2 == 0, i % 3 == 0, True, False],
        },
      )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  root = str(tmp_path_factory.mktemp("labelled"))
  LabelledPictures(data_dir=root).download_and_prepare()
  return types.SimpleNamespace(
    source="tfds",
    name="labelled_pictures",
    split="train",
    data_dir=root,
    image_size=8,
    channels=3,
    background=(1.0, 1.0, 1.0),
    range="full",
    max_mib=9.0,
    threads=0,
    prefetch=2,
    max_unreadable=0,
  )


def read(data, split, *wanted, names=None):
  """Labels in the order of the images' numbers, and those numbers."""
  dataset = pipeline.evaluation_dataset(
    data, batch_size=4, labels=wanted, names=names, split=split
  )
  batches = list(dataset.as_numpy_iterator())
  join = lambda pick: np.concatenate([pick(x)[x["valid"]] for x in batches])
  number = join(lambda x: x["image"][:, 0, 0, 0]).astype(int)
  order = np.argsort(number)
  return number[order], {
    name: join(lambda x, name=name: x["labels"][name])[order] for name in wanted
  }


def test_labels_keep_their_type_and_their_values(data):
  number, found = read(data, "train", "number", "height", "old", "kind")
  assert number.tolist() == list(range(13))
  assert found["number"].dtype == found["old"].dtype == np.int32
  assert found["height"].dtype == np.float32
  np.testing.assert_array_equal(found["number"], number - 5)
  np.testing.assert_allclose(found["height"], number / 20, rtol=1e-6)
  np.testing.assert_array_equal(found["old"], number > 7)
  np.testing.assert_array_equal(found["kind"], number % 2)


def test_text_becomes_classes_that_all_splits_number_alike(data):
  names = labels.class_names(data, ["train", "test"], "species")
  assert names == sorted(SPECIES)
  for split in ("train", "test"):
    number, found = read(data, split, "species", names={"species": names})
    assert found["species"].dtype == np.int32
    assert [names[x] for x in found["species"]] == [
      SPECIES[i % 2 if i < 13 else 2] for i in number
    ]
  _, found = read(data, "test", "species")
  assert set(found["species"]) == {SPECIES[2].encode()}


def test_classes_have_the_names_that_the_data_set_gives(data, tmp_path):
  assert labels.class_names(data, ["train"], "kind") == ["soft", "hard"]
  assert labels.class_names(data, ["train"], "number") is None
  for name in ("train/dog/x.png", "test/cat/y.png"):
    (tmp_path / name).parent.mkdir(parents=True)
    Image.new("L", (9, 9)).save(tmp_path / name)
  folder = types.SimpleNamespace(
    **{**vars(data), "source": "folder", "name": str(tmp_path)}
  )
  names = labels.class_names(folder, ["train", "test"], "label")
  assert names == ["cat", "dog"]
  _, found = read(folder, "train", "label", names={"label": names})
  assert found["label"].tolist() == [1]


def test_the_nearest_object_is_a_number_that_distance_bins():
  depth = tf.constant([[3.0, 4, 11.5], [5, 6, 8.75], [1, 2, 12]])
  example = {"objects": {"pixel_coords": depth, "shape": tf.zeros([3])}}
  nearest = labels.function("nearest")(example)
  assert nearest.dtype == tf.float32 and float(nearest) == 8.75
  assert int(scenes.distance(example)) == np.digitize(
    8.75, scenes.DISTANCE_EDGES, right=True
  )


@pytest.mark.parametrize(
  "features, known",
  [
    ({}, "there are: none"),
    ({"label": 1}, "there are: label"),
    ({"objects": {}, "file": 1}, "count, distance, file, nearest, objects"),
    ({"objects": {}, "depth": 1}, "count, depth, distance, nearest, objects"),
  ],
)
def test_only_labels_that_can_be_had_are_named(features, known):
  with pytest.raises(ValueError, match=f'no label "colour"; .*{known}'):
    labels.function("colour")(features)


@pytest.mark.parametrize(
  "label, names, expected",
  [
    ("tags", ["0", "1"], lambda i: [i % 3 >= 1, i % 3 == 2]),
    ("words", ["x", "y"], lambda i: [i % 3 >= 1, i % 3 == 2]),
    (
      "kinds",
      ["soft", "hard", "odd"],
      lambda i: [i % 3 == 2, False, i % 3 >= 1],
    ),
    ("flags", None, lambda i: [i % 2 == 0, i % 3 == 0, True, False]),
    ("one_hot", None, lambda i: np.eye(3)[i % 3]),
  ],
)
def test_several_classes_an_image_become_a_truth_value_each(
  data, label, names, expected
):
  assert labels.class_names(data, ["train", "test"], label) == names
  number, found = read(data, "test", label, names={label: names})
  np.testing.assert_array_equal(
    found[label], np.asarray([expected(i) for i in number], np.float32)
  )


def test_a_sample_of_labels_is_spread_over_all_images(data):
  values, whole = labels.sample(data, "train", "number", limit=4)
  assert not whole and len(values) == 4 and len(set(map(int, values))) == 4
  values, whole = labels.sample(data, "train", "species")
  assert whole and set(values) == {name.encode() for name in SPECIES[:2]}


# --- evaluations of them ---------------------------------------------------


def settings_of(label, protocols, train="train", test="test"):
  return config_lib.evaluation(
    label, protocols=protocols, train=train, test=test
  )


@pytest.mark.parametrize(
  "label, protocol, complaint",
  [
    (
      "height",
      "linear",
      "is float32 .* takes classes.*fits \\(ridge",
    ),
    ("height", "ridge", ""),
    ("species", "linear", ""),
    ("species", "ridge", "takes numbers"),
    ("species", "multilabel", "takes any number of classes"),
    ("one_hot", "linear", ""),
    ("one_hot", "multilabel", ""),
    ("flags", "knn", "classes of 4.*use multilabel"),
    ("flags", "multilabel", ""),
    ("words", "multilabel", ""),
    ("tags", "multilabel", ""),
    ("kinds", "linear", r"takes classes.*fits \(multilabel\)"),
    ("old", "linear", ""),
    ("nothing", "linear", 'no label "nothing"'),
  ],
)
def test_labels_are_held_to_a_protocol_before_any_step(
  config, data, label, protocol, complaint
):
  config.data.update(vars(data))
  config.evaluations = {"mine": settings_of(label, (protocol,))}
  if not complaint:
    return evaluation.check_data(config)
  with pytest.raises(ValueError, match=complaint) as error:
    evaluation.check_data(config)
  assert "mine" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
  "label, protocol, train, test, line",
  [
    ("species", "linear", "train", "test", "5 of 5 test.*über-bee.*as errors"),
    ("kind", "knn", "train[:1]", "test", "of one class, (soft|hard)"),
    ("number", "ridge", "train[:1]", "test", "is -?\\d for all 1 images"),
  ],
)
def test_what_is_odd_of_classes_is_one_line(
  config, data, capsys, label, protocol, train, test, line
):
  config.data.update(vars(data))
  config.evaluations = {"mine": settings_of(label, (protocol,), train, test)}
  try:
    evaluation.check_data(config)
    (said,) = [
      x for x in capsys.readouterr().err.splitlines() if "learns" not in x
    ]
  except ValueError as error:
    said = str(error)
  assert re.search(line, said) and "mine" in said and "\n" not in said


@pytest.mark.parametrize(
  "train, test, line",
  [
    ([0, 2, 2, 0], [2], "^no training image of b$"),
    ([0, 1, 2], [2, 2], "^one training image a class"),
    ([0, 1, 2, 2], [0, 3, 4, 3], r"^3 of 4 test .* \(3, 4\); they count as e"),
    ([1, 1, 1], [0, 1], "^all 3 training images are of one class, b; .*2"),
    ([[0, 1], [1, 0], [0, 1]], [[1, 0]], "^$"),  # one-hot
  ],
)
def test_classes_that_cannot_be_learned_are_one_line(train, test, line):
  sides = [[np.asarray(x, np.int32) for x in side] for side in (train, test)]
  try:
    said = label_checks._classes(
      *sides, True, list("abc") if "b" in line else None
    )
  except ValueError as error:
    said = [str(error)]
  assert any(re.search(line, note) for note in said or [""])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_number_that_is_none_is_refused(bad):
  with pytest.raises(ValueError, match="1 of 3 images .* no finite number"):
    label_checks._numbers([1.0, bad, 2.0], False)


@pytest.mark.parametrize(
  "label, classes, words",
  [
    ("kind", 1, "has 2 classes and method.classes is 1; set --config.method."),
    ("species", 1, "has 2 classes and method.classes is 1"),
    ("old", 1, "has 2 classes and method.classes is 1"),
    ("number", 20, "is -5 for an image; classes count from 0 on"),
    ("height", 20, "is float32; the objective learns classes"),
    ("one_hot", 3, "is float32; the objective learns classes"),
    ("kind", 2, ""),
    ("old", 5, ""),
    ("species", 2, ""),
  ],
)
def test_labels_to_learn_are_classes_of_the_objective(
  data, label, classes, words
):
  config = types.SimpleNamespace(**vars(data), label=label)
  names = labels.class_names(config, ["train"], label)
  if not words:
    labels.check_classes(config, names, classes)
    return
  with pytest.raises(ValueError, match=f'data.label "{label}" {words}'):
    labels.check_classes(config, names, classes)
