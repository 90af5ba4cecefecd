"""Where images come from: random access to encoded records.

A source is plain Python and NumPy for reading (one call a batch, any order, no
state), and TensorFlow only for labels. So the order of a run is arithmetic on
record numbers, and a resumed run seeks instead of reading again.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import difflib
import os
import pathlib
import struct
import threading
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")
_OPEN_FILES = 256  # descriptors that one source keeps open


class Source(Protocol):
  """Random access to the encoded images of one data set."""

  # "png" or "jpeg" where every image is stored so, else None.
  encoding: str | None

  def __len__(self) -> int:
    ...

  def read(self, indices: np.ndarray) -> list[bytes]:
    """Records of the given numbers, as they are stored."""

  def images(self, records: Sequence[bytes]) -> list[bytes]:
    """The encoded image of each record."""

  def name(self, index: int) -> str:
    """What to call a record in a message."""

  def features(self, record: tf.Tensor, index: tf.Tensor) -> dict[str, Any]:
    """All features of one record but its image, decoded by TensorFlow."""


class _Files:
  """Positional reads of many files through a bounded set of descriptors."""

  def __init__(self, paths: Sequence[str]):
    self._paths = paths
    self._open = collections.OrderedDict()
    self._lock = threading.Lock()

  def read(self, number: int, offset: int, length: int) -> bytes:
    # The lock covers the read, so that no other thread closes the file.
    with self._lock:
      descriptor = self._open.pop(number, None)
      if descriptor is None:
        descriptor = os.open(self._paths[number], os.O_RDONLY)
      self._open[number] = descriptor
      if len(self._open) > _OPEN_FILES:
        os.close(self._open.popitem(last=False)[1])
      data = os.pread(descriptor, length, offset)
    if len(data) != length:
      raise ValueError(
          f"{self._paths[number]} ends before byte {offset + length}; it was"
          " cut or changed while in use: prepare the data set again"
      )
    return data

  def __del__(self):
    for descriptor in self._open.values():
      os.close(descriptor)


def scan_tfrecord(path: str) -> tuple[np.ndarray, np.ndarray]:
  """Offsets and lengths (bytes, int64) of the records of a TFRecord file.

  Reads 12 bytes a record and skips the rest.

  Raises:
    ValueError: the file does not hold whole TFRecords.
  """
  offsets, lengths = [], []
  size = os.path.getsize(path)
  with open(path, "rb", buffering=0) as file:
    position = 0
    while position < size:
      header = os.pread(file.fileno(), 12, position)
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


class TfdsSource:
  """A split, or slice of a split, of a prepared TFDS data set.

  Args:
    builder: a prepared builder.
    split: name of a split, or a slice such as "train[:1%]".

  Raises:
    ValueError: no such split, or files that allow no random access.
  """

  def __init__(self, builder: tfds.core.DatasetBuilder, split: str):
    self._builder = builder
    self._features = builder.info.features
    info = _split_info(builder, split)
    self._label = f"{builder.info.full_name} {split}"
    self._image_key = _image_key(self._features, self._label)
    feature = self._features[self._image_key]
    # What the builder declared; else the images tell themselves.
    self.encoding = getattr(feature, "_encoding_format", None)
    instructions = info.file_instructions
    self._files = _Files([x.filename for x in instructions])
    parts = []
    for number, x in enumerate(instructions):
      if ".tfrecord" not in os.path.basename(x.filename):
        raise ValueError(
            f"{x.filename} is not a TFRecord file; prepare {self._label} with"
            " file_format=tfrecord"
        )
      offsets, lengths = scan_tfrecord(x.filename)
      stop = len(offsets) if x.take < 0 else x.skip + x.take
      span = slice(x.skip, stop)
      numbers = np.full(len(offsets[span]), number, np.int64)
      parts.append(np.stack([numbers, offsets[span], lengths[span]], -1))
    self._index = np.concatenate(parts)

  def __len__(self) -> int:
    return len(self._index)

  def read(self, indices: np.ndarray) -> list[bytes]:
    rows = self._index[indices].tolist()
    return [self._files.read(*row) for row in rows]

  def images(self, records: Sequence[bytes]) -> list[bytes]:
    key, result = self._image_key, []
    for record in records:
      feature = tf.train.Example.FromString(record).features.feature
      result.append(feature[key].bytes_list.value[0])
    return result

  def name(self, index: int) -> str:
    return f"{self._label} record {index}"

  def features(self, record: tf.Tensor, index: tf.Tensor) -> dict[str, Any]:
    del index
    skip = {self._image_key: tfds.decode.SkipDecoding()}
    features = self._features.deserialize_example(record, decoders=skip)
    del features[self._image_key]
    return features


class FolderSource:
  """Image files below a folder, in sorted order.

  Where every image lies in a sub-folder, the names of the first level are the
  classes, numbered in sorted order.

  Args:
    root: the folder.

  Raises:
    ValueError: no such folder, or no image in it.
  """

  encoding = None

  def __init__(self, root: str):
    self._root = pathlib.Path(root).expanduser()
    if not self._root.is_dir():
      raise ValueError(f"no folder {root}; set data.name to a folder of images")
    self._paths = sorted(_walk(str(self._root), ""))
    if not self._paths:
      raise ValueError(
          f"no image below {root}; it needs files that end in"
          f" {', '.join(FOLDER_SUFFIXES)}"
      )
    tops = [path.split("/", 1)[0] for path in self._paths]
    nested = all("/" in path for path in self._paths)
    self.classes = sorted(set(tops)) if nested else []
    number = {name: i for i, name in enumerate(self.classes)}
    self._labels = np.asarray([number.get(x, -1) for x in tops], np.int32)

  def __len__(self) -> int:
    return len(self._paths)

  def read(self, indices: np.ndarray) -> list[bytes]:
    return [self._read(self._root / self._paths[i]) for i in indices.tolist()]

  def _read(self, path: pathlib.Path) -> bytes:
    try:
      return path.read_bytes()
    except OSError:  # gone or forbidden: an unreadable image like any other
      return b""

  def images(self, records: Sequence[bytes]) -> list[bytes]:
    return list(records)

  def name(self, index: int) -> str:
    return str(self._root / self._paths[index])

  def features(self, record: tf.Tensor, index: tf.Tensor) -> dict[str, Any]:
    del record
    if not self.classes:
      return {}
    return {"label": tf.gather(self._labels, index)}


def _walk(folder: str, prefix: str) -> list[str]:
  """Image files below a folder, as paths relative to the first call's."""
  found = []
  with os.scandir(folder) as entries:
    for entry in entries:
      path = prefix + entry.name
      if entry.is_dir():
        found += _walk(entry.path, path + "/")
      elif entry.name.lower().endswith(FOLDER_SUFFIXES):
        found.append(path)
  return found


def open_source(config: Any, split: str | None = None) -> Source:
  """Opens the source that config.data names.

  Args:
    config: config.data; reads source, name, split and data_dir.
    split: in place of config.split. A folder has no splits and ignores it.

  Raises:
    ValueError: unknown source, data set or split, or nothing to read.
  """
  if config.source not in _SOURCES:
    raise ValueError(
        f'unknown data.source "{config.source}"; known:'
        f" {', '.join(_SOURCES)}"
    )
  return _SOURCES[config.source](config, split or config.split)


def _open_tfds(config: Any, split: str) -> Source:
  return TfdsSource(find_builder(config.name, config.data_dir), split)


def _open_folder(config: Any, split: str) -> Source:
  del split
  return FolderSource(config.name)


def _open_scenes(config: Any, split: str) -> Source:
  from jepa_jax.data import scenes  # a builder registers itself on import

  num_train, num_test = config.num_scenes
  builder = scenes.prepare(
      config.data_dir or None,
      image_size=config.image_size,
      num_train=num_train,
      num_test=num_test,
  )
  return TfdsSource(builder, split)


_SOURCES: Mapping[str, Callable[[Any, str], Source]] = {
    "tfds": _open_tfds,
    "folder": _open_folder,
    "scenes": _open_scenes,
}


def find_builder(name: str, data_dir: str = "") -> tfds.core.DatasetBuilder:
  """Finds a prepared TFDS data set; never uses the network.

  Args:
    name: as for `tfds.load`: "set", "set/config" or "set/config:version".
    data_dir: where TFDS keeps its data; "" for its default.

  Raises:
    ValueError: unknown name, or not prepared there.
  """
  kwargs = {"data_dir": os.path.expanduser(data_dir)} if data_dir else {}
  try:
    builder = tfds.builder(name, **kwargs)
  except tfds.core.DatasetNotFoundError:
    known = set(tfds.list_builders(with_community_datasets=False))
    known |= {x.name for x in _folders(data_dir)}
    base = name.split("/")[0].split(":")[0]
    near = difflib.get_close_matches(base, sorted(known), n=3, cutoff=0.5)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise ValueError(
        f'unknown TFDS data set "{name}"{hint}. `tfds.list_builders()` lists'
        f" those that TFDS knows; prepared in {data_dir or 'its data_dir'}:"
        f" {', '.join(sorted(x.name for x in _folders(data_dir))) or 'none'}"
    ) from None
  if builder.is_prepared():
    return builder
  try:  # another version than the installed code's may be there
    return tfds.core.read_only_builder.builder_from_files(name, **kwargs)
  except tfds.core.DatasetNotFoundError:
    raise ValueError(
        f'TFDS data set "{name}" is not prepared in'
        f" {data_dir or 'the default data_dir of TFDS'}; prepare it with"
        f" `{_prepare_command(name, data_dir)}`{_manual_steps(builder)}, or set"
        " data.data_dir to where it is"
    ) from None


def _prepare_command(name: str, data_dir: str) -> str:
  where = f" --data_dir={data_dir}" if data_dir else ""
  return f"tfds build {name}{where}"


def _manual_steps(builder: tfds.core.DatasetBuilder) -> str:
  """What must be downloaded by hand before a data set can be prepared."""
  instructions = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
  if not instructions:
    return ""
  return f" after getting its files by hand ({' '.join(instructions.split())})"


def _folders(data_dir: str) -> list[pathlib.Path]:
  path = pathlib.Path(data_dir or "~/tensorflow_datasets").expanduser()
  if not path.is_dir():
    return []
  return [x for x in path.iterdir() if x.is_dir() and x.name != "downloads"]


def _split_info(builder: tfds.core.DatasetBuilder, split: str) -> Any:
  splits = builder.info.splits
  try:
    info = splits[split]
  except (KeyError, ValueError) as error:
    raise ValueError(
        f'{builder.info.full_name} has no split "{split}"; it has:'
        f" {', '.join(sorted(splits))}, and slices such as train[:1%]"
    ) from error
  if not info.num_examples:
    raise ValueError(
        f'split "{split}" of {builder.info.full_name} holds no example; set'
        " data.split to a larger one"
    )
  return info


def _image_key(features: Any, label: str) -> str:
  keys = [
      key
      for key, feature in features.items()
      if isinstance(feature, tfds.features.Image)
  ]
  if not keys:
    raise ValueError(
        f"{label} has no image; its features are: {', '.join(features)}"
    )
  return "image" if "image" in keys else keys[0]
