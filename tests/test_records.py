import pathlib
import types

import pytest
import tensorflow as tf

from jepa_jax.data import records

RECORDS = [b"a" * n for n in (1, 0, 300, 7)]


def write(path, values=RECORDS):
  with tf.io.TFRecordWriter(str(path)) as writer:
    for value in values:
      writer.write(value)


def part(path, skip=0, take=-1):
  """A file instruction as TFDS makes them."""
  return types.SimpleNamespace(filename=str(path), skip=skip, take=take)


def test_scan_finds_every_record_and_refuses_a_cut_file(tmp_path):
  path = str(tmp_path / "x.tfrecord")
  write(path)
  offsets, lengths = records.scan_tfrecord(path)
  data = pathlib.Path(path).read_bytes()
  found = [data[o : o + n] for o, n in zip(offsets, lengths)]
  assert found == RECORDS
  for cut in (1, 5, 20, 330):
    pathlib.Path(path).write_bytes(data[:-cut])
    with pytest.raises(ValueError, match="not a whole TFRecord file"):
      records.scan_tfrecord(path)


@pytest.mark.parametrize("root", ["", "ram://"])
def test_records_of_local_and_remote_files(root, tmp_path):
  paths = [f"{root or tmp_path}/{i}.tfrecord" for i in range(3)]
  for i, path in enumerate(paths):
    write(path, [b"%d-%d" % (i, j) for j in range(5)])
  found = records.TfRecords([part(paths[2], 1, 3), part(paths[0], 4)])
  assert len(found) == 4
  assert found.__getitems__([0, 1, 2, 3]) == [b"2-1", b"2-2", b"2-3", b"0-4"]
  assert found.__getitems__([3, 0, 3]) == [b"0-4", b"2-1", b"0-4"]


def test_more_files_than_may_be_open(tmp_path, monkeypatch):
  monkeypatch.setattr(records, "_OPEN_FILES", 2)
  for i in range(5):
    write(tmp_path / f"{i}", [b"%d" % i])
  found = records.TfRecords([part(tmp_path / f"{i}") for i in range(5)])
  order = [0, 1, 2, 3, 4, 2, 0, 4, 4]
  assert found.__getitems__(order) == [b"%d" % i for i in order]


def test_a_file_cut_while_in_use_is_named(tmp_path):
  write(tmp_path / "x")
  found = records.TfRecords([part(tmp_path / "x")])
  (tmp_path / "x").write_bytes((tmp_path / "x").read_bytes()[:50])
  with pytest.raises(ValueError, match="x ends before byte"):
    found.__getitems__([2])


def test_the_index_is_kept_until_a_file_changes(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setattr(records, "_CACHE_SECONDS", 0.0)
  calls, scan = [], records.scan_tfrecord
  monkeypatch.setattr(
    records, "scan_tfrecord", lambda path: calls.append(path) or scan(path)
  )
  write(tmp_path / "x")
  for _ in range(2):
    found = records.TfRecords([part(tmp_path / "x")])
    assert found.__getitems__(range(4)) == RECORDS
  assert len(calls) == 1
  assert len(records.TfRecords([part(tmp_path / "x", 1)])) == 3
  write(tmp_path / "x", RECORDS[::-1] + [b"more"])
  assert len(records.TfRecords([part(tmp_path / "x")])) == 5
  for file in (tmp_path / "cache/jepa_jax").iterdir():
    file.write_bytes(b"broken")
  assert len(records.TfRecords([part(tmp_path / "x")])) == 5


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  monkeypatch.setattr(records, "_CACHE_SECONDS", 0.0)
  write(tmp_path / "x")
  assert len(records.TfRecords([part(tmp_path / "x")])) == 4


def test_names_are_kept_as_they_are():
  names = ["a/b.png", "", "ü", "line\nbreak"]
  packed = records.Names(records.Names.pack(names))
  assert list(packed) == names and len(packed) == 4
  assert not len(records.Names(records.Names.pack([])))
