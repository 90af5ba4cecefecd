import io
import os
import pathlib
import types

import numpy as np
from PIL import Image
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from jepa_jax.data import records, sources

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


def test_names_are_in_the_order_of_whole_paths(tmp_path):
  names = ["a/2.png", "a-b/1.png", "a/10.png", "b/c.d/1.png", "b/c/1.png"]
  names += ["b/c-/1.png", "b/c.png", "ü/é.png"]
  for name in names:
    save(tmp_path / name)
  source = sources.open_source(config("folder", str(tmp_path)))
  found = [source.name(i) for i in range(len(source))]
  assert found == [str(tmp_path / name) for name in sorted(names)]
  assert source.classes == ["a", "a-b", "b", "ü"]
  for i, name in enumerate(sorted(names)):
    label = source.features(tf.constant(b""), tf.constant(i))["label"]
    assert source.classes[int(label)] == name.split("/")[0]


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


def test_a_long_listing_is_kept_until_a_folder_changes(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(records, "_CACHE_SECONDS", 0.0)
  root = tmp_path / "images"
  for name in ("a/x.png", "b/c/y.png"):
    save(root / name)
  wanted = [str(root / name) for name in ("a/x.png", "b/c/y.png")]
  calls = []
  list_folder = sources._list_folder
  monkeypatch.setattr(
    sources,
    "_list_folder",
    lambda path: calls.append(path) or list_folder(path),
  )

  def names():
    source = sources.open_source(config("folder", str(root)))
    assert source.classes == ["a", "b"]
    return [source.name(i) for i in range(len(source))]

  assert names() == names() == wanted
  assert len(calls) == 1
  save(root / "b/c/z.png")
  os.utime(root / "b/c", ns=(1, 1))  # however coarse the clock is
  assert names() == [*wanted, str(root / "b/c/z.png")]
  (root / "a/x.png").unlink()
  save(root / "a/v.png")
  os.utime(root / "a", ns=(2, 2))
  assert names()[0] == str(root / "a/v.png")
  assert len(calls) == 3


def test_a_link_to_a_folder_above_does_not_loop(tmp_path):
  save(tmp_path / "a/x.png")
  (tmp_path / "a/up").symlink_to(tmp_path)
  source = sources.open_source(config("folder", str(tmp_path)))
  assert len(source) == 1


# --- mixtures ---------------------------------------------------------------


def test_a_mixture_has_the_images_of_its_parts(tiny, tmp_path):
  for i in range(3):
    save(tmp_path / f"{i}.png", i)
  name = f"0.75 tfds:tiny_pictures + 0.25 folder:{tmp_path}"
  source = sources.open_source(config("mixture", name, data_dir=tiny))
  assert len(source) == 40
  assert source.name(36).startswith("tiny_pictures")
  assert source.name(37) == str(tmp_path / "0.png")
  images = source.images(source.read(np.asarray([38, 5])))
  assert Image.open(io.BytesIO(images[0])).size == (9, 7)
  assert Image.open(io.BytesIO(images[1])).format == "JPEG"


@pytest.mark.parametrize(
  "name", ["tiny_pictures", "0 folder:/x", "1 nothing:x", "1 folder:/x + y"]
)
def test_a_mixture_that_is_none_is_explained(name):
  with pytest.raises(ValueError, match="0.7 tfds:imagenet2012"):
    sources.open_source(config("mixture", name))
