"""I-JEPA with pixels as targets: the paper's ablation of its target encoder.

The predictor says the pixels of the target patches, normalised a patch or not,
so nothing is averaged; all else is I-JEPA's.

Reference: Assran et al. 2023, table 7, arXiv:2301.08243 (1 % of the labels,
L/16: 40.7 against 66.9 of predicted representations).
"""

import dataclasses
from typing import ClassVar

import jax
import ml_collections

from jepa_jax import config_table, keys, models
from jepa_jax.objectives import ijepa


@dataclasses.dataclass(frozen=True)
class PixelIJEPA(ijepa.IJEPA):
  """See above; attributes are those of IJEPA."""

  keys: ClassVar = {
    name: config_table.IJEPA[name]
    for name in ("variance", "covariance", "sigreg")
  } | {
    "target_norm": keys.Key(
      "layer",
      keys.Choice(("layer", "none")),
      "of the pixels of a patch: mean 0 and variance 1, or as they are",
    )
  }

  @staticmethod
  def target_width(config: ml_collections.ConfigDict) -> int:
    """Pixels of a patch, all channels."""
    return config.encoder.patch_size**2 * config.data.channels

  def averaged(self, params):
    """Nothing: the pixels are there."""
    return {}

  def targets(self, target_params, batch, buffers) -> jax.Array:
    """Pixels of the target patches, [B, M, T, patch * patch * C]."""
    images = models.normalize_images(batch["image"], self.mean, self.std)
    patches = models.patchify(images, self.encoder.patch_size)
    return models.gather_patches(patches, batch["target_ids"])

  def watched(self, targets, context, batch) -> jax.Array:
    """The context's features, averaged, for pixels cannot collapse."""
    return ijepa.pool_context(context, batch)

  def target_flops(self) -> int:
    """Pixels cost no product."""
    return 0
