"""Draws a random scene."""

import dataclasses
import zlib

import numpy as np

from jepa_jax.render import casting, world
from jepa_jax.render.world import Scene

EXTENT = 3.0  # centres lie in [-EXTENT, EXTENT]^2
MIN_GAP = 0.25  # between the footprints of two objects
MIN_MARGIN = 0.1  # the same, on the axes that the camera sees as right, back
MIN_VISIBLE = 8  # pixels of the 64 x 64 picture, for every object


def sample_scene(seed: int, split: str, index: int) -> Scene:
  """Draws the scene `index` of a split.

  The number of objects is drawn first and kept whatever is rejected later, so
  that the eight counts stay equally likely.

  Args:
    seed: of the data set, >= 0.
    split: name of the split.
    index: of the image in its split, >= 0.

  Returns:
    A scene in which no two objects touch and each one shows at least
    `MIN_VISIBLE` pixels of a 64 x 64 picture.
  """
  rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
  num_objects = int(rng.integers(world.MIN_OBJECTS, world.MAX_OBJECTS + 1))
  radii = np.array(list(world.SIZES.values()))
  while True:
    size = rng.integers(0, len(world.SIZES), num_objects)
    centers = _place(rng, radii[size])
    if centers is None:
      continue
    scene = Scene(
      shape=rng.integers(0, len(world.SHAPES), num_objects),
      color=rng.integers(0, len(world.COLORS), num_objects),
      material=rng.integers(0, len(world.MATERIALS), num_objects),
      size=size,
      rotation=rng.uniform(0, 360, num_objects),
      centers=centers,
    )
    scene = dataclasses.replace(  # Let cubes, which are lower, touch the floor.
      scene,
      centers=np.concatenate([centers, scene.half_widths[:, None]], axis=1),
    )
    owner = casting.cast(scene, 64)[1]
    visible = np.bincount(owner.ravel() + 1, minlength=num_objects + 1)[1:]
    if visible.min() >= MIN_VISIBLE:
      return scene


def _place(rng: np.random.Generator, radii: np.ndarray) -> np.ndarray | None:
  """[n, 2] floor positions that keep their distance, or None if stuck."""
  directions = world.AXES[[0, 2], :2]
  directions /= np.linalg.norm(directions, axis=1, keepdims=True)
  placed = []
  for k, radius in enumerate(radii):
    for candidate in rng.uniform(-EXTENT, EXTENT, (30, 2)):
      if k == 0:
        break
      offset = candidate - np.array(placed)
      gap = np.hypot(offset[:, 0], offset[:, 1]) - radii[:k] - radius
      margin = np.abs(offset @ directions.T).max(axis=1)
      if gap.min() > MIN_GAP and margin.min() > MIN_MARGIN:
        break
    else:
      return None
    placed.append(candidate)
  return np.array(placed)
