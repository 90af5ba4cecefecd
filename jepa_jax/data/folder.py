"""Images in a folder: which there are, their classes and their splits.

    root/CLASS/x.jpg           classes, or root/x.jpg without any
    root/train/CLASS/x.jpg     splits beside each other, "train" and more of
    root/test/CLASS/x.jpg      "val", "valid", "validation" and "test"

Where no folders say what the splits are, "test" is a tenth of the images,
chosen by a hash of their paths, and "train" the others: an image that is added
or removed moves no other one. Where a tenth is little, at least one image of
each class with two or more is held out, and five in all, but for these no more
than a quarter. "all" is both, and slices are words of TFDS: "train[:90%]",
"train[90%:]", "train[:500]+test".
"""

import collections
from collections.abc import Callable, Sequence
import functools
import hashlib
import itertools
import os
import pathlib
import stat
from typing import Any

from absl import logging
import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from jepa_jax import paths
from jepa_jax.data import headers, records

SUFFIXES = (
  *(".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp"),
  *(".tif", ".tiff", ".avif", ".npy"),
  *((".heic", ".heif") if headers.pillow_heif else ()),
)
# Images by their names, of formats that are not read.
UNREAD = (
  *(".heic", ".heif", ".jxl", ".jp2", ".j2k", ".psd", ".svg", ".ico", ".tga"),
  *(".exr", ".hdr", ".dcm", ".ppm", ".pgm", ".pbm", ".pnm", ".eps", ".xcf"),
  *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raw", ".npz"),
)
HELD_OUT = 0.1  # share of the images that is "test" where no folder says so
_HELD_OUT_LEAST = 5  # images, where a quarter has as many
_FEW = 30  # images of a test split that are warned of
_NAMED = 3  # of the files that are skipped for one reason
# A pipe is not waited for; Windows has no such flag, and no such pipes.
_NOT_WAITING = getattr(os, "O_NONBLOCK", 0)
_SPLITS = {"val", "valid", "validation", "test"}  # folders beside "train"


def is_labelled(root: str) -> bool:
  """Whether a probe can learn classes, and be scored on others' images."""
  train = FolderSource(root, "train")
  if not train.classes or len({*train.labels.tolist()}) < 2:
    return False
  try:
    return len(FolderSource(root, "test")) > 0
  except ValueError:  # too few images to hold any out
    return False


class FolderSource:
  """Image files below a folder, in sorted order.

  Where every image of a split lies in a sub-folder, the names of the first
  level (below the split's folder) are the classes, numbered in sorted order
  over all splits.

  Attributes:
    classes: their names, none where an image lies in no sub-folder.
    labels: int32, the class of each image of the split, or -1.

  Args:
    root: the folder.
    split: see the head of this file.
    max_mib: MiB of the largest file that is read.

  Raises:
    ValueError: no such folder or split, or no image in it.
  """

  encoding = None

  def __init__(
    self, root: str, split: str = "all", max_mib: float = headers.MAX_MIB
  ):
    self._root = paths.local(root, "data.name")
    self._most = int(max_mib * 2**20)
    root = paths.printable(root)
    if not self._root.is_dir():
      raise ValueError(f"no folder {root}; set data.name to a folder of images")
    listing = records.cached(
      "folder",
      (str(self._root.resolve()), SUFFIXES),
      lambda: _list_folder(str(self._root)),
      lambda arrays: _is_current(str(self._root), arrays),
    )
    _tell_skipped(root, records.Names(listing["skipped"]))
    self._names = records.Names(listing["names"])
    if not len(self._names):
      raise ValueError(
        f"no image below {root}; it needs files that end in"
        f" {', '.join(SUFFIXES)}"
      )
    groups = [x.split("/") for x in records.Names(listing["groups"])]
    self._counts = listing["counts"]  # images of each group
    by_folder = _splits_of({parts[0] for parts in groups})
    hashes = listing["hashes"]
    labels = self._name_classes(groups, by_folder)
    if by_folder:
      of = lambda x: np.repeat([g[0] == x for g in groups], self._counts)
      splits = {x: np.flatnonzero(of(x)) for x in sorted(by_folder)}
    else:
      splits = _hold_out(hashes, labels)
    # Record number -> place in the listing.
    self._chosen = _select(split, splits, hashes, root).astype(np.int32)
    if split == "test" and len(self._chosen) < _FEW:
      _tell(
        f'split "test" of {root} holds {len(self._chosen)} images, so that a '
        f"score moves in steps of {100 / len(self._chosen):.0f} %"
      )
    self.labels = labels[self._chosen]
    if (self.labels < 0).any():  # none where a file is in no sub-folder
      self.classes = []

  def _name_classes(self, groups, by_folder):
    """Sets classes; the label of each image of the listing, -1 for none."""
    level = 1 if by_folder else 0
    found = [x[level] if len(x) > level + 1 else "" for x in groups]
    tops = [x[0] for x in groups]
    names = {
      name
      for name, top in zip(found, tops)
      if name and (not by_folder or top in by_folder)
    }
    number = {name: i for i, name in enumerate(sorted(names))}
    self.classes = [paths.printable(name) for name in number]
    labels = np.asarray([number.get(name, -1) for name in found], np.int32)
    return np.repeat(labels, self._counts)

  def __len__(self) -> int:
    return len(self._chosen)

  def read(self, indices: np.ndarray) -> list[bytes]:
    # One that is gone or forbidden is an unreadable image like any other.
    return [self._read(i)[0] for i in indices.tolist()]

  def problem(self, index: int) -> str:
    return self._read(index)[1]

  def _read(self, index: int) -> tuple[bytes, str]:
    """A file, or nothing and why."""
    try:
      # Of what was put in a file's place, a pipe would be waited for.
      file = os.open(self._path(index), os.O_RDONLY | _NOT_WAITING)
      with open(file, "rb") as opened:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
          return b"", "no file"
        if status.st_size > self._most:
          return b"", (
            f"a file of {status.st_size / 2**20:,.0f} MiB, more than"
            f" data.max_mib={self._most / 2**20:g}"
          )
        return opened.read(self._most), ""
    except OSError as error:
      return b"", (error.strerror or type(error).__name__).lower()

  def images(self, records: Sequence[bytes]) -> list[bytes]:
    return list(records)

  def name(self, index: int) -> str:
    return paths.printable(str(self._path(index)))

  def features(self, record: tf.Tensor, index: tf.Tensor) -> dict[str, Any]:
    del record
    if not self.classes:
      return {}
    return {"label": tf.gather(self.labels, index)}

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


def _hold_out(hashes: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
  """Splits by hash; at least one image is held out of two or more."""
  held = hashes < HELD_OUT * 2**32
  for label in np.unique(labels[labels >= 0]):
    members = np.flatnonzero(labels == label)
    if len(members) > 1 and not held[members].any():
      held[members[np.argmin(hashes[members])]] = True
  few = min(_HELD_OUT_LEAST, max(len(hashes) // 4, int(len(hashes) > 1)))
  order = np.argsort(hashes, kind="stable")
  missing = few - int(held.sum())
  held[[i for i in order.tolist() if not held[i]][: max(missing, 0)]] = True
  if held.all():
    held[order[-1]] = False
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
  What looks like an image and is none that is read is listed too, as
  "reason\\tname".
  """
  packed, groups, counts, hashes, folders, skipped = [], [], [], [], [], []
  seen: set[tuple[int, int]] = set()
  # Names to come, a folder's with its "/", the next one last: folders may lie
  # deeper than Python calls.
  pending: list[list[str]] = [[""]]
  while pending:
    if not pending[-1]:
      pending.pop()
      continue
    group = pending[-1].pop()
    if isinstance(group, str):
      here = _list_one(root, group, seen, folders, skipped)
      runs = itertools.groupby(here, lambda x: x[-1] == "/")
      found: list[Any] = []
      for is_folder, names in runs:
        found += list(names) if is_folder else [(group, list(names))]
      pending.append(found[::-1])
    else:
      prefix, names = group
      packed.append(records.Names.pack(names))
      groups.append(prefix)
      counts.append(len(names))
      hashes.append(np.asarray([_hash(name) for name in names], np.uint32))
  return {
    "names": np.concatenate([*packed, np.zeros(0, np.uint8)]),
    "groups": records.Names.pack(groups),
    "counts": np.asarray(counts, np.int64),
    "hashes": np.concatenate([*hashes, np.zeros(0, np.uint32)]),
    "folders": records.Names.pack([prefix for prefix, _ in folders]),
    "times": np.asarray([time_ns for _, time_ns in folders], np.int64),
    "skipped": records.Names.pack(skipped),
  }


def _list_one(
  root: str,
  prefix: str,
  seen: set[tuple[int, int]],
  folders: list[tuple[str, int]],
  skipped: list[str],
) -> list[str]:
  """Images and folders, with their "/", of one folder in sorted order."""
  path, here = os.path.join(root, prefix), []
  try:
    status = os.stat(path)
    if (status.st_dev, status.st_ino) in seen:  # a link to a folder above
      skipped.append(f"a folder seen already\t{prefix}")
      return []
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(path) as entries:
      for entry in entries:
        # What other programs leave behind: .ipynb_checkpoints, ._x.jpg, ...
        if entry.name.startswith(".") or entry.name == "__MACOSX":
          continue
        name, lower = prefix + entry.name, entry.name.lower()
        if lower.endswith(SUFFIXES) and _is(entry.is_file):
          here.append(name)
        elif _is(entry.is_dir):
          here.append(name + "/")
        elif lower.endswith(SUFFIXES):
          skipped.append(f"no file\t{name}")
        elif lower.endswith(UNREAD):
          suffix = lower[lower.rindex(".") :]
          skipped.append(f"{suffix} is not read\t{name}")
    folders.append((prefix, status.st_mtime_ns))
  except OSError as error:
    why = (error.strerror or type(error).__name__).lower()
    skipped.append(f"{why}\t{prefix}")
    folders.append((prefix, -1))  # looked at again each time
    return []
  return sorted(here)  # with its "/", a folder stands where its files belong


def _is(kind: Callable[[], bool]) -> bool:
  """What an entry says of itself."""
  try:
    return kind()
  except OSError:  # a link to itself
    return False


def _tell_skipped(root: str, skipped: Sequence[str]) -> None:
  """Says once what is no image and looks like one."""
  reasons = collections.defaultdict(list)
  for line in skipped:
    why, _, name = line.partition("\t")
    reasons[why].append(name)
  for why, names in sorted(reasons.items()):
    shown = ", ".join(paths.printable(x) for x in names[:_NAMED])
    more = ", ..." if len(names) > _NAMED else ""
    _tell(f"skipped {len(names):,} below {root}: {why}: {shown}{more}")


@functools.cache
def _tell(text: str) -> None:
  """Warns, once a process of each thing."""
  logging.warning("%s", text)


def _hash(name: str) -> int:
  digest = hashlib.blake2b(os.fsencode(name), digest_size=4).digest()
  return int.from_bytes(digest, "little")


def _is_current(root: str, listing: dict[str, np.ndarray]) -> bool:
  """Whether no folder has changed since it was listed."""
  if "skipped" not in listing:  # of an older version
    return False
  folders = records.Names(listing["folders"])
  for prefix, time_ns in zip(folders, listing["times"]):
    try:
      if os.stat(os.path.join(root, prefix)).st_mtime_ns != time_ns:
        return False
    except OSError:
      return False
  return True
