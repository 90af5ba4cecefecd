"""I-JEPA on rendered scenes: from nothing to a report on a laptop.

Command:   python -m jepa_jax.train --config experiments/quickstart.py \\
             --workdir runs/quickstart
Hardware:  2 CPU cores, 4 GiB, 10 minutes; no network, no accelerator.
Expected:  the paper has no such experiment.
Seen:      linear probe on the last layer, in percent, mean of three seeds
           (random encoder in brackets): count 36.7 (31.4), distance 66.3
           (57.2).
"""

import ml_collections

from jepa_jax import config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """No variants: the only one is "" for the whole run."""
  config.choose("variant", variant, ("",))
  c = config.defaults()
  c.batch_size = 64
  c.total = "2000 steps"  # 16 epochs

  c.data.source = "scenes"
  c.data.name = "scenes"
  c.data.num_examples = 8000  # rendered once, with 2,000 more to test on
  c.data.image_size = 64  # pixels
  c.data.mean = (0.65, 0.65, 0.65)  # of the scenes, which are low in contrast
  c.data.std = (0.113, 0.113, 0.113)
  # Whole pictures: what a crop shows of a scene changes more than the scenes
  # do, and can be told from any patch, so that a small encoder learns that.
  c.data.crop_scale = (1.0, 1.0)
  c.data.crop_ratio = (1.0, 1.0)
  c.masks.name = "corrected"
  c.masks.min_keep = 4  # patches, of a grid of 8 x 8
  c.masks.context_patches = 24  # the released recipe cuts all to 13

  c.encoder.update(width=64, depth=6, num_heads=4, mlp_ratio=4.0)
  c.encoder.patch_size = 8  # pixels
  c.predictor.update(width=64, depth=2, num_heads=4)

  c.optimizer.warmup = "100 steps"
  c.optimizer.lr_start = 1e-4
  c.optimizer.lr = 5e-4
  c.compute.dtype = "float32"  # as fast as bfloat16 on a CPU
  c.compute.scan = False  # unrolled is faster on a CPU

  c.log_every = "10 steps"
  c.checkpoint.every = "200 steps"
  c.evaluations.count = config.evaluation("count")
  c.evaluations.distance = config.evaluation("distance")
  return c
