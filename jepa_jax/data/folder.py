"""Images in a folder: which there are, their classes and their splits.

    root/CLASS/x.jpg           classes, or root/x.jpg without any
    root/train/CLASS/x.jpg     splits beside each other, "train" and more of
    root/test/CLASS/x.jpg      "val", "valid", "validation" and "test"

Where no folders say what the splits are, "test" is a tenth of the images,
chosen by a hash of their paths, and "train" the others: an image that is added
or removed moves no other one. "all" is both, and slices are words of TFDS:
"train[:90%]", "train[90%:]", "train[:500]+test".
"""

from collections.abc import Sequence
import hashlib
import itertools
import os
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from jepa_jax.data import headers, records

SUFFIXES = (
  *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"),
  *(".tif", ".tiff", ".avif", ".npy"),
  *((".heic", ".heif") if headers.pillow_heif else ()),
)
HELD_OUT = 0.1  # share of the images that is "test" where no folder says so
_SPLITS = {"val", "valid", "validation", "test"}  # folders beside "train"


class FolderSource:
  """Image files below a folder, in sorted order.

  Where every image of a split lies in a sub-folder, the names of the first
  level (below the split's folder) are the classes, numbered in sorted order
  over all splits.

  Args:
    root: the folder.
    split: see the head of this file.

  Raises:
    ValueError: no such folder or split, or no image in it.
  """

  encoding = None

  def __init__(self, root: str, split: str = "all"):
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
        f" {', '.join(SUFFIXES)}"
      )
    groups = [x.split("/") for x in records.Names(listing["groups"])]
    self._counts = listing["counts"]  # images of each group
    by_folder = _splits_of({parts[0] for parts in groups})
    level = 1 if by_folder else 0
    hashes = listing["hashes"]
    if by_folder:
      of = lambda x: np.repeat([g[0] == x for g in groups], self._counts)
      splits = {x: np.flatnonzero(of(x)) for x in sorted(by_folder)}
    else:
      splits = _hold_out(hashes)
    # Record number -> place in the listing.
    self._chosen = _select(split, splits, hashes, str(root)).astype(np.int32)
    self._name_classes(groups, level, by_folder)

  def _name_classes(self, groups, level, by_folder):
    """Sets classes, and the label of each record."""
    found = [x[level] if len(x) > level + 1 else "" for x in groups]
    tops = [x[0] for x in groups]
    names = {
      name
      for name, top in zip(found, tops)
      if name and (not by_folder or top in by_folder)
    }
    self.classes = sorted(names)
    number = {name: i for i, name in enumerate(self.classes)}
    labels = np.asarray([number.get(name, -1) for name in found], np.int32)
    self._labels = np.repeat(labels, self._counts)[self._chosen]
    if (self._labels < 0).any():  # none where a file is in no sub-folder
      self.classes = []

  def __len__(self) -> int:
    return len(self._chosen)

  def read(self, indices: np.ndarray) -> list[bytes]:
    files = []
    for i in indices.tolist():
      try:
        files.append(self._path(i).read_bytes())
      except OSError:  # gone or forbidden: an unreadable image like any other
        files.append(b"")
    return files

  def images(self, records: Sequence[bytes]) -> list[bytes]:
    return list(records)

  def name(self, index: int) -> str:
    return str(self._path(index))

  def features(self, record: tf.Tensor, index: tf.Tensor) -> dict[str, Any]:
    del record
    if not self.classes:
      return {}
    return {"label": tf.gather(self._labels, index)}

  def class_names(self, label: str) -> list[str] | None:
    return self.classes if label == "label" and self.classes else None

  def places(self) -> dict[str, np.ndarray]:
    # A group of files is listed alike below any root: by its first one.
    ends = np.cumsum(self._counts)
    group = np.searchsorted(ends, self._chosen, side="right")
    result = {}
    for number in np.unique(group).tolist():
      start = int(ends[number] - self._counts[number])
      first = os.path.realpath(self._root / self._names[start])
      result[first] = self._chosen[group == number] - start
    return result

  def _path(self, index: int) -> pathlib.Path:
    return self._root / self._names[int(self._chosen[index])]


def _splits_of(tops: set[str]) -> set[str]:
  """The folders of the first level that are splits; none: they are classes."""
  if "train" in tops and (tops & _SPLITS or tops == {"train"}):
    return tops & {"train", *_SPLITS}
  return set()


def _hold_out(hashes: np.ndarray) -> dict[str, np.ndarray]:
  """Splits by hash; at least one image is held out of two or more."""
  held = hashes < HELD_OUT * 2**32
  if len(hashes) > 1 and not held.any():
    held[np.argmin(hashes)] = True
  if held.all():
    held[np.argmax(hashes)] = False
  return {"train": np.flatnonzero(~held), "test": np.flatnonzero(held)}


def _select(
  split: str, splits: dict[str, np.ndarray], hashes: np.ndarray, root: str
) -> np.ndarray:
  """The images of a split, or of slices of splits, in sorted order.

  Classes follow one another in sorted order, so that a slice of it would hold
  some of them only: a slice is taken of the images as their hashes order them.
  """
  infos = {
    name: tfds.core.SplitInfo(name, shard_lengths=[len(members)], num_bytes=0)
    for name, members in splits.items()
  }
  try:
    instruction = tfds.core.ReadInstruction.from_spec(split)
    spans = instruction.to_absolute(infos)
  except (KeyError, ValueError, NotImplementedError) as error:
    raise ValueError(
      f'folder {root} has no split "{split}"; it has: {", ".join(splits)},'
      " all, and slices such as train[:90%]"
    ) from error
  chosen = []
  for span in spans:
    members = splits[span.splitname]
    order = np.argsort(hashes[members], kind="stable")
    chosen.append(members[order[slice(span.from_, span.to)]])
  chosen = np.sort(np.concatenate(chosen))
  if not len(chosen):
    raise ValueError(
      f'split "{split}" of folder {root} holds no image; set data.split to a'
      " larger one"
    )
  return chosen


def _list_folder(root: str) -> dict[str, np.ndarray]:
  """Names and hashes of the images below a folder, and its folders.

  Names are packed a folder at a time, for a million of them as Python objects
  would take ten times the memory. A group is a run of files of one folder.
  """
  packed, groups, counts, hashes, folders, seen = [], [], [], [], [], set()

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
        # What other programs leave behind: .ipynb_checkpoints, ._x.jpg, ...
        if entry.name.startswith(".") or entry.name == "__MACOSX":
          continue
        if entry.name.lower().endswith(SUFFIXES):
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
        groups.append(prefix)
        counts.append(len(names))
        hashes.append(np.asarray([_hash(name) for name in names], np.uint32))

  walk("")
  return {
    "names": np.concatenate([*packed, np.zeros(0, np.uint8)]),
    "groups": records.Names.pack(groups),
    "counts": np.asarray(counts, np.int64),
    "hashes": np.concatenate([*hashes, np.zeros(0, np.uint32)]),
    "folders": records.Names.pack([prefix for prefix, _ in folders]),
    "times": np.asarray([time_ns for _, time_ns in folders], np.int64),
  }


def _hash(name: str) -> int:
  digest = hashlib.blake2b(os.fsencode(name), digest_size=4).digest()
  return int.from_bytes(digest, "little")


def _is_current(root: str, listing: dict[str, np.ndarray]) -> bool:
  """Whether no folder has changed since it was listed."""
  if "hashes" not in listing:  # of an older version
    return False
  folders = records.Names(listing["folders"])
  for prefix, time_ns in zip(folders, listing["times"]):
    try:
      if os.stat(os.path.join(root, prefix)).st_mtime_ns != time_ns:
        return False
    except OSError:
      return False
  return True
