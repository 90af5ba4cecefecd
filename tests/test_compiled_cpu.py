"""What XLA's CPU backend makes of the code, in the words of its HLO."""

import re

import conftest
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import models
from jepa_jax.models import flops
from jepa_jax.models.kernels import cpu
from jepa_jax.objectives import ijepa


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


@pytest.mark.parametrize("shape", [(45, 13), (13, 45), (259, 131)])
def test_products_and_their_gradients_stay_products(shape):
  """A convolution takes 80 times as long, as of jax 0.11.1."""
  arrays = jnp.ones((7, shape[0])), jnp.ones(shape)
  loss = lambda *arrays: jnp.square(cpu.matmul(*arrays)).sum()
  text = jax.jit(jax.grad(loss, (0, 1))).lower(*arrays).compile().as_text()
  assert "convolution" not in text
  assert set(re.findall(r"lhs_contracting_dims={(\d+)}", text)) == {"1"}


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


def test_products_are_computed_again_under_full_alone():
  def count(remat):
    encoder = models.Encoder(
      width=28, depth=3, num_heads=7, patch_size=4, remat=remat,
      kernels=cpu.KERNELS,
    )  # fmt: skip
    images = jnp.ones((2, 12, 20, 3))
    variables = encoder.init(jax.random.key(0), images)
    loss = lambda v: jnp.square(encoder.apply(v, images)).sum()
    lowered = jax.jit(jax.grad(loss)).lower(variables)
    return lowered.as_text().count("stablehlo.dot_general")

  # Of each of three blocks, attention's two, and then its four linear layers'.
  assert count("dots") - count("products") == 3 * 2
  assert count("full") - count("dots") == 3 * 4


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


def test_on_a_cpu_the_context_waits_for_the_targets(config):
  program = conftest.build(config)
  text = program.step.lower(program.state_spec, program.batch_spec)
  text = text.compile().as_text()
  # What it waits for: whether a target's feature is above infinity.
  assert "constant(inf)" in text and "direction=GT" in text


def compiled_flops(function, *shapes):
  return jax.jit(function).lower(*shapes).compile().cost_analysis()["flops"]


def test_flops_agree_with_the_compiler():
  c = conftest.small_config()
  c.encoder.update(width=280, depth=2, num_heads=7)
  c.predictor.update(width=240, depth=3, num_heads=3)
  # Without norms and GELU, which are not counted and cost XLA some 4 %.
  bare = models.Kernels(layer_norm=lambda x, *_: x, gelu=lambda x: x)
  objective = ijepa.IJEPA.from_config(c, bare)
  s = objective.shapes
  k, t, m = s.context_patches, s.target_patches, s.num_targets
  params = jax.eval_shape(objective.init, jax.random.key(0))
  b, shape = 3, jax.ShapeDtypeStruct
  apply = lambda network: lambda p, *xs: network.apply({"params": p}, *xs)

  encoder = flops.encoder(objective.encoder, 25, 3)
  images = shape((b, 40, 40, 3), jnp.float32)
  forward = apply(objective.encoder)
  assert compiled_flops(forward, params["encoder"], images) == pytest.approx(
    b * encoder, rel=0.02
  )

  least = flops.predictor(objective.predictor, k, t, m)
  context = shape((b, 1, k, 280), jnp.float32)
  ids = shape((b, 1, k), jnp.int32), shape((b, m, t), jnp.int32)
  predict = lambda p, *xs: apply(objective.predictor)(p, *xs, (5, 5))
  seen = compiled_flops(predict, params["predictor"], context, *ids)
  assert b * least < seen < 1.03 * b * least

  def loss(params, batch):
    targets = objective.targets(objective.averaged(params), batch, {})
    targets = jax.lax.stop_gradient(targets)
    return objective.loss(params, targets, batch, jax.random.key(0), {}).total

  step_flops = b * objective.flops()
  seen = compiled_flops(jax.grad(loss), params, objective.batch_spec(b))
  assert step_flops < seen < 1.04 * step_flops


def test_unknown_flags_and_options_are_left_out():
  """XLA ends a process at a flag, and refuses an option, that it lacks."""
  assert conftest.known_to_xla("--xla_backend_optimization_level=0")
  assert not conftest.known_to_xla("--xla_of_another_version=0")
  known = {"xla_backend_optimization_level": 0}
  assert cpu.known_options({"xla_of_another_version": 0, **known}) == known
