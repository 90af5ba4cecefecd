"""The mask samplers of `jepa_jax.objectives.masks`, in TensorFlow.

`TensorFlow` spells the few array functions that the samplers use; the samplers
themselves are the same lines that NumPy and JAX run, and give the same masks.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from jepa_jax.objectives import masks


class TensorFlow:
  """NumPy's names for what the samplers need of TensorFlow."""

  asarray = staticmethod(tf.convert_to_tensor)
  astype = staticmethod(tf.cast)
  broadcast_to = staticmethod(tf.broadcast_to)
  concatenate = staticmethod(tf.concat)
  cond = staticmethod(tf.cond)
  matmul = staticmethod(tf.linalg.matmul)
  min = staticmethod(tf.reduce_min)
  reshape = staticmethod(tf.reshape)
  right_shift = staticmethod(tf.bitwise.right_shift)
  sort = staticmethod(tf.sort)
  take = staticmethod(tf.gather)
  where = staticmethod(tf.where)

  @staticmethod
  def all(x: tf.Tensor, axis: int | None = None) -> tf.Tensor:
    return tf.reduce_all(x, axis)

  @staticmethod
  def any(x: tf.Tensor, axis: int | None = None) -> tf.Tensor:
    return tf.reduce_any(x, axis)

  @staticmethod
  def sum(x: tf.Tensor, axis: Any, dtype: Any = None) -> tf.Tensor:
    return tf.reduce_sum(x if dtype is None else tf.cast(x, dtype), axis)

  @staticmethod
  def take_along_axis(x: tf.Tensor, ids: tf.Tensor, axis: int) -> tf.Tensor:
    return tf.gather(x, ids, axis=axis, batch_dims=axis)

  @staticmethod
  def kth_largest(values: tf.Tensor, k: int) -> tf.Tensor:
    # Several times as fast as tf.math.top_k, which sorts.
    n = values.shape[-1] - k
    return tf.raw_ops.NthElement(input=values, n=n)[..., None]

  @staticmethod
  def first(valid: tf.Tensor, k: int) -> tf.Tensor:
    """Indices of the first k true entries of the last axis, then zeros."""
    shape = valid.shape
    rows = tf.reshape(valid, (-1, shape[-1]))
    count = tf.math.count_nonzero(rows, axis=1, dtype=tf.int32)
    # All true entries in one list, row after row; each row takes its first k.
    ids = tf.cast(tf.where(rows)[:, 1], tf.int32)
    ids = tf.concat([ids, tf.zeros([k], tf.int32)], 0)
    start = tf.cumsum(count, exclusive=True)
    slots = np.arange(k, dtype=np.int32)
    ids = tf.gather(ids, start[:, None] + slots)
    ids = tf.where(slots < count[:, None], ids, 0)
    return tf.reshape(ids, (*shape[:-1], k))


# Conversion by AutoGraph has nothing to convert here and triples the tracing.
@tf.autograph.experimental.do_not_convert
def sample(
  config: Any,
  grid: tuple[int, int],
  *,
  seed: int,
  step: tf.Tensor,
  epoch: tf.Tensor,
  index: tf.Tensor,
) -> dict[str, tf.Tensor]:
  """As `objectives.masks.sample`; index needs a static shape [B]."""
  return masks.sample(
    config,
    grid,
    seed=seed,
    step=step,
    epoch=epoch,
    index=index,
    xp=TensorFlow,
  )
