"""The `scenes` data set: CLEVR-like pictures drawn on the spot, no download.

It has the features of TFDS's `clevr` under the same names, with the same
classes in the same order, and a depth map besides. So the labels below serve
the real CLEVR and this one alike.

    builder = scenes.prepare(image_size=64)
    dataset = builder.as_dataset(split="train")
    dataset = dataset.map(lambda e: (e["image"], scenes.count(e)))

`jepa_jax.render` draws; this file stores the images as TFRecords by TFDS.
"""

import collections.abc
import dataclasses
import os
import typing

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds

from jepa_jax.render import examples, world

NUM_TRAIN, NUM_TEST = 8000, 2000
# VTAB's bins of the nearest object's depth, in CLEVR's world units.
DISTANCE_EDGES = (8.0, 8.5, 9.0, 9.5, 10.0)


def count(example: dict) -> tf.Tensor:
  """How many objects there are, as VTAB's Clevr/Count counts them.

  Args:
    example: one example of `scenes`, or of `clevr` (splits train and
      validation; its test split has no objects to count).

  Returns:
    int32 scalar, 0 for 3 objects up to 7 for 10.

  Reference: Zhai et al. 2019, table 2 and appendix A, arXiv:1910.04867.
  """
  return tf.shape(example["objects"]["shape"])[0] - world.MIN_OBJECTS


def distance(example: dict) -> tf.Tensor:
  """How far the nearest object is, as VTAB's Clevr/Distance bins it.

  Args:
    example: as for `count`.

  Returns:
    int32 scalar, 0 for a centre at depth 8 or less, 5 beyond depth 10: the
    number of `DISTANCE_EDGES` that the depth exceeds.

  Reference: Zhai et al. 2019, table 2 and appendix A, arXiv:1910.04867.
  """
  return tf.reduce_sum(tf.cast(nearest(example) > DISTANCE_EDGES, tf.int32))


def nearest(example: dict) -> tf.Tensor:
  """How far the nearest object is, as a number: what `distance` bins.

  Args:
    example: as for `count`.

  Returns:
    float32 scalar, depth of its centre along the optical axis, in CLEVR's
    world units.
  """
  return tf.reduce_min(example["objects"]["pixel_coords"][:, 2])


def depth(example: dict) -> tf.Tensor:
  """The depth map of a `scenes` example.

  Args:
    example: one example of `scenes`; `clevr` has no depth map.

  Returns:
    float32 [H, W, 1], depth along the optical axis in world units, as in
    `pixel_coords[2]`; 32 stands for 32 and beyond.
  """
  return tf.cast(example["depth"], tf.float32) * examples.DEPTH_UNIT


def shapes(example: dict) -> tf.Tensor:
  """What is seen in each pixel: the floor, or a solid of which shape.

  Follows from depth: what is nearer than the floor of that pixel is of the
  solid whose centre is nearest to it, in radii.

  Args:
    example: as for `depth`.

  Returns:
    int32 [H, W]: 0 for floor and backdrop, else 1 + the number of a shape of
    world.SHAPES.
  """
  seen = depth(example)  # [H, W, 1]
  size = example["depth"].shape[0] or tf.shape(example["depth"])[0]
  rays, floor = tf.numpy_function(
    _rays_and_floor, [size], (tf.float32, tf.float32), stateful=False
  )
  rays.set_shape([*example["depth"].shape[:2], 3])
  floor.set_shape(example["depth"].shape[:2])
  points = tf.constant(world.CAMERA, tf.float32) + seen * rays  # [H, W, 3]
  objects = example["objects"]
  radii = tf.gather(
    tf.constant(list(world.SIZES.values()), tf.float32), objects["size"]
  )
  away = tf.norm(points[..., None, :] - objects["3d_coords"], axis=-1) / radii
  owner = tf.gather(objects["shape"], tf.argmin(away, axis=-1))
  solid = seen[..., 0] < floor - 4 * examples.DEPTH_UNIT
  return tf.where(solid, 1 + tf.cast(owner, tf.int32), 0)


def _rays_and_floor(size):
  """Directions [H, W, 3] of pixels, and the depth of the floor in each."""
  rays = np.moveaxis(world.camera_rays(2 * int(size)), 0, -1)
  down = np.maximum(-rays[..., 2], 1e-6)
  floor = np.minimum(world.CAMERA[2] / down, 32)
  corners = lambda x: np.stack([x[i::2, j::2] for i in (0, 1) for j in (0, 1)])
  # As depth is that of the nearest of a pixel's four rays.
  return (
    np.float32(corners(rays).mean(axis=0)),
    np.float32(corners(floor).min(axis=0)),
  )


# Each takes one un-batched example. `count` and `distance` are classes,
# `nearest` is a number, `depth` and `shapes` are maps.
LABELS: dict[str, collections.abc.Callable[[dict], tf.Tensor]] = {
  "count": count,
  "distance": distance,
  "nearest": nearest,
  "depth": depth,
  "shapes": shapes,
}
# The features that each of them needs.
NEEDS: dict[str, tuple[str, ...]] = {
  **dict.fromkeys(LABELS, ("objects",)),
  "depth": ("depth",),
  "shapes": ("objects", "depth"),
}
# What the classes are called, by number.
CLASS_NAMES: dict[str, tuple[str, ...]] = {
  "count": tuple(map(str, range(world.MIN_OBJECTS, world.MAX_OBJECTS + 1))),
  "distance": (
    *(f"≤ {edge:g}" for edge in DISTANCE_EDGES),
    f"> {DISTANCE_EDGES[-1]:g}",
  ),
}


@dataclasses.dataclass(eq=False)
class ScenesConfig(tfds.core.BuilderConfig):
  """What is drawn. The name, hence the folder, follows from the values.

  Attributes:
    name: filled in; what is given is not kept.
    image_size: pixels a side.
    num_train, num_test: images in each split.
    seed: another seed, other pictures.
  """

  name: str = ""
  image_size: int = 64
  num_train: int = NUM_TRAIN
  num_test: int = NUM_TEST
  seed: int = 0

  def __post_init__(self):
    for field in ("image_size", "num_train", "num_test"):
      if getattr(self, field) < 1:
        raise ValueError(
          f"scenes: {field} is {getattr(self, field)}; it must be at least 1."
        )
    if self.seed < 0:
      raise ValueError(f"scenes: seed is {self.seed}; it must be 0 or more.")
    name = f"{self.image_size}px"
    if (self.num_train, self.num_test) != (NUM_TRAIN, NUM_TEST):
      name += f"_{self.num_train}_{self.num_test}"
    if self.seed:
      name += f"_seed{self.seed}"
    self.name = name
    self.description = (
      f"{self.num_train} training and {self.num_test} test images of "
      f"{self.image_size} x {self.image_size} pixels, seed {self.seed}."
    )


class Scenes(tfds.core.GeneratorBasedBuilder):
  """TFDS builder of the `scenes` data set."""

  VERSION = tfds.core.Version("2.0.0")
  RELEASE_NOTES: typing.ClassVar = {
    "1.0.0": "First release.",
    "2.0.0": "Still camera and lights; rows stretched as in CLEVR's probes.",
  }
  BUILDER_CONFIGS: typing.ClassVar = [
    ScenesConfig(image_size=size) for size in (64, 96, 128, 224)
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    size = self.builder_config.image_size
    label = tfds.features.ClassLabel
    return tfds.core.DatasetInfo(
      builder=self,
      description="Three to ten solids on a plane, drawn by ray casting.",
      homepage="https://arxiv.org/abs/1612.06890",  # what it is modelled on
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(size, size, 3), encoding_format="png"
          ),
          # In units of `examples.DEPTH_UNIT`: a 16-bit PNG is a quarter of
          # the size of raw floats.
          "depth": tfds.features.Image(
            shape=(size, size, 1), dtype=tf.uint16, encoding_format="png"
          ),
          "file_name": tfds.features.Text(),
          "objects": tfds.features.Sequence(
            {
              "color": label(names=list(world.COLORS)),
              "material": label(names=list(world.MATERIALS)),
              "shape": label(names=list(world.SHAPES)),
              "size": label(names=list(world.SIZES)),
              "rotation": tfds.features.Scalar(tf.float32),
              "3d_coords": tfds.features.Tensor(shape=(3,), dtype=tf.float32),
              "pixel_coords": tfds.features.Tensor(
                shape=(3,), dtype=tf.float32
              ),
            }
          ),
        }
      ),
    )

  def _split_generators(self, dl_manager):
    del dl_manager  # Nothing is downloaded.
    config = self.builder_config
    return {
      "train": self._generate_examples("train", config.num_train),
      "test": self._generate_examples("test", config.num_test),
    }

  def _generate_examples(self, split: str, num_examples: int):
    config = self.builder_config
    # More than 8 would wait for this process, which encodes and writes.
    workers = min(os.cpu_count() or 1, 8)
    drawn = examples.stream(
      seed=config.seed,
      split=split,
      count=num_examples,
      image_size=config.image_size,
      workers=workers,
    )
    yield from enumerate(drawn)


def prepare(
  data_dir: str | os.PathLike | None = None,
  *,
  image_size: int = 64,
  num_train: int = NUM_TRAIN,
  num_test: int = NUM_TEST,
  seed: int = 0,
) -> Scenes:
  """Draws the data set unless it is there already, and opens it.

  TFDS writes to a folder of another name and renames it at the end: what was
  cut short is drawn anew, never mistaken for the whole. The network is not
  used.

  Args:
    data_dir: where data sets live; TFDS's usual (~/tensorflow_datasets) if
      None.
    image_size: pixels a side.
    num_train, num_test: images in each split.
    seed: another seed, other pictures.

  Returns:
    The builder, ready for `as_dataset(split="train")` or "test".

  Raises:
    ValueError: a size or a number is not positive.
    RuntimeError: a drawing process ended early.
  """
  config = ScenesConfig(
    image_size=image_size, num_train=num_train, num_test=num_test, seed=seed
  )
  config = Scenes.builder_configs.get(config.name, config)
  if data_dir is not None:
    data_dir = os.path.expanduser(data_dir)
  builder = Scenes(data_dir=data_dir, config=config)
  try:
    builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
  except OSError:
    # Another process (on a pod, another host) may have been first to rename
    # its folder, which holds the same pictures.
    builder = Scenes(data_dir=data_dir, config=config)
    if not builder.info.initialized:
      raise
  return builder
