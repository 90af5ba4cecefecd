"""Kernels that a backend has of its own, beside the plain ones."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import test_models

from jepa_jax import models
from jepa_jax.models.kernels import cpu, gpu, tpu, xla

PLAIN = models.Kernels()
TUNED = {"xla": xla.KERNELS, "cpu": cpu.KERNELS}


def with_gradients(f, far, *args):
  """f(*args) and its gradients, all in float32."""

  def total(*args):
    return (f(*args).astype(jnp.float32) * far).sum()

  gradients = jax.grad(total, tuple(range(len(args))))(*args)
  f32 = lambda x: np.asarray(x, np.float32)
  return jax.tree.map(f32, (f(*args), gradients))


def assert_near(seen, expected, off):
  def near(a, b):
    np.testing.assert_allclose(a, b, rtol=off, atol=off * np.abs(b).max())

  jax.tree.map(near, seen, expected)


OFF = {"float32": 1e-5, "bfloat16": 0.02}  # bfloat16 has 8 bits


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize("name", TUNED)
def test_dense_layers_are_the_plain_ones(name, dtype):
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda i, *shape: jax.random.normal(keys[i], shape, dtype)
  args = draw(0, 2, 5, 13), draw(1, 13, 45), draw(2, 45)
  far = jax.random.normal(keys[3], (2, 5, 45))
  assert_near(
    with_gradients(TUNED[name].dense, far, *args),
    with_gradients(PLAIN.dense, far, *args),
    OFF[dtype],
  )


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize("name", TUNED)
def test_gelu_is_the_plain_one(name, dtype):
  x = jnp.linspace(-6, 6, 91).astype(dtype)
  far = jax.random.normal(jax.random.key(0), x.shape)
  assert_near(
    with_gradients(TUNED[name].gelu, far, x),
    with_gradients(PLAIN.gelu, far, x),
    OFF[dtype],
  )


@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize("name", ["plain", *TUNED])
def test_layer_norm_and_its_gradient_match_flax(name, dtype):
  keys = jax.random.split(jax.random.key(0), 4)
  x = (3.0 * jax.random.normal(keys[0], (2, 5, 12)) + 1.0).astype(dtype)
  far = jax.random.normal(keys[1], x.shape)
  scale = 1.0 + jax.random.normal(keys[2], (12,))
  bias = jax.random.normal(keys[3], (12,))
  norm = nn.LayerNorm(epsilon=1e-3, dtype=jnp.float32, use_fast_variance=False)
  flax = lambda x, scale, bias: norm.apply(
    {"params": {"scale": scale, "bias": bias}}, x
  )
  own = (TUNED | {"plain": PLAIN})[name].layer_norm
  assert_near(
    with_gradients(lambda *args: own(*args, 1e-3), far, x, scale, bias),
    with_gradients(flax, far, x, scale, bias),
    OFF[dtype],
  )


ATTENTION = {
  "plain": PLAIN.attention,
  "xla": xla.attention,
  "cpu": cpu.attention,
  "cuDNN's call": functools.partial(gpu.attention, implementation="xla"),
}


# What a kernel is called with, and how many of its arguments a device has a
# share of; the others are the same on all.
B, N, D, HEADS = 2, 5, 12, 3
CALLS = {
  "dense": (((B, N, D), (D, 7), (7,)), 1),
  "layer_norm": (((B, N, D), (D,), (D,)), 1),
  "attention": (((B, N, 3, HEADS, 4),), 1),
  "attention, queries apart": (((B, N, 2, HEADS, 4), (B, 2, HEADS, 4)), 2),
  "gelu": (((B, N, D),), 1),
}
TUNED_OR_NOT = TUNED | {
  "plain": PLAIN,
  "gpu": models.Kernels(attention=ATTENTION["cuDNN's call"]),
}


def call_of(kernels, name):
  """A kernel as a function of arrays of floats alone."""
  kernel = getattr(kernels, name.partition(",")[0])
  return {
    "layer_norm": lambda *args: kernel(*args, 1e-3),
    "attention, queries apart": lambda qkv, query: kernel(qkv, None, query),
  }.get(name, kernel)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", TUNED_OR_NOT)
def test_gradients_have_the_types_of_what_they_are_of(name, call):
  shapes, _ = CALLS[call]
  kernel = call_of(TUNED_OR_NOT[name], call)
  total = lambda *args: kernel(*args).astype(jnp.float32).sum()
  for types in itertools.product(("bfloat16", "float32"), repeat=len(shapes)):
    args = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, types)]
    gradient = jax.grad(total, tuple(range(len(args))))
    assert [x.dtype for x in jax.eval_shape(gradient, *args)] == list(types)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", [*TUNED_OR_NOT, "tpu"])
def test_kernels_may_be_called_by_device(name, call):
  """With JAX's check of what varies, which the types alone show."""
  kernels = models.Kernels(attention=tpu.attention)
  kernel = call_of((TUNED_OR_NOT | {"tpu": kernels})[name], call)
  shapes, shared = CALLS[call]
  args = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
  mesh = jax.sharding.Mesh(jax.devices()[:1], "d")
  specs = (P("d"),) * shared + (P(),) * (len(args) - shared)
  gradient = jax.grad(
    lambda *args: jax.lax.psum(kernel(*args).sum(), "d"),
    tuple(range(len(args))),
  )
  by_device = jax.shard_map(
    gradient,
    mesh=mesh,
    in_specs=specs,
    out_specs=specs,
    check_vma=call != "gelu" or test_models.erf_is_checked(mesh),
  )
  seen = jax.eval_shape(by_device, *args)
  assert [x.shape for x in seen] == list(shapes)


@pytest.mark.parametrize("first", [None, 2])  # queries of some patches alone
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", OFF)
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_and_its_gradient_match_flax(name, dtype, padded, first):
  qkv = jax.random.normal(jax.random.key(0), (2, 5, 3, 4, 7), dtype)
  valid = jnp.asarray([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0]], bool)
  far = jax.random.normal(jax.random.key(1), (2, 5, 28))[:, first:]

  def flax(qkv):
    q, k, v = qkv[:, first:, 0], qkv[:, :, 1], qkv[:, :, 2]
    mask = valid[:, None, None] if padded else None
    y = nn.dot_product_attention(
      q, k, v, mask=mask, force_fp32_for_softmax=True
    )
    return y.reshape(far.shape)

  def own(qkv):
    query = None
    if first:
      query, qkv = qkv[:, first:, 0], qkv[:, :, 1:]
    return ATTENTION[name](qkv, valid if padded else None, query)

  seen = with_gradients(own, far, qkv)
  exact = with_gradients(flax, far, qkv.astype("float32"))
  off = 1e-5 if dtype == "float32" else 0.05
  assert_near(seen, exact, off)
  if padded:
    np.testing.assert_array_equal(seen[1][0][0, 2, 1:], 0)


@pytest.mark.parametrize("width", [7, 8, 24])
@pytest.mark.parametrize("queries, tokens", [(3, 5), (4, 6), (5, 5), (6, 6)])
@pytest.mark.parametrize("padded", [False, True])
def test_cudnn_gets_what_it_takes(monkeypatch, padded, queries, tokens, width):
  given = []
  whole = jax.nn.dot_product_attention

  def attention(*args, implementation, **settings):
    given.append((*args, settings["mask"]))
    assert implementation == "cudnn"
    return whole(*args, **settings, implementation="xla")

  monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
  qkv = jax.random.normal(
    jax.random.key(0), (2, tokens, 3, 4, width), jnp.bfloat16
  )
  valid = jnp.arange(tokens) < jnp.asarray([[2], [tokens]]) if padded else None
  args = qkv[:, :, 1:], valid, qkv[:, :queries, 0]
  y = gpu.attention(*args)
  np.testing.assert_allclose(
    *(np.asarray(x, "float32") for x in (y, PLAIN.attention(*args))), atol=0.03
  )
  ((query, key, value, mask),) = given
  assert query.shape[3] % 8 == query.shape[1] % 2 == key.shape[1] % 2 == 0
  assert key.shape == value.shape and query.shape[3] == key.shape[3]
  # Every query has its own row of the mask, and none where nothing needs it.
  if padded or tokens % 2:
    assert mask.shape == (2, 1, query.shape[1], key.shape[1])
  else:
    assert mask is None


@pytest.mark.parametrize(
  "dtype, width, message",
  [
    ("float32", 8, 'float32.*make compute.dtype "bfloat16"'),
    ("bfloat16", 136, "heads 136 wide.*128"),
  ],
)
def test_what_cudnn_does_not_take_is_said_in_one_line(dtype, width, message):
  with pytest.raises(ValueError, match=message):
    gpu.attention(jnp.ones((2, 4, 3, 1, width), dtype))


@pytest.mark.parametrize("first", [None, 5])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernel_for_tpus_is_the_same(dtype, padded, first):
  heads, shape = 3, (4, 12, 72)
  qkv, far = jax.random.normal(jax.random.key(0), (2, *shape), dtype)
  far = far[:, first:, :24]
  query = None
  if first:  # queries of some patches alone
    query, qkv = qkv[:, first:, :24], qkv[..., 24:]
  valid = jnp.arange(12) < jnp.asarray([[4], [6], [12], [7]])
  valid = valid if padded else None
  split = lambda x: x.reshape(*x.shape[:2], -1, heads, 8).astype(jnp.float32)

  def plain(qkv, query):
    query = None if query is None else split(query)[:, :, 0]
    return PLAIN.attention(split(qkv), valid, query)

  y, pull = jax.vjp(plain, qkv, query)
  settings = dict(heads=heads, interpret=True)
  off = 1e-5 if dtype == "float32" else 0.02  # bfloat16 has 8 bits
  f32 = lambda x: np.asarray(x, np.float32)
  close = lambda a, b: np.testing.assert_allclose(
    f32(a), f32(b), atol=off, rtol=off
  )
  close(tpu.fused_forward(qkv, valid, query, **settings), y)
  gradients = tpu.fused_backward(qkv, valid, query, far, **settings)
  jax.tree.map(close, gradients, pull(far.astype(jnp.float32)))


def kept(images, variables, depth):
  """Elements that the backward pass waits for, parameters among them."""
  encoder = models.Encoder(
    **test_models.SETTINGS | {"depth": depth}, kernels=xla.KERNELS
  )
  _, backward = jax.vjp(lambda v: encoder.apply(v, images), variables)
  return sum(x.size for x in jax.tree.leaves(backward))


def test_a_block_keeps_what_it_needs_once():
  b, n, width, heads = 2, 15, 28, 7
  images = jax.random.normal(jax.random.key(0), (b, 12, 20, 3))
  networks = [
    models.Encoder(**test_models.SETTINGS | {"depth": depth}).init(
      jax.random.key(0), images
    )
    for depth in (5, 6)
  ]
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  more = kept(images, networks[1], 6) - kept(images, networks[0], 5)
  # Inputs of two norms and of four layers, queries, keys and values, what goes
  # into GELU, and the attention weights.
  needed = b * n * (5 * width + 3 * width + 2 * 4 * width)
  needed += b * heads * n * n
  needed += size(networks[1]) - size(networks[0])
  assert more < 1.05 * needed


@pytest.mark.parametrize("name", TUNED)
@pytest.mark.parametrize("network", test_models.NETWORKS)
def test_networks_are_the_same_with_any_kernels(network, name):
  with jax.enable_x64(True):
    f, variables, x = test_models.small(network)
    plain = jax.value_and_grad(test_models.total(f), (0, 1))(variables, x)
    f, _, _ = test_models.small(network, kernels=TUNED[name])
    tuned = jax.value_and_grad(test_models.total(f), (0, 1))(variables, x)
    # In float64: nothing is computed in float32 but what float32 is for.
    assert_near(tuned, plain, 1e-9)


@pytest.mark.parametrize("batch", [6, 7])  # 7 sequences make no equal parts
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("first", [None, 3])
def test_attention_in_chunks_is_the_same(first, padded, batch, monkeypatch):
  tokens, heads = 5, 2
  qkv = jax.random.normal(jax.random.key(0), (batch, tokens, 3, heads, 4))
  valid = jnp.arange(tokens) < 2 + jnp.arange(batch)[:, None] % 4
  query = None
  if first:
    query, qkv = qkv[:, first:, 0], qkv[:, :, 1:]

  def gradient(qkv, query):
    attend = lambda qkv, query: cpu.attention(
      qkv, valid if padded else None, query
    )
    y, back = jax.vjp(attend, qkv, query)
    return y, back(jnp.cos(y))

  whole = gradient(qkv, query)
  queries = tokens - (first or 0)
  three = 3 * 4 * heads * queries * tokens  # bytes of three sequences' scores
  monkeypatch.setattr(cpu, "_NEAR_BYTES", three)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-6),
    gradient(qkv, query),
    whole,
  )


@pytest.mark.parametrize("shape", [(45, 13), (13, 45), (259, 131)])
def test_gradients_of_products_are_those_of_the_plain_product(shape):
  rows, far = (
    jax.random.normal(jax.random.key(i), (7, shape[i])) for i in (0, 1)
  )
  kernel = jax.random.normal(jax.random.key(2), shape)
  gradient = lambda f: jax.grad(
    lambda rows, kernel: (f(rows, kernel) * far).sum(), argnums=(0, 1)
  )(rows, kernel)
  for own, plain in zip(gradient(cpu.matmul), gradient(jnp.matmul)):
    scale = np.abs(plain).max()
    np.testing.assert_allclose(own, plain, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("keys", [3, 9])  # fewer and more than a head is wide
def test_sums_over_queries_are_those_of_the_plain_product(keys):
  scores = jax.random.normal(jax.random.key(0), (2, 4, 5, keys))
  x = jax.random.normal(jax.random.key(1), (2, 4, 5, 7))
  np.testing.assert_allclose(
    jax.jit(cpu.sum_over_queries)(scores, x),
    jnp.einsum("bhqk,bhqd->bhkd", scores, x),
    atol=1e-5,
  )


def test_attention_in_bfloat16_rounds_its_weights_and_little_more():
  """Weights kept in 16 bits cost the gradient little beside its own inputs.

  What is more is dy over the softmax's sum, rounded once: 1.15.
  """
  qkv = jax.random.normal(jax.random.key(0), (4, 64, 3, 4, 32))
  short = qkv.astype(jnp.bfloat16)
  far = jax.random.normal(jax.random.key(1), (4, 64, 128))

  def kept_in_float32(qkv):
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    scores = jnp.einsum(
      "bhqd,bhkd->bhqk",
      q * 32**-0.5,
      k,
      preferred_element_type=jnp.float32,
    )
    y = jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v
    return y.transpose(0, 2, 1, 3).reshape(far.shape)

  def gradient(f, qkv):
    g = jax.grad(lambda qkv: (f(qkv).astype(jnp.float32) * far).sum())(qkv)
    return np.asarray(g, np.float32)

  exact = gradient(kept_in_float32, short.astype(jnp.float32))
  error = lambda f: np.linalg.norm(gradient(f, short) - exact)
  assert error(xla.attention) < 1.2 * error(kept_in_float32)
  assert error(xla.attention) < 0.01 * np.linalg.norm(exact)
