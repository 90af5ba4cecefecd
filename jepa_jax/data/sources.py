"""Where images come from: random access to encoded records.

A source is plain Python and NumPy for reading (one call a batch, any order, no
state), and TensorFlow only for labels. So the order of a run is arithmetic on
record numbers, and a resumed run seeks instead of reading again.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import copy
import difflib
import os
import pathlib
import re
from typing import Any, Protocol

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from jepa_jax import models
from jepa_jax.data import folder, records


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

  def problem(self, index: int) -> str:
    """Why a record is read as empty; "" where it is not, or none knows."""

  def features(self, record: tf.Tensor, index: tf.Tensor) -> dict[str, Any]:
    """All features of one record but its image, decoded by TensorFlow."""

  def class_names(self, label: str) -> list[str] | None:
    """Names of the classes of a label, by number; None where it has none."""

  def places(self) -> dict[str, np.ndarray]:
    """Where the records are: numbers within a place, by the place's name.

    Two sources share a record where they share a number of a place.
    """


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
    self._instructions = info.file_instructions
    self._label = f"{builder.info.full_name} {split}"
    self._image_key = _image_key(self._features, self._label)
    feature = self._features[self._image_key]
    # What the builder declared; else the images tell themselves.
    self.encoding = getattr(feature, "_encoding_format", None)
    kinds = {_record_format(x.filename) for x in self._instructions}
    if kinds == {"tfrecord"}:
      self._records = records.TfRecords(self._instructions)
    elif kinds == {"array_record"}:
      self._records = _array_records(self._instructions, self._label)
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

  def problem(self, index: int) -> str:
    del index
    return ""

  def features(self, record: tf.Tensor, index: tf.Tensor) -> dict[str, Any]:
    del index
    skip = {self._image_key: tfds.decode.SkipDecoding()}
    features = self._features.deserialize_example(record, decoders=skip)
    del features[self._image_key]
    return features

  def class_names(self, label: str) -> list[str] | None:
    if label not in self._features:
      from jepa_jax.data import scenes  # a builder registers itself on import

      names = (
        scenes.CLASS_NAMES.get(label) if "objects" in self._features else None
      )
      return list(names) if names else None
    feature = self._features[label]
    feature = getattr(feature, "feature", feature)  # of what a list holds
    named = isinstance(feature, tfds.features.ClassLabel)
    return list(feature.names) if named else None

  def places(self) -> dict[str, np.ndarray]:
    return _merged(
      {str(x.filename): np.arange(x.skip, x.skip + x.take)}
      for x in self._instructions
    )


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

  def problem(self, index: int) -> str:
    part, number = self._part(index)
    return part.problem(number)

  def features(self, record: tf.Tensor, index: tf.Tensor) -> dict[str, Any]:
    del record, index
    return {}

  def class_names(self, label: str) -> list[str] | None:
    del label
    return None

  def places(self) -> dict[str, np.ndarray]:
    return _merged(part.places() for part in self.parts)


def _merged(parts: Iterable[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """One dict of the numbers of several; each number once."""
  merged: dict[str, np.ndarray] = {}
  for places in parts:
    for place, numbers in places.items():
      merged[place] = np.union1d(merged.get(place, []), numbers)
  return merged


def shared(a: Source, b: Source) -> int:
  """How many records two sources have in common."""
  theirs = b.places()
  return sum(
    len(np.intersect1d(numbers, theirs[place]))
    for place, numbers in a.places().items()
    if place in theirs
  )


def open_source(config: Any, split: str | None = None) -> Source:
  """Opens the source that config.data names.

  Args:
    config: config.data; reads source, name, split and data_dir.
    split: in place of config.split.

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
  return folder.FolderSource(config.name, split, config.max_mib)


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
    image_size=max(models.height_and_width(config.image_size)),
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
  except (KeyError, ValueError, NotImplementedError) as error:
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


def _array_records(instructions: Any, label: str) -> Any:
  """Random access to ArrayRecord files, where their reader is installed."""
  try:
    from array_record.python import array_record_data_source
  except ImportError:
    raise ValueError(
      f"{label} is stored as array_record, whose reader is not installed (it "
      "has no package for Windows, Intel Macs and ARM Linux); prepare the data "
      "set with --file_format=tfrecord."
    ) from None
  return array_record_data_source.ArrayRecordDataSource(instructions)


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
