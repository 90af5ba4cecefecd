"""A U-Net that says the noise in an image, given a representation.

Residual blocks at falling and rising resolutions, attention at the low ones.
The level of the noise and the representation scale and shift the group norms
of every block.

Reference: Dhariwal and Nichol 2021, appendix A, arXiv:2105.05233; Bordes et
  al. 2022, section 3, arXiv:2112.09164.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.models import patches
from jepa_jax.models.kernels import Kernels

_GROUPS = 32  # of a group norm, where each has four channels or more
# What ends a residual branch begins small, so that the branch begins as the
# identity; not 0, so that all of it has a gradient from the first step on.
_SMALL = nn.initializers.variance_scaling(1e-4, "fan_avg", "uniform")


class UNet(nn.Module):
  """See above.

  Attributes:
    channels: of the first level.
    multipliers: channels of each level over those of the first; each level has
      half the side of the one before it.
    blocks: residual blocks a level.
    attention: sides, in pixels of the level, that have attention.
    num_heads: of attention.
    patch_size: pixels a side that are channels of one place: 2 quarters the
      work. Published: 1.
    remat: whether the backward pass computes residual blocks again.
    dtype: of the computation; parameters and norms are float32.
    kernels: see models.Kernels; attention is taken from them.
  """

  channels: int
  multipliers: tuple[int, ...]
  blocks: int = 2
  attention: tuple[int, ...] = ()
  num_heads: int = 4
  patch_size: int = 1
  remat: bool = False
  dtype: Any = jnp.float32
  kernels: Kernels = Kernels()

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    level: jax.Array,
    condition: jax.Array,
    known: jax.Array,
  ) -> jax.Array:
    """The noise in images.

    Args:
      images: [B, H, W, C], noisy.
      level: [B], step of the diffusion that each is at.
      condition: [B, D], a representation of what is to be seen.
      known: [B] bool; where False the condition is not looked at.

    Returns:
      float32 [B, H, W, C].

    Raises:
      ValueError: a side that cannot be halved once a level but the first.
    """
    halvings = 2 ** (len(self.multipliers) - 1)
    grid = patches.patch_grid(*images.shape[1:3], self.patch_size)
    if any(side % halvings for side in grid):
      raise ValueError(
        f"a U-Net of {len(self.multipliers)} levels needs images whose sides "
        f"are multiples of {self.patch_size * halvings} pixels; these have "
        f"{images.shape[1]}x{images.shape[2]}."
      )
    given = self._condition(level, condition, known)
    x = images
    if self.patch_size > 1:
      x = patches.patchify(x, self.patch_size)
      x = x.reshape(len(x), *grid, x.shape[-1])
    outputs = x.shape[-1]
    x = _conv(self.channels * self.multipliers[0], self.dtype, "conv_in")(x)
    x = self._levels(x, given)
    x = nn.silu(_norm("norm_out")(x))
    x = nn.Conv(outputs, (3, 3), kernel_init=_SMALL, name="conv_out")(x)
    if self.patch_size > 1:
      size = self.patch_size
      x = x.reshape(len(x), *grid, size, size, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(images.shape)

  def _condition(self, level, condition, known) -> jax.Array:
    """What the blocks are given of noise and representation, [B, E]."""
    width = 4 * self.channels
    dense = lambda name: nn.Dense(width, dtype=self.dtype, name=name)
    x = dense("level1")(level_embedding(level, self.channels))
    x = dense("level2")(nn.silu(x))
    unknown = self.param("unknown", nn.initializers.normal(0.02), (width,))
    told = dense("condition")(condition)
    return nn.silu(x + jnp.where(known[:, None], told, unknown))

  def _levels(self, x, given) -> jax.Array:
    """All blocks: down, in the middle, up; [B, H, W, C] to the same H, W."""
    residual = nn.remat(_Residual) if self.remat else _Residual
    block = lambda width, name, resample="": residual(
      width, resample, self.dtype, name=name
    )

    def attend(x, name):
      if x.shape[1] not in self.attention and name != "middle_attention":
        return x
      heads, kernels = self.num_heads, self.kernels
      return _Attention(heads, self.dtype, kernels, name=name)(x)

    last = len(self.multipliers) - 1
    seen = [x]
    for i, times in enumerate(self.multipliers):
      for j in range(self.blocks):
        x = block(self.channels * times, f"down{i}_{j}")(x, given)
        x = attend(x, f"down{i}_{j}_attention")
        seen.append(x)
      if i < last:
        x = block(x.shape[-1], f"down{i}_half", "down")(x, given)
        seen.append(x)
    x = block(x.shape[-1], "middle1")(x, given)
    x = attend(x, "middle_attention")
    x = block(x.shape[-1], "middle2")(x, given)
    for i, times in reversed(list(enumerate(self.multipliers))):
      for j in range(self.blocks + 1):
        x = jnp.concatenate([x, seen.pop()], axis=-1)
        x = block(self.channels * times, f"up{i}_{j}")(x, given)
        x = attend(x, f"up{i}_{j}_attention")
      if i:
        x = block(x.shape[-1], f"up{i}_double", "up")(x, given)
    return x


class _Residual(nn.Module):
  """Two convolutions; "down" halves the sides between, "up" doubles them."""

  channels: int
  resample: str
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, given: jax.Array) -> jax.Array:
    y = nn.silu(_norm("norm1")(x))
    if self.resample == "down":
      x, y = (nn.avg_pool(z, (2, 2), (2, 2)) for z in (x, y))
    elif self.resample == "up":
      x, y = (z.repeat(2, axis=1).repeat(2, axis=2) for z in (x, y))
    y = _conv(self.channels, self.dtype, "conv1")(y)
    changes = nn.Dense(2 * self.channels, dtype=self.dtype, name="given")(given)
    scale, shift = jnp.split(changes[:, None, None], 2, axis=-1)
    y = nn.silu(_norm("norm2")(y) * (1 + scale) + shift)
    y = _conv(self.channels, self.dtype, "conv2", kernel_init=_SMALL)(y)
    if x.shape[-1] != self.channels:
      x = nn.Conv(self.channels, (1, 1), dtype=self.dtype, name="skip")(x)
    return x + y


class _Attention(nn.Module):
  """Of every place to every other."""

  num_heads: int
  dtype: Any
  kernels: Kernels

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    b, h, w, c = x.shape
    if c % self.num_heads:
      raise ValueError(
        f"a level of {c} channels does not divide by {self.num_heads} heads; "
        "change one of them."
      )
    y = _norm("norm")(x).reshape(b, h * w, c)
    y = nn.Dense(3 * c, dtype=self.dtype, name="qkv")(y)
    heads = (3, self.num_heads, c // self.num_heads)
    y = self.kernels.attention(y.reshape(b, h * w, *heads), None, None)
    out = nn.Dense(c, dtype=self.dtype, kernel_init=_SMALL, name="out")
    return x + out(y).reshape(x.shape)


def _norm(name: str) -> Any:
  """Group norm in float32."""

  def norm(x):
    groups = math.gcd(_GROUPS, max(x.shape[-1] // 4, 1))
    return nn.GroupNorm(groups, epsilon=1e-5, dtype=jnp.float32, name=name)(x)

  return norm


def _conv(channels: int, dtype: Any, name: str, **settings: Any) -> nn.Conv:
  return nn.Conv(channels, (3, 3), dtype=dtype, name=name, **settings)


def level_embedding(level: jax.Array, width: int) -> jax.Array:
  """Cosines and sines of a step: [B] -> float32 [B, width], width even.

  Reference: Vaswani et al. 2017, section 3.5, arXiv:1706.03762.
  """
  half = width // 2
  frequencies = np.exp(-math.log(10_000) * np.arange(half) / half)
  angles = level.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
