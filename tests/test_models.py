"""The networks, by themselves."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import models
from jepa_jax.models import attention, cpu, transformer

B, H, W, C, PATCH = 2, 12, 20, 3, 4  # grid 3 x 5
SETTINGS = dict(width=28, depth=5, num_heads=7, patch_size=PATCH)


@pytest.fixture(scope="module")
def images():
  return jax.random.normal(jax.random.key(0), (B, H, W, C))


@pytest.fixture(scope="module")
def variables(images):
  params = models.Encoder(**SETTINGS).init(jax.random.key(1), images)
  # Biases start at zero and norms at one: move them, so that each matters.
  keys = iter(jax.random.split(jax.random.key(2), 100))
  return jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params
  )


@pytest.mark.parametrize("padded", [False, True])
def test_the_attention_of_jax_is_the_same(padded):
  qkv = jax.random.normal(jax.random.key(0), (2, 6, 3, 3, 5))
  valid = jnp.arange(6) < jnp.asarray([[4], [6]]) if padded else None
  for part, query in ((qkv, None), (qkv[:, :, 1:], qkv[:, 2:, 0])):
    np.testing.assert_allclose(
      attention.attend_with_jax(part, valid, query, "xla"),
      attention.attend(part, valid, query),
      atol=1e-6,
    )


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
    return attention.attend(split(qkv), valid, query)

  y, pull = jax.vjp(plain, qkv, query)
  settings = dict(heads=heads, interpret=True)
  off = 1e-5 if dtype == "float32" else 0.02  # bfloat16 has 8 bits
  f32 = lambda x: np.asarray(x, np.float32)
  close = lambda a, b: np.testing.assert_allclose(
    f32(a), f32(b), atol=off, rtol=off
  )
  close(attention.fused_forward(qkv, valid, query, **settings), y)
  gradients = attention.fused_backward(qkv, valid, query, far, **settings)
  jax.tree.map(close, gradients, pull(far.astype(jnp.float32)))


def test_where_there_is_no_tpu_the_kernel_gives_way(images, variables):
  """On a CPU, values and gradients are those of `attend`."""

  def loss(params, name):
    encoder = models.Encoder(**SETTINGS, attention=name)
    return (encoder.apply(params, images) ** 2).sum()

  own, fused = (
    jax.grad(functools.partial(loss, name=name))(variables)
    for name in ("own", "pallas")
  )
  jax.tree.map(np.testing.assert_array_equal, own, fused)


def test_every_block_uses_the_attention_that_is_asked_for(
  images, variables, monkeypatch
):
  asked = []
  whole = attention.attend_with_jax
  monkeypatch.setattr(
    attention, "attend_with_jax", lambda *a: asked.append(a[-1]) or whole(*a)
  )
  other = models.Encoder(**SETTINGS, attention="xla").apply(variables, images)
  assert set(asked) == {"xla"} and len(asked) >= 5
  expected = models.Encoder(**SETTINGS).apply(variables, images)
  np.testing.assert_allclose(other, expected, atol=1e-4)


def test_layout_is_asked_for_blocks_and_forgotten(images, variables):
  blocks, inputs = [], []
  with models.layout(
    lambda x: inputs.append(x.shape) or x, lambda w: blocks.append(w) or w
  ):
    seen = models.Encoder(**SETTINGS).apply(variables, images)
  assert set(inputs) == {(B, 15, 28)}
  assert {(28, 84), (28, 28), (28, 112), (112, 28)} < {w.shape for w in blocks}
  count = len(blocks)
  expected = models.Encoder(**SETTINGS).apply(variables, images)
  np.testing.assert_allclose(seen, expected, atol=1e-6)
  assert len(blocks) == count


def kept(images, variables, depth=SETTINGS["depth"], gather=None):
  """Elements that the backward pass waits for, parameters among them."""
  encoder = models.Encoder(**SETTINGS | {"depth": depth})
  with models.layout(None, gather):
    _, backward = jax.vjp(lambda v: encoder.apply(v, images), variables)
  return sum(x.size for x in jax.tree.leaves(backward))


def test_gathered_kernels_are_not_kept(images, variables):
  # Times one: a new array, as one that comes from other devices.
  gathered = kept(images, variables, gather=lambda w: 1.0 * w)
  assert gathered == kept(images, variables)


def test_a_block_keeps_what_it_needs_once(images, variables):
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  deeper = SETTINGS["depth"] + 1
  grown = models.Encoder(**SETTINGS | {"depth": deeper}).init(
    jax.random.key(0), images
  )
  more = kept(images, grown, deeper) - kept(images, variables)
  # Inputs of two norms and of four layers, queries, keys and values, what goes
  # into GELU, and the attention weights.
  width, hidden = SETTINGS["width"], 4 * SETTINGS["width"]
  needed = B * 15 * (5 * width + 3 * width + 2 * hidden)
  needed += B * SETTINGS["num_heads"] * 15 * 15
  needed += size(grown) - size(variables)
  assert more < 1.05 * needed


def test_patchify_cuts_row_major_patches():
  image = np.arange(H * W * C).reshape(1, H, W, C)
  patches = np.asarray(models.patchify(jnp.asarray(image), PATCH))
  assert patches.shape == (1, 15, PATCH * PATCH * C)
  row, column = 2, 3
  expected = image[0, 8:12, 12:16].reshape(-1)
  np.testing.assert_array_equal(patches[0, row * 5 + column], expected)


def test_positions_are_separable_and_follow_the_formula():
  positions = models.sincos_positions((3, 5), 8).reshape(3, 5, 8)
  # First half: the column; second half: the row; sines before cosines.
  assert np.allclose(positions[:, 2, :4], positions[:1, 2, :4])
  assert np.allclose(positions[2, :, 4:], positions[2, :1, 4:])
  frequencies = [1.0, 0.01]
  expected = [np.sin(4 * f) for f in frequencies]
  expected += [np.cos(4 * f) for f in frequencies]
  np.testing.assert_allclose(positions[0, 4, :4], expected, atol=1e-6)
  expected = [np.sin(2 * f) for f in frequencies]
  expected += [np.cos(2 * f) for f in frequencies]
  np.testing.assert_allclose(positions[2, 0, 4:], expected, atol=1e-6)


def test_encoder_of_all_patches_in_any_order_is_the_same(images, variables):
  encoder = models.Encoder(**SETTINGS)
  whole = encoder.apply(variables, images)
  assert whole.shape == (B, 15, 28)
  order = jax.random.permutation(jax.random.key(3), 15)
  chosen = encoder.apply(variables, images, jnp.tile(order, (B, 1)))
  np.testing.assert_allclose(chosen, whole[:, order], atol=1e-4)


def test_context_sees_its_own_patches_alone(images, variables):
  encoder = models.Encoder(**SETTINGS)
  ids = jnp.asarray([[0, 3, 7], [1, 8, 14]])
  before = encoder.apply(variables, images, ids)
  patches = models.patchify(images, PATCH)
  outside = jnp.ones(patches.shape[:2], bool)
  outside = outside.at[jnp.arange(B)[:, None], ids].set(False)
  noisy = jnp.where(outside[..., None], 9.0, patches)
  changed = noisy.reshape(B, 3, 5, PATCH, PATCH, C)
  changed = changed.transpose(0, 1, 3, 2, 4, 5).reshape(images.shape)
  np.testing.assert_allclose(
    encoder.apply(variables, changed, ids), before, atol=1e-6
  )
  assert not np.allclose(encoder.apply(variables, changed)[:, 0], before[:, 0])


def test_padding_changes_nothing(images, variables):
  encoder = models.Encoder(**SETTINGS)
  ids = jnp.asarray([[2, 5, 9], [4, 6, 11]])
  padded = jnp.pad(ids, ((0, 0), (0, 4)))
  valid = jnp.arange(7)[None] < jnp.asarray([[3], [3]])
  np.testing.assert_allclose(
    encoder.apply(variables, images, padded, valid)[:, :3],
    encoder.apply(variables, images, ids),
    atol=1e-4,
  )


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("blocks", [2, 3])  # fewer patches than all, and more
def test_wanted_patches_are_those_of_the_whole(
  images, variables, blocks, layers, scan
):
  encoder = models.Encoder(**SETTINGS, scan=scan)
  wanted = jax.random.randint(jax.random.key(3), (B, blocks, 6), 0, 15)
  seen = encoder.apply(variables, images, layers=layers, wanted=wanted)
  whole = models.Encoder(**SETTINGS).apply(variables, images, layers=layers)
  np.testing.assert_allclose(
    seen, models.gather_patches(whole, wanted), atol=1e-4
  )
  with pytest.raises(ValueError, match="whole images alone"):
    encoder.apply(variables, images, wanted[:, 0], wanted=wanted)


def test_several_contexts_are_encoded_apart(images, variables):
  encoder = models.Encoder(**SETTINGS)
  ids = jnp.asarray([[[0, 1], [5, 7]], [[2, 3], [8, 14]]])
  both = encoder.apply(variables, images, ids)
  assert both.shape == (B, 2, 2, 28)
  for s in range(2):
    np.testing.assert_allclose(
      both[:, s], encoder.apply(variables, images, ids[:, s]), atol=1e-4
    )


@pytest.mark.parametrize("layers", [1, 4, 5])
@pytest.mark.parametrize(
  "remat, every", [("products", 1), ("dots", 1), ("full", 1), ("full", 2)]
)
def test_scan_and_remat_change_nothing(images, variables, layers, remat, every):
  plain = models.Encoder(**SETTINGS)
  other = models.Encoder(**SETTINGS, scan=True, remat=remat, remat_every=every)

  def loss(encoder):
    def f(v):
      return jnp.square(encoder.apply(v, images, layers=layers)).sum()

    return jax.value_and_grad(f)(variables)

  value, grads = loss(plain)
  other_value, other_grads = loss(other)
  np.testing.assert_allclose(value, other_value, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(other_grads)):
    np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-3)


def test_last_layers_end_with_the_last(images, variables):
  encoder = models.Encoder(**SETTINGS)
  four = encoder.apply(variables, images, layers=4)
  assert four.shape == (B, 15, 4 * 28)
  np.testing.assert_allclose(
    four[..., -28:], encoder.apply(variables, images), atol=1e-6
  )


def test_bfloat16_computes_near_float32_with_float32_parameters(
  images, variables
):
  encoder = models.Encoder(**SETTINGS, dtype=jnp.bfloat16)
  params = encoder.init(jax.random.key(1), images)
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype("float32")}
  low = encoder.apply(variables, images)
  high = models.Encoder(**SETTINGS).apply(variables, images)
  assert low.dtype == jnp.bfloat16
  assert jnp.linalg.norm(low - high) / jnp.linalg.norm(high) < 0.05


@pytest.mark.parametrize("rate", ["dropout", "drop_path"])
def test_stochastic_parts_act_in_training_alone(images, variables, rate):
  encoder = models.Encoder(**SETTINGS, **{rate: 0.5})
  plain = models.Encoder(**SETTINGS).apply(variables, images)
  np.testing.assert_array_equal(encoder.apply(variables, images), plain)

  def draw(seed):
    rngs = {"dropout": jax.random.key(seed)}
    return encoder.apply(variables, images, train=True, rngs=rngs)

  np.testing.assert_array_equal(draw(0), draw(0))
  assert not np.allclose(draw(0), draw(1))
  assert not np.allclose(draw(0), plain)


@pytest.mark.parametrize("first", [None, 2])
def test_attention_and_its_gradient_match_flax(first):
  qkv = jax.random.normal(jax.random.key(0), (2, 5, 3, 4, 7))
  valid = jnp.asarray([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0]], bool)
  weights = jax.random.normal(jax.random.key(1), (2, 5, 28))[:, first:]

  def flax(qkv):
    q, k, v = qkv[:, first:, 0], qkv[:, :, 1], qkv[:, :, 2]
    y = nn.dot_product_attention(q, k, v, mask=valid[:, None, None])
    return y.reshape(weights.shape)

  def own(qkv):
    if first is None:
      return attention.attend(qkv, valid)
    return attention.attend(qkv[:, :, 1:], valid, qkv[:, first:, 0])

  np.testing.assert_allclose(own(qkv), flax(qkv), atol=1e-5)
  gradient = lambda f: jax.grad(lambda qkv: (f(qkv) * weights).sum())(qkv)
  np.testing.assert_allclose(gradient(own), gradient(flax), atol=1e-5)
  np.testing.assert_array_equal(gradient(own)[0, 2, 1:], 0)  # padding


@pytest.mark.parametrize("batch", [6, 7])  # 7 sequences make no equal parts
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("first", [None, 3])
def test_attention_of_a_few_sequences_at_a_time_is_the_same(
  first, padded, batch, monkeypatch
):
  tokens, heads = 5, 2
  qkv = jax.random.normal(jax.random.key(0), (batch, tokens, 3, heads, 4))
  valid = jnp.arange(tokens) < 2 + jnp.arange(batch)[:, None] % 4
  query = None
  if first:
    query, qkv = qkv[:, first:, 0], qkv[:, :, 1:]

  def gradient(qkv, query):
    attend = lambda qkv, query: attention.attend(
      qkv, valid if padded else None, query
    )
    y, back = jax.vjp(attend, qkv, query)
    return y, back(jnp.cos(y))

  whole = jax.jit(gradient).lower(qkv, query).compile()
  queries = tokens - (first or 0)
  few = 3 * 4 * heads * queries * tokens  # bytes of three sequences' scores
  monkeypatch.setattr(cpu, "_NEAR_BYTES", few)
  parts = jax.jit(lambda *given: gradient(*given)).lower(qkv, query).compile()
  assert " while(" not in whole.as_text()
  assert parts.as_text().count(" while(") == (2 if batch == 6 else 0)
  for own, plain in zip(
    jax.tree.leaves(parts(qkv, query)), jax.tree.leaves(whole(qkv, query))
  ):
    np.testing.assert_allclose(own, plain, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_and_its_gradient_match_flax(dtype):
  keys = jax.random.split(jax.random.key(0), 4)
  x = (3.0 * jax.random.normal(keys[0], (2, 5, 12)) + 1.0).astype(dtype)
  far = jax.random.normal(keys[1], x.shape)
  params = {
    "scale": 1.0 + jax.random.normal(keys[2], (12,)),
    "bias": jax.random.normal(keys[3], (12,)),
  }
  settings = dict(epsilon=1e-3, dtype=dtype)

  def values(norm):
    y = lambda params, x: norm.apply({"params": params}, x)
    total = lambda params, x: (y(params, x).astype(jnp.float32) * far).sum()
    return y(params, x), jax.grad(total, argnums=(0, 1))(params, x)

  own = values(transformer.LayerNorm(**settings))
  flax = values(nn.LayerNorm(**settings, use_fast_variance=False))
  close = functools.partial(
    np.testing.assert_allclose,
    rtol=1e-5 if dtype == jnp.float32 else 1e-2,
    atol=1e-5 if dtype == jnp.float32 else 1e-2,
  )
  f32 = lambda x: np.asarray(x, np.float32)
  jax.tree.map(lambda a, b: close(f32(a), f32(b)), own, flax)


# The last is too wide, and its sums are too long, for Eigen; the rows of the
# one before lie apart by what caches are poor at.
PRODUCTS = [(45, 13), (13, 45), (5, 512), (259, 131)]


@pytest.mark.parametrize("shape", PRODUCTS)
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


def test_products_with_weights_are_computed_again_under_full_alone(
  images, variables
):
  def count(remat):
    encoder = models.Encoder(**SETTINGS, remat=remat)
    loss = lambda v: jnp.square(encoder.apply(v, images)).sum()
    lowered = jax.jit(jax.grad(loss)).lower(variables)
    return lowered.as_text().count("stablehlo.convolution")

  once = count("none")
  assert once == count("products") == count("dots") < count("full")


@pytest.mark.parametrize("keys", [3, 9])  # fewer and more than a head is wide
def test_sums_over_queries_are_those_of_the_plain_product(keys):
  scores = jax.random.normal(jax.random.key(0), (2, 4, 5, keys))
  x = jax.random.normal(jax.random.key(1), (2, 4, 5, 7))
  np.testing.assert_allclose(
    jax.jit(cpu.sum_over_queries)(scores, x),
    jnp.einsum("bhqk,bhqd->bhkd", scores, x),
    atol=1e-5,
  )


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
  gradient = jax.grad(lambda qkv: attention.attend(qkv).sum())
  text = jax.jit(gradient).lower(qkv).compile().as_text()
  batched = r"lhs_batch_dims={([\d,]+)}, lhs_contracting_dims={(\d+)}"
  flat = r"dot\([^)]*\), lhs_contracting_dims={(\d+)}"  # of [B * N, D]
  assert set(re.findall(batched, text)) == {("0,1", "3")}
  assert set(re.findall(flat, text)) == {"1"}


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
  assert error(attention.attend) < 1.2 * error(kept_in_float32)
  assert error(attention.attend) < 0.01 * np.linalg.norm(exact)


@pytest.fixture(scope="module")
def predictor_inputs():
  context = jax.random.normal(jax.random.key(4), (B, 2, 3, 28))
  context_ids = jnp.asarray([[[0, 1, 4], [2, 3, 6]], [[5, 8, 9], [1, 2, 7]]])
  target_ids = jnp.asarray([[[10, 11], [12, 13], [9, 14]]] * B)
  return context, context_ids, target_ids


def test_predictor_predicts_blocks_and_contexts_apart(predictor_inputs):
  context, context_ids, target_ids = predictor_inputs
  predictor = models.Predictor(width=24, depth=2, num_heads=3, output_width=28)
  args = (context, context_ids, target_ids, (3, 5))
  variables = predictor.init(jax.random.key(5), *args)
  variables = jax.tree.map(lambda x: x + 0.1, variables)
  whole = predictor.apply(variables, *args)
  assert whole.shape == (B, 2, 3, 2, 28)
  for s in range(2):
    for m in range(3):
      alone = predictor.apply(
        variables,
        context[:, s : s + 1],
        context_ids[:, s : s + 1],
        target_ids[:, m : m + 1],
        (3, 5),
      )
      np.testing.assert_allclose(alone[:, 0, 0], whole[:, s, m], atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize(
  "remat, every", [("none", 1), ("full", 1), ("full", 2)]
)
def test_a_scanned_predictor_is_the_same(predictor_inputs, depth, remat, every):
  context, context_ids, target_ids = predictor_inputs
  args = (context, context_ids, target_ids, (3, 5))
  settings = dict(width=24, depth=depth, num_heads=3, output_width=28)
  plain = models.Predictor(**settings)
  variables = plain.init(jax.random.key(5), *args)
  variables = jax.tree.map(lambda x: x + 0.1, variables)
  loss = lambda network: jax.value_and_grad(
    lambda v: jnp.square(network.apply(v, *args)).sum()
  )(variables)
  other = models.Predictor(
    **settings, scan=True, remat=remat, remat_every=every
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-3),
    loss(other),
    loss(plain),
  )


def test_predictor_ignores_padding(predictor_inputs):
  context, context_ids, target_ids = predictor_inputs
  predictor = models.Predictor(width=24, depth=2, num_heads=3, output_width=28)
  args = (context, context_ids, target_ids, (3, 5))
  variables = predictor.init(jax.random.key(5), *args)
  variables = jax.tree.map(lambda x: x + 0.1, variables)
  pad = lambda x, by: jnp.pad(x, ((0, 0), (0, 0), (0, by)))
  padded = predictor.apply(
    variables,
    jnp.pad(context, ((0, 0), (0, 0), (0, 4), (0, 0)), constant_values=7.0),
    pad(context_ids, 4),
    pad(target_ids, 1),
    (3, 5),
    jnp.broadcast_to(jnp.arange(7) < 3, (B, 2, 7)),
    jnp.broadcast_to(jnp.arange(3) < 2, (B, 3, 3)),
  )
  np.testing.assert_allclose(
    padded[..., :2, :], predictor.apply(variables, *args), atol=1e-4
  )


def test_sizes_have_the_published_parameter_counts():
  # The released ViT-H/14 has 630.8 M with its 256 x 1280 fixed positions, which
  # are no parameters here.
  counts = {}
  for name, patch_size in (("h", 14), ("b", 16)):
    encoder = models.Encoder(**models.SIZES[name], patch_size=patch_size)
    shapes = jax.eval_shape(
      encoder.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3))
    )
    counts[name] = sum(x.size for x in jax.tree.leaves(shapes))
  d, layers, f = 1280, 32, 5120
  block = 4 * d * d + 4 * d + 2 * d * f + f + d + 4 * d
  assert counts["h"] == layers * block + 14 * 14 * 3 * d + d + 2 * d
  assert round((counts["h"] + 256 * d) / 1e5) == 6308
  assert round(counts["b"] / 1e6) == 86


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(patch_size=7), "nearest patch sizes"),
    (dict(num_heads=5), "not a multiple of 5 heads"),
    (dict(width=30), "not a multiple of 4"),
    (dict(remat="some"), "known: none, products, dots, full"),
  ],
)
def test_misfits_are_named(images, change, message):
  encoder = models.Encoder(**(SETTINGS | change))
  with pytest.raises(ValueError, match=message):
    encoder.init(jax.random.key(0), images)


def test_too_many_layers_are_refused(images, variables):
  with pytest.raises(ValueError, match="ask for 1 to 5"):
    models.Encoder(**SETTINGS).apply(variables, images, layers=6)
