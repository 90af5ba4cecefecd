"""MAE and data2vec against transformers, on random weights."""

from conftest import small_config
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import config as config_lib
from jepa_jax import models, objectives
from jepa_jax.objectives import mae

pytestmark = pytest.mark.torch

SIDE, PATCH, N = 20, 4, 25


def randomised(model):
  """Their parameters as NumPy arrays, all of them random."""
  import torch

  generator = torch.Generator().manual_seed(0)
  for name, x in model.named_parameters():
    if "pos" not in name:
      scale = 0.2 if x.ndim > 1 else 0.3
      offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
      noise = torch.randn(x.shape, generator=generator)
      x.data.copy_(offset + scale * noise)
  return {k: x.detach().numpy() for k, x in model.named_parameters()}


def dense(theirs, name):
  """A linear layer, whose kernels are the other way round there."""
  found = {"kernel": theirs[f"{name}.weight"].T}
  width = found["kernel"].shape[1]
  found["bias"] = theirs.get(f"{name}.bias", np.zeros(width, np.float32))
  return found


def norm(theirs, name):
  return {"scale": theirs[f"{name}.weight"], "bias": theirs[f"{name}.bias"]}


def blocks(theirs, names, depth):
  """Stacked blocks, [L, ...]."""
  each = []
  for i in range(depth):
    n = {key: name.format(i) for key, name in names.items()}
    qkv = [dense(theirs, n[key]) for key in "qkv"]
    joined = {
      part: np.concatenate([x[part] for x in qkv], axis=-1)
      for part in ("kernel", "bias")
    }
    block = {"qkv": joined}
    block |= {k: dense(theirs, n[k]) for k in ("out", "fc1", "fc2")}
    block |= {k: norm(theirs, n[k]) for k in ("norm1", "norm2")}
    each.append(block)
  return {"blocks": jax.tree.map(lambda *x: np.stack(x), *each)}


def patch_embed(theirs, name):
  """[D, C, p, q] -> [p * q * C, D]."""
  kernel = theirs[f"{name}.weight"].transpose(2, 3, 1, 0)
  return {
    "kernel": kernel.reshape(-1, kernel.shape[-1]),
    "bias": theirs[f"{name}.bias"],
  }


def config_of(name, **method):
  config = small_config()
  config.objective = name
  config_lib.fill_method(config)
  config.method.update(method)
  config.data.image_size = SIDE
  config.data.mean, config.data.std = (0.5,) * 3, (0.25,) * 3
  config.encoder.update(width=28, depth=3, num_heads=7, mlp_ratio=2.0)
  config.encoder.update(patch_size=PATCH, class_token=True)
  config.predictor.update(width=24, depth=2, num_heads=3, mlp_ratio=3.0)
  config.loss = "l2"
  return config


def place(parameter):
  """Fills in the positions; a class token has none."""
  import torch

  table = models.sincos_positions((5, 5), parameter.shape[-1])
  table = np.pad(table, ((1, 0), (0, 0)))
  parameter.data.copy_(torch.tensor(table)[None])


def pixels():
  return np.random.default_rng(0).integers(
    0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8
  )


def as_theirs(images):
  import torch

  x = (images / np.float32(255) - 0.5) / 0.25
  return torch.tensor(x, dtype=torch.float32).permute(0, 3, 1, 2)


def test_mae():
  import torch
  import transformers

  theirs = transformers.ViTMAEForPreTraining(
    transformers.ViTMAEConfig(
      hidden_size=28, num_hidden_layers=3, num_attention_heads=7,
      intermediate_size=56, decoder_hidden_size=24, decoder_num_hidden_layers=2,
      decoder_num_attention_heads=3, decoder_intermediate_size=72,
      image_size=SIDE, patch_size=PATCH, norm_pix_loss=True,
      layer_norm_eps=1e-6, mask_ratio=0.6,
    )
  ).eval()  # fmt: skip
  place(theirs.vit.embeddings.position_embeddings)
  place(theirs.decoder.decoder_pos_embed)
  table = randomised(theirs)
  names = lambda start: {
    **{k: f"{start}.{{}}.attention.{k}_proj" for k in "qkv"},
    "out": f"{start}.{{}}.attention.o_proj",
    "fc1": f"{start}.{{}}.mlp.fc1",
    "fc2": f"{start}.{{}}.mlp.fc2",
    "norm1": f"{start}.{{}}.layernorm_before",
    "norm2": f"{start}.{{}}.layernorm_after",
  }
  config = config_of("mae")
  objective = objectives.load("mae").from_config(config)
  assert isinstance(objective, mae.MAE)
  params = {
    "encoder": {
      "class_token": table["vit.embeddings.cls_token"],
      "patch_embed": patch_embed(
        table, "vit.embeddings.patch_embeddings.projection"
      ),
      "transformer": blocks(table, names("vit.layers"), 3),
      "norm": norm(table, "vit.layernorm"),
    },
    "predictor": {
      "embed": dense(table, "decoder.decoder_embed"),
      "mask_token": table["decoder.mask_token"],
      "transformer": blocks(table, names("decoder.decoder_layers"), 2),
      "norm": norm(table, "decoder.decoder_norm"),
      "project": dense(table, "decoder.decoder_pred"),
    },
  }
  assert shapes(params) == shapes(objective.init(jax.random.key(0)))
  noise = np.random.default_rng(1).random((2, N)).astype(np.float32)
  order = np.argsort(noise, axis=1)
  batch = {
    "image": pixels(),
    "context_ids": jnp.asarray(order[:, None, :10]),
    "target_ids": jnp.asarray(order[:, None, 10:]),
  }
  with torch.no_grad():
    expected = theirs(as_theirs(pixels()), noise=torch.tensor(noise)).loss
  targets = objective.targets({}, batch, {})
  loss = objective.loss(params, targets, batch, jax.random.key(0), {})
  np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-4)


def test_data2vec():
  import torch
  import transformers

  config = config_of("data2vec", layers=2, beta=0.5)
  objective = objectives.load("data2vec").from_config(config)
  theirs = transformers.Data2VecVisionModel(
    transformers.Data2VecVisionConfig(
      hidden_size=28, num_hidden_layers=3, num_attention_heads=7,
      intermediate_size=56, image_size=SIDE, patch_size=PATCH,
      layer_norm_eps=1e-6, layer_scale_init_value=0.0, drop_path_rate=0.0,
      use_mask_token=True, use_absolute_position_embeddings=True,
      use_mean_pooling=False,
    ),
    add_pooling_layer=False,
  ).eval()  # fmt: skip
  place(theirs.embeddings.position_embeddings)
  table = randomised(theirs)
  start = "encoder.layer.{}"
  names = {
    "q": f"{start}.attention.attention.query",
    "k": f"{start}.attention.attention.key",
    "v": f"{start}.attention.attention.value",
    "out": f"{start}.attention.output.dense",
    "fc1": f"{start}.intermediate.dense",
    "fc2": f"{start}.output.dense",
    "norm1": f"{start}.layernorm_before",
    "norm2": f"{start}.layernorm_after",
  }
  encoder = {
    "class_token": table["embeddings.cls_token"],
    "mask_token": table["embeddings.mask_token"],
    "patch_embed": patch_embed(table, "embeddings.patch_embeddings.projection"),
    "transformer": blocks(table, names, 3),
    "norm": norm(table, "layernorm"),
  }
  rng = np.random.default_rng(2)
  head = {
    "kernel": rng.normal(size=(28, 28)).astype(np.float32),
    "bias": rng.normal(size=28).astype(np.float32),
  }
  params = {"encoder": encoder, "head": head}
  assert shapes(params) == shapes(objective.init(jax.random.key(0)))
  ids = np.stack([rng.permutation(N)[:12].reshape(2, 6) for _ in range(2)])
  valid = rng.random((2, 2, 6)) < 0.7
  batch = {"image": pixels(), "target_ids": ids, "target_valid": valid}
  masked = np.zeros((2, N), bool)
  for i in range(2):
    masked[i, ids[i][valid[i]]] = True
  np.testing.assert_array_equal(objective.masked(batch), masked)
  with torch.no_grad():
    seen = theirs(as_theirs(pixels()), bool_masked_pos=torch.tensor(masked))
    whole = theirs(as_theirs(pixels()), output_hidden_states=True)
    width = (28,)
    layers = [
      torch.nn.functional.layer_norm(x[:, 1:], width)
      for x in whole.hidden_states[-2:]
    ]
    targets = torch.nn.functional.layer_norm(sum(layers) / 2, width)
    predictions = seen.last_hidden_state[:, 1:] @ torch.tensor(
      head["kernel"]
    ) + torch.tensor(head["bias"])
    expected = torch.nn.functional.smooth_l1_loss(
      predictions[torch.tensor(masked)], targets[torch.tensor(masked)], beta=0.5
    )
  ours = objective.targets({"encoder": encoder}, batch, {})
  np.testing.assert_allclose(ours, targets, atol=2e-4)
  loss = objective.loss(params, ours, batch, jax.random.key(0), {})
  np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-4)


def shapes(tree):
  return jax.tree.map(np.shape, dict(tree))
