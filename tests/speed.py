"""Times this project against PyTorch on the CPU, in turns.

    python tests/speed.py encode > speed.json
    python tests/speed.py step --setting a > speed.json

"encode" extracts features with a random ViT-B/16 (224 pixels, 16 images)
beside transformers' IJepaModel. "step" trains beside a PyTorch I-JEPA of the
same shapes built from torch.nn, with scaled_dot_product_attention, fused AdamW
and the same gathers and moving average. All is float32.

Each side has a process of its own, so that neither finds the other's threads
or memory, and waits while the other runs: the machine's mood falls on both.
Prints JSON; "ratio" above 1 means that ours is faster. A round in which a step
finds new memory measures the kernel: it is reported and another is run, up to
twice as many in all; the medians are of those that are "counted", or of all
where none is. Needs the extra "torch".
"""

import argparse
from collections.abc import Callable
import importlib.metadata
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from typing import Any

from jepa_jax import command, models

_CLEAN = 10  # page faults that a step may have

# The shapes of "step". K context patches, M blocks of T target patches.
SETTINGS: dict[str, dict[str, Any]] = {
  "a": dict(
    encoder=dict(width=192, depth=12, num_heads=3, patch_size=4),
    predictor=dict(width=96, depth=6, num_heads=3),
    image_size=32,
    batch_size=128,
    context=24,
    blocks=4,
    target=12,
  ),
  "b": dict(
    encoder=dict(width=384, depth=12, num_heads=6, patch_size=16),
    predictor=dict(width=192, depth=6, num_heads=6),
    image_size=224,
    batch_size=16,
    context=72,
    blocks=4,
    target=35,
  ),
}


def torch_encode(settings: dict[str, Any]) -> Callable[[], float]:
  """Features by transformers' IJepaModel; returns a checksum."""
  import numpy as np
  import torch
  import transformers

  torch.manual_seed(0)
  size = models.SIZES[settings["size"]]
  model = transformers.IJepaModel(
    transformers.IJepaConfig(
      hidden_size=size["width"],
      num_hidden_layers=size["depth"],
      num_attention_heads=size["num_heads"],
      intermediate_size=int(size["width"] * size["mlp_ratio"]),
      image_size=settings["image_size"],
      patch_size=settings["patch_size"],
      layer_norm_eps=1e-6,
      attn_implementation=settings["attention"],
    )
  ).eval()
  model.save_pretrained(settings["folder"])
  pixels = torch.tensor(_images(settings)).permute(0, 3, 1, 2).contiguous()

  def run() -> float:
    with torch.inference_mode():
      features = model(pixels).last_hidden_state.mean(dim=1).numpy()
    return float(np.abs(features).mean())

  return run


def jax_encode(settings: dict[str, Any]) -> Callable[[], float]:
  """Features by jepa_jax.load of the folder that torch_encode wrote."""
  import jax.numpy as jnp
  import numpy as np

  import jepa_jax

  model = jepa_jax.load(settings["folder"])
  images = jnp.asarray(_images(settings))
  return lambda: float(np.abs(np.asarray(model.encode(images))).mean())


def torch_step(settings: dict[str, Any]) -> Callable[[], float]:
  """One I-JEPA step in PyTorch; returns the loss."""
  import torch
  from torch import nn
  import torch.nn.functional as F

  torch.manual_seed(0)

  class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
      super().__init__()
      self.heads = heads
      self.norm1 = nn.LayerNorm(width, eps=1e-6)
      self.qkv = nn.Linear(width, 3 * width)
      self.out = nn.Linear(width, width)
      self.norm2 = nn.LayerNorm(width, eps=1e-6)
      self.mlp = nn.Sequential(
        nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
      )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
      b, n, d = x.shape
      qkv = self.qkv(self.norm1(x)).reshape(b, n, 3, self.heads, -1)
      q, k, v = qkv.permute(2, 0, 3, 1, 4)
      y = F.scaled_dot_product_attention(q, k, v)
      x = x + self.out(y.transpose(1, 2).reshape(b, n, d))
      return x + self.mlp(self.norm2(x))

  def blocks(depth: int, width: int, num_heads: int, **_: int) -> nn.Module:
    return nn.Sequential(*[Block(width, num_heads) for _ in range(depth)])

  def gather(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.gather(x, 1, ids[..., None].expand(-1, -1, x.shape[-1]))

  class Encoder(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      width, patch = enc["width"], enc["patch_size"]
      self.embed = nn.Conv2d(3, width, patch, patch)
      self.blocks = blocks(**enc)
      self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: torch.Tensor, ids: Any = None) -> torch.Tensor:
      x = self.embed(x).flatten(2).transpose(1, 2) + enc_positions
      if ids is not None:
        x = gather(x, ids)
      return self.norm(self.blocks(x))

  class Predictor(nn.Module):
    def __init__(self) -> None:
      super().__init__()
      width = pred["width"]
      self.embed = nn.Linear(enc["width"], width)
      self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
      self.blocks = blocks(**pred)
      self.norm = nn.LayerNorm(width, eps=1e-6)
      self.project = nn.Linear(width, enc["width"])

    def forward(self, x: torch.Tensor, ids: Any, targets: Any) -> torch.Tensor:
      x = self.embed(x) + pred_positions[0][ids]
      x = x.repeat(settings["blocks"], 1, 1)
      asked = self.token + pred_positions[0][torch.cat(targets)]
      x = self.blocks(torch.cat([x, asked], dim=1))
      return self.project(self.norm(x[:, ids.shape[1] :]))

  enc, pred = settings["encoder"], settings["predictor"]
  side = settings["image_size"] // enc["patch_size"]
  positions = lambda width: torch.tensor(
    models.sincos_positions((side, side), width)
  )[None]
  enc_positions = positions(enc["width"])
  pred_positions = positions(pred["width"])
  images, ids, targets = (torch.tensor(a) for a in _batch(settings))
  images = images.permute(0, 3, 1, 2)
  ids, targets = ids.long(), list(targets.long().unbind(1))
  encoder, predictor, target_encoder = Encoder(), Predictor(), Encoder()
  target_encoder.load_state_dict(encoder.state_dict())
  parameters = [*encoder.parameters(), *predictor.parameters()]
  optimizer = torch.optim.AdamW(
    [
      {"params": [p for p in parameters if p.ndim > 1]},
      {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ],
    lr=1e-4,
    fused=True,
  )

  def run() -> float:
    with torch.no_grad():
      features = target_encoder(images)
      features = F.layer_norm(features, features.shape[-1:])
      wanted = torch.cat([gather(features, block) for block in targets])
    loss = F.smooth_l1_loss(
      predictor(encoder(images, ids), ids, targets), wanted
    )
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
      old, new = list(target_encoder.parameters()), list(encoder.parameters())
      torch._foreach_mul_(old, 0.996)
      torch._foreach_add_(old, new, alpha=0.004)
    return loss.item()

  return run


def jax_step(settings: dict[str, Any]) -> Callable[[], float]:
  """One step of this project's Program; returns the loss."""
  import jax
  import numpy as np

  from jepa_jax import config as config_lib
  from jepa_jax.training import program as program_lib
  from jepa_jax.training import sharding

  config = config_lib.defaults()
  config.encoder.update(settings["encoder"])
  config.predictor.update(settings["predictor"])
  config.data.image_size = settings["image_size"]
  config.data.source, config.data.name = "scenes", "scenes"
  config.batch_size = settings["batch_size"]
  config.accumulate_steps = settings["accumulate_steps"]
  config.total = "1000 steps"
  config.optimizer.warmup = "10 steps"
  config.masks.context_patches = settings["context"]
  config.masks.min_keep = 1
  config.compute.dtype = "float32"
  config.compute.scan = False
  program = program_lib.build(config, sharding.make_mesh(config.mesh))
  images, ids, targets = _batch(settings)
  arrays = {
    "image": np.clip(images * 50 + 128, 0, 255).astype(np.uint8),
    "context_ids": ids[:, None],
    "target_ids": targets,
  }
  batch = {
    name: jax.device_put(array, program.batch_spec[name].sharding)
    for name, array in arrays.items()
  }
  state = program.init(0)

  def run() -> float:
    nonlocal state
    state, metrics, _ = program.step(state, batch)
    return float(metrics["loss"])

  return run


def _images(settings: dict[str, Any]) -> Any:
  import numpy as np

  side = settings["image_size"]
  shape = (settings["batch_size"], side, side, 3)
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def _batch(settings: dict[str, Any]) -> tuple[Any, Any, Any]:
  """Images [B, H, W, 3], context ids [B, K] and target ids [B, M, T]."""
  import numpy as np

  rng = np.random.default_rng(1)
  patches = (settings["image_size"] // settings["encoder"]["patch_size"]) ** 2

  def draw(count: int) -> Any:
    order = rng.random((settings["batch_size"], patches)).argsort(axis=1)
    return np.sort(order[:, :count], axis=1).astype(np.int32)

  targets = [draw(settings["target"]) for _ in range(settings["blocks"])]
  return _images(settings), draw(settings["context"]), np.stack(targets, axis=1)


class Side:
  """A process that builds one side and runs it when asked."""

  def __init__(self, name: str, settings: dict[str, Any]) -> None:
    context = multiprocessing.get_context("spawn")
    self._pipe, there = context.Pipe()
    context.Process(
      target=_work, args=(name, settings, there), daemon=True
    ).start()
    there.close()
    self.value = self._pipe.recv()  # of the first run

  def run(self, count: int) -> dict[str, float]:
    """Runs `count` times; means a run."""
    self._pipe.send(count)
    return self._pipe.recv()


def _work(name: str, settings: dict[str, Any], pipe: Any) -> None:
  if name.startswith("torch"):
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
  run = globals()[name](settings)
  value = run()
  faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  clean = 0
  for _ in range(30):  # until the allocator holds what a run takes
    before = faults()
    run()
    clean = clean + 1 if faults() - before < _CLEAN else 0
    if clean == 5:
      break
  pipe.send(value)
  while True:
    try:
      count = pipe.recv()
    except EOFError:  # all is measured
      return
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    for _ in range(count):
      run()
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    faults = after.ru_minflt - before.ru_minflt
    pipe.send(
      {
        "seconds": seconds / count,
        "cpu_seconds": cpu / count,
        "minor_faults": faults / count,
        "peak_gib": after.ru_maxrss / 2**20,  # Linux counts in KiB
      }
    )


def main(arguments: argparse.Namespace) -> int:
  settings = vars(arguments)
  if arguments.what == "step":
    settings |= SETTINGS[arguments.setting]
  with tempfile.TemporaryDirectory() as folder:
    # PyTorch first: it writes the weights that ours loads.
    sides = {
      side: Side(f"{side}_{arguments.what}", settings | {"folder": folder})
      for side in ("torch", "jax")
    }
  if arguments.what == "encode":
    error = abs(sides["jax"].value / sides["torch"].value - 1)
    if not error < 1e-4:
      raise ValueError(
        f"features differ by {error:.1e}; they need to be equal."
      )
  rounds: list[dict[str, Any]] = []
  counted: list[dict[str, Any]] = []
  while len(counted) < arguments.rounds and len(rounds) < 2 * arguments.rounds:
    turns = list(sides)[:: 1 if len(rounds) % 2 else -1]
    rounds.append({})
    for name in turns:
      time.sleep(arguments.pause)
      rounds[-1][name] = sides[name].run(arguments.steps)
    faults = max(turn["minor_faults"] for turn in rounds[-1].values())
    if faults < _CLEAN or arguments.what == "encode":
      counted.append(rounds[-1])
  median = {
    name: {
      key: statistics.median(turn[name][key] for turn in counted or rounds)
      for key in rounds[0][name]
    }
    for name in sides
  }
  report = {
    "ratio": median["torch"]["seconds"] / median["jax"]["seconds"],
    "median": median,
    "counted": len(counted),
    "rounds": rounds,
    "settings": settings,
    "cores": len(os.sched_getaffinity(0)),
    "versions": {
      name: importlib.metadata.version(name)
      for name in ("jax", "jaxlib", "torch", "transformers")
    },
  }
  print(json.dumps(report, indent=2))
  return 0


def parse_flags() -> argparse.ArgumentParser:
  flags = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = flags.add_subparsers(dest="what", required=True)
  for what, rounds in (("encode", 9), ("step", 30)):
    sub = commands.add_parser(what)
    sub.add_argument("--rounds", type=int, default=rounds)
    # Turns of one: a machine that others share is faster or slower for half a
    # minute at a time, and longer turns would not meet that alike.
    sub.add_argument("--steps", type=int, default=1, help="a turn")
    sub.add_argument(
      "--pause", type=float, default=0.5, help="seconds before each turn"
    )
  sub.add_argument("--setting", choices=SETTINGS, default="a")
  sub.add_argument(
    "--accumulate_steps", type=int, default=1, help="of ours alone"
  )
  sub = commands.choices["encode"]
  sub.add_argument("--size", choices=models.SIZES, default="b")
  sub.add_argument("--image_size", type=int, default=224, help="pixels")
  sub.add_argument("--patch_size", type=int, default=16, help="pixels")
  sub.add_argument("--batch_size", type=int, default=16, help="images")
  sub.add_argument(
    "--attention",
    choices=("sdpa", "eager"),
    default="sdpa",
    help="of transformers; sdpa is its default and the faster one",
  )
  return flags


if __name__ == "__main__":
  # A library's user of "encode" has no allocator settings, nor has either side.
  command.run(main, parse_flags(), tune_allocator="encode" not in sys.argv)
