"""LeJEPA on ImageNet-1k: views agree, and features are normal.

Command:   python -m jepa_jax.train \\
             --config experiments/lejepa_in1k.py:vith14 --workdir runs/lejepa
Hardware:  a TPU pod or GPUs; plan it with python -m jepa_jax.plan.
Expected:  linear probe of LeJEPA's paper: ViT-H/14 79. The other sizes are
           for comparisons at equal trunk; the paper has no figure for them.
           Figure, batch and epochs are to be checked against the paper.
Seen:      not run: it needs a pod.

Reference: Balestriero and LeCun 2025, arXiv:2511.08544.
"""

import ml_collections

from jepa_jax import config, models

VARIANTS = {"vitb16": ("b", 16), "vitl16": ("l", 16), "vith14": ("h", 14)}


def get_config(variant: str = "vith14") -> ml_collections.ConfigDict:
  """One of VARIANTS."""
  config.choose("variant", variant, VARIANTS)
  size, patch_size = VARIANTS[variant]
  c = config.defaults("lejepa")
  c.batch_size = 512
  c.total = "100 epochs"

  c.data.name = "imagenet2012"
  c.data.num_examples = 1_281_167
  c.data.image_size = 224  # pixels
  c.data.crop_scale = (0.3, 1.0)  # share of the area, of large views
  c.data.local_scale = (0.05, 0.3)
  c.data.flip = True
  c.data.color_jitter = 0.5
  c.data.blur = 0.5
  c.data.solarize = 0.1
  c.method.views = 2
  c.method.local_views = 6
  c.method.local_size = 96 if patch_size == 16 else 98  # pixels
  c.method.weight = 0.05

  c.encoder.update(models.SIZES[size])
  c.encoder.patch_size = patch_size  # pixels
  c.encoder.drop_path = 0.1

  c.optimizer.warmup = "10 epochs"
  c.optimizer.lr_start = 0.0
  c.optimizer.lr = 5e-4
  c.optimizer.lr_end = 5e-7
  c.optimizer.weight_decay_start = 0.05
  c.optimizer.weight_decay_end = 0.05

  c.compute.dtype = "bfloat16"
  c.compute.remat = "dots"
  c.evaluations.imagenet = config.evaluation("label", test="validation")
  return c
