"""Attention, in the ways that a config may ask for.

Axes: B sequences, N tokens, D = heads * head_dim features.
"""

import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from jepa_jax.models import cpu

_PADDED = -1e30  # score of what no query may see
_SEQUENCE_BYTES = 2**20  # of queries, keys and values in a call of the kernel
_VMEM_BYTES = 96 * 2**20  # that a call may take of a chip's


def attend(
  qkv: jax.Array, valid: jax.Array | None = None, first: int = 0
) -> jax.Array:
  """Scaled dot-product attention; scores and softmax in float32.

  Differentiable backwards only: jax.grad and jax.vjp, not jax.jvp.

  Args:
    qkv: [B, N, 3, heads, head_dim], queries, keys and values.
    valid: [B, N] bool, False for padding that no query may see, or None.
    first: of the patches whose output is wanted.

  Returns:
    [B, N - first, heads * head_dim].
  """
  return _attend(qkv, valid, first)


# Kept for the backward pass are arrays that are there already, and the
# attention weights, not yet divided by their sums, in the type in which they
# met the values: left to itself, JAX keeps these in float32 besides, and
# queries, keys and values with a last axis so short that a TPU fills it up.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(qkv: jax.Array, valid: jax.Array | None, first: int) -> jax.Array:
  return _attend_forward(qkv, valid, first)[0]


def _heads_first(
  qkv: jax.Array, first: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Scaled queries, keys and values, each [B, heads, tokens, head_dim]."""
  query = qkv[:, first:, 0] * (qkv.shape[-1] ** -0.5)
  key, value = qkv[:, :, 1], qkv[:, :, 2]
  return tuple(x.transpose(0, 2, 1, 3) for x in (query, key, value))


def _attend_forward(
  qkv: jax.Array, valid: jax.Array | None, first: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  query, key, value = _heads_first(qkv, first)
  scores = jnp.einsum(
    "bhqd,bhkd->bhqk", query, key, preferred_element_type=jnp.float32
  )
  if valid is not None:
    scores = jnp.where(valid[:, None, None, :], scores, _PADDED)
  weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
  # The softmax's sums divide what is far smaller than its weights.
  share = 1.0 / weights.sum(axis=-1, keepdims=True)
  weights = weights.astype(value.dtype)
  y = jnp.einsum(
    "bhqk,bhkd->bhqd", weights, value, preferred_element_type=jnp.float32
  )
  y = (y * share).astype(value.dtype).transpose(0, 2, 1, 3)
  y = y.reshape(*y.shape[:2], -1)
  return y, (qkv, weights, share, y)


def _attend_backward(
  first: int, kept: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, None]:
  qkv, weights, share, y = kept
  query, key, value = _heads_first(qkv, first)
  split = lambda x: x.reshape(*x.shape[:2], *qkv.shape[3:])
  # For every row the sum of its weights times their gradients, from arrays
  # that are far smaller.
  # Reference: Dao et al. 2022, appendix B.2, arXiv:2205.14135.
  total = cpu.head_sums(
    dy.astype(jnp.float32) * y.astype(jnp.float32), qkv.shape[3]
  ).transpose(0, 2, 1)[..., None]
  dy = (split(dy).transpose(0, 2, 1, 3) * share).astype(dy.dtype)
  dweights = jnp.einsum(
    "bhqd,bhkd->bhqk", dy, value, preferred_element_type=jnp.float32
  )
  dscores = (weights * (dweights - total * share)).astype(qkv.dtype)
  dquery = jnp.einsum("bhqk,bhkd->bhqd", dscores, key)
  dquery = jnp.pad(
    dquery * (qkv.shape[-1] ** -0.5), ((0, 0), (0, 0), (first, 0), (0, 0))
  )
  dkey = cpu.sum_over_queries(dscores, query)
  dvalue = cpu.sum_over_queries(weights, dy)
  # Turned one by one: XLA's CPU then joins them in about half the time.
  turned = [x.transpose(0, 2, 1, 3) for x in (dquery, dkey, dvalue)]
  return jnp.stack(turned, axis=2), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend_with_jax(
  qkv: jax.Array, valid: jax.Array | None, first: int, implementation: str
) -> jax.Array:
  """What `attend` does, by jax.nn.dot_product_attention.

  Args:
    qkv: as of attend, and so valid and first.
    valid: see qkv.
    first: see qkv.
    implementation: "cudnn" (NVIDIA GPUs; 16 bits; fused) or "xla".

  Returns:
    [B, N - first, heads * head_dim].
  """
  y = jax.nn.dot_product_attention(
    qkv[:, first:, 0],
    qkv[:, :, 1],
    qkv[:, :, 2],
    mask=None if valid is None else valid[:, None, None, :],
    implementation=implementation,
  )
  return y.reshape(*y.shape[:2], -1)


def attend_fused(
  qkv: jax.Array, valid: jax.Array | None = None, first: int = 0
) -> jax.Array:
  """What `attend` does, on a TPU by one kernel that keeps scores on the chip.

  The TPU's memory sees queries, keys, values, the output and their gradients,
  each once and as wide as they are; scores are computed again in the backward
  pass. On other devices this is `attend`. The kernel works on whole sequences
  in the chip's fast memory (1,024 tokens 1,280 wide fit a v5e's). A batch that
  is split over devices needs `layout`.

  Args:
    qkv: as of attend, and so valid and first.
    valid: see qkv.
    first: see qkv.

  Returns:
    [B, N - first, heads * head_dim].
  """
  # Flat in memory: a last axis as short as head_dim would be filled up.
  flat = qkv.reshape(*qkv.shape[:2], -1)
  return _fused(flat, valid, first, qkv.shape[3])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _fused(
  qkv: jax.Array, valid: jax.Array | None, first: int, heads: int
) -> jax.Array:
  return jax.lax.platform_dependent(
    qkv,
    valid,
    tpu=functools.partial(fused_forward, first=first, heads=heads),
    default=lambda qkv, valid: attend(_split(qkv, heads), valid, first),
  )


def _fused_backward(
  first: int,
  heads: int,
  kept: tuple[jax.Array, jax.Array | None],
  dy: jax.Array,
) -> tuple[jax.Array, None]:
  def default(qkv, valid, dy):
    plain = lambda qkv: attend(_split(qkv, heads), valid, first)
    return jax.vjp(plain, qkv)[1](dy)[0]

  kernel = functools.partial(fused_backward, first=first, heads=heads)
  return jax.lax.platform_dependent(
    *kept, dy, tpu=kernel, default=default
  ), None


_fused.defvjp(
  lambda qkv, valid, first, heads: (
    _fused(qkv, valid, first, heads),
    (qkv, valid),
  ),
  _fused_backward,
)


def _split(qkv: jax.Array, heads: int) -> jax.Array:
  return qkv.reshape(*qkv.shape[:2], 3, heads, -1)


def fused_forward(
  qkv: jax.Array,
  valid: jax.Array | None,
  *,
  first: int,
  heads: int,
  interpret: bool = False,
) -> jax.Array:
  """The kernel of `attend_fused`: qkv [B, N, 3 * D] -> [B, N - first, D].

  `interpret` runs it on any device, slowly.
  """
  b, n, wide = qkv.shape
  return _on_sequences(
    functools.partial(_forward_kernel, heads, first),
    (qkv,),
    valid,
    (b, n - first, wide // 3),
    products=2,
    heads=heads,
    interpret=interpret,
  )


def fused_backward(
  qkv: jax.Array,
  valid: jax.Array | None,
  dy: jax.Array,
  *,
  first: int,
  heads: int,
  interpret: bool = False,
) -> jax.Array:
  """Gradient of `fused_forward` for qkv from dy [B, N - first, D]."""
  return _on_sequences(
    functools.partial(_backward_kernel, heads, first),
    (qkv, dy),
    valid,
    qkv.shape,
    products=5,
    heads=heads,
    interpret=interpret,
  )


def _on_sequences(
  kernel, arrays, valid, out_shape, *, products, heads, interpret
):
  """Runs a kernel on some sequences at a time: arrays [B, N, ...], valid."""
  b, n, wide = arrays[0].shape
  queries, width = min(n, arrays[-1].shape[1], out_shape[1]), wide // 3
  if valid is not None:
    bias = jnp.where(valid, 0.0, _PADDED).astype(jnp.float32)
    arrays = (*arrays, bias[:, None, :])
  # Some sequences a call of the kernel hide what starting it costs.
  most = max(1, _SEQUENCE_BYTES // (n * wide * arrays[0].dtype.itemsize))
  together = next(size for size in range(min(b, most), 0, -1) if b % size == 0)
  out = jax.ShapeDtypeStruct(out_shape, arrays[0].dtype)
  spec = lambda x: pl.BlockSpec((together, *x.shape[1:]), lambda i: (i, 0, 0))
  return pl.pallas_call(
    functools.partial(_each, kernel, valid is not None),
    grid=(b // together,),
    in_specs=[spec(x) for x in arrays],
    out_specs=spec(out),
    out_shape=out,
    # What the compiler believes, and with it its estimates.
    cost_estimate=pl.CostEstimate(
      flops=2 * products * b * queries * n * width,
      bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, out)),
      transcendentals=b * heads * queries * n,
    ),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",), vmem_limit_bytes=_VMEM_BYTES
    ),
    interpret=interpret,
  )(*arrays)


def _each(kernel, padded, *refs):
  """Calls a kernel for every sequence of a block."""

  def one(i, _):
    views = [ref.at[i] for ref in refs]
    bias = views.pop(-2)[...].T if padded else None  # [N, 1]
    kernel(bias, *views)
    return 0

  jax.lax.fori_loop(0, refs[0].shape[0], one, 0)


def _turned(ref, start, stop, first=0):
  """Columns [start, stop) of the rows from first on, features first."""
  return ref[first:, start:stop].astype(jnp.float32).T


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
def _forward_kernel(heads, first, bias, qkv, y):
  width = qkv.shape[-1] // 3
  head_dim, dtype = width // heads, qkv.dtype
  query = _turned(qkv, 0, width, first)
  key, value = (_turned(qkv, i * width, (i + 1) * width) for i in (1, 2))
  rows = []
  for h in range(heads):
    part = slice(h * head_dim, (h + 1) * head_dim)
    q, k, v = (x[part].astype(dtype) for x in (query, key, value))
    weights, share = _weights(k, q, bias, head_dim**-0.5)
    rows.append(_product(v, weights.astype(dtype), 1, 0) * share)
  y[...] = jnp.concatenate(rows).T.astype(dtype)


def _backward_kernel(heads, first, bias, qkv, dy, dqkv):
  width = qkv.shape[-1] // 3
  head_dim, dtype = width // heads, qkv.dtype
  scale = head_dim**-0.5
  query = _turned(qkv, 0, width, first)
  key, value = (_turned(qkv, i * width, (i + 1) * width) for i in (1, 2))
  far = _turned(dy, 0, width)
  rows = [], [], []
  for h in range(heads):
    part = slice(h * head_dim, (h + 1) * head_dim)
    q, k, v, d = (x[part].astype(dtype) for x in (query, key, value, far))
    weights, share = _weights(k, q, bias, scale)
    weights = weights * share
    dweights = _product(v, d, 0, 0)
    total = (weights * dweights).sum(axis=0, keepdims=True)
    dscores = (weights * (dweights - total) * scale).astype(dtype)
    rows[0].append(_product(k, dscores, 1, 0))
    rows[1].append(_product(q, dscores, 1, 1))
    rows[2].append(_product(d, weights.astype(dtype), 1, 1))
  for i, parts in enumerate(rows):
    start = 0 if i else first
    columns = slice(i * width, (i + 1) * width)
    dqkv[start:, columns] = jnp.concatenate(parts).T.astype(dtype)
  if first:
    dqkv[:first, :width] = jnp.zeros((first, width), dtype)
