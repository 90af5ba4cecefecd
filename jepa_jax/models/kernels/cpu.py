"""Networks as XLA's CPU backend is fast at them.

It hands products along the left side's last axis to a library, YNNPACK, and
all others to Eigen, which takes several times as long for many matrices at
once. The work of either is shared by the threads of all devices, which then
wait for each other: of two devices, each on a core of its own, one is done
later than the other.

All differentiate backwards only.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jepa_jax.models import kernels
from jepa_jax.models.kernels import xla

# What a core's second cache and its share of the third hold, about.
_NEAR_BYTES = 2**20


def dense(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
  """See kernels.dense."""
  # Flat, or XLA transposes operands for the weights' gradient: six blocks'
  # backward pass took 1.6 times as long.
  rows = matmul(x.reshape(-1, x.shape[-1]), kernel) + bias
  return rows.reshape(*x.shape[:-1], kernel.shape[-1])


def layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> jax.Array:
  """See kernels.layer_norm."""
  return xla.norm_rows(x, scale, bias, epsilon, row_sums)


def attention(
  qkv: jax.Array,
  valid: jax.Array | None = None,
  query: jax.Array | None = None,
) -> jax.Array:
  """See kernels.attention.

  Devices that share a batch need it per device (jax.shard_map): chunks are cut
  across all that is given.
  """
  return xla.attend(qkv, valid, query, _STEPS)


def map_in_chunks(
  function: Callable[..., Any], bytes_each: int, *arrays: jax.Array | None
) -> Any:
  """function(*arrays) of sequences that do not need each other.

  It sees a few of them at a time, so that what it makes of them is still in the
  caches when it is used.

  Args:
    function: arrays [B, ...], for any B, or None -> a tree of arrays [B, ...].
    bytes_each: that it writes and reads again for a sequence.
    *arrays: its arguments.

  Returns:
    What it returns.
  """
  b = arrays[0].shape[0]
  most = min(b, max(1, _NEAR_BYTES // bytes_each))
  few = next((n for n in range(most, 0, -1) if b % n == 0), b)
  if few in (1, b):  # one by one costs as much as it saves
    return function(*arrays)
  cut = lambda x: x.reshape(-1, few, *x.shape[1:])
  outs = jax.lax.map(lambda xs: function(*xs), jax.tree.map(cut, arrays))
  return jax.tree.map(lambda x: x.reshape(b, *x.shape[2:]), outs)


def sum_over_queries(scores: jax.Array, x: jax.Array) -> jax.Array:
  """Sums over queries: scores [B, H, Q, K] times x [B, H, Q, D].

  One side is transposed in memory, the one that is smaller: x where a head is
  narrower than its keys are many, the scores elsewhere.

  Returns:
    [B, H, K, D].
  """
  if x.shape[-1] < scores.shape[-1]:
    return (_transpose(x) @ scores).swapaxes(-1, -2)
  return _transpose(scores) @ x


# XLA would put a transposition into the product beside it again.
_in_memory = jax.lax.optimization_barrier


def _transpose(x: jax.Array) -> jax.Array:
  """The transposed matrices, in memory."""
  return _in_memory(x.swapaxes(-1, -2))


def row_sums(x: jax.Array, weights: jax.Array) -> jax.Array:
  """Sums of rows: x [..., D] times weights [D], summed over D -> [...].

  A product: XLA joins a sum with what spreads it over its row again, and then
  writes and reads whole arrays of what are few numbers.
  """
  return (x.reshape(-1, x.shape[-1]) @ weights).reshape(x.shape[:-1])


def head_sums(x: jax.Array, heads: int) -> jax.Array:
  """Sums over each head's part of x [..., heads * head_dim]: [..., heads].

  A product, so that x is read as the other products read it: XLA makes a copy
  with split heads otherwise.
  """
  *axes, width = x.shape
  parts = jnp.repeat(jnp.eye(heads, dtype=x.dtype), width // heads, axis=0)
  return (x.reshape(-1, width) @ parts).reshape(*axes, heads)


_STEPS = xla.AttentionSteps(map_in_chunks, sum_over_queries, head_sums)


def matmul(rows: jax.Array, kernel: jax.Array) -> jax.Array:
  """Rows [R, in] times kernel [in, out] -> [R, out].

  All products, also those of the gradients, sum along the left side's last
  axis; for the kernel's gradient the narrower of its two sides is transposed in
  memory.
  """
  rows, kernel = kernels.same_type(rows, kernel)
  return _matmul(*kernels.vary_alike(rows, kernel))


@jax.custom_vjp
def _matmul(rows: jax.Array, kernel: jax.Array) -> jax.Array:
  return rows @ kernel


def _backward(
  kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  rows, kernel = kept
  if kernel.shape[0] > kernel.shape[1]:
    dkernel = _in_memory(_transpose(dy) @ rows).T
  else:
    dkernel = _transpose(rows) @ dy
  return dy @ kernel.T, dkernel


_matmul.defvjp(lambda *factors: (_matmul(*factors), factors), _backward)


def after(batch: Any, done: Any) -> Any:
  """A batch whose indices a CPU makes only when `done` is there.

  XLA's CPU works on whatever is ready, on threads that all devices share. Of
  two networks that do not need each other it may run one device's both first,
  and that device then waits for the other at the next collective.

  Args:
    batch: tree of arrays [B, ...].
    done: tree of arrays [B, ...]; floats are waited for.

  Returns:
    The batch.
  """
  floats = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
  done = [x for x in jax.tree.leaves(done) if floats(x)]
  if not done:
    return batch
  # No number is above infinity, which XLA does not see.
  never = sum(x.reshape(x.shape[0], -1)[:, 0] > jnp.inf for x in done)

  def wait(x):
    # Not pixels: they would be read, and normalised, once more.
    if not jnp.issubdtype(x.dtype, jnp.signedinteger):
      return x
    return x + never.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))

  return jax.tree.map(wait, batch)


# For a forward pass in float32, XLA's own products and plain sums need 7 to 20
# percent less CPU time than its fused kernels and sums in trees. (For training
# the fused kernels are the faster ones.)
FORWARD_OPTIONS = {
  "xla_cpu_experimental_ynn_fusion_type": "",
  "xla_disable_hlo_passes": "tree_reduction_rewriter",
}


def known_options(options: dict[str, Any]) -> dict[str, Any]:
  """Those of some compiler options that this version of XLA has."""

  def has(name: str) -> bool:
    try:
      jax.jit(lambda: 0, compiler_options={name: options[name]})()
    except jax.errors.JaxRuntimeError:
      return False
    return True

  return {name: options[name] for name in options if has(name)}


KERNELS = kernels.Kernels(
  dense=dense, layer_norm=layer_norm, attention=attention, gelu=xla.gelu
)
