"""Schedules and the optimizer.

Schedules are tables in float64, made once: the value of every step is exact
to the last bit of its float32, the same on every device, and the log shows
what the step used.
"""

from collections.abc import Callable, Sequence
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from jepa_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Schedules:
  """Hyperparameters of every step, float64 [total_steps] each."""

  lr: np.ndarray
  weight_decay: np.ndarray
  momentum: np.ndarray


def make_schedules(config: ml_collections.ConfigDict) -> Schedules:
  """Tables of learning rate, weight decay and target momentum.

  Learning rate: linear from lr_start to lr in the warm-up, then a cosine to
  lr_end. Weight decay: cosine (released) or linear (paper). Both count steps
  from 1, so the first update is one step into the schedule, while the
  momentum, linear, counts from 0: as released.

  Raises:
    ValueError: there is nothing to train, or only a warm-up.

  Reference: Assran et al. 2023, appendix A, arXiv:2301.08243.
  """
  settings = config.optimizer
  total, warmup = config_lib.lengths(config)
  step = np.arange(1, total + 1, dtype=np.float64)

  def cosine(start: float, end: float, progress: np.ndarray) -> np.ndarray:
    return end + (start - end) * 0.5 * (1.0 + np.cos(np.pi * progress))

  rising = settings.lr_start + (settings.lr - settings.lr_start) * (
    step / max(1, warmup)
  )
  falling = cosine(
    settings.lr, settings.lr_end, (step - warmup) / (total - warmup)
  )
  decay = (settings.weight_decay_start, settings.weight_decay_end)
  if settings.weight_decay_shape == "cosine":
    weight_decay = cosine(*decay, step / total)
  else:
    weight_decay = decay[0] + (decay[1] - decay[0]) * step / total
  first, last = config.momentum
  return Schedules(
    lr=np.where(step < warmup, rising, falling),
    weight_decay=weight_decay,
    momentum=first + (last - first) * (step - 1.0) / total,
  )


def lookup(table: np.ndarray, step: jax.Array) -> jax.Array:
  """Value of a schedule at a traced step, float32; the end's holds on."""
  return jnp.asarray(table, jnp.float32)[jnp.minimum(step, len(table) - 1)]


def decayed(params: Any) -> Any:
  """Which parameters decay: all but biases and other vectors.

  Blocks lie stacked, [L, ...], so their leading axis does not count.

  Args:
    params: tree of arrays.

  Returns:
    Tree of bool.
  """

  def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    stacked = any(getattr(key, "key", None) == "blocks" for key in path)
    return leaf.ndim - stacked > 1

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(
  config: ml_collections.ConfigDict,
  schedules: Schedules,
  learning_rate_scale: Callable[[Any], Any] = lambda params: None,
) -> optax.GradientTransformation:
  """AdamW with scheduled learning rate and weight decay.

  Args:
    config: see jepa_jax.config; reads `optimizer`.
    schedules: see make_schedules.
    learning_rate_scale: params -> tree of factors that broadcast against
      them, or None. config.optimizer.lr_scale multiplies them.

  Returns:
    The transformation. Where nothing is scaled its state has no part of it.

  Raises:
    ValueError: a pattern of optimizer.lr_scale is found in no parameter.

  Reference: Loshchilov and Hutter 2019, arXiv:1711.05101.
  """
  settings = config.optimizer
  adamw = optax.adamw(
    lambda step: lookup(schedules.lr, step),
    b1=settings.b1,
    b2=settings.b2,
    eps=settings.eps,
    mu_dtype=settings.mu_dtype,
    weight_decay=lambda step: lookup(schedules.weight_decay, step),
    mask=decayed,
  )

  def scaled(updates: Any, params: Any) -> Any:
    factors = _by_pattern(settings.lr_scale, params)
    for tree in (factors, learning_rate_scale(params)):
      if tree is not None:
        updates = jax.tree.map(lambda u, f: u * f, updates, tree)
    return updates

  def update(updates, state, params):
    # Of the update, so that weight decay is scaled as well.
    updates, state = adamw.update(updates, state, params)
    return scaled(updates, params), state

  tx = optax.GradientTransformation(adamw.init, update)
  if settings.clip_norm:
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), tx)
  return tx


def _by_pattern(rules: Sequence[tuple[str, float]], params: Any) -> Any:
  """Factor of every parameter: of the first pattern found in its path, or 1."""
  if not rules:
    return None
  found = set()

  def factor(path: tuple[Any, ...], leaf: Any) -> float:
    del leaf
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    for pattern, value in rules:
      if re.search(pattern, name):
        found.add(pattern)
        return value
    return 1.0

  factors = jax.tree_util.tree_map_with_path(factor, params)
  for pattern, _ in rules:
    if pattern not in found:
      raise ValueError(
        f'optimizer.lr_scale has the pattern "{pattern}", which decides for '
        "no parameter; remove it, or put it before a broader one."
      )
  return factors
