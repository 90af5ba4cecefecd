"""The colours of a scene: lights, shadows, materials, and the picture."""

import math

import numpy as np

from jepa_jax.render import casting, world
from jepa_jax.render.world import Scene

_ALBEDO = (np.array(list(world.COLORS.values()), np.float32) / 255) ** 2.2
_FLOOR = np.array([[0.37, 0.37, 0.365]], np.float32)
_LIGHT_RADIUS = 0.06  # of the key light, as seen from the floor: penumbra
_SUBPIXELS = ((0, 0), (0, 1), (1, 0), (1, 1))  # row and column of the rays


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
  depth, owner = casting.cast(scene, grid)
  rays = world.camera_rays(grid)
  points = world.CAMERA.astype(np.float32)[:, None, None] + depth * rays
  normals = casting.surface_normals(scene, points, owner)
  direct = _direct_light(scene, points, owner)
  ambient = _ambient_light(scene, points, owner)
  color = _shade(scene, rays, normals, owner, direct, ambient)
  # Far floor melts into the backdrop, so that the horizon leaves no edge.
  haze = np.clip((depth - 14) / 16, 0, 1)
  color += haze * (np.float32(0.36) - color)
  color = 0.25 * sum(color[:, i::2, j::2] for i, j in _SUBPIXELS)
  image = 255 * np.clip(color, 0, 1) ** np.float32(1 / 2.2) + 0.5
  image = np.ascontiguousarray(image.astype(np.uint8).transpose(1, 2, 0))
  depths = np.stack([depth[i::2, j::2] for i, j in _SUBPIXELS])
  owners = np.stack([owner[i::2, j::2] for i, j in _SUBPIXELS])
  nearest = depths.argmin(axis=0)[None]
  return (
    image,
    np.take_along_axis(depths, nearest, axis=0)[0],
    np.take_along_axis(owners, nearest, axis=0)[0],
  )


def _direct_light(
  scene: Scene, points: np.ndarray, owner: np.ndarray
) -> np.ndarray:
  """Whether the key light reaches each point: [grid, grid], 0 or 1.

  The four rays of a pixel look at four points of the light: averaged, the
  shadow has a soft edge at no cost.

  Args:
    scene: gives the objects.
    points: [3, grid, grid] surface points.
    owner: [grid, grid] the object there, or -1 for the floor.
  """
  grid = owner.shape[0]
  direct = np.ones((grid, grid), np.float32)
  across = world.unit(np.cross(world.KEY_LIGHT, [0.0, 0.0, 1.0]))
  along = np.cross(world.KEY_LIGHT, across)
  light = np.empty((3, grid, grid), np.float32)
  for i, j in _SUBPIXELS:
    angle = math.radians(45 + 90 * (2 * i + j))
    offset = math.cos(angle) * across + math.sin(angle) * along
    point = world.unit(world.KEY_LIGHT + _LIGHT_RADIUS * offset)
    light[:, i::2, j::2] = point[:, None, None]
  for k, center in enumerate(scene.centers):
    radius = casting.bounding_radius(scene, k)
    # Distance along the light's direction at which the shadow meets the floor.
    reach = (center[2] + radius) / world.KEY_LIGHT[2]
    ends = np.stack([center, center - reach * world.KEY_LIGHT])
    radius += reach * 1.5 * _LIGHT_RADIUS
    window = casting.window_of(ends, radius, grid)
    inside = (slice(None), *window)
    offset = points[inside] - center.astype(np.float32)[:, None, None]
    near, far = casting.intersections(scene, k, offset, light[inside])
    # Convex: an object shades itself only where it faces away from the light.
    blocked = (near < far) & (far > 1e-4) & (owner[window] != k)
    direct[window][blocked] = 0
  return direct


def _ambient_light(
  scene: Scene, points: np.ndarray, owner: np.ndarray
) -> np.ndarray:
  """Share of the ambient light that reaches each point: [grid, grid].

  Objects, taken as balls, hide some of it from the floor. Arguments as of
  `_direct_light`.
  """
  grid = owner.shape[0]
  ambient = np.ones((grid, grid), np.float32)
  for k, center in enumerate(scene.centers):
    half = np.float32(scene.half_widths[k])
    radius = 2.5 * casting.bounding_radius(scene, k)
    window = casting.window_of(center[None] * [1, 1, 0], radius, grid)
    offset = points[(slice(None), *window)]
    offset = offset - center.astype(np.float32)[:, None, None]
    squared = np.maximum(sum(o * o for o in offset), half * half)
    hidden = -offset[2] * (half * half) / (squared * np.sqrt(squared))
    hidden = np.maximum(hidden - 0.04, 0) * (owner[window] < 0)
    ambient[window] *= 1 - np.minimum(hidden, 0.9)
  return ambient


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
  key = _dot(normals, world.KEY_LIGHT)
  diffuse = 0.85 * direct * np.maximum(key, 0)
  diffuse += 0.25 * np.maximum(_dot(normals, world.FILL_LIGHT), 0)
  diffuse += ambient * (0.3 + 0.1 * normals[2])
  albedo = np.concatenate([_ALBEDO[scene.color], _FLOOR])  # owner -1: last row
  metal = np.append(scene.material, 0).astype(np.float32)[owner]
  solid = owner >= 0
  # A highlight where the mirrored ray points at a light: broad and weak on
  # rubber, tight and strong on metal.
  gloss = np.zeros_like(diffuse)
  lights = ((world.KEY_LIGHT, 1.0, direct), (world.FILL_LIGHT, 0.35, 1))
  for source, power, seen in lights:
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
