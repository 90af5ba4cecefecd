"""Finds the surface that each ray meets first, and the surface's normal.

Rays are cast for all pixels at once; the only loops are over the at most ten
objects, and each object is tested only on the part of the picture that it can
cover.
"""

import math

import numpy as np

from jepa_jax.render import world
from jepa_jax.render.world import Scene


def cast(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
  """Finds the surface that each of grid x grid rays meets first.

  Args:
    scene: what to look at.
    grid: rays a side, through the centres of equal cells.

  Returns:
    depth [grid, grid] float32 along the optical axis; owner [grid, grid] int,
    the object's index or -1 for the floor.
  """
  rays = world.camera_rays(grid)
  down = np.minimum(rays[2], np.float32(-1e-3))
  depth = np.minimum(np.float32(-world.CAMERA[2]) / down, np.float32(1e3))
  owner = np.full((grid, grid), -1)
  for k, center in enumerate(scene.centers):
    window = window_of(center[None], bounding_radius(scene, k), grid)
    origin = (world.CAMERA - center)[:, None, None]
    near, far = intersections(scene, k, origin, rays[(slice(None), *window)])
    hit = (near < far) & (near < depth[window])
    depth[window][hit] = near[hit]
    owner[window][hit] = k
  return depth, owner


def surface_normals(
  scene: Scene, points: np.ndarray, owner: np.ndarray
) -> np.ndarray:
  """Surface normals at the points where rays end.

  Args:
    scene: what is looked at.
    points: [3, grid, grid] the points.
    owner: [grid, grid] the object there, or -1 for the floor.

  Returns:
    [3, grid, grid] float32 unit vectors.
  """
  normals = np.zeros(points.shape, np.float32)
  normals[2] = 1
  for k, center in enumerate(scene.centers):
    radius = bounding_radius(scene, k)
    window = window_of(center[None], radius, owner.shape[0])
    inside = (slice(None), *window)
    mine = owner[window] == k
    offset = points[inside][:, mine] - center.astype(np.float32)[:, None]
    normal = _normals(
      world.SHAPES[scene.shape[k]], _to_object_axes(scene, k, offset)
    )
    normals[inside][:, mine] = _to_object_axes(scene, k, normal, inverse=True)
  return normals


def window_of(
  centers: np.ndarray, radius: float, grid: int
) -> tuple[slice, slice]:
  """Rows and columns that the convex hull of equal spheres can cover."""
  bounds = [[], []]  # of y, of x; plain floats, which are faster when so few
  for x, y, depth in ((centers - world.CAMERA) @ world.AXES.T).tolist():
    if depth <= 1.01 * radius:
      return slice(0, grid), slice(0, grid)
    scale = (depth**2 - radius**2) * world.TANGENT
    axes = zip((y, x), bounds, (world.STRETCH, 1), strict=True)
    for side, bound, stretch in axes:
      spread = radius * math.sqrt(side**2 + depth**2 - radius**2)
      bound.append((side * depth - spread) / scale * stretch)
      bound.append((side * depth + spread) / scale * stretch)
  rows, columns = (
    slice(
      min(max(math.floor(grid * (1 + min(bound)) / 2), 0), grid),
      min(max(math.ceil(grid * (1 + max(bound)) / 2), 0), grid),
    )
    for bound in bounds
  )
  return rows, columns


def bounding_radius(scene: Scene, k: int) -> float:
  """Radius of the bounding sphere of object k."""
  stretch = {"cube": math.sqrt(3), "sphere": 1.0, "cylinder": math.sqrt(2)}
  return scene.half_widths[k] * stretch[world.SHAPES[scene.shape[k]]]


def _to_object_axes(
  scene: Scene, k: int, vectors: np.ndarray, *, inverse: bool = False
) -> np.ndarray:
  """Rotates [3, ...] vectors from world axes to those of object k."""
  if world.SHAPES[scene.shape[k]] != "cube":
    return vectors  # Symmetric about the vertical: rotation changes nothing.
  angle = math.radians(scene.rotation[k])
  cos, sin = math.cos(angle), math.sin(angle) * (-1 if inverse else 1)
  x, y, z = vectors
  return np.stack([cos * x + sin * y, cos * y - sin * x, z])


def intersections(
  scene: Scene, k: int, origin: np.ndarray, ray: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Where rays enter and leave an object.

  Args:
    scene, k: which object.
    origin: [3, ...] where rays start, less the object's centre.
    ray: [3, ...] directions; origin and ray broadcast.

  Returns:
    near, far: ray parameters; no hit where near >= far.
  """
  shape, half = world.SHAPES[scene.shape[k]], np.float32(scene.half_widths[k])
  origin = _to_object_axes(scene, k, origin).astype(np.float32)
  ray = _to_object_axes(scene, k, ray)
  if shape == "sphere":
    return _round_intersections(half, origin, ray)
  near, far = _slab_intersections(half, origin[2], ray[2])
  if shape == "cylinder":
    sides = [_round_intersections(half, origin[:2], ray[:2])]
  else:
    sides = [_slab_intersections(half, origin[i], ray[i]) for i in (0, 1)]
  for side_near, side_far in sides:
    near, far = np.maximum(near, side_near), np.minimum(far, side_far)
  return near, far


def _slab_intersections(half, origin, ray):
  inverse = 1 / np.where(np.abs(ray) < 1e-7, np.float32(1e-7), ray)
  middle, extent = -origin * inverse, half * np.abs(inverse)
  return middle - extent, middle + extent


def _round_intersections(half, origin, ray):
  a = np.maximum(sum(r * r for r in ray), np.float32(1e-12))
  b = sum(o * r for o, r in zip(origin, ray, strict=True))
  c = sum(o * o for o in origin) - half * half
  discriminant = b * b - a * c
  root = np.sqrt(np.maximum(discriminant, 0))
  missed = np.where(discriminant > 0, 0, np.float32(np.inf))
  return (-b - root) / a + missed, (-b + root) / a


def _normals(shape: str, offset: np.ndarray) -> np.ndarray:
  """Unit normals at surface points, both [3, points] in the object's axes."""
  if shape == "cube":
    largest = np.abs(offset).argmax(axis=0)[None]
    normal = np.zeros_like(offset)
    side = np.sign(np.take_along_axis(offset, largest, axis=0))
    np.put_along_axis(normal, largest, side, axis=0)
    return normal
  normal = offset.copy()
  if shape == "cylinder":
    lid = np.abs(offset[2]) > np.hypot(offset[0], offset[1])
    normal[:2, lid] = 0
    normal[2, ~lid] = 0
  return normal / np.maximum(np.linalg.norm(normal, axis=0), np.float32(1e-6))
