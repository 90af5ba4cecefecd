"""The train step against the released code's numbers.

The reference file covers one setting. For others, the model is written down
here a second time, in PyTorch's own layers, and makes files of that format.
"""

import json
import sys

import conftest
import numpy as np
import parity
import pytest

SETTINGS = {
    "img": 20, "patch": 4, "dim": 24, "depth": 2, "heads": 3,
    "predictor_dim": 16, "predictor_depth": 1, "predictor_heads": 2,
    "mlp_ratio": 4.0, "batch": 3, "num_context_masks": 1,
    "num_target_masks": 4, "layer_norm_eps": 1e-6, "steps": 3,
    "iterations_per_epoch": 7, "epochs": 3, "warmup_epochs": 1,
    "start_lr": 2e-4, "lr": 1e-3, "final_lr": 1e-6, "weight_decay": 0.04,
    "final_weight_decay": 0.4, "ema": [0.996, 1.0],
    "adam": {"b1": 0.9, "b2": 0.999, "eps": 1e-8}, "dtype": "float32",
}  # fmt: skip
VARIANTS = {
    "two contexts, three targets": dict(
        num_context_masks=2, num_target_masks=3
    ),
    "five targets, ratio 48/11": dict(
        num_target_masks=5, mlp_ratio=48 / 11, dim=40, heads=5
    ),
    "deeper, larger patches, past the warm-up": dict(
        img=48, patch=8, depth=4, predictor_depth=3, warmup_epochs=0, batch=2,
        predictor_mlp_ratio=2.5,
        ema=[0.9, 0.99], adam={"b1": 0.8, "b2": 0.95, "eps": 1e-6},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def reference():
  return dict(np.load(conftest.DATA / "ijepa_reference_step.npz"))


@pytest.fixture(scope="module")
def ours(reference):
  return parity.compute(reference)


def test_four_steps_match_the_released_code(ours, reference):
  results = parity.judge(ours, reference)
  bad = [r for r in results if not r.ok]
  assert not bad, parity.report(bad)
  # Four outputs, four scalars a step, the gradient and the end of all.
  arrays = [k for k in reference if k.startswith(("step0/grad/", "final/"))]
  arrays = [k for k in arrays if "pos_embed" not in k]
  assert len(results) == 4 + 4 * 4 + len(arrays)


@pytest.mark.parametrize(
  ("key", "wrong", "found"),
  [
    ("step0/targets", 2e-5, "step0/targets"),
    ("step0/grad/predictor/mask_token", 2e-5, "predictor/mask_token"),
    ("final/target_encoder/norm.weight", 5e-5, "target_encoder/norm"),
    ("loss", 2e-5, "loss of step 2"),
    ("momentum", 2e-7, "momentum of step 3"),
  ],
)
def test_a_wrong_number_is_found(key, wrong, found, ours, reference):
  results = parity.judge(ours | {key: ours[key] * (1 + wrong)}, reference)
  assert any(found in r.name for r in results if not r.ok)
  broken = parity.judge(ours | {key: ours[key] * np.nan}, reference)
  assert any(found in r.name for r in broken if not r.ok)


def test_a_missing_quantity_is_found(ours, reference):
  less = {k: v for k, v in reference.items() if k != "step0/targets"}
  with pytest.raises(ValueError, match="not on both sides: step0/targets"):
    parity.judge(ours, less)


@pytest.mark.parametrize(("error", "code"), [(1e-6, 0), (1e-3, 1)])
def test_the_exit_code_tells(error, code, monkeypatch, capsys):
  result = parity.Comparison("loss of step 0", error, 1e-5)
  monkeypatch.setattr(parity, "compare", lambda *_, **__: [result])
  monkeypatch.setattr(sys, "argv", ["parity.py", "file.npz"])
  assert parity.main() == code
  assert "loss of step 0" in capsys.readouterr().out


@pytest.mark.torch
@pytest.mark.parametrize("variant", VARIANTS)
def test_other_settings_match_pytorch(variant, tmp_path):
  file = tmp_path / "reference.npz"
  write_reference(file, SETTINGS | VARIANTS[variant])
  bad = [r for r in parity.compare(file) if not r.ok]
  assert not bad, parity.report(bad)


def networks(meta):
  """The encoder and the predictor in PyTorch, under the released names."""
  import torch
  from torch import nn

  width, narrow, eps = meta["dim"], meta["predictor_dim"], 1e-6
  side = meta["img"] // meta["patch"]

  class Attention(nn.Module):
    def __init__(self, d, heads):
      super().__init__()
      self.heads = heads
      self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
      split = lambda y: y.unflatten(2, (self.heads, -1)).transpose(1, 2)
      q, k, v = map(split, self.qkv(x).chunk(3, dim=-1))
      y = nn.functional.scaled_dot_product_attention(q, k, v)
      return self.proj(y.transpose(1, 2).flatten(2))

  class Mlp(nn.Module):
    def __init__(self, d, ratio):
      super().__init__()
      hidden = int(d * ratio)
      self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x):
      return self.fc2(nn.functional.gelu(self.fc1(x)))

  class Block(nn.Module):
    def __init__(self, d, heads, ratio):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(d, eps), nn.LayerNorm(d, eps)
      self.attn, self.mlp = Attention(d, heads), Mlp(d, ratio)

    def forward(self, x):
      x = x + self.attn(self.norm1(x))
      return x + self.mlp(self.norm2(x))

  def blocks(d, heads, depth, ratio):
    return nn.Sequential(*[Block(d, heads, ratio) for _ in range(depth)])

  def positions(d):
    """Half of the channels for the column, half for the row."""
    omega = 10000.0 ** (-np.arange(d // 4) / (d / 4))
    out = np.zeros((side, side, d))
    for i in range(side):
      for j in range(side):
        parts = [f(p * omega) for p in (j, i) for f in (np.sin, np.cos)]
        out[i, j] = np.concatenate(parts)
    table = torch.tensor(out.reshape(1, -1, d), dtype=torch.float32)
    return nn.Parameter(table, requires_grad=False)

  class PatchEmbed(nn.Module):
    def __init__(self):
      super().__init__()
      self.proj = nn.Conv2d(3, width, meta["patch"], meta["patch"])

  class Encoder(nn.Module):
    def __init__(self):
      super().__init__()
      self.pos_embed = positions(width)
      self.patch_embed = PatchEmbed()
      self.blocks = blocks(
        width, meta["heads"], meta["depth"], meta["mlp_ratio"]
      )
      self.norm = nn.LayerNorm(width, eps)

    def forward(self, images, masks=None):  # masks: [B, S, K]
      x = self.patch_embed.proj(images).flatten(2).mT + self.pos_embed
      if masks is not None:
        x = torch.cat([pick(x, masks[:, s]) for s in range(masks.shape[1])])
      return self.norm(self.blocks(x))

  class Predictor(nn.Module):
    def __init__(self):
      super().__init__()
      self.mask_token = nn.Parameter(torch.zeros(1, 1, narrow))
      self.predictor_pos_embed = positions(narrow)
      self.predictor_embed = nn.Linear(width, narrow)
      self.predictor_blocks = blocks(
        narrow,
        meta["predictor_heads"],
        meta["predictor_depth"],
        meta.get("predictor_mlp_ratio", 4.0),
      )
      self.predictor_norm = nn.LayerNorm(narrow, eps)
      self.predictor_proj = nn.Linear(narrow, width)

    def forward(self, context, contexts, targets):
      b, position = len(contexts), self.predictor_pos_embed
      outputs = []
      for m in range(targets.shape[1]):
        for s in range(contexts.shape[1]):
          spread = position.expand(b, -1, -1)
          seen = self.predictor_embed(context[s * b : (s + 1) * b])
          seen = seen + pick(spread, contexts[:, s])
          asked = self.mask_token + pick(spread, targets[:, m])
          x = self.predictor_blocks(torch.cat([seen, asked], dim=1))
          x = self.predictor_norm(x[:, seen.shape[1] :])
          outputs.append(self.predictor_proj(x))
      return torch.cat(outputs)

  return Encoder(), Predictor()


def pick(x, ids):
  """[B, N, D] at [B, K] -> [B, K, D]."""
  return x.gather(1, ids[..., None].expand(-1, -1, x.shape[-1]))


def write_reference(file, meta):
  """Trains for a few steps in PyTorch and writes what the check reads."""
  import copy

  import torch

  rng = np.random.default_rng(0)
  generator = torch.manual_seed(0)
  encoder, predictor = networks(meta)
  # Every parameter matters. But the gradient of the keys' biases, which is 0
  # but for rounding, stays far below Adam's epsilon.
  for name, p in [*encoder.named_parameters(), *predictor.named_parameters()]:
    if "pos_embed" not in name:
      norm_weight = "norm" in name and name.endswith("weight")
      noise = torch.randn(p.shape, generator=generator)
      p.data = norm_weight + (0.08 if p.ndim > 1 else 0.1) * noise
  target = copy.deepcopy(encoder)
  both = {"encoder": encoder, "predictor": predictor}
  out = {"meta_json": np.array(json.dumps(meta))}

  def put(prefix, module, values=lambda module: module.state_dict()):
    for name, value in values(module).items():
      out[f"{prefix}/{name}"] = value.numpy().copy()

  for name, module in both.items():
    put(f"init/{name}", module)
  trained = [
    p for m in both.values() for p in m.parameters() if p.requires_grad
  ]
  adam = meta["adam"]
  optimizer = torch.optim.AdamW(
    [
      {"params": [p for p in trained if p.ndim > 1], "decays": True},
      {"params": [p for p in trained if p.ndim < 2], "decays": False},
    ],
    betas=(adam["b1"], adam["b2"]),
    eps=adam["eps"],
  )
  total = meta["epochs"] * meta["iterations_per_epoch"]
  warmup = meta["warmup_epochs"] * meta["iterations_per_epoch"]
  cosine = lambda a, b, x: b + (a - b) * (1 + np.cos(np.pi * x)) / 2
  scalars = {"loss": [], "lr": [], "weight_decay": [], "momentum": []}
  patches = (meta["img"] // meta["patch"]) ** 2
  for step in range(meta["steps"]):
    count = step + 1
    lr = cosine(
      meta["lr"], meta["final_lr"], (count - warmup) / (total - warmup)
    )
    if count < warmup:
      lr = meta["start_lr"] + (meta["lr"] - meta["start_lr"]) * count / warmup
    decay = cosine(
      meta["weight_decay"], meta["final_weight_decay"], count / total
    )
    momentum = meta["ema"][0] + step * (meta["ema"][1] - meta["ema"][0]) / total
    draw = lambda m, k: np.sort(
      [
        [rng.permutation(patches)[:k] for _ in range(m)]
        for _ in range(meta["batch"])
      ]
    )
    masks = {
      "context": draw(meta["num_context_masks"], patches // 3 + step % 2),
      "target": draw(meta["num_target_masks"], patches // 5),
    }
    images = rng.normal(
      size=(meta["batch"], 3, meta["img"], meta["img"])
    ).astype(np.float32)
    out[f"step{step}/images_nchw"] = images
    for name, mask in masks.items():
      out[f"step{step}/masks_{name}"] = mask
    images = torch.from_numpy(images)
    contexts, asked = (torch.from_numpy(masks[k]) for k in masks)

    with torch.no_grad():
      features = target(images)
      normal = torch.nn.functional.layer_norm(features, features.shape[-1:])
      targets = torch.cat(
        [
          pick(normal, asked[:, m])
          for m in range(asked.shape[1])
          for _ in range(contexts.shape[1])
        ]
      )
    context = encoder(images, contexts)
    prediction = predictor(context, contexts, asked)
    loss = torch.nn.functional.smooth_l1_loss(prediction, targets)
    optimizer.zero_grad()
    loss.backward()
    if step == 0:
      outputs = {
        "target_encoder_output": features,
        "context_encoder_output": context,
        "predictor_output": prediction,
        "targets": targets,
      }
      for name, value in outputs.items():
        out[f"step0/{name}"] = value.detach().numpy().copy()
      for name, module in both.items():
        put(
          f"step0/grad/{name}",
          module,
          lambda m: {
            n: p.grad for n, p in m.named_parameters() if p.requires_grad
          },
        )
    for group in optimizer.param_groups:
      group["lr"] = lr
      group["weight_decay"] = decay if group["decays"] else 0.0
    optimizer.step()
    with torch.no_grad():
      for old, new in zip(target.parameters(), encoder.parameters()):
        old.mul_(momentum).add_(new, alpha=1 - momentum)
    for name, value in zip(scalars, (loss.item(), lr, decay, momentum)):
      scalars[name].append(value)
  for name, values in scalars.items():
    out[name] = np.array(values)
  for name, module in {**both, "target_encoder": target}.items():
    put(f"final/{name}", module)
  np.savez(file, **out)
