"""The mask samplers of `jepa_jax.masks`, in TensorFlow.

`TensorFlow` spells the few array functions that the samplers use; the samplers
themselves are the same lines that NumPy and JAX run, and give the same masks.
"""

from typing import Any

import numpy as np
import tensorflow as tf

from jepa_jax import masks


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
  def kth_largest(values: tf.Tensor, k: int) -> tf.Tensor:
    # Several times as fast as tf.math.top_k, which sorts.
    n = values.shape[-1] - k
    return tf.raw_ops.NthElement(input=values, n=n)[..., None]

  @staticmethod
  def true_ids(member: tf.Tensor, count: tf.Tensor, k: int) -> tf.Tensor:
    """Indices of the first k of the `count` true entries of the last axis."""
    # All true entries in one list, row after row; each row takes k from its
    # first one on, and so others' where it has fewer.
    ids = tf.where(tf.reshape(member, (-1, member.shape[-1])))[:, 1]
    ids = tf.concat([tf.cast(ids, tf.int32), tf.zeros([k], tf.int32)], 0)
    start = tf.cumsum(tf.reshape(count, (-1,)), exclusive=True)
    ids = tf.gather(ids, start[:, None] + np.arange(k, dtype=np.int32))
    return tf.reshape(ids, (*member.shape[:-1], k))


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
  """As `masks.sample`; index needs a static shape [B]."""
  return masks.sample(
    config,
    grid,
    seed=seed,
    step=step,
    epoch=epoch,
    index=index,
    xp=TensorFlow,
  )
