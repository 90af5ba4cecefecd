"""The one seam where a backend may compute a thing its own way.

The networks take a `Kernels`. Its defaults are plain: they run on every backend
and differentiate in every mode. The trainer hands in faster ones, see
jepa_jax.training.sharding:

  xla.py  for training on any backend: less is kept for the backward pass
  cpu.py  the same, in shapes that XLA's CPU backend is fast at
  tpu.py  attention as one Pallas kernel
  gpu.py  attention by cuDNN

Those of these files differentiate backwards only (jax.grad and jax.vjp, not
jax.jvp), and so only once.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp

PADDED = -1e30  # score of what no query may see


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  """Linear layer.

  Args:
    x: [..., in].
    kernel: [in, out], of x's type.
    bias: [out], of x's type.

  Returns:
    [..., out].
  """
  return x @ kernel + bias


def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """Layer normalisation over the last axis.

  Args:
    x: [..., D].
    scale: [D].
    bias: [D].
    epsilon: added to the variance.

  Returns:
    [..., D], float32, or float64 for float64 x.
  """
  wide = at_least_float32(x.dtype)
  x, scale, bias = (y.astype(wide) for y in (x, scale, bias))
  x = x - x.mean(axis=-1, keepdims=True)
  variance = jnp.square(x).mean(axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(variance + epsilon) * scale + bias


def attention(
  qkv: jax.Array,
  valid: jax.Array | None = None,
  query: jax.Array | None = None,
) -> jax.Array:
  """Scaled dot-product attention; scores and softmax in float32 or float64.

  Args:
    qkv: [B, N, 3, heads, head_dim], queries, keys and values; [B, N, 2, heads,
      head_dim], keys and values, beside `query`.
    valid: [B, N] bool, False for padding that no query may see, or None.
    query: [B, Q, heads, head_dim], where not every patch has a query; or None.

  Returns:
    [B, N or Q, heads * head_dim].
  """
  query, key, value = split_qkv(qkv, query)
  scores = jnp.einsum(
    "bqhd,bkhd->bhqk",
    query * qkv.shape[-1] ** -0.5,
    key,
    preferred_element_type=at_least_float32(qkv.dtype),
  )
  weights = jax.nn.softmax(mask_scores(scores, valid)).astype(value.dtype)
  y = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
  return jax.lax.collapse(y, 2)


def gelu(x: jax.Array) -> jax.Array:
  """Exact Gaussian error linear unit."""
  return jax.nn.gelu(x, approximate=False)


def _anywhere(x: jax.Array) -> jax.Array:
  return x


@dataclasses.dataclass(frozen=True)
class Kernels:
  """How a network computes. Equal kernels share compiled programs.

  Attributes:
    dense: (x, kernel, bias) -> y, as `dense`.
    layer_norm: (x, scale, bias, epsilon) -> y, as `layer_norm`.
    attention: (qkv, valid, query) -> y, as `attention`.
    gelu: x -> y, as `gelu`.
    constrain: of what goes into a block, [B', N, D] where B' is a multiple of
      the batch, the same where it should lie on the devices.
  """

  dense: Callable[..., jax.Array] = dense
  layer_norm: Callable[..., jax.Array] = layer_norm
  attention: Callable[..., jax.Array] = attention
  gelu: Callable[[jax.Array], jax.Array] = gelu
  constrain: Callable[[jax.Array], jax.Array] = _anywhere


def at_least_float32(dtype: jnp.dtype) -> jnp.dtype:
  """The type in which sums of numbers of a type are computed."""
  return jnp.promote_types(dtype, jnp.float32)


def same_type(*arrays: jax.Array) -> list[jax.Array]:
  """Arrays in the type of what they are added up to."""
  dtype = jnp.result_type(*arrays)
  return [x.astype(dtype) for x in arrays]


def vary_alike(*arrays: jax.Array | None) -> list[jax.Array | None]:
  """Arrays that vary over the same axes, inside of a jax.shard_map.

  A kernel with a backward pass of its own needs that of its arguments: JAX
  then adds up the gradients of what all devices share. Elsewhere it is nothing.
  """
  varying = lambda x: jax.typeof(x).manual_axis_type.varying
  axes = set().union(*(varying(x) for x in arrays if x is not None))

  def spread(x: jax.Array | None) -> jax.Array | None:
    missing = () if x is None else tuple(sorted(axes - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x

  return [spread(x) for x in arrays]


def split_qkv(
  qkv: jax.Array, query: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Queries, keys and values of what `attention` takes, [B, N or Q, H, d]."""
  if query is None:
    query, qkv = qkv[:, :, 0], qkv[:, :, 1:]
  return query, qkv[:, :, 0], qkv[:, :, 1]


def mask_scores(scores: jax.Array, valid: jax.Array | None) -> jax.Array:
  """Scores [B, H, Q, N], none of padding; see `attention`."""
  if valid is None:
    return scores
  return jnp.where(valid[:, None, None, :], scores, PADDED)
