"""The networks, by themselves, with their plain kernels."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import models
from jepa_jax.models.kernels import cpu, xla

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


@functools.cache
def small(name, dtype="float64", kernels=models.Kernels()):  # noqa: B008
  """A network by name: (f, variables, x), where f(variables, x) is its output.

  Some of its input is padding, and some patches give keys and values alone.
  """
  keys = iter(jax.random.split(jax.random.key(0), 100))
  if name == "Encoder":
    network = models.Encoder(
      width=8,
      depth=2,
      num_heads=2,
      patch_size=2,
      dtype=dtype,
      kernels=kernels,
    )
    x = jax.random.normal(next(keys), (B, 4, 6, C), "float64")

    def f(variables, x):
      valid = jnp.broadcast_to(jnp.arange(6) != 4, (x.shape[0], 6))
      ids = jnp.broadcast_to(jnp.asarray([5, 0, 2]), (x.shape[0], 3))
      return network.apply(variables, x, valid=valid, query_ids=ids)

    variables = jax.jit(network.init)(next(keys), x)
  else:
    network = models.Predictor(
      width=8,
      depth=2,
      num_heads=2,
      output_width=5,
      dtype=dtype,
      kernels=kernels,
    )
    x = jax.random.normal(next(keys), (B, 1, 3, 12), "float64")

    def f(variables, x, apply=network.apply):
      every = lambda rows: jnp.broadcast_to(
        jnp.asarray(rows), (x.shape[0], *np.shape(rows))
      )
      ids, targets = every([[3, 1, 5]]), every([[0, 2], [4, 0]])
      valid = every([[True, True, False]])
      return apply(variables, x, ids, targets, (2, 3), valid)

    variables = jax.jit(functools.partial(f, apply=network.init))(next(keys), x)
  variables = jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape, "float64"),
    variables,
  )
  return jax.jit(f), variables, x


def in_float32(name, kernels, dtype="float32"):
  """As small, with variables and x in float32."""
  with jax.enable_x64(True):
    f, *args = small(name, dtype, kernels)
    return f, *jax.tree.map(lambda x: x.astype("float32"), args)


def along(f, variables, x):
  """f as a function of two numbers, steps in variables and in x."""
  keys = iter(jax.random.split(jax.random.key(1), 100))
  draw = lambda x: jax.random.normal(next(keys), x.shape, x.dtype)
  directions = jax.tree.map(draw, (variables, x))

  def g(t):
    add = lambda i, x, d: x + t[i] * d
    return f(
      *(
        jax.tree.map(functools.partial(add, i), *pair)
        for i, pair in enumerate(zip((variables, x), directions))
      )
    )

  return g


def differences(g, step=1e-5):
  """Central differences of a function of two numbers, at 0: [..., 2].

  Any part that is computed in float32 would be off by a hundredth.
  """
  columns = [
    (g(step * unit) - g(-step * unit)) / (2 * step) for unit in jnp.eye(2)
  ]
  return jnp.stack(columns, axis=-1)


def total(g):
  return lambda *args: jnp.square(g(*args)).sum()


# Name -> (what the transformation gives, what it should give) of f, variables
# and x. A network that is added to NETWORKS keeps all of these promises.
ZERO = np.zeros(2)
TRANSFORMS = {
  "jit": lambda f, v, x: (jax.jit(f)(v, x), f(v, x)),
  "grad": lambda f, v, x: (
    jax.grad(total(along(f, v, x)))(ZERO),
    differences(total(along(f, v, x))),
  ),
  "jvp": lambda f, v, x: (
    jax.jvp(along(f, v, x), (ZERO,), (np.asarray([0.7, -2.0]),))[1],
    differences(along(f, v, x)) @ np.asarray([0.7, -2.0]),
  ),
  "linearize": lambda f, v, x: (
    jax.linearize(along(f, v, x), ZERO)[1](np.asarray([0.7, -2.0])),
    differences(along(f, v, x)) @ np.asarray([0.7, -2.0]),
  ),
  "jacfwd": lambda f, v, x: (
    jax.jacfwd(along(f, v, x))(ZERO),
    differences(along(f, v, x)),
  ),
  "jacrev": lambda f, v, x: (
    jax.jacrev(along(f, v, x))(ZERO),
    differences(along(f, v, x)),
  ),
  "hessian": lambda f, v, x: (
    jax.hessian(total(along(f, v, x)))(ZERO),
    differences(jax.grad(total(along(f, v, x)))),
  ),
  "grad of grad": lambda f, v, x: (
    jax.grad(lambda t: jax.grad(total(along(f, v, x)))(t)[0])(ZERO),
    differences(jax.grad(total(along(f, v, x))))[0],
  ),
  "vmap": lambda f, v, x: (
    jax.vmap(f, (0, None))(jax.tree.map(lambda x: jnp.stack([x, -x]), v), x),
    jnp.stack([f(v, x), f(jax.tree.map(jnp.negative, v), x)]),
  ),
  "vmap of grad": lambda f, v, x: (
    jax.vmap(jax.grad(total(f), 1), (None, 0))(v, jnp.stack([x, 2 * x])),
    jnp.stack([jax.grad(total(f), 1)(v, i * x) for i in (1, 2)]),
  ),
  "checkpoint": lambda f, v, x: (
    jax.grad(total(jax.checkpoint(f)), 1)(v, x),
    jax.grad(total(f), 1)(v, x),
  ),
  "export": lambda f, v, x: (exported(f, v, x), f(v, x)),
}
NETWORKS = ("Encoder", "Predictor")
KERNELS = {"plain": models.Kernels(), "xla": xla.KERNELS, "cpu": cpu.KERNELS}


def exported(f, variables, x):
  """What f gives in another process, whose batch may have any size."""
  (b,) = jax.export.symbolic_shape("b")
  export = jax.export.export(jax.jit(f), platforms=("cpu", "cuda", "tpu"))
  done = export(
    jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables),
    jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype),
  )
  return jax.export.deserialize(done.serialize()).call(variables, x)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_networks_behave_under_every_transformation(transform, network):
  with jax.enable_x64(True):
    seen, expected = TRANSFORMS[transform](*small(network))
    assert seen.dtype == jnp.float64
    scale = np.abs(expected).max()
    np.testing.assert_allclose(seen, expected, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize(
  "dtype, off", [("float16", 0.01), ("bfloat16", 0.05), ("float32", 1e-5)]
)
def test_narrow_types_are_near_float64(dtype, off, network):
  with jax.enable_x64(True):
    f, variables, x = small(network)
    expected = f(variables, x)
    seen = small(network, dtype)[0](variables, x)
    assert seen.dtype == dtype
    error = jnp.linalg.norm(seen - expected) / jnp.linalg.norm(expected)
    assert error < off


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_an_empty_batch_is_empty(kernels, network):
  f, variables, x = in_float32(network, KERNELS[kernels])
  shape = lambda x: jax.eval_shape(f, variables, x).shape
  assert shape(x[:0]) == (0, *shape(x)[1:])
  total = lambda *args: f(*args).sum()
  gradient = jax.eval_shape(jax.grad(total, (0, 1)), variables, x[:0])
  same = lambda a, b: a.shape == b.shape
  assert jax.tree.all(jax.tree.map(same, gradient, (variables, x[:0])))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("params", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_have_the_parameters_type(dtype, params, kernels, network):
  f, variables, x = in_float32(network, KERNELS[kernels], dtype)
  variables = jax.tree.map(lambda x: x.astype(params), variables)
  total = lambda v: f(v, x).astype("float32").sum()
  gradient = jax.eval_shape(jax.grad(total), variables)
  assert {x.dtype for x in jax.tree.leaves(gradient)} == {np.dtype(params)}


def erf_is_checked(mesh):
  """Whether those defaults take JAX's own erf; jax 0.12.0.1's do not."""
  spec = jax.sharding.PartitionSpec("d")
  slope = jax.grad(lambda x: jax.lax.erf(x).sum())
  by_device = jax.shard_map(slope, mesh=mesh, in_specs=spec, out_specs=spec)
  try:
    jax.eval_shape(by_device, jnp.ones(4))
  except ValueError:
    return False
  return True


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_networks_run_by_device(kernels, network):
  """Under jax.shard_map with its defaults, which check what varies."""
  f, variables, x = in_float32(network, KERNELS[kernels])
  spec = jax.sharding.PartitionSpec
  mesh = jax.sharding.Mesh(jax.devices()[:1], "d")
  total = lambda v, x: jax.lax.psum(f(v, x).sum(), "d")
  by_device = jax.shard_map(
    jax.value_and_grad(total),
    mesh=mesh,
    in_specs=(spec(), spec("d")),
    out_specs=spec(),
    check_vma=erf_is_checked(mesh),
  )
  loss, gradient = jax.eval_shape(by_device, variables, x)
  assert loss.shape == ()
  assert jax.tree.structure(gradient) == jax.tree.structure(variables)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("kernels", KERNELS)
def test_nothing_of_float64_is_computed_in_float32(kernels, network):
  with jax.enable_x64(True):
    f, variables, x = small(network, "float64", KERNELS[kernels])
    total = lambda *args: f(*args).sum()
    program = jax.jit(jax.grad(total)).lower(variables, x).as_text()
  assert "f64" in program and "f32" not in program


@pytest.mark.parametrize("shape", [(H, W), (13, W, C), (1, 1, 13, W, C)])
def test_a_wrong_rank_is_named_before_the_grid(shape):
  with pytest.raises(ValueError, match=r"they need to be \[B, H, W, C\]"):
    models.Encoder(**SETTINGS).init(jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("scan", [False, True])
def test_every_block_is_seen_from_outside(images, variables, scan):
  encoder = models.Encoder(**SETTINGS, scan=scan)
  y, state = encoder.apply(
    variables, images, capture_intermediates=True, mutable=["intermediates"]
  )
  blocks = state["intermediates"]["transformer"]["blocks"]
  names = ["0-4"] if scan else ["0", "1", "2", "3", "4"]
  assert [name for name in blocks if name != "__call__"] == names
  several = encoder.apply(variables, images, layers=5)
  whole = blocks["0-4"]["0"] if scan else None
  for i in range(5):
    block = jax.tree.map(lambda x: x[i], whole) if scan else blocks[str(i)]  # noqa: B023
    (output,) = block["__call__"]
    x = output - output.mean(-1, keepdims=True)
    x /= jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)
    norm = variables["params"]["norm"]
    np.testing.assert_allclose(
      x * norm["scale"] + norm["bias"],
      several[..., 28 * i : 28 * (i + 1)],
      atol=1e-4,
    )
    assert block["fc1"]["__call__"][0].shape == (B, 15, 112)
  table = encoder.tabulate(
    jax.random.key(0), images, console_kwargs={"width": 200}
  )
  for name in ("norm1", "qkv", "out", "norm2", "fc1", "fc2"):
    assert f"transformer/blocks/{name} " in table
  count = sum(x.size for x in jax.tree.leaves(variables))
  assert f"Total Parameters: {count:,}" in table


def test_every_kernel_is_used_in_every_block(images, variables):
  calls = []

  def record(name):
    plain = getattr(models.Kernels(), name)

    def kernel(*args):
      calls.append((name, *(x.shape for x in args[:2] if x is not None)))
      return plain(*args)

    return kernel

  names = [field.name for field in dataclasses.fields(models.Kernels)]
  kernels = models.Kernels(**{name: record(name) for name in names})
  ids = jnp.zeros((B, 4), int)
  plain = models.Encoder(**SETTINGS)
  seen = plain.clone(kernels=kernels).apply(variables, images, query_ids=ids)
  expected = plain.apply(variables, images, query_ids=ids)
  np.testing.assert_array_equal(seen, expected)
  block = [
    ("constrain", (B, 15, 28)),
    ("layer_norm", (B, 15, 28), (28,)),
    ("dense", (B, 15, 28), (28, 84)),
    ("attention", (B, 15, 3, 7, 4)),
    ("dense", (B, 15, 28), (28, 28)),
    ("layer_norm", (B, 15, 28), (28,)),
    ("dense", (B, 15, 28), (28, 112)),
    ("gelu", (B, 15, 112)),
    ("dense", (B, 15, 112), (112, 28)),
  ]
  last = [
    ("constrain", (B, 15, 28)),
    ("layer_norm", (B, 15, 28), (28,)),
    ("dense", (B, 4, 28), (28, 28)),
    ("dense", (B, 15, 28), (28, 56)),
    ("attention", (B, 15, 2, 7, 4)),
    ("dense", (B, 4, 28), (28, 28)),
    ("layer_norm", (B, 4, 28), (28,)),
    ("dense", (B, 4, 28), (28, 112)),
    ("gelu", (B, 4, 112)),
    ("dense", (B, 4, 112), (112, 28)),
  ]
  first = [("dense", (B, 15, 48), (48, 28))]
  norm = [("layer_norm", (B, 4, 28), (28,))]
  assert calls == first + 4 * block + last + norm


def test_kernels_are_part_of_the_key_of_compiled_programs(images, variables):
  run = jax.jit(lambda encoder, v, x: encoder.apply(v, x), static_argnums=0)
  twice = models.Kernels(gelu=jnp.tanh), models.Kernels(gelu=jnp.tanh)
  assert twice[0] == twice[1] and hash(twice[0]) == hash(twice[1])
  outputs = [
    run(models.Encoder(**SETTINGS, kernels=kernels), variables, images)
    for kernels in (models.Kernels(), *twice)
  ]
  assert run._cache_size() == 2
  assert not np.allclose(outputs[0], outputs[1])


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
def test_queried_patches_are_those_of_the_whole(
  images, variables, blocks, layers, scan
):
  encoder = models.Encoder(**SETTINGS, scan=scan)
  ids = jax.random.randint(jax.random.key(3), (B, blocks, 6), 0, 15)
  seen = encoder.apply(variables, images, layers=layers, query_ids=ids)
  whole = models.Encoder(**SETTINGS).apply(variables, images, layers=layers)
  np.testing.assert_allclose(seen, models.gather_patches(whole, ids), atol=1e-4)
  with pytest.raises(ValueError, match="whole images alone"):
    encoder.apply(variables, images, ids[:, 0], query_ids=ids)


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
