"""The library: load, encode, predict, warm-start, bridge, export."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_convert import (
  assert_same,
  make,
  one_device,
  tiny_config,
  workdir,  # noqa: F401, a fixture
)
from test_convert import (
  run as run_command,
)

import jepa_jax
from jepa_jax import config as config_lib
from jepa_jax import convert, models, objectives, pretrained
from jepa_jax.convert import weights as weights_lib
from jepa_jax.training import checkpoints, program

GRID = (3, 5)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """An export with all networks, and its weights."""
  weights = make("target", "context", "predictor")
  path = tmp_path_factory.mktemp("export") / "all.npz"
  convert.write(weights, path)
  return path, weights


@pytest.fixture(scope="module")
def model(exported):
  return jepa_jax.load(exported[0])


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (3, 12, 20, 3), np.uint8)


def normalized(images):
  """As the weights of `make` want it, written independently."""
  return (images / 255.0 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6]


def test_importing_loads_no_framework():
  code = textwrap.dedent("""
      import sys
      import jepa_jax
      assert jepa_jax.__version__ and "load" in dir(jepa_jax)
      heavy = {"jax", "flax", "tensorflow", "torch", "transformers"}
      assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
      jepa_jax.load
      heavy = {"tensorflow", "torch", "transformers"}
      assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
      try:
        jepa_jax.lode
      except AttributeError as error:
        assert "lode" in str(error)
      else:
        raise AssertionError
  """)
  subprocess.run([sys.executable, "-c", code], check=True)


def test_the_parts_are_plain_flax(model, exported, images):
  module, params, preprocessing = model
  assert model.which == "target"
  x = preprocessing(images)
  np.testing.assert_allclose(x, normalized(images), atol=1e-5)
  features = module.apply({"params": params}, x)
  _, weights = exported
  expected = weights.module("target").apply(
    {"params": weights.networks["target"]}, x
  )
  np.testing.assert_array_equal(features, expected)
  np.testing.assert_array_equal(preprocessing(x), x)  # floats are normalised


@pytest.mark.parametrize("layers", [1, 3])
def test_encode_pools_patches_or_keeps_their_grid(layers, model, images):
  maps = model.encode(images, layers=layers, pool=None)
  assert maps.shape == (3, *GRID, layers * 28)
  assert maps.dtype == jnp.float32
  pooled = model.encode(images, layers=layers)
  np.testing.assert_allclose(pooled, maps.mean(axis=(1, 2)), atol=1e-5)
  patches = model.module.apply(
    {"params": model.params}, model.preprocessing(images), layers=layers
  )
  np.testing.assert_allclose(
    maps.reshape(3, 15, -1), patches, atol=2e-5, rtol=1e-4
  )
  # The last layer stands last.
  last = model.encode(images, pool=None)
  np.testing.assert_allclose(maps[..., -28:], last, atol=2e-5, rtol=1e-4)


def test_encode_tells_target_from_context(model, exported, images):
  target, context = (model.encode(images, w) for w in ("target", "context"))
  assert np.abs(target - context).max() > 0.1
  np.testing.assert_array_equal(model.encode(images), target)
  chosen = jepa_jax.load(exported[0], "context")
  np.testing.assert_array_equal(chosen.encode(images), context)


def test_encode_in_batches_compiles_once(model, images):
  whole = model.encode(images)
  before = pretrained._encoder()._cache_size()
  parts = model.encode(images, batch_size=2)
  assert pretrained._encoder()._cache_size() == before + 1
  np.testing.assert_allclose(parts, whole, atol=1e-5)
  model.encode(images[:1], batch_size=2)
  assert pretrained._encoder()._cache_size() == before + 1


@pytest.mark.parametrize("batch_size", [0, 2])
def test_no_images_have_no_features(model, images, batch_size):
  assert model.encode(images[:0], batch_size=batch_size).shape == (0, 28)
  assert model.encode(images[:0], pool=None).shape == (0, *GRID, 28)
  ids = np.zeros((0, 2), int)
  assert model.predict(images[:0], ids, ids).shape == (0, 1, 1, 2, 28)


def test_floats_from_0_to_1_are_normalised_where_one_says_so(model, images):
  expected = model.encode(images)
  unit = images / np.float32(255)
  seen = model.encode(unit, unit_range=True)
  np.testing.assert_allclose(seen, expected, atol=1e-5)
  assert np.abs(model.encode(unit) - expected).max() > 0.01
  ids = np.zeros((3, 2), int)
  np.testing.assert_allclose(
    model.predict(unit, ids, ids + 1, unit_range=True),
    model.predict(images, ids, ids + 1),
    atol=1e-5,
  )


def test_what_is_loaded_says_so_in_one_line(model):
  assert repr(model) == (
    "Pretrained(target encoder: 3 blocks of width 28, patches of 4; images "
    "12x20x3; networks: context, predictor, target)"
  )


def test_float64_is_computed_in_float64(exported, images):
  with pytest.raises(ValueError, match="jax_enable_x64"):
    jepa_jax.load(exported[0], dtype="float64")
  with jax.enable_x64(True):
    model = jepa_jax.load(exported[0], dtype="float64")
    seen = model.encode(images)
    assert seen.dtype == jnp.float64
    assert model.preprocessing(images).dtype == jnp.float64
    # Images that differ by less than float32 can tell differ here.
    far = normalized(images)
    near = far + 1e-10
    assert np.abs(model.encode(near) - model.encode(far)).max() > 0
  np.testing.assert_allclose(
    seen, jepa_jax.load(exported[0]).encode(images), atol=1e-3
  )


def test_half_precision_is_close(exported, images):
  half = jepa_jax.load(exported[0], dtype="bfloat16", scan=True)
  whole = jepa_jax.load(exported[0])
  got, expected = (m.encode(images) for m in (half, whole))
  assert got.dtype == jnp.float32
  error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
  assert 1e-5 < error < 0.05


def test_other_sizes_get_positions_of_their_own(model):
  images = np.zeros((2, 8, 24, 3), np.uint8)
  images[1, :, 12:] = 200
  found = model.encode(images, pool=None)
  assert found.shape == (2, 2, 6, 28)
  module, params, preprocessing = model
  stored = models.sincos_positions((2, 6), 28)  # computed, of that grid
  expected = dataclasses.replace(module, position_grid=(2, 6)).apply(
    {"params": {**params, "positions": stored}}, preprocessing(images)
  )
  np.testing.assert_allclose(found.reshape(2, 12, 28), expected, atol=1e-5)


def test_stored_positions_are_of_one_grid(tmp_path, images):
  weights = make("target", stored=True)
  convert.write(weights, tmp_path / "e.npz")
  model = jepa_jax.load(tmp_path / "e.npz")
  assert model.encode(images, pool=None).shape == (3, *GRID, 28)
  with pytest.raises(ValueError, match="2x6 patches but.*3x5.*bicubic"):
    model.encode(np.zeros((2, 8, 24, 3), np.uint8))


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (dict(which="teacher"), 'no "teacher".*context, predictor, target'),
    (dict(pool="max"), 'unknown pool "max"'),
    (dict(layers=4), "last 4 layers were asked of 3"),
    (dict(images=np.zeros((12, 20, 3), np.uint8)), "need to be"),
    (dict(images=np.zeros((1, 12, 20, 1), np.uint8)), "H, W, 3"),
    (dict(images=np.zeros((1, 13, 20, 3), np.uint8)), "patch size 4"),
    (
      dict(images=np.zeros((1, 12, 20, 3), int)),
      "int64; they need to be uint8",
    ),
    (dict(images=np.zeros((1, 12, 20, 3), np.uint16)), "uint16; they need"),
    (dict(images=np.zeros((1, 12, 20, 3), bool)), "bool; they need to be"),
  ],
)
def test_encode_says_what_is_wrong(arguments, message, model, images):
  with pytest.raises(ValueError, match=message):
    model.encode(**dict(images=images) | arguments)


@pytest.mark.parametrize("kind", ["published", "e.npz"])
@pytest.mark.parametrize("channels", [1, 4, 12])
def test_any_number_of_channels(channels, kind, tmp_path):
  weights = dataclasses.replace(make(), channels=channels)
  assert weights.mean == pytest.approx((0.2,) * channels)
  weights.networks["target"] = jax.tree.map(
    lambda x: np.ones(x.shape, np.float32),
    weights_lib.abstract(weights, "target"),
  )
  convert.write(weights, tmp_path / kind)
  for path in tmp_path.rglob("preprocessor_config.json"):
    path.unlink()  # so that ImageNet's three values stand in
  model = jepa_jax.load(tmp_path / kind)
  assert len(model.preprocessing.mean) == channels
  features = model.encode(np.zeros((2, 12, 20, channels), np.uint8))
  assert features.shape == (2, 28)
  for other in {1, 3, 4} - {channels}:
    with pytest.raises(ValueError, match=rf"\[B, H, W, {channels}\]"):
      model.encode(np.zeros((2, 12, 20, other), np.uint8))


def test_predict_any_patches_from_any_others(model, exported, images):
  rng = np.random.default_rng(0)
  draw = lambda blocks, k: np.stack(
    [[rng.permutation(15)[:k] for _ in range(blocks)] for _ in images]
  )
  context_ids, target_ids = draw(2, 7), draw(3, 4)
  got = model.predict(images, context_ids, target_ids)
  assert got.shape == (3, 2, 3, 4, 28)
  _, weights = exported
  context = jax.jit(weights.module("context").apply)(
    {"params": weights.networks["context"]},
    normalized(images).astype(np.float32),
    context_ids,
  )
  expected = weights.module("predictor").apply(
      {"params": weights.networks["predictor"]},
      context, context_ids, target_ids, GRID,
  )  # fmt: skip
  np.testing.assert_allclose(got, expected, atol=1e-3, rtol=1e-3)
  # One block an image needs no axis of its own; padding changes nothing.
  single = model.predict(images, context_ids[:, 0], target_ids[:, 1])
  np.testing.assert_allclose(
    single[:, 0, 0], got[:, 0, 1], atol=1e-3, rtol=1e-3
  )
  padded = np.pad(context_ids[:, 0], [(0, 0), (0, 2)])
  valid = np.arange(9) < np.full((3, 1), 7)
  masked = model.predict(images, padded, target_ids[:, 1], valid)
  np.testing.assert_allclose(masked, single, atol=1e-3, rtol=1e-3)


def test_predict_says_what_is_wrong(model, images, tmp_path):
  ids = np.zeros((3, 2), int)
  with pytest.raises(ValueError, match=r"target_ids.*\[0, 15\)"):
    model.predict(images, ids, ids + 15)
  with pytest.raises(ValueError, match=r"context_ids.*\[3, blocks, patches\]"):
    model.predict(images, ids[:2], ids)
  convert.write(make("target"), tmp_path / "e.npz")
  with pytest.raises(ValueError, match="no predictor"):
    jepa_jax.load(tmp_path / "e.npz").predict(images, ids, ids)


def test_a_run_loads_as_it_evaluates(workdir):  # noqa: F811
  folder, state = workdir
  model = jepa_jax.load(folder)
  images = np.random.default_rng(0).integers(0, 256, (2, 24, 24, 3), np.uint8)
  config = tiny_config()
  objective = program.build(config, one_device()).objective
  target = jax.tree.map(lambda x: 2 * x, state.target_params["encoder"])
  expected = objective.encoder.apply(
    {"params": target},
    models.normalize_images(images, config.data.mean, config.data.std),
  ).mean(axis=1)
  np.testing.assert_allclose(model.encode(images), expected, atol=1e-5)
  assert model.predictor is not None


# Runs of other objectives, of which nothing here knows the name.


def train_steps(objective, folder):
  """A run of two steps on random images: its program, state and images."""
  config = tiny_config()
  config.objective = objective
  config_lib.fill_method(config)
  built = program.build(config, one_device())
  rng = np.random.default_rng(0)
  batch = {
    name: jax.device_put(
      np.ones(spec.shape, spec.dtype)
      if spec.dtype == bool
      else rng.integers(0, 36, spec.shape).astype(spec.dtype),
      spec.sharding,
    )
    for name, spec in built.batch_spec.items()
  }
  state = built.init(5)
  for _ in range(2):
    state = built.step(state, batch)[0]
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  with checkpoints.Checkpoints(
    folder / "checkpoints", config.checkpoint
  ) as saved:
    saved.save(state)
  return built, state, rng.integers(0, 256, (3, 24, 24, 3), np.uint8)


@pytest.fixture(scope="module")
def pixel_run(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pixels")
  return folder, *train_steps("pixel_ijepa", folder)


def test_a_run_that_averages_nothing_loads(pixel_run, caplog):
  folder, built, state, images = pixel_run
  model = jepa_jax.load(folder)
  assert (model.which, set(model.networks)) == (
    "context", {"context", "predictor"}
  )  # fmt: skip
  assert "no target encoder" not in caplog.text
  networks = built.objective.networks
  x = model.preprocessing(images)
  expected = networks["encoder"].apply({"params": state.params["encoder"]}, x)
  np.testing.assert_allclose(
    model.encode(images), expected.mean(axis=1), atol=1e-5
  )
  context_ids, target_ids = np.arange(12).reshape(3, 4), np.arange(15, 21)
  target_ids = np.stack([target_ids, target_ids + 3, target_ids + 9])
  got = model.predict(images, context_ids, target_ids)
  assert got.shape == (3, 1, 1, 6, 4 * 4 * 3)  # pixels of a patch
  context_ids, target_ids = context_ids[:, None], target_ids[:, None]
  context = networks["encoder"].apply(
    {"params": state.params["encoder"]}, x, context_ids
  )
  expected = networks["predictor"].apply(
      {"params": state.params["predictor"]},
      context, context_ids, target_ids, (6, 6),
  )  # fmt: skip
  np.testing.assert_allclose(got, expected, atol=1e-4)


def test_a_run_that_averages_nothing_converts(pixel_run, tmp_path):
  folder, _, state, images = pixel_run
  weights = convert.read(folder)
  convert.write(weights, tmp_path / "all.npz")
  back = convert.read(tmp_path / "all.npz")
  assert_same(back, weights)
  assert same(state.params["predictor"], back.networks["predictor"])
  model = jepa_jax.load(tmp_path / "all.npz")
  ids = np.zeros((3, 2), int)
  np.testing.assert_array_equal(
    model.predict(images, ids, ids + 1),
    jepa_jax.load(folder).predict(images, ids, ids + 1),
  )
  # The default of the command is the encoder that is evaluated.
  run_command(folder, tmp_path / "hugging_face")
  assert_same(convert.read(tmp_path / "hugging_face"), weights.only("context"))
  for name, message in (
    ("p.pth.tar", "encoder's width 28, and this one's are of width 48"),
    ("folder", "holds one encoder, and there are context, predictor"),
  ):
    with pytest.raises(ValueError, match=message):
      convert.write(weights, tmp_path / name)
    assert not (tmp_path / name).exists()
  with pytest.raises(ValueError, match='no "target".*there are: context'):
    convert.read(folder, "target")


def test_a_run_that_averages_nothing_starts_others(pixel_run, fresh):
  folder, built, state, _ = pixel_run
  own = jepa_jax.warm_start(built.init(1), folder, which="all", strict=True)
  assert same(state.params["encoder"], own.params["encoder"])
  assert same(state.params["predictor"], own.params["predictor"])
  # Of an objective with a moving average, both encoders begin there.
  warm = jepa_jax.warm_start(fresh[1], folder)
  for part in (warm.params, warm.target_params):
    assert same(state.params["encoder"], part["encoder"])
  with pytest.raises(ValueError, match=r"project/kernel is \[12, 48\]"):
    jepa_jax.warm_start(fresh[1], folder, which="all")


def test_frozen_networks_and_those_of_no_known_kind(tmp_path):
  built, state, images = train_steps("outside_objective:Outside", tmp_path)
  model = jepa_jax.load(tmp_path)
  assert set(model.networks) == {"context"}
  expected = built.objective.networks["encoder"].apply(
    {"params": state.network("encoder")}, model.preprocessing(images)
  )
  np.testing.assert_allclose(
    model.encode(images), expected.mean(axis=1), atol=1e-5
  )
  frozen = state.replace(
    params={"head": state.params["head"]},
    frozen={"encoder": state.params["encoder"]},
  )
  folder = tmp_path / "frozen"
  config = json.loads((tmp_path / "config.json").read_text())
  folder.mkdir()
  (folder / "config.json").write_text(json.dumps(config))
  with checkpoints.Checkpoints(
    folder / "checkpoints", tiny_config().checkpoint
  ) as saved:
    saved.save(frozen)
  np.testing.assert_array_equal(
    jepa_jax.load(folder).encode(images), model.encode(images)
  )
  fresh = built.init(1)
  fresh = fresh.replace(frozen={"encoder": fresh.params["encoder"]})
  warm = jepa_jax.warm_start(fresh, folder)
  assert same(state.params["encoder"], warm.frozen["encoder"])
  config["objective"] = "test_library:Nothing"
  (folder / "config.json").write_text(json.dumps(config))
  with pytest.raises(ValueError, match='Nothing" has no network "encoder"'):
    jepa_jax.load(folder)


class Nothing(objectives.Objective):
  """An objective without an encoder."""

  networks: typing.ClassVar = {}

  @classmethod
  def from_config(cls, config, kernels=None):
    return cls()

  def batch_spec(self, batch_size):
    return {}

  def init(self, rng):
    return {}

  def loss(self, params, targets, batch, rng, buffers):
    raise NotImplementedError


def test_a_config_of_the_version_before_loads(workdir, tmp_path):  # noqa: F811
  folder, _ = workdir
  old = json.loads((folder / "config.json").read_text())
  old["compute"].update(attention="own", parts=4)
  del old["objective"]
  shutil.copytree(folder / "checkpoints", tmp_path / "checkpoints")
  (tmp_path / "config.json").write_text(json.dumps(old))
  assert_same(convert.read(tmp_path), convert.read(folder))


def test_the_bridge_to_nnx_runs(model, images):
  """The module's docstring shows it; what it shows is what runs."""
  text = pretrained.__doc__.partition("flax.nnx:\n")[2]
  module, params, preprocessing = model
  names = dict(
      jax=jax, module=module, params=params, preprocessing=preprocessing,
      images=images,
  )  # fmt: skip
  exec(textwrap.dedent(text), names)
  expected = module.apply({"params": params}, preprocessing(images))
  np.testing.assert_allclose(names["patches"], expected, atol=1e-5)


def test_an_exported_encoder_needs_nothing_of_ours(model, images, tmp_path):
  model.export(tmp_path / "out", layers=2)
  np.save(tmp_path / "images.npy", images)
  code = textwrap.dedent("""
      import sys
      import jax
      import numpy as np
      exported = jax.export.deserialize(
          open("out/encoder.stablehlo", "rb").read())
      params = dict(np.load("out/encoder.npz"))
      images = np.load("images.npy")
      features = exported.call(params, images)
      assert exported.call(params, images[:1]).shape[0] == 1
      assert not {"jepa_jax", "flax"} & set(sys.modules)
      np.save("features.npy", features)
  """)
  subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)
  features = np.load(tmp_path / "features.npy")
  np.testing.assert_allclose(
    features, model.encode(images, layers=2), atol=1e-4, rtol=1e-4
  )
  with pytest.raises(ValueError, match="exists"):
    model.export(tmp_path / "out")
  for name in ("out", "out/encoder.stablehlo", "out/encoder.npz"):
    with pytest.raises(ValueError, match="read it by jax.export.deserialize"):
      jepa_jax.load(tmp_path / name)


def test_two_devices_share_the_images(exported):
  """And a number of images that they do not divide works too."""
  code = textwrap.dedent("""
      import sys
      import jax
      import numpy as np
      import jepa_jax
      model = jepa_jax.load(sys.argv[1])
      assert len(jax.devices()) == 2
      images = np.random.default_rng(0).integers(
          0, 256, (4, 12, 20, 3), np.uint8)
      both = model.encode(images)
      assert len(both.sharding.device_set) == 2
      one = model.encode(images[:3])
      np.testing.assert_allclose(both[:3], one, atol=1e-4, rtol=1e-4)
      parts = model.encode(images, batch_size=3)
      np.testing.assert_allclose(both, parts, atol=1e-4, rtol=1e-4)
  """)
  flags = "--xla_force_host_platform_device_count=2"
  subprocess.run(
    [sys.executable, "-c", code, str(exported[0])],
    check=True,
    env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
  )


# Warm starts.


@pytest.fixture(scope="module")
def fresh():
  built = program.build(tiny_config(), one_device())
  return built, built.init(0)


def start_weights(*networks, **encoder):
  """Weights that fit the tiny config."""
  return make(
    *networks,
    grid=(6, 6),
    depth=2,
    predictor=dict(width=12, depth=1, num_heads=3, mlp_ratio=4.0),
    **encoder,
  )


def same(one, other):
  return jax.tree.all(
    jax.tree.map(lambda a, b: np.array_equal(a, b), one, dict(other))
  )


@pytest.mark.parametrize("which", ["target", "context", "all"])
def test_warm_start_puts_networks_in_their_places(which, fresh, tmp_path):
  built, state = fresh
  weights = start_weights("target", "context", "predictor")
  convert.write(weights, tmp_path / "w.npz")
  warm = jepa_jax.warm_start(state, tmp_path / "w.npz", which=which)
  online = "context" if which == "all" else which
  target = "target" if which == "all" else which
  networks = weights.networks
  assert same(networks[online], warm.params["encoder"])
  assert same(networks[target], warm.target_params["encoder"])
  predictor = (
    networks["predictor"] if which == "all" else state.params["predictor"]
  )
  assert same(predictor, warm.params["predictor"])
  assert int(warm.step) == 0
  for leaf, spec in zip(
    jax.tree.leaves(warm), jax.tree.leaves(built.state_spec)
  ):
    assert (leaf.shape, leaf.dtype) == (spec.shape, spec.dtype)
    assert leaf.sharding.is_equivalent_to(spec.sharding, leaf.ndim)


def test_weights_with_other_heads_are_refused(fresh, tmp_path, caplog):
  """Their shapes are the same, and what they compute is not."""
  built, state = fresh
  networks = built.objective.networks
  convert.write(start_weights("target", num_heads=4), tmp_path / "w.npz")
  start = functools.partial(
    jepa_jax.warm_start, state, tmp_path / "w.npz", networks=networks
  )
  with pytest.raises(ValueError, match="attention has 4 heads.* network's 7"):
    start()
  kept = start(strict=False)
  assert "leaves as it was" in caplog.text and "4 heads" in caplog.text
  assert same(state.params["encoder"], kept.params["encoder"])
  convert.write(start_weights("target"), tmp_path / "same.npz")
  warm = jepa_jax.warm_start(state, tmp_path / "same.npz", networks=networks)
  assert not same(state.params["encoder"], warm.params["encoder"])


def test_warm_start_is_strict_unless_told(fresh, tmp_path, caplog):
  _, state = fresh
  convert.write(start_weights("target", mlp_ratio=1.0), tmp_path / "w.npz")
  with pytest.raises(ValueError) as caught:
    jepa_jax.warm_start(state, tmp_path / "w.npz")
  message = str(caught.value)
  assert "transformer/blocks/fc1/kernel is [2, 28, 28], not [2, 28, 58]" in (
    message
  )
  assert "init_strict" in message and "\n" not in message
  warm = jepa_jax.warm_start(state, tmp_path / "w.npz", strict=False)
  assert "leaves as it was" in caplog.text and "fc1/kernel" in caplog.text
  fc1 = lambda s: s.params["encoder"]["transformer"]["blocks"]["fc1"]["kernel"]
  np.testing.assert_array_equal(fc1(warm), fc1(state))
  norm = lambda p: p["norm"]["scale"]
  assert not np.array_equal(
    norm(warm.params["encoder"]), norm(state.params["encoder"])
  )
  with pytest.raises(ValueError, match='no "context"'):
    jepa_jax.warm_start(state, tmp_path / "w.npz", which="all")


def test_warm_start_takes_no_foreign_positions(fresh, tmp_path):
  _, state = fresh
  weights = start_weights("target", stored=True)
  convert.write(weights, tmp_path / "far.npz")
  with pytest.raises(ValueError, match="extra: positions"):
    jepa_jax.warm_start(state, tmp_path / "far.npz")
  near = models.sincos_positions((6, 6), 28).astype(jnp.bfloat16)
  weights.networks["target"]["positions"] = near.astype(np.float32)
  convert.write(weights, tmp_path / "near.npz")
  warm = jepa_jax.warm_start(state, tmp_path / "near.npz")
  assert "positions" not in warm.params["encoder"]
