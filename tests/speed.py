"""Times feature extraction against transformers' IJepaModel, in turns.

    python tests/speed.py > speed.json

Both run the same random ViT (B/16 at 224 pixels, 16 images, float32) on the
CPU in one process, one after the other, several rounds: the machine's mood
then falls on both. Prints JSON; "ratio" above 1 means that ours is faster.
Needs the extra "torch".
"""

import argparse
import json
import os
import statistics
import tempfile
import time

from jepa_jax import command, models


def measure(arguments: argparse.Namespace) -> dict[str, object]:
  """Times both; see the flags.

  Raises:
    ValueError: their features differ.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np
  import torch
  import transformers

  import jepa_jax

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  size = models.SIZES[arguments.size]
  theirs = transformers.IJepaModel(
    transformers.IJepaConfig(
      hidden_size=size["width"],
      num_hidden_layers=size["depth"],
      num_attention_heads=size["num_heads"],
      intermediate_size=int(size["width"] * size["mlp_ratio"]),
      image_size=arguments.image_size,
      patch_size=arguments.patch_size,
      layer_norm_eps=1e-6,
      attn_implementation=arguments.attention,
    )
  ).eval()
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    ours = jepa_jax.load(folder)
  side = arguments.image_size
  images = (
    np.random.default_rng(0)
    .normal(size=(arguments.batch_size, side, side, 3))
    .astype(np.float32)
  )
  pixels = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
  batch = jnp.asarray(images)

  def run_theirs() -> np.ndarray:
    with torch.inference_mode():
      return theirs(pixels).last_hidden_state.mean(dim=1).numpy()

  def run_ours() -> np.ndarray:
    return np.asarray(ours.encode(batch))

  error = np.linalg.norm(run_ours() - run_theirs())
  error /= np.linalg.norm(run_theirs())
  if not error < 1e-4:
    raise ValueError(f"features differ by {error:.1e}; they need to be equal.")
  seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
  for i in range(arguments.rounds):
    turns = [("ours", run_ours), ("transformers", run_theirs)]
    for name, run in turns[:: 1 if i % 2 else -1]:
      # OpenMP's threads spin on for a while after PyTorch's turn.
      time.sleep(arguments.pause)
      start = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - start)
  median = {name: statistics.median(times) for name, times in seconds.items()}
  return {
    "ratio": median["transformers"] / median["ours"],
    "median_seconds": median,
    "images_per_second": {
      name: arguments.batch_size / value for name, value in median.items()
    },
    "seconds": seconds,
    "relative_error": float(error),
    "settings": vars(arguments),
    "cores": len(os.sched_getaffinity(0)),
    "versions": {
      "jax": jax.__version__,
      "torch": torch.__version__,
      "transformers": transformers.__version__,
    },
  }


def main(arguments: argparse.Namespace) -> int:
  print(json.dumps(measure(arguments), indent=2))
  return 0


if __name__ == "__main__":
  flags = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add_argument("--size", choices=models.SIZES, default="b")
  flags.add_argument("--image_size", type=int, default=224, help="pixels")
  flags.add_argument("--patch_size", type=int, default=16, help="pixels")
  flags.add_argument("--batch_size", type=int, default=16, help="images")
  flags.add_argument("--rounds", type=int, default=15)
  flags.add_argument(
    "--pause", type=float, default=0.5, help="seconds before each turn"
  )
  flags.add_argument(
    "--attention",
    choices=("sdpa", "eager"),
    default="sdpa",
    help="of transformers; sdpa is its default and the faster one",
  )
  command.run(main, flags)
