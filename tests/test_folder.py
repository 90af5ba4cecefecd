import inspect
import io
import json
import os
import socket
import sys

import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

from jepa_jax import config
from jepa_jax.data import folder, records, sources


def save(path, value=0):
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.new("RGB", (9, 7), (value, 0, 0)).save(path)


def test_folder_reads_every_image_below_it_in_sorted_order(tmp_path):
  names = ["b.png", "a/2.JPG", "a/1.jpeg", "c/d/e.bmp"]
  for name in names:
    save(tmp_path / name)
  (tmp_path / "a/notes.txt").write_text("no image")
  source = folder.FolderSource(str(tmp_path))
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
  source = folder.FolderSource(str(tmp_path))
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
  source = folder.FolderSource(str(tmp_path))
  found = [source.name(i) for i in range(len(source))]
  assert found == [str(tmp_path / name) for name in sorted(names)]
  assert source.classes == ["a", "a-b", "b", "ü"]
  for i, name in enumerate(sorted(names)):
    label = source.features(tf.constant(b""), tf.constant(i))["label"]
    assert source.classes[int(label)] == name.split("/")[0]


def test_a_file_that_went_away_reads_as_empty(tmp_path):
  save(tmp_path / "a.png")
  source = folder.FolderSource(str(tmp_path))
  (tmp_path / "a.png").unlink()
  assert source.read(np.asarray([0])) == [b""]


def test_no_folder_and_an_empty_folder_are_errors(tmp_path):
  with pytest.raises(ValueError, match="no folder .*data.name"):
    folder.FolderSource(str(tmp_path / "nowhere"))
  (tmp_path / "notes.txt").write_text("no image")
  with pytest.raises(ValueError, match="no image below"):
    folder.FolderSource(str(tmp_path))


def test_a_long_listing_is_kept_until_a_folder_changes(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(records, "_CACHE_SECONDS", 0.0)
  root = tmp_path / "images"
  for name in ("a/x.png", "b/c/y.png"):
    save(root / name)
  wanted = [str(root / name) for name in ("a/x.png", "b/c/y.png")]
  calls = []
  list_folder = folder._list_folder
  monkeypatch.setattr(
    folder,
    "_list_folder",
    lambda path: calls.append(path) or list_folder(path),
  )

  def names():
    source = folder.FolderSource(str(root))
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
  source = folder.FolderSource(str(tmp_path))
  assert len(source) == 1


# --- splits -----------------------------------------------------------------


def names_of(root, split="all"):
  source = folder.FolderSource(str(root), split)
  names = [source.name(i) for i in range(len(source))]
  return [name.removeprefix(f"{root}/") for name in names]


def test_folders_of_splits_are_splits_and_below_them_are_classes(tmp_path):
  names = ["test/ant/a.png", "test/cat/b.png", "train/cat/c.png"]
  names += ["train/dog/x/d.png", "train/dog/e.png", "val/dog/f.png"]
  for name in [*names, "stray.png"]:
    save(tmp_path / name)
  assert names_of(tmp_path, "test") == names[:2]
  assert names_of(tmp_path, "train") == [names[2], names[4], names[3]]
  assert names_of(tmp_path, "val+test") == [*names[:2], names[5]]
  assert len(names_of(tmp_path)) == 6  # a stray one is in no split
  for split, labels in (("train", [1, 2, 2]), ("test", [0, 1]), ("val", [2])):
    source = folder.FolderSource(str(tmp_path), split)
    assert source.class_names("label") == ["ant", "cat", "dog"]
    found = [
      int(source.features(tf.constant(b""), tf.constant(i))["label"])
      for i in range(len(source))
    ]
    assert found == labels


def test_a_split_without_classes_has_no_labels(tmp_path):
  for name in ("train/a/x.png", "train/b/y.png", "test/z.png"):
    save(tmp_path / name)
  source = folder.FolderSource(str(tmp_path), "test")
  assert source.class_names("label") is None
  assert source.features(tf.constant(b""), tf.constant(0)) == {}
  assert folder.FolderSource(str(tmp_path), "train").classes == ["a", "b"]


def test_a_class_may_be_called_train(tmp_path):
  for name in ("car/x.png", "train/y.png"):
    save(tmp_path / name)
  assert folder.FolderSource(str(tmp_path)).classes == ["car", "train"]


def many(root, count=400):
  for i in range(count):
    path = root / f"class{i % 2}/{i:03}.png"
    path.parent.mkdir(exist_ok=True)
    path.touch()
  return root


def test_a_tenth_is_held_out_and_stays_so_as_images_come_and_go(tmp_path):
  many(tmp_path)
  test, train = names_of(tmp_path, "test"), names_of(tmp_path, "train")
  assert sorted(test + train) == names_of(tmp_path)
  assert 25 < len(test) < 55
  for number in range(2):  # of both classes, which lie one after the other
    assert sum(f"class{number}" in name for name in test) > 8
  (tmp_path / train[0]).unlink()
  (tmp_path / "class1/new.png").touch()
  now = names_of(tmp_path, "test")
  assert set(now) - {"class1/new.png"} == set(test)


@pytest.mark.parametrize("count, held", [(20, 5), (12, 3), (60, 5), (4, 1)])
def test_a_small_folder_holds_a_handful_out(tmp_path, count, held):
  for i in range(count):
    (tmp_path / f"{i}.png").touch()
  assert len(names_of(tmp_path, "test")) >= held
  assert len(names_of(tmp_path, "train")) >= count - max(held, count // 5)


def test_at_least_one_of_each_class_is_held_out(tmp_path, caplog):
  for i in range(21):  # 7 classes of 3
    path = tmp_path / f"{i // 3}/{i}.png"
    path.parent.mkdir(exist_ok=True)
    path.touch()
  (tmp_path / "alone").mkdir()
  (tmp_path / "alone/x.png").touch()
  folders = lambda split: [x.split("/")[0] for x in names_of(tmp_path, split)]
  assert set(folders("test")) >= set("0123456")
  assert set(folders("train")) == {*"0123456", "alone"}
  assert "moves in steps of" in caplog.text


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_handful_of_images_has_both_splits(tmp_path, count):
  for i in range(count):
    (tmp_path / f"{i}.png").touch()
  assert len(names_of(tmp_path, "train")) == max(1, count - 1)
  if count == 1:
    with pytest.raises(ValueError, match="holds no image"):
      names_of(tmp_path, "test")
  else:
    assert len(names_of(tmp_path, "test")) == 1


def test_slices_share_the_images_out_whatever_their_class(tmp_path):
  many(tmp_path)
  train = names_of(tmp_path, "train")
  first = names_of(tmp_path, "train[:25%]")
  rest = names_of(tmp_path, "train[25%:]")
  assert sorted(first + rest) == train
  assert len(first) == round(len(train) / 4)
  assert 25 < sum("class0" in name for name in first) < 65
  assert first == sorted(first)
  assert len(names_of(tmp_path, "train[:30]+test[:2]")) == 32


@pytest.mark.parametrize(
  "split", ["valid", "train[:1", "train[:9999]", "all[:9%]"]
)
def test_a_split_that_is_not_there_is_named_in_one_line(tmp_path, split):
  many(tmp_path, 5)
  with pytest.raises(ValueError) as error:
    names_of(tmp_path, split)
  assert "it has: train, test, all, and slices" in str(error.value)
  assert "\n" not in str(error.value)


def test_what_other_programs_leave_behind_is_no_image_and_no_class(tmp_path):
  for name in (
    "cat/x.png",
    "cat/._x.png",
    ".ipynb_checkpoints/x.png",
    "__MACOSX/cat/x.png",
    "dog/.hidden/y.png",
    "dog/y.png",
  ):
    save(tmp_path / name)
  source = folder.FolderSource(str(tmp_path))
  assert names_of(tmp_path) == ["cat/x.png", "dog/y.png"]
  assert source.classes == ["cat", "dog"]


def test_what_two_splits_share_is_counted_by_any_root(tmp_path):
  for name in ("train/a/x.png", "train/a/y.png", "train/b.png", "test/z.png"):
    save(tmp_path / name)
  of = lambda root, split: folder.FolderSource(str(root), split)
  train, test = of(tmp_path, "train"), of(tmp_path, "test")
  assert sources.shared(train, test) == 0
  assert sources.shared(train, of(tmp_path, "all")) == 3
  assert sources.shared(train, of(tmp_path / "train/a", "all")) == 2
  mixture = sources.Mixture([of(tmp_path / "test", "all"), train], [1, 1])
  assert sources.shared(mixture, test) == 1
  (tmp_path / "link").symlink_to(tmp_path / "test")
  assert sources.shared(of(tmp_path / "link", "all"), test) == 1


def test_a_run_of_before_folders_had_splits_had_all_images(tmp_path):
  stored = {"batch_size": 2, "encoder": {"width": 8, "depth": 1}}
  data = {"source": "folder", "name": "/photos", "split": "train"}
  data["image_size"] = 28
  path = tmp_path / "config.json"

  def split_of(**more):
    path.write_text(json.dumps(stored | {"data": data | more}))
    return config.read(path).data.split

  assert split_of() == "all"
  assert split_of(label="") == "train"
  assert split_of(source="tfds") == "train"


# --- what is no image, and hostile names ------------------------------------


def hostile(root):
  """A folder with two images, and all else that can look like one."""
  save(root / "cat/a.png")
  save(root / "x.png/b.png")  # a folder named like an image
  os.mkfifo(root / "pipe.png")
  with socket.socket(socket.AF_UNIX) as server:
    server.bind(os.path.relpath(root / "socket.jpg"))
  (root / "zero.png").symlink_to("/dev/zero")
  (root / "itself.png").symlink_to("itself.png")
  (root / "itself").symlink_to("itself")
  (root / "gone.png").symlink_to("nowhere.png")
  (root / "cat/up").symlink_to(root)
  for name in ("a.svg", "b.CR2", "c.jxl"):
    (root / name).touch()
  (root / "notes.txt").touch()


def test_what_is_no_image_is_skipped_and_named_and_ends_nothing(
  tmp_path, caplog, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "root").mkdir()
  hostile(tmp_path / "root")
  assert names_of(tmp_path / "root") == ["cat/a.png", "x.png/b.png"]
  assert "skipped 5 below" in caplog.text  # no files
  for name in (
    "pipe.png",
    "a folder seen already: cat/up/",
    ".cr2 is not read",
  ):
    assert name in caplog.text
  assert "notes" not in caplog.text
  caplog.clear()
  names_of(tmp_path / "root")
  assert "skipped" not in caplog.text  # said once


def test_a_folder_that_may_not_be_read_is_named(tmp_path, caplog, monkeypatch):
  save(tmp_path / "a/x.png")
  save(tmp_path / "b/y.png")
  scandir = os.scandir

  def refuse(path):
    if path.endswith("b/"):
      raise PermissionError(13, "Permission denied")
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  assert names_of(tmp_path) == ["a/x.png"]
  assert "permission denied: b/" in caplog.text
  listing = folder._list_folder(str(tmp_path))
  assert not folder._is_current(str(tmp_path), listing)  # looked at again


def test_folders_may_lie_deeper_than_python_calls(tmp_path):
  name = "d/" * 150 + "x.png"
  save(tmp_path / name)
  limit = sys.getrecursionlimit()
  sys.setrecursionlimit(len(inspect.stack()) + 100)
  try:
    listing = folder._list_folder(str(tmp_path))
  finally:
    sys.setrecursionlimit(limit)
  assert list(records.Names(listing["names"])) == [name]


def test_what_takes_a_files_place_is_not_waited_for(tmp_path):
  for name in ("a.png", "b.png", "c.png"):
    save(tmp_path / name)
  with open(tmp_path / "c.png", "ab") as file:
    file.truncate(2**20 + 1)
  source = folder.FolderSource(str(tmp_path), max_mib=1)
  (tmp_path / "a.png").unlink()
  os.mkfifo(tmp_path / "a.png")
  (tmp_path / "b.png").unlink()
  (tmp_path / "b.png").symlink_to("/dev/zero")
  assert source.read(np.arange(3)) == [b"", b"", b""]
  assert [source.problem(i) for i in range(3)] == [
    "no file",
    "no file",
    "a file of 1 MiB, more than data.max_mib=1",
  ]


def test_names_are_printed_escaped(tmp_path):
  names = ["red\x1b[31m", "line\nbreak", "turned\u202e", os.fsdecode(b"\xff")]
  for name in (*names, "ü"):
    save(tmp_path / name / f"{name}.png")
  source = folder.FolderSource(str(tmp_path))
  shown = " ".join(source.name(i) for i in range(5)) + " ".join(source.classes)
  assert shown.isprintable() and "ü.png" in shown
  assert r"red\x1b[31m" in source.classes and r"\udcff" in source.classes
  assert all(source.read(np.arange(5)))
