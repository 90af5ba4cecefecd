"""What is drawn of: a run or weights, and images with their classes."""

import argparse
import contextlib
import copy
from typing import Any

from jepa_jax import paths

# Vectors a side that a map of features has at least, where patches allow it.
_FINE_ENOUGH = 32


class Source:
  """What is drawn: flags, and on demand the network and the images.

  Args:
    arguments: the parsed flags.
    count: images.
    labelled: whether their classes are read too, where they have some.
  """

  def __init__(
    self, arguments: argparse.Namespace, count: int, labelled: bool = False
  ):
    self.flags = arguments
    self._count = count
    self._labelled = labelled
    self._model = self._images = self._labels = None

  @property
  def run(self) -> Any:
    """The workdir, or None."""
    given = self.flags.workdir
    return None if given is None else paths.local(given, "--workdir")

  @property
  def config(self) -> Any:
    """That of the run, or None of weights."""
    from jepa_jax import config as config_lib

    if self.run is None:
      return None
    path = self.run / "config.json"
    if not path.is_file():
      raise ValueError(f"{self.run} holds no run: there is no {path}.")
    return config_lib.read(path)

  @property
  def model(self) -> Any:
    """The networks."""
    if self._model is None:
      from jepa_jax import pretrained

      self._model = pretrained.load(
        self.flags.weights or self.run, step=self.flags.step
      )
    return self._model

  @property
  def images(self) -> Any:
    """uint8 [n, H, W, C]."""
    if self._images is None:
      self._images, self._labels = self._read()
    return self._images

  @property
  def labels(self) -> list[str] | None:
    """The class of each image, or None."""
    _ = self.images  # read together
    return self._labels

  def first(self, count: int) -> "Source":
    """The same of its first images."""
    other = copy.copy(self)
    other._images = self.images[:count]
    other._labels = self.labels and self.labels[:count]
    return other

  @property
  def fine(self) -> int:
    """Vectors a side of a patch: --fine, or enough for a smooth map."""
    size = self.model.module.patch_size
    if self.flags.fine:
      return self.flags.fine
    grid = max(self.images.shape[1:3]) // size
    enough = [f for f in (1, 2, 4) if size % f == 0]
    return next((f for f in enough if f * grid >= _FINE_ENOUGH), enough[-1])

  def _read(self):
    from jepa_jax.pictures import images

    config, split = self.config, self.flags.split
    if self.flags.images is None and config is None:
      raise ValueError("--weights have no images; give --images FOLDER.")
    if self.flags.images is not None:
      data = images.config_of_folder(
        self.flags.images, self.model.preprocessing
      )
      split, known = split or "all", ["label"]
    else:
      data = config.data
      held_out = next(iter(config.evaluations.values()), None)
      split = split or (held_out.test if held_out else data.split)
      known = [x.label for x in config.evaluations.values() if not x.data]
    label = ""
    if self.flags.label:
      label = images.class_label(data, split, [self.flags.label])
    elif self._labelled:
      with contextlib.suppress(ValueError):  # pictures do without
        label = images.class_label(data, split, known)
    return images.of_data(data, split, self._count, label)
