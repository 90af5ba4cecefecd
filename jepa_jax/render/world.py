"""What a scene consists of: its objects, and the camera and lights of all.

World axes are x, y on the floor and z up, in CLEVR's units.

Differs: CLEVR frames 3:2 and is squeezed to a square by those who use it. Our
  picture is square, with square pixels.
"""

import dataclasses
import functools
import math

import numpy as np

# Names and orders are those of TFDS's `clevr`.
COLORS = {
  "gray": (87, 87, 87),
  "blue": (42, 75, 215),
  "brown": (129, 74, 25),
  "yellow": (255, 238, 51),
  "red": (173, 35, 35),
  "green": (29, 105, 20),
  "purple": (129, 38, 192),
  "cyan": (41, 208, 208),
}
MATERIALS = ("rubber", "metal")
SHAPES = ("cube", "sphere", "cylinder")
SIZES = {"small": 0.35, "large": 0.7}  # radius
MIN_OBJECTS, MAX_OBJECTS = 3, 10


def unit(vector: np.ndarray) -> np.ndarray:
  """The vector scaled to length 1."""
  return vector / np.linalg.norm(vector)


def _look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
  """[3, 3] rows right, down, forward of a camera that stands upright."""
  forward = unit(target - position)
  right = unit(np.cross(forward, [0.0, 0.0, 1.0]))
  return np.stack([right, np.cross(forward, right), forward])


CAMERA = np.array([6.85, -6.85, 5.85])  # its position
CAMERA_TARGET = np.array([-0.1, 0.1, 0.0])
AXES = _look_at(CAMERA, CAMERA_TARGET)  # rows right, down, forward
TANGENT = 0.41  # of half the field of view
# Of the rows: CLEVR's pictures are 480 x 320 and become squares in its probes.
STRETCH = 1.5
KEY_LIGHT = unit(np.array([-0.3, -0.65, 0.85]))  # direction towards the light
FILL_LIGHT = unit(np.array([0.75, 0.1, 0.65]))


@dataclasses.dataclass(frozen=True)
class Scene:
  """The n objects of a picture.

  Attributes:
    shape, color, material, size: [n] int, indices in the tables above.
    rotation: [n] degrees about the vertical.
    centers: [n, 3] world coordinates of the objects' centres.
  """

  shape: np.ndarray
  color: np.ndarray
  material: np.ndarray
  size: np.ndarray
  rotation: np.ndarray
  centers: np.ndarray

  @functools.cached_property
  def half_widths(self) -> np.ndarray:
    """[n] radius of a sphere or cylinder, half the edge of a cube."""
    radius = np.array(list(SIZES.values()))[self.size]
    return np.where(self.shape == 0, radius / math.sqrt(2), radius)


def project(points: np.ndarray, image_size: int) -> np.ndarray:
  """Maps world points to pixels.

  Args:
    points: [n, 3] world coordinates.
    image_size: pixels a side.

  Returns:
    [n, 3]: x to the right and y downwards in pixels from the picture's
    top-left corner (the first pixel's centre is 0.5), depth in world units.
  """
  x, y, depth = ((points - CAMERA) @ AXES.T).T
  half = image_size / 2
  return np.stack(
    [
      half + half * x / (depth * TANGENT),
      half + half * y * STRETCH / (depth * TANGENT),
      depth,
    ],
    axis=1,
  )


def camera_rays(grid: int) -> np.ndarray:
  """Directions of the rays through the centres of grid x grid equal cells.

  A point on a ray is `CAMERA + depth * direction`. The component of the
  direction along the optical axis is 1, so that the ray's parameter is the
  depth, as in CLEVR's `pixel_coords[2]`.

  Returns:
    [3, grid, grid] float32.
  """
  offset = ((np.arange(grid) + 0.5) / grid * 2 - 1) * TANGENT
  right, down, forward = AXES.astype(np.float32)
  offset = offset.astype(np.float32)
  return (
    forward[:, None, None]
    + down[:, None, None] * (offset[:, None] / STRETCH)
    + right[:, None, None] * offset
  )
