"""Every method with one trunk on small data: what I-JEPA is compared with.

Command:   python -m jepa_jax.train \\
             --config experiments/rivals.py:mae,fashion --workdir runs/mae
           The variant is a method and "scenes" or "fashion"; for the latter
           --config.data.data_dir=DIR, which holds TFDS's fashion_mnist/3.0.1.
           All for the same compute:
           python -m jepa_jax.compare --budget 3e14FLOPs --seeds 3 \\
             --workdir runs/rivals --configs \\
             experiments/rivals.py:{ijepa,mae,data2vec},scenes
Hardware:  2 CPU cores, minutes to half an hour a run.
Expected:  nothing is known.
Seen:      Fashion-MNIST, 7e12 FLOPs, three seeds: docs/methods.md. Scenes have
           not been run.
"""

import ml_collections

from jepa_jax import config

METHODS = (
  *("ijepa", "ijepa_position", "pixel_ijepa", "mae", "data2vec"),
  *("cae", "ibot", "lejepa", "supervised"),
)
DATA = ("scenes", "fashion")


def get_config(variant: str = "ijepa,scenes") -> ml_collections.ConfigDict:
  """A method of METHODS and one of DATA, with a comma between."""
  method, _, data = variant.partition(",")
  config.choose("variant", variant, [f"{m},{d}" for m in METHODS for d in DATA])
  c = config.defaults(method.partition("_position")[0])
  c.batch_size = 128
  c.total = "2000 steps"
  _set_data(c, data)

  # The trunk, and what learns it, is the same for all.
  c.encoder.update(width=128, depth=6, num_heads=4, mlp_ratio=4.0)
  c.predictor.update(width=64, depth=4, num_heads=4)
  c.optimizer.warmup = "10 %"
  c.optimizer.lr_start = 1e-4
  c.optimizer.lr = 1e-3
  c.compute.dtype = "float32"  # as fast as bfloat16 on a CPU
  c.compute.scan = False  # unrolled is faster on a CPU
  c.log_every = "20 steps"
  c.checkpoint.every = "500 steps"
  _set_method(c, method)
  return c


def _set_data(c: ml_collections.ConfigDict, data: str) -> None:
  """Images, patches, a context of I-JEPA's, and the probes."""
  if data == "scenes":
    c.data.source = c.data.name = "scenes"
    c.data.num_examples = 8000
    c.data.image_size = 64  # pixels
    c.data.mean = (0.65, 0.65, 0.65)
    c.data.std = (0.113, 0.113, 0.113)
    c.encoder.patch_size = 8  # pixels: a grid of 8 x 8
    c.masks.context_patches = 24
    c.data.label = "count"  # of the supervised one alone
    c.evaluations.count = config.evaluation("count")
    c.evaluations.distance = config.evaluation("distance")
  else:
    c.data.name = "fashion_mnist"
    c.data.num_examples = 60_000
    c.data.image_size = 28  # pixels
    c.data.channels = 1
    c.data.mean = (0.286,)
    c.data.std = (0.353,)
    c.encoder.patch_size = 4  # pixels: a grid of 7 x 7
    c.masks.context_patches = 14
    c.data.label = "label"
    c.evaluations.clothing = config.evaluation("label")
  c.masks.name = "corrected"
  c.masks.min_keep = 4  # patches


def _set_method(c: ml_collections.ConfigDict, method: str) -> None:
  """What a method has of its own."""
  if method == "ijepa_position":
    c.method.target_norm = "position"
  elif method in ("mae", "cae"):
    c.masks.name = "random"
    c.masks.num_targets = 1
    share = 0.75 if method == "mae" else 0.5
    c.masks.target_scale = (share, share)
    c.masks.context_patches = 0
    c.encoder.class_token = True
    c.loss = "l2" if method == "mae" else c.loss
  elif method == "data2vec":
    c.method.layers = 3
    c.encoder.class_token = True
    c.masks.context_patches = 0
  elif method in ("ibot", "lejepa"):
    # Augmentation of their papers, weaker: the images are small.
    c.data.flip = True
    c.data.color_jitter = 0.4
    c.data.blur = 0.3
    c.data.solarize = 0.1
    c.data.local_scale = (0.1, 0.3)
    c.method.local_views = 4
    c.method.local_size = c.data.image_size // 2 // c.encoder.patch_size
    c.method.local_size *= c.encoder.patch_size
    c.method.hidden = 256
  if method == "ibot":
    c.encoder.class_token = True
    c.method.bottleneck = 64
    c.method.prototypes = 256
    c.masks.num_targets = 2  # one for each large view
    c.masks.target_scale = (0.1, 0.4)
    c.masks.context_patches = 0
    c.momentum = (0.996, 1.0)
  elif method == "cae":
    c.method.tokens = 256
    c.method.decoder_depth = 2
  elif method == "supervised":
    c.method.classes = 10
