import io
import pathlib
import types

import numpy as np
from PIL import Image
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from jepa_jax.data import sources

SHARED = pathlib.Path(__file__).parents[2] / "shared/data/tfds"


class TinyPictures(tfds.core.GeneratorBasedBuilder):
  """JPEG images of different sizes, each with its number as its label."""

  VERSION = tfds.core.Version("1.2.0")

  def _info(self):
    features = {
        "image": tfds.features.Image(encoding_format="jpeg"),
        "label": tfds.features.ClassLabel(num_classes=40),
        "objects": tfds.features.Sequence({"size": tf.int64}),
    }
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    counts = {"train": 37, "test": 5}
    return {k: self._generate_examples(n) for k, n in counts.items()}

  def _generate_examples(self, count):
    for i in range(count):
      image = np.full((20 + i, 30, 3), 6 * i, np.uint8)
      yield i, {"image": image, "label": i, "objects": {"size": [i, i + 1]}}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
  """data_dir with tiny_pictures prepared."""
  data_dir = tmp_path_factory.mktemp("tfds")
  TinyPictures(data_dir=data_dir).download_and_prepare()
  return str(data_dir)


def config(source="tfds", name="tiny_pictures", split="train", data_dir=""):
  return types.SimpleNamespace(
      source=source, name=name, split=split, data_dir=data_dir, image_size=8
  )


def label_of(record):
  return tf.train.Example.FromString(record).features.feature[
      "label"
  ].int64_list.value[0]


# --- TFDS -------------------------------------------------------------------


def test_tfds_records_are_those_of_the_data_set_in_its_order(tiny):
  source = sources.open_source(config(data_dir=tiny))
  assert len(source) == 37
  builder = TinyPictures(data_dir=tiny)
  expected = builder.as_dataset(
      split="train",
      decoders={"image": tfds.decode.SkipDecoding()},
      read_config=tfds.ReadConfig(interleave_cycle_length=1),
  ).as_numpy_iterator()
  records = source.read(np.arange(37))
  for i, (record, example) in enumerate(zip(records, expected, strict=True)):
    features = source.features(tf.constant(record), tf.constant(i))
    assert "image" not in features
    assert features["label"].numpy() == example["label"]
    np.testing.assert_array_equal(
        features["objects"]["size"], example["objects"]["size"]
    )
    assert source.images([record]) == [example["image"]]


def test_tfds_reads_any_order_with_repeats(tiny):
  source = sources.open_source(config(data_dir=tiny))
  every = source.read(np.arange(37))
  index = np.asarray([36, 0, 0, 17])
  assert source.read(index) == [every[i] for i in index]
  assert source.name(17) == "tiny_pictures/1.2.0 train record 17"


def test_tfds_slices_are_parts_of_the_split(tiny):
  def labels(split):
    source = sources.open_source(config(split=split, data_dir=tiny))
    return [label_of(x) for x in source.read(np.arange(len(source)))]

  every = labels("train")
  assert sorted(every) == list(range(37))
  assert labels("train[:10]") == every[:10]
  assert labels("train[10:]") == every[10:]
  assert labels("train[5:7]+train[30:]") == every[5:7] + every[30:]
  assert len(labels("train[:10%]")) == 4
  assert sorted(labels("test")) == list(range(5))


def test_tfds_finds_what_another_version_or_no_code_left_there(tiny, tmp_path):
  old = tmp_path / "fashion_mnist/2.9.9"
  old.parent.mkdir()
  old.symlink_to(pathlib.Path(tiny) / "tiny_pictures/1.2.0")
  assert len(sources.find_builder("fashion_mnist", str(tmp_path)).info.splits)


@pytest.mark.parametrize(
    "changes, words_of_it",
    [
        ({"name": "tiny_picture"}, ["unknown", "nearest: tiny_pictures"]),
        ({"name": "no/such"}, ["unknown", "tiny_pictures"]),
        ({"name": "cifar10"}, ["not prepared", "tfds build cifar10"]),
        ({"name": "imagenet2012"}, ["not prepared", "by hand"]),
        ({"split": "valid"}, ['no split "valid"', "test, train"]),
        ({"split": "train[:0]"}, ["no example"]),
        ({"source": "tdfs"}, ["tdfs", "tfds, folder, scenes"]),
    ],
)
def test_what_is_not_there_is_said_in_one_line(tiny, changes, words_of_it):
  with pytest.raises(ValueError) as error:
    sources.open_source(config(data_dir=tiny, **changes))
  for word in words_of_it:
    assert word in str(error.value)
  assert "\n" not in str(error.value)


def test_fashion_mnist_is_read_as_it_is():
  if not SHARED.exists():
    pytest.skip(f"{SHARED} is not here")
  source = sources.open_source(
      config(name="fashion_mnist", split="train[:1%]", data_dir=str(SHARED))
  )
  assert len(source) == 600
  image = tf.io.decode_png(source.images(source.read(np.asarray([3])))[0])
  assert image.shape == (28, 28, 1)


def test_scan_finds_every_record_and_refuses_a_cut_file(tmp_path):
  path = str(tmp_path / "x.tfrecord")
  records = [b"a" * n for n in (1, 0, 300, 7)]
  with tf.io.TFRecordWriter(path) as writer:
    for record in records:
      writer.write(record)
  offsets, lengths = sources.scan_tfrecord(path)
  data = pathlib.Path(path).read_bytes()
  found = [data[o : o + n] for o, n in zip(offsets, lengths)]
  assert found == records
  for cut in (1, 5, 20, 330):
    pathlib.Path(path).write_bytes(data[:-cut])
    with pytest.raises(ValueError, match="not a whole TFRecord file"):
      sources.scan_tfrecord(path)


# --- folders ----------------------------------------------------------------


def save(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (9, 7), (value, 0, 0)).save(path)


def test_folder_reads_every_image_below_it_in_sorted_order(tmp_path):
  names = ["b.png", "a/2.JPG", "a/1.jpeg", "c/d/e.bmp"]
  for name in names:
    save(tmp_path / name)
  (tmp_path / "a/notes.txt").write_text("no image")
  source = sources.open_source(config("folder", str(tmp_path)))
  assert len(source) == 4
  assert [source.name(i) for i in range(4)] == [
      str(tmp_path / name) for name in sorted(names)
  ]
  for i, data in enumerate(source.images(source.read(np.arange(4)))):
    assert Image.open(io.BytesIO(data)).size == (9, 7), i
  assert source.features(tf.constant(b""), tf.constant(0)) == {}


def test_folders_of_a_folder_are_its_classes(tmp_path):
  for name in ("cat/x.png", "dog/b/y.png", "dog/z.png", "ant/w.png"):
    save(tmp_path / name)
  source = sources.open_source(config("folder", str(tmp_path)))
  assert source.classes == ["ant", "cat", "dog"]
  labels = [
      int(source.features(tf.constant(b""), tf.constant(i))["label"])
      for i in range(4)
  ]
  assert labels == [0, 1, 2, 2]


def test_a_file_that_went_away_reads_as_empty(tmp_path):
  save(tmp_path / "a.png")
  source = sources.open_source(config("folder", str(tmp_path)))
  (tmp_path / "a.png").unlink()
  assert source.read(np.asarray([0])) == [b""]


def test_no_folder_and_an_empty_folder_are_errors(tmp_path):
  with pytest.raises(ValueError, match="no folder .*data.name"):
    sources.open_source(config("folder", str(tmp_path / "nowhere")))
  (tmp_path / "notes.txt").write_text("no image")
  with pytest.raises(ValueError, match="no image below"):
    sources.open_source(config("folder", str(tmp_path)))
