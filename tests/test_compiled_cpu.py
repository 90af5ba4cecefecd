"""What XLA's CPU backend makes of the code, in the words of its HLO."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import PRODUCTS

from jepa_jax import models
from jepa_jax.models.kernels import cpu


@pytest.mark.parametrize("batch, loops", [(6, 2), (7, 0)])
def test_attention_in_chunks_is_a_loop_forwards_and_one_backwards(
  batch, loops, monkeypatch
):
  qkv = jnp.ones((batch, 5, 3, 2, 4))
  monkeypatch.setattr(cpu, "_NEAR_BYTES", 3 * 4 * 2 * 5 * 5)  # of three scores
  gradient = jax.grad(lambda qkv: jnp.square(cpu.attention(qkv)).sum())
  text = jax.jit(gradient).lower(qkv).compile().as_text()
  # 7 sequences make no equal parts.
  assert text.count(" while(") == loops


@pytest.mark.parametrize("shape", PRODUCTS)
def test_products_go_to_eigen_where_it_is_faster(shape):
  arrays = jnp.ones((7, shape[0])), jnp.ones(shape)
  product = lambda *arrays: cpu.matmul(*arrays)  # traced anew
  text = jax.jit(product).lower(*arrays).compile().as_text()
  assert " convolution(" not in text
  assert ("ynn_fusion" in text) == (shape in PRODUCTS[2:])


def test_other_types_than_float32_are_not_left_to_eigen():
  arrays = (jnp.ones(shape, jnp.bfloat16) for shape in ((7, 45), (45, 13)))
  text = jax.jit(lambda *given: cpu.matmul(*given)).lower(*arrays).as_text()
  assert "stablehlo.dot_general" in text
  assert "stablehlo.convolution" not in text


@pytest.mark.parametrize("batched", [(0, 0), (0, None), (None, 0)])
def test_products_of_several_matrices_stay_products(batched):
  shapes = (7, 5), (5, 3)
  rows, kernel = (
    jax.random.normal(jax.random.key(i), shape if axis is None else (2, *shape))
    for i, (shape, axis) in enumerate(zip(shapes, batched))
  )
  several = jax.jit(jax.vmap(cpu.matmul, batched)).lower(rows, kernel).compile()
  np.testing.assert_allclose(several(rows, kernel), rows @ kernel, rtol=1e-5)
  assert "convolution" not in several.as_text()


def test_products_with_weights_are_computed_again_under_full_alone():
  def count(remat):
    encoder = models.Encoder(
      width=28, depth=3, num_heads=7, patch_size=4, remat=remat,
      kernels=cpu.KERNELS,
    )  # fmt: skip
    images = jnp.ones((2, 12, 20, 3))
    variables = encoder.init(jax.random.key(0), images)
    loss = lambda v: jnp.square(encoder.apply(v, images)).sum()
    lowered = jax.jit(jax.grad(loss)).lower(variables)
    return lowered.as_text().count("stablehlo.convolution")

  once = count("none")
  assert once == count("products") == count("dots") < count("full")


def test_what_waits_is_the_same_whatever_it_waits_for():
  ids = jnp.arange(24).reshape(4, 2, 3)
  done = jnp.asarray([jnp.inf, -jnp.inf, jnp.nan, 1.0])[:, None] * jnp.ones(5)
  wait = jax.jit(cpu.after).lower(ids, done).compile()
  np.testing.assert_array_equal(wait(ids, done), ids)
  assert "compare(" in wait.as_text()  # XLA has not seen through it


@pytest.mark.parametrize("tokens", [5, 9])  # fewer and more than a head is wide
def test_attention_on_a_cpu_has_no_products_that_xla_is_slow_at(tokens):
  """Those that sum along another than the left side's last axis."""
  qkv = jnp.ones((2, tokens, 3, 4, 7))
  gradient = jax.grad(lambda qkv: cpu.attention(qkv).sum())
  text = jax.jit(gradient).lower(qkv).compile().as_text()
  batched = r"lhs_batch_dims={([\d,]+)}, lhs_contracting_dims={(\d+)}"
  flat = r"dot\([^)]*\), lhs_contracting_dims={(\d+)}"  # of [B * N, D]
  assert set(re.findall(batched, text)) == {("0,1", "3")}
  assert set(re.findall(flat, text)) == {"1"}
