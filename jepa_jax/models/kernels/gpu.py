"""Attention by cuDNN, on NVIDIA GPUs."""

import jax
import jax.numpy as jnp

from jepa_jax.models import kernels


def attention(
  qkv: jax.Array,
  valid: jax.Array | None = None,
  query: jax.Array | None = None,
  *,
  implementation: str = "cudnn",
) -> jax.Array:
  """See kernels.attention; 16 bits alone.

  Args:
    qkv: see kernels.attention.
    valid: see kernels.attention.
    query: see kernels.attention.
    implementation: of jax.nn.dot_product_attention; "xla" runs anywhere.
  """
  query, key, value = kernels.split_qkv(qkv, query)
  mask = None
  if valid is not None:  # whole: cuDNN takes no mask that it would broadcast
    (b, n), q = valid.shape, query.shape[1]
    mask = jnp.broadcast_to(valid[:, None, None, :], (b, 1, q, n))
  y = jax.nn.dot_product_attention(
    query, key, value, mask=mask, implementation=implementation
  )
  return y.reshape(*y.shape[:2], -1)
