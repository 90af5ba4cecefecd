"""What a sampler gets (Settings) and what it returns (Draw)."""

import dataclasses
import functools
import math
from typing import Any

from jepa_jax import keys
from jepa_jax.masks import rectangles
from jepa_jax.masks.arrays import Array


@dataclasses.dataclass(frozen=True)
class Settings:
  """config.masks as a hashable value, with the grid; keys as in config.py."""

  grid: tuple[int, int]
  name: str = "released"
  num_contexts: int = 1
  num_targets: int = 4
  context_scale: tuple[float, float] = (0.85, 1.0)
  target_scale: tuple[float, float] = (0.15, 0.2)
  aspect_ratio: tuple[float, float] = (0.75, 1.5)
  allow_overlap: bool = False
  min_keep: int = 10
  context_patches: int = 0

  @classmethod
  def from_config(cls, config: Any, grid: tuple[int, int]) -> "Settings":
    """Reads config.masks, or what differs from its defaults.

    Raises:
      ValueError: unknown key, or a value is out of range.
    """
    defaults = {
      field.name: field.default
      for field in dataclasses.fields(cls)
      if field.name != "grid"
    }
    config = dict(config or {})
    for key in config:
      keys.choose("key of masks", key, defaults)
    config = defaults | config
    pair = lambda key: tuple(float(x) for x in config[key])
    settings = cls(
      name=config["name"],
      grid=(int(grid[0]), int(grid[1])),
      num_contexts=int(config["num_contexts"]),
      num_targets=int(config["num_targets"]),
      context_scale=pair("context_scale"),
      target_scale=pair("target_scale"),
      aspect_ratio=pair("aspect_ratio"),
      allow_overlap=bool(config["allow_overlap"]),
      min_keep=int(config["min_keep"]),
      context_patches=int(config["context_patches"]),
    )
    for key, most in (
      ("context_scale", 1.0),
      ("target_scale", 1.0),
      ("aspect_ratio", math.inf),
    ):
      low, high = getattr(settings, key)
      if not 0 < low <= high <= most:
        raise ValueError(
          f"masks.{key} is ({low:g}, {high:g}); it needs 0 < min <= max"
          + (" <= 1" if most == 1 else "")
        )
    patches = math.prod(settings.grid)
    for key, low, high in (
      ("num_contexts", 1, 64),
      ("num_targets", 1, 64),
      ("min_keep", 0, patches),
      ("context_patches", 0, patches),
    ):
      if not low <= getattr(settings, key) <= high:
        raise ValueError(
          f"masks.{key} is {getattr(settings, key)}; on a {settings.grid[0]}x"
          f"{settings.grid[1]} grid it must be from {low} to {high}"
        )
    return settings

  @property
  def keep(self) -> int:
    """Fewest patches of a legal context, for all samplers but `released`."""
    return max(self.min_keep, 1)

  def shapes(
    self, *, released: bool
  ) -> tuple[rectangles.Shapes, rectangles.Shapes]:
    """Shapes of the context and of the targets.

    A context is square, or in proportion to the grid if not `released`, so that
    scale 1 is the whole of any grid.
    """
    height, width = self.grid
    square = 1.0 if released else height / width
    enumerate_shapes = functools.partial(
      rectangles.enumerate_shapes, grid=self.grid, released=released
    )
    return (
      enumerate_shapes(self.context_scale, (square, square)),
      enumerate_shapes(self.target_scale, self.aspect_ratio),
    )

  def no_mask(self, why: str, change: str) -> ValueError:
    """The error of settings that allow no legal mask."""
    return ValueError(
      f'no legal mask of the "{self.name}" sampler on a {self.grid[0]}x'
      f"{self.grid[1]} grid: {why}; {change}"
    )


@dataclasses.dataclass(frozen=True)
class Draw:
  """Random masks, before they are padded or cut to K and T patches.

  Attributes:
    context: bool [B, S, N], the patches that each context may use.
    targets: (ids int32, valid bool), [B, M, T] each, where T is the
      sampler's; otherwise bool [B, M, N], the patches of each target.
    order: int32 [B, S, N]; a random numbering from 0 of each context's patches,
      anything elsewhere; a context of more than K patches keeps the first K.
      None where the sampler draws no such order.
  """

  context: Array
  targets: Any
  order: Array | None = None
