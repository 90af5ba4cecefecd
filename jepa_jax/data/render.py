"""Draws small CLEVR-like scenes with NumPy alone: lit solids on a plane.

A scene is a pure function of (seed, split, index), so any number of
processes, in any order, draws the same bytes. Rays are cast for all pixels at
once; the only loops are over the at most ten objects, and each object is
tested on the rectangle of the screen that it (or its shadow) can touch.

World axes are x, y on the floor and z up, in CLEVR's units. A ray is
`position + depth * (forward + u * right + v * down)`, so that the ray's
parameter is itself the depth along the optical axis, as in CLEVR's
`pixel_coords[2]`.

This file imports neither TensorFlow nor the rest of the package: run by its
path, it is the worker process that `stream` starts.

Differs: CLEVR frames 3:2 and is squeezed to a square by those who use it. Our
  picture is square, with square pixels.

Reference: Johnson et al. 2017, section 3 and appendix A, arXiv:1612.06890.
"""

import collections.abc
import dataclasses
import functools
import json
import math
import os
import pickle
import signal
import struct
import subprocess
import sys
import zlib

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

EXTENT = 3.0  # centres lie in [-EXTENT, EXTENT]^2
MIN_GAP = 0.25  # between the footprints of two objects
MIN_MARGIN = 0.1  # the same, on the axes that the camera sees as right, back
MIN_VISIBLE = 8  # pixels of the 64 x 64 picture, for every object
CAMERA = (6.85, -6.85, 5.85)
CAMERA_TARGET = (-0.1, 0.1, 0.0)
TANGENT = 0.41  # of half the field of view
# Of the rows: CLEVR's pictures are 480 x 320 and become squares in its probes.
STRETCH = 1.5
DEPTH_UNIT = 1 / 2048  # of the uint16 depth map, which thus ends at 32

_ALBEDO = (np.array(list(COLORS.values()), np.float32) / 255) ** 2.2
_FLOOR = np.array([[0.37, 0.37, 0.365]], np.float32)
_KEY_LIGHT = (-0.3, -0.65, 0.85)  # towards the light
_FILL_LIGHT = (0.75, 0.1, 0.65)
_LIGHT_RADIUS = 0.06  # of the key light, as seen from the floor: penumbra


@dataclasses.dataclass(frozen=True)
class Scene:
  """What is drawn: n objects, one camera, two lights.

  Attributes:
    shape, color, material, size: [n] int, indices in the tables above.
    rotation: [n] degrees about the vertical.
    centers: [n, 3] world coordinates of the objects' centres.
    position: [3] the camera's.
    axes: [3, 3] rows are the camera's right, down and forward.
    key, fill: [3] unit vectors towards the lights.
  """

  shape: np.ndarray
  color: np.ndarray
  material: np.ndarray
  size: np.ndarray
  rotation: np.ndarray
  centers: np.ndarray
  position: np.ndarray
  axes: np.ndarray
  key: np.ndarray
  fill: np.ndarray

  @functools.cached_property
  def half_widths(self) -> np.ndarray:
    """[n] radius of a sphere or cylinder, half the edge of a cube."""
    radius = np.array(list(SIZES.values()))[self.size]
    return np.where(self.shape == 0, radius / math.sqrt(2), radius)


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
  num_objects = int(rng.integers(MIN_OBJECTS, MAX_OBJECTS + 1))
  position = np.array(CAMERA)
  axes = _look_at(position, np.array(CAMERA_TARGET))
  key, fill = _unit(np.array(_KEY_LIGHT)), _unit(np.array(_FILL_LIGHT))
  while True:
    size = rng.integers(0, len(SIZES), num_objects)
    centers = _place(rng, np.array(list(SIZES.values()))[size], axes)
    if centers is None:
      continue
    scene = Scene(
      shape=rng.integers(0, len(SHAPES), num_objects),
      color=rng.integers(0, len(COLORS), num_objects),
      material=rng.integers(0, len(MATERIALS), num_objects),
      size=size,
      rotation=rng.uniform(0, 360, num_objects),
      centers=centers,
      position=position,
      axes=axes,
      key=key,
      fill=fill,
    )
    scene = dataclasses.replace(  # Let cubes, which are lower, touch the floor.
      scene,
      centers=np.concatenate([centers, scene.half_widths[:, None]], axis=1),
    )
    owner = cast(scene, 64)[1]
    visible = np.bincount(owner.ravel() + 1, minlength=num_objects + 1)[1:]
    if visible.min() >= MIN_VISIBLE:
      return scene


def _place(
  rng: np.random.Generator, radii: np.ndarray, axes: np.ndarray
) -> np.ndarray | None:
  """[n, 2] floor positions that keep their distance, or None if stuck."""
  directions = axes[[0, 2], :2]
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


def project(scene: Scene, points: np.ndarray, image_size: int) -> np.ndarray:
  """Where world points appear.

  Args:
    scene: gives the camera.
    points: [n, 3] world coordinates.
    image_size: pixels a side.

  Returns:
    [n, 3]: x to the right and y downwards in pixels from the picture's
    top-left corner (the first pixel's centre is 0.5), depth in world units.
  """
  x, y, depth = ((points - scene.position) @ scene.axes.T).T
  half = image_size / 2
  return np.stack(
    [
      half + half * x / (depth * TANGENT),
      half + half * y * STRETCH / (depth * TANGENT),
      depth,
    ],
    axis=1,
  )


def cast(scene: Scene, grid: int) -> tuple[np.ndarray, np.ndarray]:
  """Finds the surface that each of grid x grid rays meets first.

  Args:
    scene: what to look at.
    grid: rays a side, through the centres of equal cells.

  Returns:
    depth [grid, grid] float32 along the optical axis; owner [grid, grid] int,
    the object's index or -1 for the floor.
  """
  rays = _rays(scene, grid)
  down = np.minimum(rays[2], np.float32(-1e-3))
  depth = np.minimum(np.float32(-scene.position[2]) / down, np.float32(1e3))
  owner = np.full((grid, grid), -1)
  for k, center in enumerate(scene.centers):
    window = _window(scene, center[None], _reach(scene, k), grid)
    origin = _turn(scene, k, scene.position - center).astype(np.float32)
    near, far = _crossing(
      SHAPES[scene.shape[k]],
      np.float32(scene.half_widths[k]),
      origin[:, None, None],
      _turn(scene, k, rays[(slice(None), *window)]),
    )
    hit = (near < far) & (near < depth[window])
    depth[window][hit] = near[hit]
    owner[window][hit] = k
  return depth, owner


def surface_normals(
  scene: Scene, points: np.ndarray, owner: np.ndarray
) -> np.ndarray:
  """Which way the surface faces where rays end.

  Args:
    scene: what is looked at.
    points: [3, grid, grid] where on it the rays end.
    owner: [grid, grid] the object there, or -1 for the floor.

  Returns:
    [3, grid, grid] float32 unit vectors.
  """
  normals = np.zeros(points.shape, np.float32)
  normals[2] = 1
  for k, center in enumerate(scene.centers):
    window = _window(scene, center[None], _reach(scene, k), owner.shape[0])
    inside = (slice(None), *window)
    mine = owner[window] == k
    where = points[inside][:, mine] - center.astype(np.float32)[:, None]
    normal = _outward(SHAPES[scene.shape[k]], _turn(scene, k, where))
    normals[inside][:, mine] = _turn(scene, k, normal, back=True)
  return normals


def render(
  scene: Scene, image_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Draws a scene with 2 x 2 rays a pixel, each to a point of the light.

  Args:
    scene: what to draw.
    image_size: pixels a side.

  Returns:
    image [H, W, 3] uint8 (sRGB); depth [H, W] float32, of the nearest surface
    in the pixel, in world units; owner [H, W] int, that surface's object or -1.
  """
  grid = 2 * image_size
  depth, owner = cast(scene, grid)
  rays = _rays(scene, grid)
  points = scene.position.astype(np.float32)[:, None, None] + depth * rays
  normals = surface_normals(scene, points, owner)
  direct, ambient = _shadows(scene, points, owner)
  color = _shade(scene, rays, normals, owner, direct, ambient)
  # Far floor melts into the backdrop, so that the horizon leaves no edge.
  haze = np.clip((depth - 14) / 16, 0, 1)
  color += haze * (np.float32(0.36) - color)
  color = 0.25 * sum(color[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
  image = 255 * np.clip(color, 0, 1) ** np.float32(1 / 2.2) + 0.5
  image = np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))
  corners = [(i, j) for i in (0, 1) for j in (0, 1)]
  depths = np.stack([depth[i::2, j::2] for i, j in corners])
  owners = np.stack([owner[i::2, j::2] for i, j in corners])
  nearest = depths.argmin(axis=0)[None]
  return (
    image,
    np.take_along_axis(depths, nearest, axis=0)[0],
    np.take_along_axis(owners, nearest, axis=0)[0],
  )


def example(seed: int, split: str, index: int, image_size: int) -> dict:
  """One image with its annotations, in the features of TFDS's `clevr`.

  Args:
    seed, split, index: which scene.
    image_size: pixels a side. The scene does not depend on it.

  Returns:
    image [H, W, 3] uint8, depth [H, W, 1] uint16 in units of `DEPTH_UNIT`,
    file_name, and objects, a list of dictionaries.
  """
  scene = sample_scene(seed, split, index)
  image, depth, _ = render(scene, image_size)
  depth = np.minimum(np.rint(depth / DEPTH_UNIT), 65535).astype(np.uint16)
  pixels = project(scene, scene.centers, image_size)
  return {
    "image": image,
    "depth": depth[..., None],
    "file_name": f"scenes_{split}_{index:06d}.png",
    "objects": [
      {
        "color": list(COLORS)[scene.color[k]],
        "material": MATERIALS[scene.material[k]],
        "shape": SHAPES[scene.shape[k]],
        "size": list(SIZES)[scene.size[k]],
        "rotation": np.float32(scene.rotation[k]),
        "3d_coords": scene.centers[k].astype(np.float32),
        "pixel_coords": pixels[k].astype(np.float32),
      }
      for k in range(len(scene.shape))
    ],
  }


def stream(
  *, seed: int, split: str, count: int, image_size: int, workers: int
) -> collections.abc.Iterator[dict]:
  """Yields `example` 0, 1, ..., count - 1, drawn by other processes.

  The workers are fresh interpreters that run this file: no fork (unsafe once
  TensorFlow has threads), and no import of the caller's main module.
  A worker whose reader has gone ends at its next write.

  Args:
    seed, split, image_size: as for `example`.
    count: number of images.
    workers: number of processes; the result does not depend on it.

  Raises:
    RuntimeError: a worker ended early; its own message is on stderr.
  """
  workers = max(1, min(workers, count))
  processes = []
  try:
    for first in range(workers):
      job = [seed, split, first, count, workers, image_size]
      processes.append(
        subprocess.Popen(
          [sys.executable, __file__, json.dumps(job)],
          stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE,
          env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
      )
    for index in range(count):
      process = processes[index % workers]
      header = process.stdout.read(8)
      size = struct.unpack("<Q", header)[0] if len(header) == 8 else -1
      payload = process.stdout.read(max(size, 0))
      if size < 0 or len(payload) != size:
        raise RuntimeError(
          f"the worker that draws scenes stopped at {split} image {index} of "
          f"{count} (exit status {process.wait()}); its message is above."
        )
      yield pickle.loads(payload)
  finally:
    for process in processes:
      process.kill()
      process.stdout.close()
      process.wait()


def _work(job: str) -> None:
  """Writes this worker's share of the examples to standard output."""
  seed, split, first, count, step, image_size = json.loads(job)
  output = sys.stdout.buffer
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # The reader ends its workers.
  try:
    for index in range(first, count, step):
      payload = pickle.dumps(example(seed, split, index, image_size), 5)
      output.write(struct.pack("<Q", len(payload)))
      output.write(payload)
      output.flush()
  except BrokenPipeError:
    os._exit(1)  # The reader has gone, and with it whoever reads a message.


def _unit(vector: np.ndarray) -> np.ndarray:
  return vector / np.linalg.norm(vector)


def _look_at(position: np.ndarray, target: np.ndarray) -> np.ndarray:
  """[3, 3] rows right, down, forward of a camera that stands upright."""
  forward = _unit(target - position)
  right = _unit(np.cross(forward, [0.0, 0.0, 1.0]))
  return np.stack([right, np.cross(forward, right), forward])


def _rays(scene: Scene, grid: int) -> np.ndarray:
  """[3, grid, grid] float32 ray directions whose forward part is 1."""
  offset = ((np.arange(grid) + 0.5) / grid * 2 - 1) * TANGENT
  right, down, forward = scene.axes.astype(np.float32)
  offset = offset.astype(np.float32)
  return (
    forward[:, None, None]
    + down[:, None, None] * (offset[:, None] / STRETCH)
    + right[:, None, None] * offset
  )


def _turn(
  scene: Scene, k: int, vectors: np.ndarray, *, back: bool = False
) -> np.ndarray:
  """Rotates [3, ...] vectors into (or back from) the object's own axes."""
  if SHAPES[scene.shape[k]] != "cube":
    return vectors  # Round about the vertical: every rotation looks the same.
  angle = math.radians(scene.rotation[k])
  cos, sin = math.cos(angle), math.sin(angle) * (-1 if back else 1)
  x, y, z = vectors
  return np.stack([cos * x + sin * y, cos * y - sin * x, z])


def _reach(scene: Scene, k: int) -> float:
  """Radius of the sphere that contains the object."""
  stretch = {"cube": math.sqrt(3), "sphere": 1.0, "cylinder": math.sqrt(2)}
  return scene.half_widths[k] * stretch[SHAPES[scene.shape[k]]]


def _window(
  scene: Scene, centers: np.ndarray, radius: float, grid: int
) -> tuple[slice, slice]:
  """Rows and columns of the grid that can see spheres (or their hull)."""
  bounds = [[], []]  # of y, of x; plain floats, which are faster when so few
  for x, y, depth in ((centers - scene.position) @ scene.axes.T).tolist():
    if depth <= 1.01 * radius:
      return slice(0, grid), slice(0, grid)
    scale = (depth**2 - radius**2) * TANGENT
    for side, bound, stretch in zip((y, x), bounds, (STRETCH, 1), strict=True):
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


def _crossing(
  shape: str, half: np.ndarray, origin: np.ndarray, ray: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Where rays enter and leave a solid centred at the origin.

  Args:
    shape: one of `SHAPES`.
    half: half the width, which is also half the height.
    origin, ray: [3, ...], broadcast against each other.

  Returns:
    near, far: ray parameters; no hit where near >= far.
  """
  if shape == "sphere":
    return _round_crossing(half, origin, ray)
  near, far = _slab_crossing(half, origin[2], ray[2])
  if shape == "cylinder":
    sides = [_round_crossing(half, origin[:2], ray[:2])]
  else:
    sides = [_slab_crossing(half, origin[i], ray[i]) for i in (0, 1)]
  for side_near, side_far in sides:
    near, far = np.maximum(near, side_near), np.minimum(far, side_far)
  return near, far


def _slab_crossing(half, origin, ray):
  inverse = 1 / np.where(np.abs(ray) < 1e-7, np.float32(1e-7), ray)
  middle, extent = -origin * inverse, half * np.abs(inverse)
  return middle - extent, middle + extent


def _round_crossing(half, origin, ray):
  a = np.maximum(sum(r * r for r in ray), np.float32(1e-12))
  b = sum(o * r for o, r in zip(origin, ray, strict=True))
  c = sum(o * o for o in origin) - half * half
  discriminant = b * b - a * c
  root = np.sqrt(np.maximum(discriminant, 0))
  missed = np.where(discriminant > 0, 0, np.float32(np.inf))
  return (-b - root) / a + missed, (-b + root) / a


def _outward(shape: str, where: np.ndarray) -> np.ndarray:
  """[3, hits] unit normals at points of a surface, in the object's axes."""
  if shape == "cube":
    largest = np.abs(where).argmax(axis=0)[None]
    normal = np.zeros_like(where)
    side = np.sign(np.take_along_axis(where, largest, axis=0))
    np.put_along_axis(normal, largest, side, axis=0)
    return normal
  normal = where.copy()
  if shape == "cylinder":
    lid = np.abs(where[2]) > np.hypot(where[0], where[1])
    normal[:2, lid] = 0
    normal[2, ~lid] = 0
  return normal / np.maximum(np.linalg.norm(normal, axis=0), np.float32(1e-6))


def _shadows(
  scene: Scene, points: np.ndarray, owner: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """How much key light and how much ambient light reaches each point.

  The four rays of a pixel look at four points of the light: averaged, the
  shadow has a soft edge at no cost.

  Args:
    scene: gives objects and light.
    points: [3, grid, grid] surface points.
    owner: [grid, grid] whose they are.

  Returns:
    direct [grid, grid] 0 or 1; ambient [grid, grid] in (0, 1].
  """
  grid = owner.shape[0]
  direct = np.ones((grid, grid), np.float32)
  ambient = np.ones((grid, grid), np.float32)
  across = _unit(np.cross(scene.key, [0.0, 0.0, 1.0]))
  along = np.cross(scene.key, across)
  light = np.empty((3, grid, grid), np.float32)
  for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
    turn = math.radians(45 + 90 * (2 * i + j))
    offset = math.cos(turn) * across + math.sin(turn) * along
    point = _unit(scene.key + _LIGHT_RADIUS * offset)
    light[:, i::2, j::2] = point[:, None, None]
  for k, center in enumerate(scene.centers):
    half, reach = np.float32(scene.half_widths[k]), _reach(scene, k)
    fall = (center[2] + reach) / scene.key[2]
    sweep = np.stack([center, center - fall * scene.key])
    radius = reach + fall * 1.5 * _LIGHT_RADIUS
    window = _window(scene, sweep, radius, grid)
    inside = (slice(None), *window)
    offset = points[inside] - center.astype(np.float32)[:, None, None]
    near, far = _crossing(
      SHAPES[scene.shape[k]],
      half,
      _turn(scene, k, offset),
      _turn(scene, k, light[inside]),
    )
    # Convex: an object shades itself only where it faces away from the light.
    blocked = (near < far) & (far > 1e-4) & (owner[window] != k)
    direct[window][blocked] = 0
    # Ambient light that the object, taken as a ball, hides from the floor.
    window = _window(scene, center[None] * [1, 1, 0], 2.5 * reach, grid)
    offset = (
      points[(slice(None), *window)] - center.astype(np.float32)[:, None, None]
    )
    squared = np.maximum(sum(o * o for o in offset), half * half)
    hidden = -offset[2] * (half * half) / (squared * np.sqrt(squared))
    hidden = np.maximum(hidden - 0.04, 0) * (owner[window] < 0)
    ambient[window] *= 1 - np.minimum(hidden, 0.9)
  return direct, ambient


def _shade(
  scene: Scene,
  rays: np.ndarray,
  normals: np.ndarray,
  owner: np.ndarray,
  direct: np.ndarray,
  ambient: np.ndarray,
) -> np.ndarray:
  """[3, grid, grid] linear colour of every ray."""
  view = rays / np.sqrt(sum(r * r for r in rays))
  facing = sum(n * v for n, v in zip(normals, view, strict=True))
  mirror_z = view[2] - 2 * facing * normals[2]
  key = _dot(normals, scene.key)
  diffuse = 0.85 * direct * np.maximum(key, 0)
  diffuse += 0.25 * np.maximum(_dot(normals, scene.fill), 0)
  diffuse += ambient * (0.3 + 0.1 * normals[2])
  albedo = np.concatenate([_ALBEDO[scene.color], _FLOOR])  # owner -1: last row
  metal = np.append(scene.material, 0).astype(np.float32)[owner]
  solid = owner >= 0
  # A highlight where the mirrored ray points at a light: broad and weak on
  # rubber, tight and strong on metal.
  gloss = np.zeros_like(diffuse)
  for source, power, seen in ((scene.key, 1.0, direct), (scene.fill, 0.35, 1)):
    cosine = _dot(view, source) - 2 * facing * _dot(normals, source)
    cosine = np.maximum(cosine, 0)
    tight = cosine**2
    for _ in range(2):
      tight *= tight
    broad = tight.copy()  # cosine^8
    for _ in range(2):
      tight *= tight  # cosine^32
    gloss += power * seen * np.where(metal > 0, 1.5 * tight, 0.07 * broad)
  gloss *= solid
  # Metal shows, tinted, a bright ceiling and the grey floor.
  around = metal * (0.25 + 0.75 * np.clip(0.5 + mirror_z, 0, 1) ** 2)
  weight = diffuse * (1 - 0.45 * metal) + 0.6 * around
  color = albedo[owner].transpose(2, 0, 1) * weight
  color += gloss
  color += 0.06 * around
  return color


def _dot(vectors: np.ndarray, direction: np.ndarray) -> np.ndarray:
  x, y, z = (np.float32(d) for d in direction)
  return vectors[0] * x + vectors[1] * y + vectors[2] * z


if __name__ == "__main__":
  _work(sys.argv[1])
