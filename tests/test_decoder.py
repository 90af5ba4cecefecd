"""The decoder: what it decodes, where its networks come from, its samples."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import test_program

import jepa_jax
from jepa_jax import models, objectives
from jepa_jax.convert import runs, warm_start
from jepa_jax.models import flops
from jepa_jax.objectives import decoder
from jepa_jax.pictures import decoders, decoding
from jepa_jax.training import program, workdir

WHOLE = ("target", "prediction")


def objective(condition="prediction", **changes):
  config = test_program.config_of("decoder")
  config.encoder.depth = 1
  config.method.update(condition=condition, **changes)
  return objectives.load("decoder").from_config(config), config


def batch_of(spec):
  rng = np.random.default_rng(0)
  patches = lambda x: np.tile(np.arange(25), (*x.shape[:-1], 1))
  ids = lambda x: rng.permuted(patches(x), axis=-1)[..., : x.shape[-1]]
  makers = {
    "uint8": lambda x: rng.integers(0, 256, x.shape, np.uint8),
    "uint32": lambda x: rng.integers(0, 2**32, x.shape, np.uint32),
    "int32": ids,
    "bool": lambda x: np.arange(x.shape[-1]) < rng.integers(
      2, x.shape[-1] + 1, (*x.shape[:-1], 1)),
  }  # fmt: skip
  return {k: makers[str(x.dtype)](x) for k, x in spec.items()}


@pytest.mark.parametrize(
  "condition",
  ["patch", *(pytest.param(c, marks=pytest.mark.slow) for c in WHOLE)],
)
def test_what_is_decoded_is_what_the_frozen_networks_say(condition):
  of, _ = objective(condition)
  params = jax.jit(of.init)(jax.random.key(1))
  assert {*of.frozen} == {*params} - {"unet"} == {*of.networks} - {"unet"}
  batch = batch_of(of.batch_spec(4))
  found = of.targets(params, batch, {})
  assert found.shape == (4, 28)
  images = models.normalize_images(batch["image"], of.mean, of.std)
  if condition != "prediction":
    features = of.encoder.apply({"params": params["encoder"]}, images)
    if condition == "target":
      np.testing.assert_allclose(found, features.mean(axis=1), atol=1e-5)
    else:  # one of the image's own patches, not the same one of each image
      away = np.abs(features - found[:, None]).max(axis=-1)
      assert away.min(axis=1).max() < 1e-5
      assert len({*away.argmin(axis=1)}) > 1
    return
  context = of.encoder.apply(
    {"params": params["context_encoder"]}, images, batch["context_ids"],
    batch["context_valid"],
  )  # fmt: skip
  predicted = of.predictor.apply(
    {"params": params["predictor"]}, context, batch["context_ids"],
    batch["target_ids"], of.grid, batch["context_valid"],
    batch["target_valid"],
  )[:, 0]  # fmt: skip
  valid = batch["target_valid"][..., None]
  means = (predicted * valid).sum(axis=2) / valid.sum(axis=2)  # [B, M, D]
  away = np.abs(means - found[:, None]).max(axis=-1)
  assert away.min(axis=1).max() < 1e-4 < np.sort(away, axis=1)[:, 1].min()
  assert len({*away.argmin(axis=1)}) > 1  # blocks are drawn by image


class State(dict):
  """Parts of a state as warm_start takes them."""

  __getattr__ = dict.__getitem__

  def replace(self, **parts):
    return State(self | parts)


def test_networks_come_from_a_run_and_are_found_in_the_decoders(monkeypatch):
  of, _ = objective()
  number = iter(range(1, 10**4))  # every array is of another value
  tree = jax.tree.map(
    lambda x: np.full(x.shape, next(number), x.dtype),
    jax.eval_shape(of.init, jax.random.key(2)),
  )
  weights = dict(
    target=tree["encoder"], context=tree["context_encoder"],
    predictor=tree["predictor"],
  )  # fmt: skip

  class Weights:
    networks = weights
    encoder = {"num_heads": 7, "width": 28}
    predictor = {"num_heads": 3}
    grid = (5, 5)

  monkeypatch.setattr(warm_start.formats, "read", lambda *_: Weights())
  blank = jax.tree.map(jnp.zeros_like, tree)
  unet = blank.pop("unet")
  state = State(params={"unet": unet}, target_params={}, frozen=blank)
  filled = warm_start.warm_start(
    state, "a run", which="all", networks=of.networks
  )
  for name, source in (
    ("encoder", "target"),
    ("context_encoder", "context"),
    ("predictor", "predictor"),
  ):
    same = jax.tree.map(np.array_equal, filled.frozen[name], weights[source])
    assert all(jax.tree.leaves(same)), name
  saved = {"params": {"unet": 0}, "target_params": {"unet": 0}}
  saved["frozen"] = dict.fromkeys(of.frozen, 0)
  assert runs._find(saved, "all") == {
    "target": ("frozen", "encoder"),
    "context": ("frozen", "context_encoder"),
    "predictor": ("frozen", "predictor"),
  }
  # A single frozen encoder is not called what it may not be.
  assert runs._find({"frozen": {"encoder": 0}}, None) == {
    "context": ("frozen", "encoder")
  }


def test_moments_standardise_the_representations():
  x = np.random.default_rng(0).normal(3, 2, (500, 4)).astype(np.float32)
  moments = {"mean": x.mean(axis=0), "square": np.square(x).mean(axis=0)}
  found = decoder.standardized(x, moments)
  np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-4)
  np.testing.assert_allclose(found.std(axis=0), 1, atol=1e-3)


@pytest.mark.parametrize("pixels", ["unit", "data"])
def test_images_are_drawn_on_the_scale_that_they_are_learned_on(pixels):
  of, _ = objective(pixels=pixels, image_size=40, patch_size=4)
  images = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), np.uint8)
  drawn = of.drawn(images)
  if pixels == "unit":
    np.testing.assert_allclose(drawn, images / 127.5 - 1, atol=1e-5)
  else:
    again = models.normalize_images(images, of.mean, of.std)
    np.testing.assert_allclose(drawn, again, atol=1e-4)
  # A network that knows the image says its noise; samples are the image.
  mean, std = of.scale
  goal = (images[:1] / 255 - mean) / std
  signal = jnp.asarray(decoder.diffusion.linear_signal(of.steps), jnp.float32)

  class Oracle:
    def apply(self, params, noisy, level, given, known):
      a = signal[level][:, None, None, None]
      return (noisy - jnp.sqrt(a) * goal) / jnp.sqrt(1 - a)

  object.__setattr__(of, "unet", Oracle())
  found = of.samples(
    {}, of.buffers(), None, jax.random.split(jax.random.key(0), 2), steps=3
  )
  np.testing.assert_array_equal(found, np.repeat(images[:1], 2, axis=0))


@pytest.mark.parametrize(
  "stride, padding", [(1, "SAME"), (2, "VALID"), (1, ((2, 0), (0, 1)))]
)
def test_convolutions_are_counted_where_they_meet_pixels(stride, padding):
  image, kernel = np.ones((1, 5, 7, 2)), np.ones((3, 2, 2, 4))
  run = lambda x: jax.lax.conv_general_dilated(
    x, kernel, (stride, stride), padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )  # fmt: skip
  # Of ones, every output is the number of products that made it.
  assert flops.products(run, image) == 2 * int(run(image).sum())
  nested = jax.jit(lambda x: jnp.einsum("nhwc,nhwd->cd", x, x))
  assert flops.products(nested, image) == 2 * 5 * 7 * 2 * 2


def state_and_images(of, count):
  params = jax.jit(of.init)(jax.random.key(1))
  frozen = {name: params.pop(name) for name in of.frozen}
  state = program.TrainState(
    step=0, params=params, target_params={}, opt_state=(), frozen=frozen,
    buffers=of.buffers(),
  )  # fmt: skip
  shape = (count, *of.image_shape)
  return state, np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.slow
@pytest.mark.parametrize("condition", ["patch", "prediction"])
def test_a_sheet_of_samples_names_what_was_drawn(condition):
  of, config = objective(condition, steps=21)
  state, images = state_and_images(of, 4)
  images[3] = images[0]
  found = decoding.decode(
    of, state, images, config.masks, shown=3, samples=2, steps=2
  )
  assert found.samples.shape == (3, 2, *of.size, of.image_shape[-1])
  assert found.samples.dtype == np.uint8
  assert (found.samples[:, 0] != found.samples[:, 1]).any()
  sizes = found.block.sum(axis=(1, 2))
  if condition == "patch":
    assert found.context is None and (sizes == 1).all()
    assert found.nearest[0] == 3  # it has the same patch, and is another image
  else:
    assert (sizes > 1).all() and not (found.block & found.context).any()
  panels = 1 + (condition == "prediction") + 2 + 1
  assert len(decoding.draw(images, found).axes) == 3 * panels
  with pytest.raises(ValueError, match="1 image"):
    decoding.decode(of, state, images[:1])


def test_samples_that_are_the_images_have_their_colours_and_features(
  monkeypatch,
):
  size = objective("patch")[0].image_shape[:2]
  of, _ = objective("patch", image_size=size)
  state, images = state_and_images(of, 8)

  def samples(self, params, buffers, wanted, keys, steps):
    return jnp.asarray(images if wanted is not None else 0 * images)

  monkeypatch.setattr(decoder.Decoder, "samples", samples)
  found = decoding.fidelity(of, state, images)
  assert found["top1"] == found["top5"] == 100
  for distance in found["own"]:
    np.testing.assert_allclose(distance, 0, atol=1e-6)
  # All of black's pixels are in one bin, 1/16 of the images'.
  np.testing.assert_allclose(found["none"][0], 15 / 16, atol=0.03)
  assert (found["none"][1] > 1e-3).all()
  assert "100.0 %" in decoding.in_words(found)
  with pytest.raises(ValueError, match="5 images"):
    decoding.fidelity(of, state, images[:5])


def test_what_draws_is_the_run_of_a_decoder(tmp_path):
  config = test_program.config_of("ijepa")
  (tmp_path / "config.json").write_text(json.dumps(workdir.describe(config)))
  with pytest.raises(ValueError, match='"ijepa", which draws no images'):
    decoders.load(tmp_path)


@pytest.mark.slow
def test_a_file_draws_what_its_run_draws(tmp_path, monkeypatch):
  of, config = objective("target", steps=21)
  state, images = state_and_images(of, 3)
  state = state.replace(target_params={"unet": state.params["unet"]})
  text = json.dumps(workdir.describe(config))
  (tmp_path / "config.json").write_text(text)
  file = tmp_path / "decoder.safetensors"
  with monkeypatch.context() as patch:
    patch.setattr(decoders, "load", lambda *_: (of, state, config.masks))
    decoders.save(tmp_path, file)
  again, found, masks = decoders.load(file)
  assert again == of and masks.to_dict() == config.masks.to_dict()
  draw = lambda *given: decoding.decode(*given, images, samples=1, steps=2)
  a, b = draw(of, state).samples, draw(again, found).samples
  # Half precision moves a pixel by a step or two.
  assert np.abs(a.astype(int) - b).max() <= 3
  with pytest.raises(ValueError, match="is a decoder, for jepa_jax.pictures"):
    jepa_jax.load(file)
  (tmp_path / "damaged.safetensors").write_bytes(file.read_bytes()[:-9])
  with pytest.raises(ValueError, match="is no .safetensors file"):
    decoders.load(tmp_path / "damaged.safetensors")
  for change, words in (
    (lambda c: c.method.update(blocks=3), "other arrays than its config"),
    (lambda c: c.update(objective="ijepa"), "draws no images"),
  ):
    _, other = objective("target", steps=21)
    change(other)
    arrays = safetensors.numpy.load_file(file)
    other = json.dumps(workdir.describe(other))
    safetensors.numpy.save_file(arrays, file, {"config": other})
    with pytest.raises(ValueError, match=words):
      decoders.load(file)
