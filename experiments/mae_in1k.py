"""Masked autoencoders on ImageNet-1k with the paper's hyperparameters.

Command:   python -m jepa_jax.train --config experiments/mae_in1k.py:vith14 \\
             --workdir with a folder that every host sees
Hardware:  a TPU slice or GPUs; `python -m jepa_jax.plan` says how many.
Data:      TFDS imagenet2012, prepared by hand from the two archives.
Expected:  top-1 of a linear probe after 1,600 epochs, Table 1 of Assran et al.
           2023 (arXiv:2301.08243): vitb16 68.0, vitl16 76.0, vith14 77.2.
Seen:      not run here.

Hyperparameters are those of He et al. 2022, appendix A.1, arXiv:2111.06377.
Differs: initial values are those of I-JEPA, normal with .02.
"""

import ml_collections

from jepa_jax import config, models

VARIANTS = {"vitb16": ("b", 16), "vitl16": ("l", 16), "vith14": ("h", 14)}


def get_config(variant: str = "vith14") -> ml_collections.ConfigDict:
  """One of VARIANTS."""
  config.choose("variant", variant, VARIANTS)
  size, patch_size = VARIANTS[variant]
  c = config.defaults("mae")
  c.batch_size = 4096
  c.total = "1600 epochs"

  c.data.name = "imagenet2012"
  c.data.num_examples = 1_281_167
  c.data.image_size = 224  # pixels
  c.data.crop_scale = (0.2, 1.0)  # share of the area
  c.data.flip = True
  # A random quarter of the patches is seen.
  c.masks.name = "random"
  c.masks.num_targets = 1
  c.masks.target_scale = (0.75, 0.75)
  c.loss = "l2"

  c.encoder.update(models.SIZES[size])
  c.encoder.patch_size = patch_size  # pixels
  c.encoder.class_token = True
  c.predictor.update(width=512, depth=8, num_heads=16)  # the decoder

  c.optimizer.warmup = "40 epochs"
  c.optimizer.lr_start = 0.0
  c.optimizer.lr = 2.4e-3  # 1.5e-4 for 256 images
  c.optimizer.lr_end = 0.0
  c.optimizer.b2 = 0.95
  c.optimizer.weight_decay_start = 0.05
  c.optimizer.weight_decay_end = 0.05

  c.compute.dtype = "bfloat16"
  c.compute.remat = "dots"
  c.evaluations.imagenet = config.evaluation("label", test="validation")
  return c
