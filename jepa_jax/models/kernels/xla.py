"""For training on any backend: less is written for the backward pass.

All differentiate backwards only.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.models import kernels

Residuals = tuple[jax.Array | None, ...]


# It keeps its input: what it makes of it costs more memory than time.
@jax.checkpoint
def gelu(x: jax.Array) -> jax.Array:
  """See kernels.gelu."""
  # Through erf: XLA has a fast polynomial for it on CPU and not for the erfc
  # of jax.nn.gelu.
  return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """See kernels.layer_norm."""
  return norm_rows(x, scale, bias, epsilon, _row_sums)


def _row_sums(x: jax.Array, weights: jax.Array) -> jax.Array:
  return (x * weights).sum(axis=-1)


def norm_rows(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  row_sums: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
  """Layer normalisation by a backend's own sums; see kernels.layer_norm.

  Args:
    x: [..., D].
    scale: [D].
    bias: [D].
    epsilon: added to the variance.
    row_sums: of [..., D] times weights [D], summed over D.
  """
  wide = kernels.at_least_float32(x.dtype)
  arrays = kernels.vary_alike(x, scale.astype(wide), bias.astype(wide))
  return _norm_rows(*arrays, epsilon, row_sums)


# Kept for the backward pass are its input and two numbers a row.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm_rows(x, scale, bias, epsilon, row_sums):
  return _layer_norm_forward(x, scale, bias, epsilon, row_sums)[0]


def _layer_norm_forward(x, scale, bias, epsilon, row_sums):
  wide = x.astype(kernels.at_least_float32(x.dtype))
  average = lambda x: row_sums(x, jnp.ones_like(scale)) / scale.size
  mean = average(wide)
  centred = wide - mean[..., None]
  inverse = jax.lax.rsqrt(average(jnp.square(centred)) + epsilon)
  y = centred * (inverse[..., None] * scale) + bias
  return y, (x, scale, mean, inverse)


def _layer_norm_backward(epsilon, row_sums, kept, dy):
  del epsilon
  x, scale, mean, inverse = kept
  normal = (x.astype(mean.dtype) - mean[..., None]) * inverse[..., None]
  dscale = dy * normal
  average = lambda x: row_sums(x, scale)[..., None] / scale.size
  dx = inverse[..., None] * (
    dy * scale - average(dy) - normal * average(dscale)
  )
  rows = tuple(range(x.ndim - 1))
  return dx.astype(x.dtype), dscale.sum(axis=rows), dy.sum(axis=rows)


_norm_rows.defvjp(_layer_norm_forward, _layer_norm_backward)


class AttentionSteps(NamedTuple):
  """Steps of `attend` that a backend may take its own way.

  Attributes:
    in_chunks: (f, bytes, *arrays) -> f(*arrays), of arrays [B, ...] or None;
      bytes are those that f writes and reads again for a sequence.
    sum_over_queries: scores [B, H, Q, K] and x [B, H, Q, D] -> [B, H, K, D].
    head_sums: x [B, Q, heads * head_dim] and heads -> [B, Q, heads].
  """

  in_chunks: Callable[..., Any]
  sum_over_queries: Callable[[jax.Array, jax.Array], jax.Array]
  head_sums: Callable[[jax.Array, int], jax.Array]


_STEPS = AttentionSteps(
  in_chunks=lambda f, bytes_each, *arrays: f(*arrays),
  sum_over_queries=lambda scores, x: scores.swapaxes(-1, -2) @ x,
  head_sums=lambda x, heads: x.reshape(
    *x.shape[:-1], heads, x.shape[-1] // heads
  ).sum(axis=-1),
)


def attention(
  qkv: jax.Array,
  valid: jax.Array | None = None,
  query: jax.Array | None = None,
) -> jax.Array:
  """See kernels.attention."""
  return attend(qkv, valid, query, _STEPS)


def attend(
  qkv: jax.Array,
  valid: jax.Array | None,
  query: jax.Array | None,
  steps: AttentionSteps,
) -> jax.Array:
  """Attention in steps of a backend's own; see kernels.attention."""
  if query is not None:
    qkv, query = kernels.same_type(qkv, query)
  return _attend(*kernels.vary_alike(qkv, valid, query), steps)


# Kept for the backward pass are arrays that are there already, and the
# attention weights, not yet divided by their sums, in the type in which they
# met the values: left to itself, JAX keeps these in float32 besides, and
# queries, keys and values with a last axis so short that a TPU fills it up.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _attend(
  qkv: jax.Array,
  valid: jax.Array | None,
  query: jax.Array | None,
  steps: AttentionSteps,
) -> jax.Array:
  return _attend_forward(qkv, valid, query, steps)[0]


def _attend_forward(
  qkv: jax.Array,
  valid: jax.Array | None,
  query: jax.Array | None,
  steps: AttentionSteps,
) -> tuple[jax.Array, Residuals]:
  y, weights, share = steps.in_chunks(
    _outputs, _score_bytes(qkv, query), qkv, valid, query
  )
  return y, (qkv, query, weights, share, y)


def _attend_backward(
  steps: AttentionSteps, kept: Residuals, dy: jax.Array
) -> tuple[jax.Array, None, jax.Array | None]:
  qkv, query, *_ = kept
  dqkv, dquery = steps.in_chunks(
    functools.partial(_gradients, steps), _score_bytes(qkv, query), *kept, dy
  )
  return dqkv, None, dquery


_attend.defvjp(_attend_forward, _attend_backward)


def _score_bytes(qkv: jax.Array, query: jax.Array | None) -> int:
  """Of a sequence's scores."""
  queries = (qkv if query is None else query).shape[1]
  return 4 * qkv.shape[3] * queries * qkv.shape[1]


def _heads_first(
  qkv: jax.Array, query: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Scaled queries, keys and values, each [B, heads, tokens, head_dim]."""
  query, key, value = kernels.split_qkv(qkv, query)
  parts = query * (qkv.shape[-1] ** -0.5), key, value
  return tuple(x.transpose(0, 2, 1, 3) for x in parts)


def _outputs(
  qkv: jax.Array, valid: jax.Array | None, query: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  wide = kernels.at_least_float32(qkv.dtype)
  query, key, value = _heads_first(qkv, query)
  scores = jnp.einsum(
    "bhqd,bhkd->bhqk", query, key, preferred_element_type=wide
  )
  scores = kernels.mask_scores(scores, valid)
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
  # The softmax's sums divide what is far smaller than its weights.
  share = 1.0 / weights.sum(axis=-1, keepdims=True)
  weights = weights.astype(value.dtype)
  y = jnp.einsum("bhqk,bhkd->bhqd", weights, value, preferred_element_type=wide)
  y = (y * share).astype(value.dtype).transpose(0, 2, 1, 3)
  return jax.lax.collapse(y, 2), weights, share


def _gradients(
  steps: AttentionSteps,
  qkv: jax.Array,
  given: jax.Array | None,
  weights: jax.Array,
  share: jax.Array,
  y: jax.Array,
  dy: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
  query, key, value = _heads_first(qkv, given)
  wide = share.dtype
  # For every row the sum of its weights times their gradients, from arrays
  # that are far smaller.
  # Reference: Dao et al. 2022, appendix B.2, arXiv:2205.14135.
  total = steps.head_sums(dy.astype(wide) * y.astype(wide), qkv.shape[3])
  total = total.transpose(0, 2, 1)[..., None]
  dy = dy.reshape(*dy.shape[:2], *qkv.shape[3:]).transpose(0, 2, 1, 3)
  dy = (dy * share).astype(qkv.dtype)
  dweights = jnp.einsum(
    "bhqd,bhkd->bhqk", dy, value, preferred_element_type=wide
  )
  dscores = (weights * (dweights - total * share)).astype(qkv.dtype)
  dquery = jnp.einsum("bhqk,bhkd->bhqd", dscores, key)
  dquery = dquery * (qkv.shape[-1] ** -0.5)
  dkey = steps.sum_over_queries(dscores, query)
  dvalue = steps.sum_over_queries(weights, dy)
  # Transposed one by one: XLA's CPU then joins them in about half the time.
  parts = [x.transpose(0, 2, 1, 3) for x in (dquery, dkey, dvalue)]
  dquery = None if given is None else parts.pop(0)
  return jnp.stack(parts, axis=2), dquery


KERNELS = kernels.Kernels(layer_norm=layer_norm, attention=attention, gelu=gelu)
