"""Records in files: random access, an index that is made once, and a cache.

Works on local files and on TensorFlow's remote file systems ("gs://...").
"""

import collections
from collections.abc import Callable, Sequence
import concurrent.futures
import hashlib
import os
import pathlib
import struct
import tempfile
import threading
import time
from typing import Any
import zipfile

import numpy as np
import tensorflow as tf

_OPEN_FILES = 256  # descriptors that one source keeps open
_REMOTE_READS = 64  # at a time
_CACHE_SECONDS = 1.0  # what takes longer to find out is kept on disk


class TfRecords:
  """Random access to the records of TFRecord files.

  Args:
    instructions: TFDS's file instructions: filename, skip and take each.
  """

  def __init__(self, instructions: Sequence[Any]):
    paths = [str(x.filename) for x in instructions]
    stamps = [(path, *_stamp(path)) for path in paths]

    def scan():
      with concurrent.futures.ThreadPoolExecutor(_REMOTE_READS) as pool:
        local = not any("://" in path for path in paths)
        scans = list((map if local else pool.map)(scan_tfrecord, paths))
      parts = []
      for number, (x, (offsets, lengths)) in enumerate(
        zip(instructions, scans)
      ):
        span = slice(x.skip, None if x.take < 0 else x.skip + x.take)
        numbers = np.full(len(offsets[span]), number)
        parts.append(np.stack([numbers, offsets[span], lengths[span]], -1))
      return {"index": np.concatenate(parts)}

    spans = [(x.skip, x.take) for x in instructions]
    self._index = cached("records", (stamps, spans), scan)["index"]
    self._files = _Files(paths)

  def __len__(self) -> int:
    return len(self._index)

  def __getitems__(self, indices: Sequence[int]) -> list[bytes]:
    return self._files.read(self._index[np.asarray(indices)].tolist())


def scan_tfrecord(path: str) -> tuple[np.ndarray, np.ndarray]:
  """Offsets and lengths (bytes, int64) of the records of a TFRecord file.

  Reads 12 bytes a record and skips the rest.

  Raises:
    ValueError: the file does not hold whole TFRecords.
  """
  offsets, lengths = [], []
  _, size = _stamp(path)
  with _open(path) as file:
    position = 0
    while position < size:
      file.seek(position)
      header = file.read(12)
      length = struct.unpack("<Q", header[:8])[0] if len(header) == 12 else size
      offsets.append(position + 12)
      lengths.append(length)
      position += length + 16  # length, its checksum, data, its checksum
  if position != size:
    raise ValueError(
      f"{path} is not a whole TFRecord file: record {len(offsets) - 1} ends"
      f" at byte {position} of {size}; prepare the data set again"
    )
  return np.asarray(offsets, np.int64), np.asarray(lengths, np.int64)


class _Files:
  """Positional reads of many files through a bounded set of descriptors.

  Paths of TensorFlow's remote file systems ("gs://...") are read by many
  threads at once, for each read waits long.
  """

  def __init__(self, paths: Sequence[str]):
    self._paths = paths
    self._open = collections.OrderedDict()
    self._lock = threading.Lock()
    self._pool = None
    if any("://" in path for path in paths):
      self._pool = concurrent.futures.ThreadPoolExecutor(_REMOTE_READS)

  def read(self, rows: Sequence[tuple[int, int, int]]) -> list[bytes]:
    """Reads (file number, offset, length) of each row."""
    each = self._pool.map if self._pool else map
    return list(each(self._read, rows))

  def _read(self, row: tuple[int, int, int]) -> bytes:
    number, offset, length = row
    if self._pool:
      with _open(self._paths[number]) as file:
        file.seek(offset)
        data = file.read(length)
    else:
      data = self._read_local(number, offset, length)
    if len(data) != length:
      raise ValueError(
        f"{self._paths[number]} ends before byte {offset + length}; it was"
        " cut or changed while in use: prepare the data set again"
      )
    return data

  def _read_local(self, number: int, offset: int, length: int) -> bytes:
    # The lock covers the read, so that no other thread closes the file.
    with self._lock:
      descriptor = self._open.pop(number, None)
      if descriptor is None:
        descriptor = os.open(self._paths[number], os.O_RDONLY)
      self._open[number] = descriptor
      if len(self._open) > _OPEN_FILES:
        os.close(self._open.popitem(last=False)[1])
      return os.pread(descriptor, length, offset)

  def __del__(self):
    for descriptor in self._open.values():
      os.close(descriptor)


def _open(path: str) -> Any:
  if "://" in path:
    return tf.io.gfile.GFile(path, "rb")
  return open(path, "rb", buffering=0)


def _stamp(path: str) -> tuple[int, int]:
  """Modification time, ns, and size, bytes."""
  stat = tf.io.gfile.stat(path) if "://" in path else os.stat(path)
  time_ns = getattr(stat, "mtime_nsec", None) or getattr(stat, "st_mtime_ns", 0)
  return time_ns, getattr(stat, "length", None) or getattr(stat, "st_size", 0)


def cached(
  kind: str,
  key: Any,
  make: Callable[[], dict[str, np.ndarray]],
  valid: Callable[[dict[str, np.ndarray]], bool] = lambda arrays: True,
) -> dict[str, np.ndarray]:
  """Arrays that `make` returns, kept on disk if they took long to make."""
  cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
  digest = hashlib.sha256(repr(key).encode()).hexdigest()[:24]
  path = pathlib.Path(cache).expanduser() / f"jepa_jax/{kind}-{digest}.npz"
  try:
    with np.load(path) as file:
      arrays = dict(file)
    if valid(arrays):
      return arrays
  except (OSError, ValueError, zipfile.BadZipFile):  # none, or a broken one
    pass
  start = time.monotonic()
  arrays = make()
  if time.monotonic() - start > _CACHE_SECONDS:
    try:
      path.parent.mkdir(parents=True, exist_ok=True)
      # Whole or not at all: another process may write or read the same.
      with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        np.savez(f"{folder}/x.npz", **arrays)
        os.replace(f"{folder}/x.npz", path)
    except OSError:
      pass  # no place to keep it: listed anew next time
  return arrays


class Names(Sequence):
  """Many short strings in one array: a tenth of the memory of a list."""

  def __init__(self, blob: np.ndarray):
    self._blob = blob.tobytes()
    self._ends = np.flatnonzero(blob == 0)

  @staticmethod
  def pack(names: Sequence[str]) -> np.ndarray:
    data = os.fsencode("".join([name + "\0" for name in names]))
    return np.frombuffer(data, np.uint8)

  def __len__(self) -> int:
    return len(self._ends)

  def __getitem__(self, index: int) -> str:
    if not 0 <= index < len(self._ends):
      raise IndexError(index)
    start = self._ends[index - 1] + 1 if index else 0
    return os.fsdecode(self._blob[start : self._ends[index]])
