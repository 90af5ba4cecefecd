"""Where images come from: random access to encoded records.

A source is plain Python and NumPy for reading (one call a batch, any order, no
state), and TensorFlow only for labels. So the order of a run is arithmetic on
record numbers, and a resumed run seeks instead of reading again.
"""

from collections.abc import Callable, Mapping, Sequence
import copy
import difflib
import itertools
import os
import pathlib
import re
from typing import Any, Protocol

from array_record.python import array_record_data_source
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from jepa_jax.data import records

FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp")


class Source(Protocol):
  """Random access to the encoded images of one data set."""

  # "png" or "jpeg" where every image is stored so, else None.
  encoding: str | None

  def __len__(self) -> int: ...

  def read(self, indices: np.ndarray) -> list[bytes]:
    """Records of the given numbers, as they are stored."""

  def images(self, records: Sequence[bytes]) -> list[bytes]:
    """The encoded image of each record."""

  def name(self, index: int) -> str:
    """What to call a record in a message."""

  def features(self, record: tf.Tensor, index: tf.Tensor) -> dict[str, Any]:
    """All features of one record but its image, decoded by TensorFlow."""


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
    kinds = {_record_format(x.filename) for x in instructions}
    if kinds == {"tfrecord"}:
      self._records = records.TfRecords(instructions)
    elif kinds == {"array_record"}:
      self._records = array_record_data_source.ArrayRecordDataSource(
        instructions
      )
    else:
      raise ValueError(
        f"{self._label} is stored as {', '.join(sorted(kinds))}, which allows"
        " no random access; prepare it with --file_format=array_record"
      )

  def __len__(self) -> int:
    return len(self._records)

  def read(self, indices: np.ndarray) -> list[bytes]:
    return self._records.__getitems__(indices.tolist())

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
    listing = records.cached(
      "folder",
      str(self._root.resolve()),
      lambda: _list_folder(str(self._root)),
      lambda arrays: _is_current(str(self._root), arrays),
    )
    self._names = records.Names(listing["names"])
    if not len(self._names):
      raise ValueError(
        f"no image below {root}; it needs files that end in"
        f" {', '.join(FOLDER_SUFFIXES)}"
      )
    self.classes = list(records.Names(listing["classes"]))
    self._labels = listing["labels"]

  def __len__(self) -> int:
    return len(self._names)

  def read(self, indices: np.ndarray) -> list[bytes]:
    files = []
    for i in indices.tolist():
      try:
        files.append((self._root / self._names[i]).read_bytes())
      except OSError:  # gone or forbidden: an unreadable image like any other
        files.append(b"")
    return files

  def images(self, records: Sequence[bytes]) -> list[bytes]:
    return list(records)

  def name(self, index: int) -> str:
    return str(self._root / self._names[index])

  def features(self, record: tf.Tensor, index: tf.Tensor) -> dict[str, Any]:
    del record
    if not self.classes:
      return {}
    return {"label": tf.gather(self._labels, index)}


def _list_folder(root: str) -> dict[str, np.ndarray]:
  """Names, labels and classes of the images below a folder, and its folders.

  Names are packed a folder at a time, for a million of them as Python objects
  would take ten times the memory.
  """
  packed, tops, counts, folders, seen = [], [], [], [], set()

  def walk(prefix: str) -> None:
    path = os.path.join(root, prefix)
    stat = os.stat(path)
    if (stat.st_dev, stat.st_ino) in seen:  # a link to a folder above
      return
    seen.add((stat.st_dev, stat.st_ino))
    folders.append((prefix, stat.st_mtime_ns))
    here = []
    with os.scandir(path) as entries:
      for entry in entries:
        if entry.name.lower().endswith(FOLDER_SUFFIXES):
          here.append(prefix + entry.name)
        elif entry.is_dir():
          here.append(prefix + entry.name + "/")
    here.sort()  # with its "/", a folder stands where its files belong
    for is_folder, group in itertools.groupby(here, lambda x: x[-1] == "/"):
      if is_folder:
        for name in group:
          walk(name)
      else:
        names = list(group)
        packed.append(records.Names.pack(names))
        tops.append(prefix.partition("/")[0])
        counts.append(len(names))

  walk("")
  classes = (
    sorted(set(tops)) if all(tops) else []
  )  # none where a file is on top
  number = {name: i for i, name in enumerate(classes)}
  labels = [number.get(top, -1) for top in tops]
  return {
    "names": np.concatenate([*packed, np.zeros(0, np.uint8)]),
    "classes": records.Names.pack(classes),
    "labels": np.repeat(np.asarray(labels, np.int32), counts),
    "folders": records.Names.pack([prefix for prefix, _ in folders]),
    "times": np.asarray([time_ns for _, time_ns in folders], np.int64),
  }


def _is_current(root: str, listing: dict[str, np.ndarray]) -> bool:
  """Whether no folder has changed since it was listed."""
  folders = records.Names(listing["folders"])
  for prefix, time_ns in zip(folders, listing["times"]):
    try:
      if os.stat(os.path.join(root, prefix)).st_mtime_ns != time_ns:
        return False
    except OSError:
      return False
  return True


class Mixture:
  """Several sources, each with its share of the images.

  An epoch has as many images as all parts together; a small part with a large
  share comes more than once an epoch, each time in an order of its own.

  Args:
    parts: the sources.
    weights: share of each, in any unit.
  """

  SLOTS = 1000  # images over which the shares are exact

  def __init__(self, parts: Sequence[Source], weights: Sequence[float]):
    self.parts = parts
    self.starts = np.cumsum([0, *map(len, parts)])  # in the numbers of records
    edges = np.cumsum([0, *weights]) / sum(weights) * self.SLOTS
    self.slots = np.round(edges).astype(int)  # of each part, as edges
    encodings = {part.encoding for part in parts}
    self.encoding = encodings.pop() if len(encodings) == 1 else None

  def __len__(self) -> int:
    return int(self.starts[-1])

  def _part(self, index: int) -> tuple[Source, int]:
    number = int(np.searchsorted(self.starts, index, "right")) - 1
    return self.parts[number], index - int(self.starts[number])

  def read(self, indices: np.ndarray) -> list[bytes]:
    images = []
    for index in indices.tolist():
      part, number = self._part(index)
      images += part.images(part.read(np.asarray([number])))
    return images

  def images(self, records: Sequence[bytes]) -> list[bytes]:
    return list(records)

  def name(self, index: int) -> str:
    part, number = self._part(index)
    return part.name(number)

  def features(self, record: tf.Tensor, index: tf.Tensor) -> dict[str, Any]:
    del record, index
    return {}


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
      f'unknown data.source "{config.source}"; known: {", ".join(_SOURCES)}'
    )
  return _SOURCES[config.source](config, split or config.split)


def _open_tfds(config: Any, split: str) -> Source:
  return TfdsSource(find_builder(config.name, config.data_dir), split)


def _open_folder(config: Any, split: str) -> Source:
  del split
  return FolderSource(config.name)


def _open_mixture(config: Any, split: str) -> Source:
  """Opens a mixture named like "0.7 tfds:imagenet2012 + 0.3 folder:/photos"."""
  matches = [
    re.fullmatch(r"(\d*\.?\d+) (\w+):(.+)", text.strip())
    for text in config.name.split(" + ")
  ]
  if not all(m and m[2] in _SOURCES and float(m[1]) > 0 for m in matches):
    raise ValueError(
      f'data.name is "{config.name}"; a mixture needs parts such as "0.7'
      ' tfds:imagenet2012 + 0.3 folder:/data/photos"'
    )
  parts = []
  for match in matches:
    part = copy.copy(config)
    part.name = match[3]
    parts.append(_SOURCES[match[2]](part, split))
  return Mixture(parts, [float(match[1]) for match in matches])


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
  "mixture": _open_mixture,
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
  where = f" --data_dir {data_dir}" if data_dir else ""
  return f"python -m jepa_jax.prepare --name {name}{where} --download"


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


def _record_format(path: Any) -> str:
  """File format by TFDS's naming: "set-split.FORMAT-00000-of-00001"."""
  return os.path.basename(str(path)).rpartition(".")[2].partition("-")[0]


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
