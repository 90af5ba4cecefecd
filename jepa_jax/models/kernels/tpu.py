"""Attention on a TPU by one Pallas kernel that keeps scores on the chip.

The TPU's memory sees queries, keys, values, the output and their gradients,
each once and as wide as they are; scores are computed again in the backward
pass. The kernel works on whole sequences in the chip's fast memory (1,024
tokens 1,280 wide fit a v5e's). Differentiates backwards only.

Axes: B sequences, N tokens, D = heads * head_dim features.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from jepa_jax.models import kernels

_SEQUENCE_BYTES = 2**20  # of queries, keys and values in a call of the kernel
_VMEM_BYTES = 96 * 2**20  # that a call may take of a chip's


def attention(
  qkv: jax.Array,
  valid: jax.Array | None = None,
  query: jax.Array | None = None,
) -> jax.Array:
  """See kernels.attention.

  A batch that is split over devices needs it per device (jax.shard_map).
  """
  # Flat in memory: a last axis as short as head_dim would be filled up.
  flat = lambda x: jax.lax.collapse(x, 2)
  arrays = flat(qkv), valid, None if query is None else flat(query)
  return _fused(*kernels.vary_alike(*arrays), qkv.shape[3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _fused(
  qkv: jax.Array,
  valid: jax.Array | None,
  query: jax.Array | None,
  heads: int,
) -> jax.Array:
  return fused_forward(qkv, valid, query, heads=heads)


def _fused_backward(
  heads: int, kept: tuple[jax.Array | None, ...], dy: jax.Array
) -> tuple[jax.Array, None, jax.Array | None]:
  dqkv, dquery = fused_backward(*kept, dy, heads=heads)
  return dqkv, None, dquery


_fused.defvjp(
  lambda qkv, valid, query, heads: (
    _fused(qkv, valid, query, heads),
    (qkv, valid, query),
  ),
  _fused_backward,
)


def fused_forward(
  qkv: jax.Array,
  valid: jax.Array | None,
  query: jax.Array | None,
  *,
  heads: int,
  interpret: bool = False,
) -> jax.Array:
  """The kernel of `attention`, on flat arrays.

  Args:
    qkv: [B, N, 3 * D], or [B, N, 2 * D] beside `query`.
    valid: [B, N] bool, or None.
    query: [B, Q, D], or None.
    heads: that share D.
    interpret: runs on any device, slowly.

  Returns:
    [B, N or Q, D].
  """
  arrays = _given(qkv, query)
  shape = (*arrays[0].shape[:2], _width(qkv, query))
  (y,) = _on_sequences(
    functools.partial(_forward_kernel, heads),
    arrays,
    valid,
    [jax.ShapeDtypeStruct(shape, qkv.dtype)],
    products=2,
    heads=heads,
    interpret=interpret,
  )
  return y


def fused_backward(
  qkv: jax.Array,
  valid: jax.Array | None,
  query: jax.Array | None,
  dy: jax.Array,
  *,
  heads: int,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
  """Gradients of `fused_forward` for qkv and query from dy [B, N or Q, D]."""
  arrays = _given(qkv, query)
  *dquery, dqkv = _on_sequences(
    functools.partial(_backward_kernel, heads),
    (*arrays, dy),
    valid,
    arrays,
    products=5,
    heads=heads,
    interpret=interpret,
  )
  return dqkv, dquery[0] if dquery else None


def _given(qkv: jax.Array, query: jax.Array | None) -> tuple[jax.Array, ...]:
  return (qkv,) if query is None else (query, qkv)


def _width(qkv: jax.Array, query: jax.Array | None) -> int:
  return qkv.shape[-1] // 3 if query is None else query.shape[-1]


def _on_sequences(kernel, arrays, valid, outs, *, products, heads, interpret):
  """Runs a kernel on some sequences at a time: arrays [B, N, ...], valid."""
  sizes = [x.shape[1:] for x in (*arrays, *outs)]
  b, n = arrays[0].shape[0], max(tokens for tokens, _ in sizes)
  queries, width = (min(size) for size in zip(*sizes))
  if valid is not None:
    bias = jnp.where(valid, 0.0, kernels.PADDED).astype(jnp.float32)
    arrays = (*arrays, bias[:, None, :])
  varying = jax.typeof(arrays[0]).manual_axis_type  # all alike
  # Some sequences a call of the kernel hide what starting it costs.
  most = max(1, _SEQUENCE_BYTES // (n * 3 * width * arrays[0].dtype.itemsize))
  together = next(size for size in range(min(b, most), 0, -1) if b % size == 0)
  spec = lambda x: pl.BlockSpec((together, *x.shape[1:]), lambda i: (i, 0, 0))
  return pl.pallas_call(
    functools.partial(_each, kernel, valid is not None, len(outs)),
    grid=(b // together,),
    in_specs=[spec(x) for x in arrays],
    out_specs=[spec(x) for x in outs],
    out_shape=[
      jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=varying)
      for x in outs
    ],
    # What the compiler believes, and with it its estimates.
    cost_estimate=pl.CostEstimate(
      flops=2 * products * b * queries * n * width,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *outs)),
      transcendentals=b * heads * queries * n,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_BYTES
    ),
    interpret=interpret,
  )(*arrays)


def _each(kernel, padded, num_outs, *refs):
  """Calls a kernel for every sequence of a block."""

  def one(i, _):
    views = [ref.at[i] for ref in refs]
    inputs, outs = views[:-num_outs], views[-num_outs:]
    bias = inputs.pop()[...].T if padded else None  # [N, 1]
    kernel(bias, inputs, outs)
    return 0

  jax.lax.fori_loop(0, refs[0].shape[0], one, 0)


def _columns(refs, width):
  """Where queries, keys and values lie: (ref, columns) of each."""
  return [
    (ref, slice(start, start + width))
    for ref in refs
    for start in range(0, ref.shape[-1], width)
  ]


def _transposed(ref, columns):
  """Columns of all rows, features first."""
  return ref[:, columns].astype(jnp.float32).T


def _weights(key, query, bias, scale):
  """Attention weights [keys, queries] from [head_dim, tokens] of a head."""
  scores = _product(key, query, 0, 0) * scale
  if bias is not None:
    scores = scores + bias
  scores = jnp.exp(scores - scores.max(axis=0, keepdims=True))
  return scores, 1.0 / scores.sum(axis=0, keepdims=True)


def _product(left, right, left_axis, right_axis):
  return jax.lax.dot_general(
    left,
    right,
    (((left_axis,), (right_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


# Features come first within a kernel: a head is then a slice of rows, which a
# TPU reads in place, and its short axis is not the one that is filled up.
def _forward_kernel(heads, bias, inputs, outs):
  (y,) = outs
  width, dtype = y.shape[-1], y.dtype
  head_dim = width // heads
  arrays = [_transposed(*place) for place in _columns(inputs, width)]
  rows = []
  for h in range(heads):
    part = slice(h * head_dim, (h + 1) * head_dim)
    q, k, v = (x[part].astype(dtype) for x in arrays)
    weights, share = _weights(k, q, bias, head_dim**-0.5)
    rows.append(_product(v, weights.astype(dtype), 1, 0) * share)
  y[...] = jnp.concatenate(rows).T.astype(dtype)


def _backward_kernel(heads, bias, inputs, outs):
  width, dtype = inputs[-1].shape[-1], inputs[-1].dtype
  head_dim = width // heads
  scale = head_dim**-0.5
  # Queries, keys, values and the output's gradient.
  arrays = [_transposed(*place) for place in _columns(inputs, width)]
  rows = [], [], []
  for h in range(heads):
    part = slice(h * head_dim, (h + 1) * head_dim)
    q, k, v, d = (x[part].astype(dtype) for x in arrays)
    weights, share = _weights(k, q, bias, scale)
    weights = weights * share
    dweights = _product(v, d, 0, 0)
    total = (weights * dweights).sum(axis=0, keepdims=True)
    dscores = (weights * (dweights - total) * scale).astype(dtype)
    rows[0].append(_product(k, dscores, 1, 0))
    rows[1].append(_product(q, dscores, 1, 1))
    rows[2].append(_product(d, weights.astype(dtype), 1, 1))
  for (ref, columns), parts in zip(_columns(outs, width), rows):
    ref[:, columns] = jnp.concatenate(parts).T.astype(dtype)
