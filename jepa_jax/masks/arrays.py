"""Array functions that NumPy, JAX and TensorFlow do not have in common.

`xp` is the namespace: `numpy`, `jax.numpy`, or the TensorFlow one of
`jepa_jax.data.tf_masks`, which has the three functions below as methods.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # np.ndarray, jax.Array or tf.Tensor, as `xp` says


def cond(xp: Any, predicate: Array, true: Callable, false: Callable) -> Any:
  """Calls `true` or `false`, as the scalar predicate says."""
  if xp is np:
    return true() if predicate else false()
  if xp is jnp:
    return jax.lax.cond(predicate, true, false)
  return xp.cond(predicate, true, false)


def kth_largest(xp: Any, values: Array, k: int) -> Array:
  """The k-th largest entry of the last axis: int32 [..., N] -> [..., 1]."""
  if xp is np:
    return np.partition(values, values.shape[-1] - k, -1)[..., -k, None]
  if xp is jnp:
    return jax.lax.top_k(values, k)[0][..., -1:]
  return xp.kth_largest(values, k)


def true_ids(xp: Any, mask: Array, count: Array, k: int) -> Array:
  """Indices of the first k true entries of the last axis: [..., N] -> [..., k].

  Args:
    xp: array namespace.
    mask: bool [..., N].
    count: int32 [..., 1], number of true entries; past it, any index.
    k: how many.
  """
  if xp is np or xp is jnp:
    return xp.argsort(~mask, axis=-1, stable=True)[..., :k]
  return xp.true_ids(mask, count, k)
