"""Products of matrices as XLA's CPU backend is fast at them.

Its fast kernels take products along the left side's last axis and the right
side's last but one; what is summed along another axis goes to kernels that
take several times as long. Other backends see the plain products.
"""

import jax
import jax.numpy as jnp


def transposed(x: jax.Array) -> jax.Array:
  """[..., N, M] -> [..., M, N]; on a CPU also in memory."""
  swap = lambda x: x.swapaxes(-1, -2)
  # Without the barrier, XLA puts the transposition into the product again.
  return jax.lax.platform_dependent(
    x, cpu=lambda x: jax.lax.optimization_barrier(swap(x)), default=swap
  )


def row_sums(x: jax.Array, weights: jax.Array) -> jax.Array:
  """Sums of rows: x [..., D] times weights [D], summed over D -> [...].

  A product on a CPU: XLA joins a sum with what spreads it over its row again,
  and then writes and reads whole arrays of what are few numbers.
  """
  product = lambda x, weights: (x.reshape(-1, x.shape[-1]) @ weights).reshape(
    x.shape[:-1]
  )
  return jax.lax.platform_dependent(
    x,
    weights,
    cpu=product,
    default=lambda x, weights: (x * weights).sum(axis=-1),
  )


def head_sums(x: jax.Array, heads: int) -> jax.Array:
  """Sums over each head's part of x [..., heads * head_dim]: [..., heads].

  A product on a CPU, so that x is read as the other products read it: XLA
  makes a copy with split heads otherwise.
  """
  *axes, width = x.shape

  def product(x):
    parts = jnp.repeat(jnp.eye(heads, dtype=x.dtype), width // heads, axis=0)
    return (x.reshape(-1, width) @ parts).reshape(*axes, heads)

  return jax.lax.platform_dependent(
    x,
    cpu=product,
    default=lambda x: x.reshape(*axes, heads, -1).sum(axis=-1),
  )


@jax.custom_vjp
def matmul(rows: jax.Array, kernel: jax.Array) -> jax.Array:
  """Rows [R, in] times kernel [in, out] -> [R, out].

  On a CPU the kernel's gradient is summed with the smaller of its axes first:
  that of a perceptron's second layer then takes about half the time.
  Differentiable backwards only.
  """
  return rows @ kernel


def _backward(
  kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
  rows, kernel = kept
  plain = lambda rows, dy: rows.T @ dy
  dkernel = plain
  if kernel.shape[0] > kernel.shape[1]:
    turned = lambda rows, dy: jax.lax.optimization_barrier(dy.T @ rows).T
    dkernel = lambda rows, dy: jax.lax.platform_dependent(
      rows, dy, cpu=turned, default=plain
    )
  return dy @ kernel.T, dkernel(rows, dy)


matmul.defvjp(lambda rows, kernel: (rows @ kernel, (rows, kernel)), _backward)
