"""Which patches are context and which are targets.

    masks.sample(config.masks, grid=(14, 14), seed=0, step=0, epoch=0,
                 index=jnp.arange(8))
    masks.sample({"name": "corrected"}, index=jnp.arange(8))

`samplers` has the samplers, each written once over an array namespace `xp`:
NumPy, `jax.numpy`, or the TensorFlow one of `jepa_jax.data.tf_masks`. The three
give the same masks for the same seed, bit for bit (see `counter_rng` and
`rectangles`).

An image's masks are a function of (seed, epoch, image). Only what the released
code draws once a batch is a function of (seed, step) instead.

Axes: B batch, S context masks, K context patches, M targets, T patches a
target, H x W patches of the grid, N = H * W. Ids count in row-major order.
"""

import dataclasses
import functools
import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np

from jepa_jax.masks import arrays, counter_rng, samplers
from jepa_jax.masks.arrays import Array
from jepa_jax.masks.interface import Draw, Settings

SAMPLERS = samplers.SAMPLERS

_SIMULATED_BATCHES, _SIMULATED_BATCH_SIZE = 256, 128  # of the K rule


@dataclasses.dataclass(frozen=True)
class MaskShapes:
  """Static sizes of the masks, and how much of them is padding on average.

  Attributes:
    num_contexts: S.
    context_patches: K.
    num_targets: M.
    target_patches: T.
    context_padding: mean share of the K slots that hold no patch.
    target_padding: mean share of the T slots that hold no patch.
  """

  num_contexts: int
  context_patches: int
  num_targets: int
  target_patches: int
  context_padding: float
  target_padding: float

  def __str__(self) -> str:
    return (
      f"{self.num_contexts} x {self.context_patches} context patches "
      f"({self.context_padding:.1%} padding), {self.num_targets} x "
      f"{self.target_patches} target patches ({self.target_padding:.1%})"
    )


def load(name: str) -> samplers.Sampler:
  """Finds a sampler by its name in SAMPLERS, or by "my_package.module:name".

  Raises:
    ValueError: unknown name, with the known ones.
  """
  module, colon, attribute = name.partition(":")
  if name not in SAMPLERS and not colon:
    raise ValueError(
      f'unknown mask sampler "{name}"; known: {", ".join(sorted(SAMPLERS))} '
      '(or "my_package.module:name").'
    )
  if not colon:
    return SAMPLERS[name]
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f'mask sampler "{name}" cannot be imported: {error}'
    ) from error


def mask_shapes(config: Any, grid: tuple[int, int]) -> MaskShapes:
  """Static sizes of the masks that a configuration gives on a grid.

  K rule, where `context_patches` is 0: the mean, over simulated batches of 128
  images, of the batch's smallest context. That is what the released code, which
  cuts every context to the batch's smallest, trains on with 128 images a
  device; few images have fewer patches, and they are padded.

  T rule: the largest target that there is, so no target is cut (but for
  `union`, see SAMPLERS).

  Args:
    config: as of `sample`.
    grid: (H, W) in patches.

  Returns:
    The sizes. A function of the arguments alone.

  Raises:
    ValueError: unknown sampler, settings out of range, or no legal mask.
  """
  return _mask_shapes(_settings(config, grid))


def sample(
  config: Any = None,
  grid: tuple[int, int] = (14, 14),
  *,
  seed: int = 0,
  step: Array = 0,
  epoch: Array = 0,
  index: Array = 0,
  xp: Any = jnp,
) -> dict[str, Array]:
  """Draws the masks of a batch.

  Works inside `jax.jit`, where config, grid and seed must be static.

  Args:
    config: config.masks, or what differs from its defaults, such as
      {"name": "corrected"}; None for nothing.
    grid: (H, W) in patches.
    seed: the run's seed.
    step: scalar integer, decides what the sampler draws once a batch; or [B],
      as if every image were a batch of its own.
    epoch: [B] or scalar integer, the epoch of each image.
    index: [B] or scalar integer, the index of each image in its source.
    xp: array namespace: `jax.numpy`, `numpy` or that of `data.tf_masks`.

  Returns:
    context_ids int32 [B, S, K] ascending, 0 where not valid;
    context_valid bool [B, S, K]; target_ids int32 [B, M, T] ascending, 0 where
    not valid; target_valid bool [B, M, T]. Valid ones come first.

  Raises:
    ValueError: as `mask_shapes`.
  """
  settings = _settings(config, grid)
  shapes, sampler = _mask_shapes(settings), load(settings.name)
  draw, image_key = _draw(settings, seed, step, epoch, index, xp)
  k, overflow = shapes.context_patches, sampler.overflow
  context_ids, context_valid = _to_static_size(
    xp, draw.context, k, overflow, image_key, 0, draw.order
  )
  targets = draw.targets
  if not isinstance(targets, tuple):
    t = shapes.target_patches
    overflow = "random" if sampler.target_quantile < 1 else "first"
    targets = _to_static_size(xp, targets, t, overflow, image_key, 1)
  return {
    "context_ids": context_ids,
    "context_valid": context_valid,
    "target_ids": targets[0],
    "target_valid": targets[1],
  }


def _draw(
  settings: Settings,
  seed: int,
  step: Array,
  epoch: Array,
  index: Array,
  xp: Any,
) -> tuple[Draw, Array]:
  index, epoch, step = (
    xp.reshape(xp.astype(xp.asarray(x), np.uint32), (-1,))
    for x in (index, epoch, step)
  )
  batch_key = counter_rng.fold_in(
    xp, counter_rng.stream_key(seed, counter_rng.MASK_BATCH), step
  )
  image_key = counter_rng.fold_in(
    xp, counter_rng.stream_key(seed, counter_rng.MASK_IMAGE), epoch
  )
  image_key = counter_rng.fold_in(xp, image_key, index)
  draw = load(settings.name).draw(settings, xp, batch_key, image_key)
  return draw, image_key


def _to_static_size(
  xp: Any,
  member: Array,
  size: int,
  overflow: str,
  key: Array,
  use: int,
  order: Array | None = None,
) -> tuple[Array, Array]:
  """Ids and validity of sets: bool [B, *, N] -> ([B, *, size], same)."""
  sets, n = member.shape[1], member.shape[2]
  if order is not None:
    member = member & (order < size)
  elif overflow == "random" and size < n:
    key = counter_rng.fold_in(xp, key, np.asarray([2**16 + use], np.uint32))
    random = xp.reshape(
      counter_rng.random_bits(xp, key, sets * n), (-1, sets, n)
    )
    rank = xp.where(member, counter_rng.random_ranks(xp, random), np.int32(-1))
    member = member & (rank >= arrays.kth_largest(xp, rank, size))
  count = xp.sum(member, axis=-1, dtype=np.int32)[..., None]
  valid = np.arange(size, dtype=np.int32) < count
  ids = arrays.true_ids(xp, member, count, size)
  return xp.astype(xp.where(valid, ids, 0), np.int32), valid


@functools.cache
def _mask_shapes(settings: Settings) -> MaskShapes:
  sampler = load(settings.name)
  sampler.check(settings)
  contexts, targets = [], []
  images = np.arange(_SIMULATED_BATCHES * _SIMULATED_BATCH_SIZE)
  for index in images.reshape(-1, 8 * _SIMULATED_BATCH_SIZE):
    step = index // _SIMULATED_BATCH_SIZE
    draw, _ = _draw(settings, 0, step, 0, index, np)
    contexts.append(draw.context.sum(-1))
    known = isinstance(draw.targets, tuple)
    targets.append((draw.targets[1] if known else draw.targets).sum(-1))
  contexts, targets = np.concatenate(contexts), np.concatenate(targets)
  smallest = contexts.reshape(_SIMULATED_BATCHES, -1).min(1)
  k = settings.context_patches or round(float(smallest.mean()))
  if known:
    t = draw.targets[0].shape[-1]
  else:
    quantile = sampler.target_quantile
    t = int(np.quantile(targets, quantile, method="higher"))
  return MaskShapes(
    num_contexts=settings.num_contexts,
    context_patches=k,
    num_targets=targets.shape[-1],
    target_patches=t,
    context_padding=float(1 - np.minimum(contexts, k).mean() / k),
    target_padding=float(1 - np.minimum(targets, t).mean() / t),
  )


def _settings(config: Any, grid: tuple[int, int]) -> Settings:
  """Checks config.masks and makes it hashable."""
  settings = Settings.from_config(config, grid)
  load(settings.name)  # ValueError where there is none
  return settings
