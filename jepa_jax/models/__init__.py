"""The networks: pure Flax, usable without the rest of the project.

Axes, here and in every room that builds on this one:
  B batch, H W image height and width in pixels, C channels,
  N patches of an image, h w its grid (N = h * w, row-major),
  S context blocks an image, K patches a context block,
  M target blocks an image, T patches a target block,
  D encoder width, P predictor width, L layers.
"""

from jepa_jax.models.kernels import Kernels
from jepa_jax.models.patches import (
  gather_patches,
  height_and_width,
  normalize_images,
  patch_grid,
  patchify,
  sincos_positions,
)
from jepa_jax.models.unet import UNet
from jepa_jax.models.vit import SIZES, Encoder, Predictor

__all__ = [
  "Encoder",
  "Kernels",
  "Predictor",
  "SIZES",
  "UNet",
  "gather_patches",
  "height_and_width",
  "normalize_images",
  "patch_grid",
  "patchify",
  "sincos_positions",
]
