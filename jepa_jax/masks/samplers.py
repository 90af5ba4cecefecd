"""The table of samplers.

Each is written once, over an array namespace `xp`; see `jepa_jax.masks`, whose
axes these are, and which offers them to users.

Reference: Assran et al. 2023, section 3 and table 6, arXiv:2301.08243.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

from jepa_jax.masks import corrected, quadrants, random_patches, released
from jepa_jax.masks.arrays import Array
from jepa_jax.masks.interface import Draw, Settings


@dataclasses.dataclass(frozen=True)
class Sampler:
  """One row of the table of samplers.

  Attributes:
    check: raises ValueError where the settings allow no legal mask.
    draw: (settings, xp, batch key [1], image keys [B]) -> Draw.
    overflow: how a context of more than K patches is cut: "first" keeps the
      first in row-major order, "random" a random subset.
    target_quantile: T is this quantile of the targets' sizes; a larger target
      is cut to a random subset.
  """

  check: Callable[[Settings], None]
  draw: Callable[[Settings, Any, Array, Array], Draw]
  overflow: str = "random"
  target_quantile: float = 1.0


SAMPLERS: Mapping[str, Sampler] = {
  "released": Sampler(released.check, released.draw, overflow="first"),
  "corrected": Sampler(corrected.check, corrected.draw),
  "block": Sampler(corrected.check, corrected.draw_block),
  "random": Sampler(random_patches.check, random_patches.draw),
  "rasterized": Sampler(quadrants.check, quadrants.draw),
  # Four overlapping rectangles rarely are as large as they could be: room for
  # the largest union would be 40 % padding.
  "union": Sampler(corrected.check, corrected.draw_union, target_quantile=0.95),
}
