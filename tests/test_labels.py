import types

import numpy as np
from PIL import Image
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from jepa_jax.data import labels, pipeline, scenes

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
