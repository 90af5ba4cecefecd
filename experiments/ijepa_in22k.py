"""I-JEPA on ImageNet-22k with the released hyperparameters.

Command:   python -m jepa_jax.train \\
             --config experiments/ijepa_in22k.py:vitg16 \\
             --workdir DIR --config.data.name=FOLDER
Hardware:  a TPU slice or GPUs.
Data:      a folder of the 14,197,122 images, in sub-folders a class or not.
Expected:  linear transfer, paper's Table 5 (CIFAR-100, Places205, iNat18,
           Clevr/Count, Clevr/Dist):
             vith14   89.5  57.8  50.5  88.6  75.0
             vitg16   89.5  59.1  55.3  86.7  73.0
Seen:      not run here.
"""

import ml_collections

from jepa_jax import config, models

VARIANTS = {
  # size, patch size, predictor depth, epochs
  "vith14": ("h", 14, 12, 66),
  "vitg16": ("g", 16, 16, 44),
}


def get_config(variant: str = "vith14") -> ml_collections.ConfigDict:
  """One of VARIANTS."""
  config.choose("variant", variant, VARIANTS)
  size, patch_size, predictor_depth, epochs = VARIANTS[variant]
  c = config.defaults()
  c.batch_size = 2048
  c.total = f"{epochs} epochs"

  c.data.source = "folder"
  c.data.name = "imagenet22k"
  c.data.num_examples = 14_197_122
  c.data.image_size = 224  # pixels

  c.encoder.update(models.SIZES[size])
  c.encoder.patch_size = patch_size  # pixels
  c.predictor.width = 384
  c.predictor.depth = predictor_depth
  c.predictor.num_heads = models.SIZES[size]["num_heads"]

  c.optimizer.warmup = "3 epochs"
  c.optimizer.lr_start = 2e-4
  c.optimizer.lr = 1e-3
  c.optimizer.lr_end = 1e-6
  c.optimizer.weight_decay_start = 0.04
  c.optimizer.weight_decay_end = 0.4
  c.momentum = (0.996, 1.0)

  c.compute.dtype = "bfloat16"
  c.compute.remat = "dots"
  return c
