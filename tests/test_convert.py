"""Conversion: exact round trips, strictness, refusals, foreign features."""

import json
import os
import pickle
import subprocess
import sys

import jax
import ml_collections
import numpy as np
import pytest
import safetensors.numpy

from jepa_jax import config as config_lib
from jepa_jax import convert, models
from jepa_jax.convert import __main__ as command_line
from jepa_jax.convert import positions as positions_lib
from jepa_jax.convert import table
from jepa_jax.convert import weights as weights_lib
from jepa_jax.training import checkpoints, program, sharding

GRID = (3, 5)


PREDICTOR = dict(width=12, depth=2, num_heads=3, mlp_ratio=2.0)


def make(
  *networks, grid=GRID, stored=False, seed=0, predictor=PREDICTOR, **encoder
):
  """Weights of random numbers; sizes all differ."""
  settings = dict(
      width=28, depth=3, num_heads=7, patch_size=4, mlp_ratio=58 / 28,
      norm_epsilon=1e-6, position_grid=grid if stored else None,
  ) | encoder  # fmt: skip
  weights = convert.Weights(
    networks={},
    encoder=settings,
    predictor=dict(predictor) if "predictor" in networks else None,
    image_size=tuple(side * settings["patch_size"] for side in grid),
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.5, 0.6),
  )
  rng = np.random.default_rng(seed)
  for name in networks:
    weights.networks[name] = jax.tree.map(
      lambda s: rng.normal(size=s.shape).astype(np.float32),
      weights_lib.abstract(weights, name),
    )
  return weights


def same_arrays(one, other):
  return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def assert_same(one, other):
  assert jax.tree.structure(one.networks) == jax.tree.structure(other.networks)
  assert same_arrays(one.networks, other.networks)
  assert one.describe() == other.describe()


def run(*arguments):
  """The command, without its process."""
  return command_line.main(
    command_line.parser().parse_args([str(a) for a in arguments])
  )


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("name", ["e.npz", "e.safetensors", "folder"])
def test_round_trips_are_exact(name, stored, tmp_path):
  weights = make("target", stored=stored)
  convert.write(weights, tmp_path / "first" / name)
  run(tmp_path / "first" / name, tmp_path / "second.npz")
  run(tmp_path / "second.npz", tmp_path / name)
  assert_same(convert.read(tmp_path / name), weights)
  if name == "folder":
    first, second = (
      (folder / "folder" / "model.safetensors").read_bytes()
      for folder in (tmp_path / "first", tmp_path)
    )
    assert first == second


def test_an_export_keeps_all_networks_and_gives_one(tmp_path):
  weights = make("target", "context", "predictor")
  convert.write(weights, tmp_path / "all.npz")
  assert_same(convert.read(tmp_path / "all.npz"), weights)
  run(tmp_path / "all.npz", tmp_path / "one.safetensors")
  assert_same(
    convert.read(tmp_path / "one.safetensors"), weights.only("target")
  )
  with pytest.raises(ValueError, match='no "context".*there are: target'):
    convert.read(tmp_path / "one.safetensors", "context")
  with pytest.raises(ValueError, match="holds one encoder"):
    convert.write(weights, tmp_path / "folder")
  assert sorted(p.name for p in tmp_path.iterdir()) == [
      "all.npz", "one.safetensors",
  ]  # fmt: skip


def test_an_export_is_plain_numpy(tmp_path):
  weights = make("target")
  convert.write(weights, tmp_path / "e.npz")
  with np.load(tmp_path / "e.npz", allow_pickle=False) as archive:
    settings = json.loads(str(archive["config"]))
    assert settings["encoder"]["width"] == 28
    assert settings["image_size"] == [12, 20]
    np.testing.assert_array_equal(
      archive["target/norm/scale"],
      weights.networks["target"]["norm"]["scale"],
    )


@pytest.mark.parametrize(
  ("rows", "network"),
  [
    (table.RELEASED_ENCODER, "target"),
    (table.RELEASED_PREDICTOR, "predictor"),
    (table.HUGGING_FACE_ENCODER, "target"),
  ],
)
def test_tables_name_every_parameter_once(rows, network):
  weights = make(network)
  params = positions_lib.with_positions(weights, network)
  paths = [f"{network}/{row.path}" for row in rows]
  assert sorted(paths) == sorted(weights_lib.flatten(network, params))
  keys = [key for key, _ in table.to_foreign(params, rows, 4)]
  assert len(keys) == len(set(keys))


def test_a_convolution_of_the_kernel_is_the_patch_embedding():
  rng = np.random.default_rng(0)
  images = rng.normal(size=(2, 12, 20, 3)).astype(np.float32)
  kernel = rng.normal(size=(4 * 4 * 3, 28)).astype(np.float32)
  foreign = table.PATCHES.to_foreign(kernel, 4)  # [D, C, patch, patch]
  ours = models.patchify(images, 4) @ kernel
  for i, j in np.ndindex(*GRID):
    patch = images[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
    theirs = np.einsum("bhwc,dchw->bd", patch, foreign)
    np.testing.assert_allclose(ours[:, 5 * i + j], theirs, rtol=2e-4, atol=2e-4)


def hugging_face_folder(tmp_path, change=None, **config):
  """A folder as published ones are: without a word on which encoder it is."""
  folder = tmp_path / "published"
  convert.write(make("target"), folder)
  settings = json.loads((folder / "config.json").read_text())
  del settings["jepa_jax_encoder"]
  (folder / "config.json").write_text(json.dumps(settings | config))
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  if change is not None:
    change(arrays)
  safetensors.numpy.save_file(arrays, folder / "model.safetensors")
  return folder


def test_published_folders_hold_the_context_encoder(tmp_path, caplog):
  folder = hugging_face_folder(tmp_path)
  run(folder, tmp_path / "e.npz")
  assert "context encoder" in caplog.text
  assert list(convert.read(tmp_path / "e.npz").networks) == ["context"]
  # Who knows better may say so.
  run(folder, tmp_path / "t.npz", "--which", "target")
  assert list(convert.read(tmp_path / "t.npz").networks) == ["target"]


def test_folders_in_parts_and_in_half_precision(tmp_path):
  half = lambda arrays: arrays.update(
    {k: x.astype(jax.numpy.bfloat16) for k, x in arrays.items()}
  )
  folder = hugging_face_folder(tmp_path, half)
  arrays = safetensors.numpy.load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  for i, part in enumerate((list(arrays)[:9], list(arrays)[9:])):
    safetensors.numpy.save_file(
      {key: arrays[key] for key in part},
      folder / f"model-0000{i + 1}-of-00002.safetensors",
    )
  found = convert.read(folder)
  expected = make("target").networks["target"]["norm"]["scale"]
  np.testing.assert_array_equal(
    found.networks["context"]["norm"]["scale"],
    expected.astype(jax.numpy.bfloat16).astype(np.float32),
  )
  # Rounded positions are no longer the computed ones, so they are kept.
  assert found.encoder["position_grid"] == GRID


def test_all_wrong_keys_are_listed_and_nothing_is_written(tmp_path):
  def change(arrays):
    del arrays["layernorm.bias"]
    del arrays["encoder.layer.1.attention.attention.key.weight"]
    arrays["classifier.weight"] = np.zeros((2, 28), np.float32)
    arrays["encoder.layer.2.output.dense.bias"] = np.zeros(27, np.float32)

  folder = hugging_face_folder(tmp_path, change)
  with pytest.raises(ValueError) as caught:
    run(folder, tmp_path / "e.npz")
  assert str(caught.value) == (
    f"{folder}: missing: encoder.layer.1.attention.attention.key.weight, "
    "layernorm.bias; extra: classifier.weight; misshapen: "
    "encoder.layer.2.output.dense.bias is [27], not [28]"
  )
  assert [p.name for p in tmp_path.iterdir()] == ["published"]


def test_a_classifier_gives_its_encoder_and_says_what_is_left(tmp_path, caplog):
  def change(arrays):
    for key in list(arrays):
      arrays[f"ijepa.{key}"] = arrays.pop(key)
    arrays["classifier.weight"] = np.zeros((2, 28), np.float32)
    arrays["classifier.bias"] = np.zeros(2, np.float32)

  architectures = ["IJepaForImageClassification"]
  folder = hugging_face_folder(tmp_path, change, architectures=architectures)
  found = convert.read(folder)
  assert same_arrays(
    found.networks["context"], make("target").networks["target"]
  )
  assert caplog.text.count("left out: classifier.bias, classifier.weight") == 1


def test_other_heads_than_a_file_has_are_refused(tmp_path):
  convert.write(make("target", "predictor"), tmp_path / "e.npz")
  with pytest.raises(ValueError, match="4 heads were asked.*settings have 7"):
    convert.read(tmp_path / "e.npz", num_heads=4)
  with pytest.raises(ValueError, match="4 heads were asked.*settings have 3"):
    convert.read(tmp_path / "e.npz", num_heads=7, predictor_heads=4)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (dict(hidden_act="relu"), "hidden_act is 'relu'.*only 'gelu'"),
    (dict(qkv_bias=False), "qkv_bias is False"),
    (dict(model_type="vit"), "model_type is 'vit'.*only 'ijepa'"),
    (dict(patch_size=[4, 2]), "not square"),
    (dict(num_hidden_layers=4), "missing: encoder.layer.3"),
    (dict(hidden_size="x"), "config.json"),
    (dict(hidden_size=2**30), "encoder.width is 1073741824"),
    (dict(num_hidden_layers=10**8), "encoder.depth is 100000000"),
    (dict(image_size=8_000_000), r"image_size\[0\] is 8000000"),
    (dict(image_size=[16_384, 4096]), "4194304 patches"),
    (dict(image_size=[12, 20, 28]), "config.json"),
    (dict(image_size=2**61 - 1), "not a multiple of patch size 4"),
    (dict(num_attention_heads=0), "encoder.num_heads is 0"),
    (dict(num_attention_heads=5), "not a multiple of 5 heads"),
    (dict(patch_size=0), "patch size 0"),
    (dict(layer_norm_eps=float("nan")), "encoder.norm_epsilon is nan"),
    (dict(num_channels=10**9), "channels is 1000000000"),
    (dict(num_channels=1), "misshapen: embeddings.patch_embeddings"),
    (dict(jepa_jax_encoder=["target"]), "which is no encoder"),
  ],
)
def test_foreign_settings_are_refused(config, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    convert.read(hugging_face_folder(tmp_path, **config))


class Code:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self.path = str(path)

  def __reduce__(self):
    return open, (self.path, "w")


def _npz(path, **arrays):
  np.savez(path, **arrays)
  return path


def _truncated(path):
  convert.write(make("target"), path)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) * 2 // 3])
  return path


def _renamed(source, path):
  convert.write(make("target"), source)
  return source.rename(path)


def _pickle(path):
  path.write_bytes(pickle.dumps({"encoder": Code(path.parent / "ran")}))
  return path


def _hidden_pickle(path):
  data = np.empty((), object)
  data[()] = Code(path.parent / "ran")
  return _npz(path, config=data)


def _changed(path, change):
  convert.write(make("target"), path)
  with np.load(path) as archive:
    arrays = dict(archive)
  change(arrays)
  return _npz(path, **arrays)


def _folder(path, **files):
  path.mkdir()
  for name, content in files.items():
    (path / name).write_text(content)
  return path


REFUSED = {
    "absent": (lambda d: d / "x.npz", "no file or folder"),
    "unknown suffix": (
        lambda d: _renamed(d / "e.npz", d / "e.bin"), "no known suffix"),
    "truncated npz": (lambda d: _truncated(d / "e.npz"), "damaged"),
    "truncated safetensors": (
        lambda d: _truncated(d / "e.safetensors"), "damaged"),
    "renamed npz": (
        lambda d: _renamed(d / "e.npz", d / "e.safetensors"), "damaged"),
    "renamed safetensors": (
        lambda d: _renamed(d / "e.safetensors", d / "e.npz"), "pickled"),
    "empty": (lambda d: d.joinpath("e.npz").write_bytes(b"") and None
              or d / "e.npz", "damaged"),
    "pickle": (lambda d: _pickle(d / "e.npz"), "pickled"),
    "pickle inside": (lambda d: _hidden_pickle(d / "e.npz"), "pickled"),
    "other npz": (lambda d: _npz(d / "e.npz", a=np.ones(2)), 'no "config"'),
    "other config": (
        lambda d: _npz(d / "e.npz", config=np.array("{}")), "settings"),
    "missing, extra": (
        lambda d: _changed(d / "e.npz", lambda a: a.update(
            {"target/norm/gamma": a.pop("target/norm/scale")})),
        "missing: target/norm/scale; extra: target/norm/gamma"),
    "misshapen": (
        lambda d: _changed(d / "e.npz", lambda a: a.update(
            {"target/norm/scale": np.ones(27, np.float32)})),
        r"target/norm/scale is \[27\], not \[28\]"),
    "network lost": (
        lambda d: _changed(d / "e.npz", lambda a: [
            a.pop(k) for k in list(a) if k.startswith("target")]),
        "missing: target/norm/bias, target/norm/scale, target/patch_embed"),
    "empty folder": (lambda d: _folder(d / "f"), "neither a run"),
    "folder of pickles": (
        lambda d: _folder(d / "f", **{
            "config.json": "{}", "pytorch_model.bin": ""}),
        "may carry code"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_safely_is_refused_in_one_line(case, tmp_path):
  make_file, message = REFUSED[case]
  path = make_file(tmp_path)
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(ValueError, match=message) as caught:
    run(path, tmp_path / "out.npz", "--which", "all")
  assert str(path) in str(caught.value)
  assert "\n" not in str(caught.value)
  assert sorted(tmp_path.rglob("*")) == before  # nothing written, no code run


def test_the_command_ends_in_one_line(tmp_path):
  ended = subprocess.run(
    [sys.executable, "-m", "jepa_jax.convert", "absent.npz", "out.npz"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 2
  assert ended.stderr == (
    "ValueError: there is no file or folder absent.npz.\n"
  )


def test_nothing_is_overwritten(tmp_path):
  convert.write(make("target"), tmp_path / "e.npz")
  before = (tmp_path / "e.npz").read_bytes()
  with pytest.raises(ValueError, match="exists"):
    convert.write(make("target", seed=1), tmp_path / "e.npz")
  assert (tmp_path / "e.npz").read_bytes() == before


def test_half_a_network_is_not_written(tmp_path):
  weights = make("target")
  del weights.networks["target"]["norm"]["scale"]
  with pytest.raises(ValueError, match="missing: target/norm/scale"):
    convert.write(weights, tmp_path / "e.npz")
  assert not list(tmp_path.iterdir())


def test_positions_are_recomputed_unless_asked_otherwise(tmp_path):
  weights = make("target")
  convert.write(weights, tmp_path / "e.npz")
  run(tmp_path / "e.npz", tmp_path / "r.npz", "--image_size", 16, 24)
  found = convert.read(tmp_path / "r.npz")
  assert found.encoder["position_grid"] is None
  assert found.image_size == (16, 24)
  run(tmp_path / "e.npz", tmp_path / "b.npz", "--image_size", 16, 24,
      "--positions", "bicubic")  # fmt: skip
  found = convert.read(tmp_path / "b.npz")
  positions = found.networks["target"]["positions"]
  assert found.encoder["position_grid"] == (4, 6)
  assert positions.shape == (24, 28)
  recomputed = models.sincos_positions((4, 6), 28)
  assert np.abs(positions - recomputed).max() > 0.1  # they are not the same
  with pytest.raises(ValueError, match="would lose them"):
    convert.resize(found, (12, 12))
  with pytest.raises(ValueError, match="multiple of patch size"):
    convert.resize(weights, (13, 20))


def test_bicubic_interpolation_keeps_what_it_has_to():
  positions = np.random.default_rng(0).normal(size=(15, 6)).astype(np.float32)
  np.testing.assert_allclose(
    positions_lib.bicubic(positions, GRID, GRID), positions, atol=1e-6
  )
  flat = positions_lib.bicubic(np.ones((15, 2), np.float32), GRID, (7, 4))
  np.testing.assert_allclose(flat, np.ones((28, 2)), atol=1e-6)
  # The kernel at 1.75, 1.25, 0.75 and 0.25, from its formula.
  half = [-0.03515625, -0.10546875, 0.26171875, 0.87890625]
  point = np.eye(8, dtype=np.float32)[4][:, None]
  twice = positions_lib.bicubic(point, (8, 1), (16, 1))[:, 0]
  np.testing.assert_array_equal(twice[5:13], half + half[::-1])


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A run with checkpoints of steps 0 and 7, as training writes them."""
  folder = tmp_path_factory.mktemp("run")
  config = tiny_config()
  state = program.build(config, one_device()).init(3)
  (folder / "config.json").write_text(json.dumps(config.to_dict()))
  with checkpoints.Checkpoints(
    folder / "checkpoints", config.checkpoint
  ) as saved:
    saved.save(state)
    saved.save(
      state.replace(
        step=state.step + 7,
        target_params=jax.tree.map(lambda x: 2 * x, state.target_params),
      )
    )
    saved.wait()
  return folder, state


def one_device():
  axes = ml_collections.ConfigDict({"data": 1, "fsdp": 1})
  return sharding.make_mesh(axes, jax.devices()[:1])


def tiny_config():
  config = config_lib.defaults()
  config.batch_size = 2
  config.total = "9 steps"
  config.optimizer.warmup = "1 steps"
  config.data.image_size = 24
  config.encoder.update(width=28, depth=2, num_heads=7, patch_size=4,
                        mlp_ratio=58 / 28)  # fmt: skip
  config.predictor.update(width=12, depth=1, num_heads=3)
  config.masks.min_keep = 1
  config.compute.dtype = "float32"
  return config


def test_a_run_is_read_without_its_optimizer(workdir, tmp_path):
  folder, state = workdir
  found = convert.read(folder)
  assert set(found.networks) == {"target", "context", "predictor"}
  scale = np.asarray(state.params["encoder"]["patch_embed"]["kernel"])
  read = lambda w, name: w.networks[name]["patch_embed"]["kernel"]
  np.testing.assert_array_equal(read(found, "target"), 2 * scale)
  np.testing.assert_array_equal(read(found, "context"), scale)
  first = convert.read(folder, "target", step=0)
  np.testing.assert_array_equal(read(first, "target"), scale)
  assert list(first.networks) == ["target"]
  assert_same(convert.read(folder / "checkpoints" / "0", "target"), first)
  run(folder, tmp_path / "hugging_face")
  assert_same(convert.read(tmp_path / "hugging_face"), found.only("target"))
  with pytest.raises(ValueError, match="of step 5; there are: 0, 7"):
    convert.read(folder, step=5)


# What needs PyTorch.


def released_networks(**changes):
  """The released model, written down in PyTorch, of random weights."""
  import test_parity
  import torch

  meta = test_parity.SETTINGS | changes
  torch.manual_seed(0)
  networks = dict(zip(("encoder", "predictor"), test_parity.networks(meta)))
  networks["target_encoder"] = test_parity.networks(meta)[0]
  return networks


def released_checkpoint(path, prefix="module.", change=None):
  import torch

  networks = released_networks()
  checkpoint = {
    name: {prefix + k: v for k, v in network.state_dict().items()}
    for name, network in networks.items()
  }
  checkpoint |= {"opt": {"state": {}}, "scaler": None, "epoch": 300,
                 "loss": np.float64(0.1), "lr": 1e-6}  # fmt: skip
  if change is not None:
    change(checkpoint)
  torch.save(checkpoint, path)
  return networks


@pytest.mark.torch
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
  ("which", "name"), [("target", "target_encoder"), ("context", "encoder")]
)
def test_released_checkpoints_give_their_features(
  prefix, which, name, tmp_path
):
  import torch

  networks = released_checkpoint(tmp_path / "c.pth.tar", prefix)
  flags = ["--num_heads", 3] + (["--which", which] if which != "target" else [])
  run(tmp_path / "c.pth.tar", tmp_path / "e.npz", *flags)
  weights = convert.read(tmp_path / "e.npz")
  assert list(weights.networks) == [which]
  assert weights.encoder["position_grid"] is None  # they are the computed ones
  images = np.random.default_rng(0).normal(size=(2, 20, 20, 3))
  ours = weights.module(which).apply(
    {"params": weights.networks[which]}, images.astype(np.float32)
  )
  with torch.no_grad():
    theirs = networks[name](torch.tensor(images).permute(0, 3, 1, 2).float())
  np.testing.assert_allclose(ours, theirs.numpy(), atol=2e-5)


@pytest.mark.torch
def test_released_checkpoints_round_trip(tmp_path):
  import torch

  networks = released_checkpoint(tmp_path / "c.pth.tar")
  heads = ("--num_heads", 3, "--predictor_heads", 2)
  run(tmp_path / "c.pth.tar", tmp_path / "e.npz", "--which", "all", *heads)
  assert convert.read(tmp_path / "e.npz").predictor["num_heads"] == 2
  run(tmp_path / "e.npz", tmp_path / "back.pth.tar", "--which", "all",
      "--prefix", "module.")  # fmt: skip
  back = torch.load(tmp_path / "back.pth.tar", weights_only=True)
  assert set(back) == set(networks)
  for name, network in networks.items():
    state = network.state_dict()
    assert set(back[name]) == {f"module.{key}" for key in state}
    for key, value in state.items():
      assert torch.equal(back[name][f"module.{key}"], value), key


def _change_keys(checkpoint):
  target = checkpoint["target_encoder"]
  weight = target.pop("module.blocks.0.attn.qkv.weight")
  target["module.blocks.0.attn.q"] = weight
  target["module.norm.weight"] = target["module.norm.weight"][:-1]


REFUSED_BY_TORCH = {
    "code": (
        lambda path: released_checkpoint(
            path, change=lambda c: c.update(extra=Code(path.parent / "ran"))),
        r"wants to run code \((io|builtins|_io)\.open\)"),
    "wrong keys": (
        lambda path: released_checkpoint(path, change=_change_keys),
        r"target_encoder: missing: blocks.0.attn.qkv.weight; extra: "
        r"blocks.0.attn.q; misshapen: norm.weight is \[23\], not \[24\]"),
    "no target": (
        lambda path: released_checkpoint(
            path, change=lambda c: c.pop("target_encoder")),
        'no "target_encoder"; its keys: encoder, predictor, opt'),
    "another model": (
        lambda path: released_checkpoint(
            path, change=lambda c: c.update(target_encoder={"a": c["lr"]})),
        "no key starts with blocks.0"),
    "export": (
        lambda path: (convert.write(make("target"), path.with_name("e.npz")),
                      os.rename(path.with_name("e.npz"), path)),
        "damaged or something else"),
    "truncated": (
        lambda path: (released_checkpoint(path),
                      path.write_bytes(path.read_bytes()[:-9000])),
        "damaged or something else"),
    "text": (lambda path: path.write_text("hello"), "something else"),
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("case", REFUSED_BY_TORCH)
def test_bad_checkpoints_are_refused_in_one_line(case, tmp_path):
  make_file, message = REFUSED_BY_TORCH[case]
  path = tmp_path / "c.pth.tar"
  make_file(path)
  with pytest.raises(ValueError, match=message) as caught:
    run(path, tmp_path / "e.npz", "--num_heads", 3)
  assert "\n" not in str(caught.value)
  assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.torch
def test_an_unknown_size_needs_its_heads(tmp_path):
  released_checkpoint(tmp_path / "c.pth.tar")
  with pytest.raises(ValueError, match="width 24 and depth 2.*--num_heads"):
    convert.read(tmp_path / "c.pth.tar")


@pytest.mark.torch
@pytest.mark.parametrize("epsilon", [1e-6, 1e-12])
def test_hugging_face_models_give_their_features(epsilon, tmp_path):
  torch, transformers = (
    pytest.importorskip("torch"),
    pytest.importorskip("transformers"),
  )
  torch.manual_seed(0)
  config = transformers.IJepaConfig(
      hidden_size=28, num_hidden_layers=2, num_attention_heads=7,
      intermediate_size=58, image_size=(12, 20), patch_size=4,
      layer_norm_eps=epsilon,
  )  # fmt: skip
  theirs = transformers.IJepaModel(config).eval()
  theirs.save_pretrained(tmp_path / "theirs")
  run(tmp_path / "theirs", tmp_path / "e.npz")
  weights = convert.read(tmp_path / "e.npz")
  images = np.random.default_rng(0).normal(size=(2, 12, 20, 3))
  images = images.astype(np.float32)
  pixels = torch.tensor(images).permute(0, 3, 1, 2)
  ours = weights.module("context").apply(
    {"params": weights.networks["context"]}, images
  )
  with torch.no_grad():
    expected = theirs(pixels).last_hidden_state.numpy()
  np.testing.assert_allclose(ours, expected, atol=2e-5)

  run(tmp_path / "e.npz", tmp_path / "ours", "--which", "context")
  before, after = (
    safetensors.numpy.load_file(tmp_path / name / "model.safetensors")
    for name in ("theirs", "ours")
  )
  assert before.keys() == after.keys()
  for key in before:
    np.testing.assert_array_equal(before[key], after[key])


@pytest.mark.torch
def test_transformers_loads_our_encoder(tmp_path):
  torch, transformers = (
    pytest.importorskip("torch"),
    pytest.importorskip("transformers"),
  )
  weights = make("target", grid=(5, 5))
  convert.write(weights, tmp_path / "ours")
  theirs, loading = transformers.IJepaModel.from_pretrained(
    tmp_path / "ours", output_loading_info=True
  )
  assert not any(loading.values()), loading
  images = np.random.default_rng(0).normal(size=(2, 20, 20, 3))
  images = images.astype(np.float32)
  ours = weights.module("target").apply(
    {"params": weights.networks["target"]}, images
  )
  with torch.no_grad():
    expected = theirs.eval()(
      torch.tensor(images).permute(0, 3, 1, 2)
    ).last_hidden_state.numpy()
  error = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
  assert error < 1e-5


@pytest.mark.torch
@pytest.mark.parametrize("new", [(6, 10), (2, 3), (7, 5), (3, 11)])
def test_bicubic_interpolation_is_that_of_pytorch(new):
  torch = pytest.importorskip("torch")
  positions = np.random.default_rng(0).normal(size=(15, 6)).astype(np.float32)
  theirs = torch.nn.functional.interpolate(
    torch.tensor(positions).reshape(1, *GRID, 6).permute(0, 3, 1, 2),
    size=new,
    mode="bicubic",
    align_corners=False,
  ).permute(0, 2, 3, 1)
  np.testing.assert_allclose(
    positions_lib.bicubic(positions, GRID, new),
    theirs.reshape(-1, 6).numpy(),
    atol=1e-5,
  )


def with_tokens(**tokens):
  """Weights of an encoder that sees more tokens than patches."""
  weights = make("target", class_token=True, registers=3)
  target = weights.networks["target"]
  assert target["class_token"].shape == (1, 1, 28)
  assert target["registers"].shape == (1, 3, 28)
  target |= {name: np.full((1, 1, 28), 0.5, np.float32) for name in tokens}
  return weights


@pytest.mark.parametrize("tokens", [{}, {"mask_token": True}])
@pytest.mark.parametrize("name", ["e.npz", "e.safetensors"])
def test_tokens_beside_the_patches_are_kept(name, tokens, tmp_path):
  weights = with_tokens(**tokens)
  convert.write(weights, tmp_path / name)
  back = convert.read(tmp_path / name)
  assert_same(back, weights)
  assert back.module("target").registers == 3
  images = np.random.default_rng(0).normal(size=(2, 12, 20, 3))
  y = back.module("target").apply(
    {"params": back.networks["target"]}, images.astype(np.float32)
  )
  assert y.shape == (2, 15, 28)  # of patches alone


def test_other_formats_have_no_such_tokens(tmp_path):
  weights = with_tokens()
  with pytest.raises(ValueError, match="class_token and registers.* lacks"):
    convert.write(weights, tmp_path / "folder")
  assert not list(tmp_path.iterdir())


def test_a_run_with_tokens_loads(tmp_path):
  config = tiny_config()
  config.encoder.update(class_token=True, registers=2)
  state = program.build(config, one_device()).init(3)
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  with checkpoints.Checkpoints(
    tmp_path / "checkpoints", config.checkpoint
  ) as saved:
    saved.save(state)
  found = convert.read(tmp_path)
  assert found.encoder["registers"] == 2
  np.testing.assert_array_equal(
    found.networks["context"]["registers"], state.params["encoder"]["registers"]
  )
