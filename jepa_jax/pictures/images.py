"""Images to draw: of a folder, or of the data that a run was trained on."""

from typing import Any

import ml_collections
import numpy as np

from jepa_jax import config as config_lib
from jepa_jax.data import pipeline

Images = np.ndarray  # uint8 [n, H, W, C]


def of_data(
  data: ml_collections.ConfigDict, split: str, count: int
) -> tuple[Images, int]:
  """Images of a split, from its first on, cut to their central part.

  Args:
    data: config.data.
    split: of it.
    count: at most so many.

  Returns:
    The images, and how many the split has.

  Raises:
    ValueError: no such data or split, or no image that can be read.
  """
  total = pipeline.num_examples(data, split)
  dataset = pipeline.evaluation_dataset(
    data, batch_size=min(count, total, 64), split=split
  )
  found, have = [], 0
  for batch in dataset.as_numpy_iterator():
    found.append(batch["image"][batch["valid"]])
    have += len(found[-1])
    if have >= count:
      break
  images = np.concatenate(found)[:count]
  if not len(images):
    raise ValueError(f"no image of {data.name} can be read.")
  return images, total


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
