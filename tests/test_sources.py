import configparser
import io
import pathlib
import sys
import types

import conftest
import numpy as np
from packaging import requirements
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
    source=source,
    name=name,
    split=split,
    data_dir=data_dir,
    image_size=8,
    max_mib=9,
  )


def label_of(record):
  return (
    tf.train.Example.FromString(record)
    .features.feature["label"]
    .int64_list.value[0]
  )


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
  stored = source.read(np.arange(37))
  for i, (record, example) in enumerate(zip(stored, expected, strict=True)):
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
    ({"name": "cifar10"}, ["not prepared", "prepare --name cifar10"]),
    ({"name": "imagenet2012"}, ["not prepared", "by hand"]),
    ({"split": "valid"}, ['no split "valid"', "test, train"]),
    ({"split": "train[:0]"}, ["no example"]),
    ({"source": "tdfs"}, ["tdfs", "tfds, folder, scenes, mixture"]),
  ],
)
def test_what_is_not_there_is_said_in_one_line(tiny, changes, words_of_it):
  with pytest.raises(ValueError) as error:
    sources.open_source(config(data_dir=tiny, **changes))
  for word in words_of_it:
    assert word in str(error.value)
  assert "\n" not in str(error.value)


def test_array_record_files_are_read_the_same(tmp_path, tiny):
  builder = TinyPictures(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  for split in ("train", "train[3:9]"):
    ours = sources.TfdsSource(builder, split)
    wanted = sources.open_source(config(split=split, data_dir=tiny))
    assert len(ours) == len(wanted)
    index = np.asarray([4, 0, 4])
    assert ours.images(ours.read(index)) == wanted.images(wanted.read(index))


def test_without_its_reader_array_record_files_alone_are_refused(
  tmp_path, tiny, monkeypatch
):
  builder = TinyPictures(data_dir=tmp_path, file_format="array_record")
  builder.download_and_prepare()
  monkeypatch.setitem(sys.modules, "array_record.python", None)
  with pytest.raises(ValueError, match="not installed.*format=tfrecord"):
    sources.TfdsSource(builder, "train")
  assert len(sources.open_source(config(split="train", data_dir=tiny)))


@pytest.mark.parametrize(
  ("system", "machine", "has"),
  [
    ("linux", "x86_64", True),
    ("linux", "aarch64", False),
    ("darwin", "arm64", True),
    ("darwin", "x86_64", False),
    ("win32", "AMD64", False),
  ],
)
def test_array_record_is_installed_where_there_is_one(system, machine, has):
  setup = configparser.ConfigParser()
  setup.read(conftest.ROOT / "setup.cfg")
  lines = setup["options"]["install_requires"].splitlines()
  needed = [
    requirements.Requirement(line)
    for line in lines
    if line.startswith(("array_record", "tensorflow"))
  ]
  here = {"sys_platform": system, "platform_machine": machine}
  names = [
    x.name for x in needed if x.marker is None or x.marker.evaluate(here)
  ]
  assert ("array_record" in names) == has
  # One build of TensorFlow.
  assert sum(x in ("tensorflow", "tensorflow-cpu") for x in names) == 1


def test_files_without_random_access_are_refused(tmp_path):
  builder = TinyPictures(data_dir=tmp_path)
  builder.download_and_prepare()
  info = types.SimpleNamespace(
    filename="x-train.riegeli-00000-of-00001", skip=0, take=-1
  )
  split = types.SimpleNamespace(file_instructions=[info], num_examples=1)
  fake = types.SimpleNamespace(
    info=types.SimpleNamespace(
      features=builder.info.features,
      full_name="x",
      splits={"train": split},
    )
  )
  with pytest.raises(ValueError, match="riegeli.*array_record"):
    sources.TfdsSource(fake, "train")


def test_fashion_mnist_is_read_as_it_is():
  if not SHARED.exists():
    pytest.skip(f"{SHARED} is not here")
  source = sources.open_source(
    config(name="fashion_mnist", split="train[:1%]", data_dir=str(SHARED))
  )
  assert len(source) == 600
  image = tf.io.decode_png(source.images(source.read(np.asarray([3])))[0])
  assert image.shape == (28, 28, 1)


def save(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (9, 7), (value, 0, 0)).save(path)


# --- mixtures ---------------------------------------------------------------


def test_a_mixture_has_the_images_of_its_parts(tiny, tmp_path):
  for i in range(3):
    save(tmp_path / f"train/{i}.png", i)
  name = f"0.75 tfds:tiny_pictures + 0.25 folder:{tmp_path}"
  source = sources.open_source(config("mixture", name, data_dir=tiny))
  assert len(source) == 40
  assert source.name(36).startswith("tiny_pictures")
  assert source.name(37) == str(tmp_path / "train/0.png")
  images = source.images(source.read(np.asarray([38, 5])))
  assert Image.open(io.BytesIO(images[0])).size == (9, 7)
  assert Image.open(io.BytesIO(images[1])).format == "JPEG"


@pytest.mark.parametrize(
  "name", ["tiny_pictures", "0 folder:/x", "1 nothing:x", "1 folder:/x + y"]
)
def test_a_mixture_that_is_none_is_explained(name):
  with pytest.raises(ValueError, match="0.7 tfds:imagenet2012"):
    sources.open_source(config("mixture", name))


def test_slices_of_tfds_share_records_where_they_overlap(tiny):
  of = lambda split: sources.open_source(config(split=split, data_dir=tiny))
  assert sources.shared(of("train[:20]"), of("train[20:]")) == 0
  assert sources.shared(of("train[:20]"), of("train[15:]")) == 5
  assert sources.shared(of("train"), of("test")) == 0
  assert sources.shared(of("train[:3]+train[:5]"), of("train")) == 5


def test_splits_of_a_mixture_are_those_of_its_parts(tiny, tmp_path):
  for i in range(30):
    save(tmp_path / f"{i}.png", i)
  name = f"1 tfds:tiny_pictures + 1 folder:{tmp_path}"
  of = lambda split: sources.open_source(
    config("mixture", name, split=split, data_dir=tiny)
  )
  assert len(of("train")) + len(of("test")) == 37 + 5 + 30
  assert sources.shared(of("train"), of("test")) == 0
  assert sources.shared(of("train[:50%]"), of("train[50%:]")) == 0
