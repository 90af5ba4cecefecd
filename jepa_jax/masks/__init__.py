"""Which patches are context and which are targets.

    masks.sample(config.masks, grid=(14, 14), seed=0, step=0, epoch=0,
                 index=jnp.arange(8))

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
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.masks import counter_rng, samplers

Array = Any  # np.ndarray, jax.Array or tf.Tensor, as `xp` says
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


def mask_shapes(config: Any, grid: tuple[int, int]) -> MaskShapes:
  """Static sizes of the masks that a configuration gives on a grid.

  K rule, where `context_patches` is 0: the mean, over simulated batches of 128
  images, of the batch's smallest context. That is what the released code, which
  cuts every context to the batch's smallest, trains on with 128 images a
  device; few images have fewer patches, and they are padded.

  T rule: the largest target that there is, so no target is cut (but for
  `union`, see SAMPLERS).

  Args:
    config: config.masks.
    grid: (H, W) in patches.

  Returns:
    The sizes. A function of the arguments alone.

  Raises:
    ValueError: unknown sampler, settings out of range, or no legal mask.
  """
  return _mask_shapes(_settings(config, grid))


def sample(
  config: Any,
  grid: tuple[int, int],
  *,
  seed: int,
  step: Array,
  epoch: Array,
  index: Array,
  xp: Any = jnp,
) -> dict[str, Array]:
  """Draws the masks of a batch.

  Works inside `jax.jit`, where config, grid and seed must be static.

  Args:
    config: config.masks.
    grid: (H, W) in patches.
    seed: the run's seed.
    step: scalar integer, decides what the sampler draws once a batch; or [B],
      as if every image were a batch of its own.
    epoch: [B] or scalar integer, the epoch of each image.
    index: [B] integer, the number of each image in its source.
    xp: array namespace: `jax.numpy`, `numpy` or that of `data.tf_masks`.

  Returns:
    context_ids int32 [B, S, K] ascending, 0 where not valid;
    context_valid bool [B, S, K]; target_ids int32 [B, M, T] ascending, 0 where
    not valid; target_valid bool [B, M, T]. Valid ones come first.

  Raises:
    ValueError: as `mask_shapes`.
  """
  settings = _settings(config, grid)
  shapes = _mask_shapes(settings)
  draw, image_key = _draw(settings, seed, step, epoch, index, xp)
  k, surplus = shapes.context_patches, SAMPLERS[settings.name].surplus
  context_ids, context_valid = _bring_to(
    xp, draw.context, k, surplus, image_key, 0, draw.order
  )
  targets = draw.targets
  if not isinstance(targets, tuple):
    t = shapes.target_patches
    cut = SAMPLERS[settings.name].target_quantile < 1
    surplus = "random" if cut else "first"
    targets = _bring_to(xp, targets, t, surplus, image_key, 1)
  return {
    "context_ids": context_ids,
    "context_valid": context_valid,
    "target_ids": targets[0],
    "target_valid": targets[1],
  }


def _draw(
  settings: samplers.Settings,
  seed: int,
  step: Array,
  epoch: Array,
  index: Array,
  xp: Any,
) -> tuple[samplers.Draw, Array]:
  index, epoch, step = (
    xp.reshape(xp.astype(xp.asarray(x), np.uint32), (-1,))
    for x in (index, epoch, step)
  )
  batch_key = counter_rng.fold(
    xp, counter_rng.stream_key(seed, counter_rng.MASK_BATCH), step
  )
  image_key = counter_rng.fold(
    xp, counter_rng.stream_key(seed, counter_rng.MASK_IMAGE), epoch
  )
  image_key = counter_rng.fold(xp, image_key, index)
  draw = SAMPLERS[settings.name].draw(settings, xp, batch_key, image_key)
  return draw, image_key


def _bring_to(
  xp: Any,
  member: Array,
  size: int,
  surplus: str,
  key: Array,
  use: int,
  order: Array | None = None,
) -> tuple[Array, Array]:
  """Ids and validity of sets: bool [B, *, N] -> ([B, *, size], same)."""
  sets, n = member.shape[1], member.shape[2]
  if order is not None:
    member = member & (order < size)
  elif surplus == "random" and size < n:
    key = counter_rng.fold(xp, key, np.asarray([2**16 + use], np.uint32))
    random = xp.reshape(counter_rng.draw(xp, key, sets * n), (-1, sets, n))
    rank = xp.where(member, counter_rng.ranks(xp, random), np.int32(-1))
    member = member & (rank >= _kth_largest(xp, rank, size))
  count = xp.sum(member, axis=-1, dtype=np.int32)[..., None]
  valid = np.arange(size, dtype=np.int32) < count
  if xp is np or xp is jnp:
    ids = xp.argsort(~member, axis=-1, stable=True)[..., :size]
  else:
    ids = xp.true_ids(member, count, size)
  return xp.astype(xp.where(valid, ids, 0), np.int32), valid


@functools.cache
def _mask_shapes(settings: samplers.Settings) -> MaskShapes:
  sampler = SAMPLERS[settings.name]
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


def _settings(config: Any, grid: tuple[int, int]) -> samplers.Settings:
  """Checks the ranges of config.masks and makes it hashable."""
  pair = lambda key: tuple(float(x) for x in config[key])
  settings = samplers.Settings(
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
  if settings.name not in SAMPLERS:
    raise ValueError(
      f'unknown mask sampler "{settings.name}"; known:'
      f" {', '.join(sorted(SAMPLERS))}"
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


def _kth_largest(xp: Any, values: Array, k: int) -> Array:
  """The k-th largest entry of the last axis: int32 [..., N] -> [..., 1]."""
  if xp is np:
    return np.partition(values, values.shape[-1] - k, -1)[..., -k, None]
  if xp is jnp:
    return jax.lax.top_k(values, k)[0][..., -1:]
  return xp.kth_largest(values, k)
