"""Images to draw, with their classes: of a folder, or of a run's data."""

from collections.abc import Sequence
from typing import Any

import ml_collections
import numpy as np

from jepa_jax import config as config_lib
from jepa_jax import paths
from jepa_jax.data import labels as labels_lib
from jepa_jax.data import pipeline, sources

Images = np.ndarray  # uint8 [n, H, W, C]


def of_data(
  data: ml_collections.ConfigDict, split: str, count: int, label: str = ""
) -> tuple[Images, list[str] | None]:
  """Images of a split, cut to their central part.

  They are the first ones; of a folder, which is sorted by class, random ones,
  always the same.

  Args:
    data: config.data.
    split: of it.
    count: at most so many.
    label: what is read with them, see class_label; "" for none.

  Returns:
    The images, and the name of each one's class, or None without a label.

  Raises:
    ValueError: no such data or split, or no image that can be read.
  """
  total = pipeline.num_examples(data, split)
  count = min(count, total)
  order = np.arange(total)
  if data.source == "folder":
    order = np.random.default_rng(0).permutation(total)
  dataset = pipeline.evaluation_dataset(
    data,
    batch_size=min(count, 64),
    split=split,
    labels=(label,) if label else (),
    indices=order[:count],
  )
  found, classes = [], []
  for batch in dataset.as_numpy_iterator():
    found.append(batch["image"][batch["valid"]])
    if label:
      classes.extend(batch["labels"][label][batch["valid"]].tolist())
  images = np.concatenate(found)
  if not len(images):
    raise ValueError(f"no image of {data.name} can be read.")
  if not label:
    return images, None
  names = sources.open_source(data, split).class_names(label)
  return images, [_name(x, names) for x in classes]


def _name(value: int | bytes, names: list[str] | None) -> str:
  if isinstance(value, bytes):
    return paths.printable(value.decode(errors="replace"))
  return names[value] if names else str(value)


def class_label(
  data: ml_collections.ConfigDict, split: str, names: Sequence[str]
) -> str:
  """The first of these labels that is a class: one integer or text an image.

  Args:
    data: config.data.
    split: of it.
    names: of labels.

  Returns:
    Its name.

  Raises:
    ValueError: the data have none of them, or they are no classes.
  """
  wrong = "no label is named"
  for name in names:
    try:
      spec = labels_lib.spec(data, split, name)
    except ValueError as error:
      wrong = str(error)
      continue
    if spec.shape.rank == 0 and not spec.dtype.is_floating:
      return name
    wrong = (
      f'label "{name}" is {spec.dtype.name} of shape {spec.shape}; a class is '
      "one integer or text."
    )
  raise ValueError(wrong)


def config_of_folder(
  folder: str, preprocessing: Any
) -> ml_collections.ConfigDict:
  """config.data of a folder's images, at the size that weights are for.

  Args:
    folder: see data.folder.
    preprocessing: jepa_jax.pretrained.Preprocessing.
  """
  data = config_lib.defaults().data
  data.update(
    source="folder",
    name=folder,
    channels=len(preprocessing.mean),
    mean=preprocessing.mean,
    std=preprocessing.std,
    num_examples=0,
  )
  height, width = preprocessing.image_size
  data.image_size = height if height == width else (height, width)
  return data
