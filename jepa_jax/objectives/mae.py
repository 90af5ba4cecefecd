"""Masked autoencoder: say the pixels of the patches that are not seen.

I-JEPA with pixels as targets is the same machine with other masks: here a
random quarter of the patches is seen (masks.name = "random", one target of
.75), by an encoder with a class token, and a wide decoder says the rest.

Reference: He et al. 2022, arXiv:2111.06377.
"""

import dataclasses
from typing import ClassVar

import jax

from jepa_jax.objectives import pixel_ijepa

_EPSILON = 1e-6


def normalize_pixels(patches: jax.Array) -> jax.Array:
  """Each patch [..., pixels] with mean 0 and standard deviation 1.

  The deviation is that of a sample, as in the released code.
  """
  centred = patches - patches.mean(axis=-1, keepdims=True)
  variance = centred.var(axis=-1, ddof=1, keepdims=True)
  return centred * jax.lax.rsqrt(variance + _EPSILON)


@dataclasses.dataclass(frozen=True)
class MAE(pixel_ijepa.PixelIJEPA):
  """See above; attributes are those of IJEPA."""

  normalize: ClassVar = staticmethod(normalize_pixels)
  tokens_predict: ClassVar[bool] = True
