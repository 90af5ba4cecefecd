"""Attention by cuDNN, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from jepa_jax.models import kernels

_WIDEST_HEAD = 128


def attention(
  qkv: jax.Array,
  valid: jax.Array | None = None,
  query: jax.Array | None = None,
  *,
  implementation: str = "cudnn",
) -> jax.Array:
  """See kernels.attention; scores are never written to the GPU's memory.

  cuDNN takes heads whose width is a multiple of 8, an even number of queries
  and of keys (where there is a gradient), and a mask that is whole. What is
  missing is filled up with zeros that nothing sees.

  Args:
    qkv: see kernels.attention; 16 bits.
    valid: see kernels.attention.
    query: see kernels.attention.
    implementation: of jax.nn.dot_product_attention; "xla" runs anywhere and
      takes any type.

  Raises:
    ValueError: other types than cuDNN knows, or heads that are too wide.
  """
  width = qkv.shape[-1]
  if implementation == "cudnn":
    _check(qkv.dtype, width)
  query, key, value = kernels.same_type(*kernels.split_qkv(qkv, query))
  (b, q), n = query.shape[:2], key.shape[1]
  if valid is None and n % 2:
    valid = jnp.ones((b, n), bool)
  query, key, value = _filled(query), _filled(key), _filled(value)
  mask = None
  if valid is not None:
    valid = jnp.pad(valid, ((0, 0), (0, n % 2)))
    mask = jnp.broadcast_to(
      valid[:, None, None, :], (b, 1, query.shape[1], key.shape[1])
    )
  y = jax.nn.dot_product_attention(
    query,
    key,
    value,
    mask=mask,
    scale=width**-0.5,
    implementation=implementation,
  )
  return jax.lax.collapse(y[:, :q, :, :width], 2)


def _filled(x: jax.Array) -> jax.Array:
  """Zeros at the ends of [B, N, H, d]: an even N and a d of eights."""
  more = ((0, 0), (0, -x.shape[1] % 2), (0, 0), (0, -x.shape[3] % 8))
  return jnp.pad(x, more) if any(end for _, end in more) else x


def _check(dtype: jnp.dtype, width: int) -> None:
  if dtype not in (jnp.bfloat16, jnp.float16):
    raise ValueError(
      f"cuDNN's attention got {dtype}, and computes in 16 bits; make "
      'compute.dtype "bfloat16", or compute.attention "xla".'
    )
  if width > _WIDEST_HEAD:
    raise ValueError(
      f"cuDNN's attention got heads {width} wide, and takes {_WIDEST_HEAD}; "
      'use more heads, or make compute.attention "xla".'
    )
