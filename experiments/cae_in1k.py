"""CAE on ImageNet-1k: features of what is hidden, then its tokens.

Command:   python -m jepa_jax.train --config experiments/cae_in1k.py:vitb16 \\
             --workdir runs/cae_vitb16
Hardware:  a TPU pod or GPUs; plan it with python -m jepa_jax.plan.
Expected:  linear probe of CAE's paper, with DALL-E's tokens: vitb16 70.4,
           vitl16 78.1 (1,600 epochs). Here tokens are k-means of patches, and
           what is hidden are random patches, not blocks. Both figures stand in
           Table 1 of Assran et al. 2023 (arXiv:2301.08243); the settings are
           to be checked against CAE's paper.
Seen:      not run: it needs a pod.

Reference: Chen et al. 2022, appendix, arXiv:2202.03026.
"""

import ml_collections

from jepa_jax import config, models

VARIANTS = {"vitb16": "b", "vitl16": "l"}


def get_config(variant: str = "vitb16") -> ml_collections.ConfigDict:
  """One of VARIANTS."""
  config.choose("variant", variant, VARIANTS)
  c = config.defaults("cae")
  c.batch_size = 2048
  c.total = "1600 epochs"

  c.data.name = "imagenet2012"
  c.data.num_examples = 1_281_167
  c.data.image_size = 224  # pixels
  c.data.crop_scale = (0.08, 1.0)  # share of the area
  c.data.flip = True
  c.data.color_jitter = 0.4
  c.masks.name = "random"
  c.masks.num_targets = 1
  c.masks.target_scale = (0.5, 0.5)

  c.encoder.update(models.SIZES[VARIANTS[variant]])
  c.encoder.patch_size = 16  # pixels
  c.encoder.class_token = True
  c.encoder.drop_path = 0.1
  c.predictor.depth = 4  # of the regressor, which is as wide as the encoder
  c.method.decoder_depth = 4
  c.method.tokens = 8192
  c.method.alignment = 2.0

  c.optimizer.warmup = "20 epochs"
  c.optimizer.lr_start = 0.0
  c.optimizer.lr = 3e-3
  c.optimizer.lr_end = 1e-5
  c.optimizer.b2 = 0.98
  c.optimizer.weight_decay_start = 0.05
  c.optimizer.weight_decay_end = 0.05
  c.optimizer.clip_norm = 3.0

  c.compute.dtype = "bfloat16"
  c.compute.remat = "dots"
  c.evaluations.imagenet = config.evaluation("label", test="validation")
  return c
