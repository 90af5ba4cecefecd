"""Small images and a small machine: 28 to 96 pixels, 2 CPU cores, 20 minutes.

Command:   python -m jepa_jax.train --workdir runs/small \\
             --config experiments/small.py:DATA[,SIZE[,IMAGES]]
           DATA is a folder of images (as of experiments/folder.py), "scenes",
           "fashion_mnist", or another image set of TFDS with a "label"
           (--config.data.data_dir=DIR holds it); SIZE in pixels, 64 or the
           data's own; IMAGES to train on, where known.
           Grey images of your own: --config.data.channels=1 and one number
           each for --config.data.mean and .std.
Hardware:  one or two CPU cores, some 20 minutes (a GPU: not tried).
Expected:  the paper has no such experiment.
Seen:      Fashion-MNIST, mean of three seeds, 20 minutes on one core: linear
           86.2 (last four layers 88.2), 20-NN 85.4 (85.0); pixels 84.5 and
           86.2. More in docs/small_data.md.

The rule. Patches are a quarter of the side below 32 pixels, an eighth from
there on: a 4 x 4 grid takes a third of the time of a 7 x 7 one. A random half
of the patches is the context, and the pixels of the other half are predicted,
in many small steps: 40,000 with 16 patches, 10,000 with 64, which take no
longer. No image is seen more than 400 times.
"""

import os

import ml_collections

from jepa_jax import config

STEPS = 40_000  # of 32 images of 16 patches; fewer of more
MOST_EPOCHS = 400
# Mean and standard deviation of the pixels, side, channels, images.
KNOWN = {
  "scenes": (0.65, 0.113, 64, 3, 8000),
  "fashion_mnist": (0.286, 0.353, 28, 1, 60_000),
  "mnist": (0.131, 0.308, 28, 1, 60_000),
  "cifar10": (0.47, 0.25, 32, 3, 50_000),
  "cifar100": (0.48, 0.27, 32, 3, 50_000),
}
OTHERS = (0.5, 0.25, 64, 3, 0)


def get_config(variant: str = "scenes") -> ml_collections.ConfigDict:
  """The variant is DATA, DATA,SIZE or DATA,SIZE,IMAGES."""
  name, size, images = _parse(variant)
  mean, std, own_size, channels, own_images = KNOWN.get(name, OTHERS)
  size, images = size or own_size, images or own_images
  patches = 4 if size < 32 else 8  # a side
  if size % patches:
    raise ValueError(
      f"got images of {size} pixels; patches need a side that {patches} "
      f"divides, such as {size - size % patches} or "
      f"{size - size % patches + patches}."
    )
  c = config.defaults("pixel_ijepa")
  c.batch_size = 32  # many small steps
  steps = STEPS * 16 // patches**2
  epochs = min(MOST_EPOCHS, steps * c.batch_size // images) if images else 0
  c.total = f"{epochs} epochs" if epochs else f"{steps} steps"

  c.data.name = name
  folder = name not in KNOWN and (os.path.isdir(name) or "/" in name)
  c.data.source = (
    "folder" if folder else "scenes" if name == "scenes" else "tfds"
  )
  c.data.num_examples = images  # 0: counted
  c.data.image_size = size  # pixels
  c.data.channels = channels
  c.data.mean = (mean,) * channels
  c.data.std = (std,) * channels
  c.data.crop_scale = (1.0, 1.0)  # whole images
  c.data.crop_ratio = (1.0, 1.0)
  c.data.flip = name not in ("mnist", "scenes")

  c.encoder.patch_size = size // patches  # pixels
  c.masks.name = "random"
  c.masks.num_targets = 1
  c.masks.target_scale = (0.5, 0.5)
  c.masks.min_keep = 4  # patches
  c.masks.context_patches = patches**2 // 2
  c.method.target_norm = "none"

  c.encoder.update(width=128, depth=4, num_heads=4, mlp_ratio=4.0)
  c.predictor.update(width=64, depth=2, num_heads=4)

  c.optimizer.warmup = "5 %"
  c.optimizer.lr_start = 5e-5
  c.optimizer.lr = 1e-3
  c.optimizer.weight_decay_start = 0.05
  c.optimizer.weight_decay_end = 0.05
  c.optimizer.b2 = 0.95
  c.compute.dtype = "float32"  # as fast as bfloat16 on a CPU
  c.compute.scan = False  # unrolled is faster on a CPU

  c.log_every = "100 steps"
  c.checkpoint.every = "5000 steps"
  for label in _labels(c.data.source, name):
    c.evaluations[label] = config.evaluation(label)
  return c


def _parse(variant: str) -> tuple[str, int, int]:
  """DATA and, 0 where not given, SIZE and IMAGES."""
  name, *numbers = variant.split(",")
  if not name or len(numbers) > 2 or not all(n.isdecimal() for n in numbers):
    raise ValueError(
      f'got "{variant}"; experiments/small.py needs DATA, DATA,SIZE or '
      "DATA,SIZE,IMAGES: --config experiments/small.py:scenes,64,8000."
    )
  size, images = ([int(n) for n in numbers] + [0, 0])[:2]
  return name, size, images


def _labels(source: str, name: str) -> tuple[str, ...]:
  """What is probed."""
  if source == "scenes":
    return "count", "distance"
  from jepa_jax.data import folder

  return ("label",) if source == "tfds" or folder.is_labelled(name) else ()
