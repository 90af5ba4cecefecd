"""data2vec on ImageNet-1k with the released hyperparameters.

Command:   python -m jepa_jax.train \\
             --config experiments/data2vec_in1k.py:vitl16 \\
             --workdir with a folder that every host sees
Hardware:  a TPU slice or GPUs; `python -m jepa_jax.plan` says how many.
Data:      TFDS imagenet2012, prepared by hand from the two archives.
Expected:  top-1 of a linear probe, vitl16 after 1,600 epochs 77.3: Table 1 of
           Assran et al. 2023 (arXiv:2301.08243). Of vitb16 it says nothing.
Seen:      not run here.

vitb16 follows the released command for 800 epochs (Baevski et al. 2022,
section 4.1, arXiv:2202.03555); vitl16 takes its values, for longer. Differs: no
relative positions and no layer scale in the encoder; six rectangles mask 60 %
of the patches in the mean, where the released code adds blocks up to 120 of
196; the momentum rises over the whole training.
"""

import ml_collections

from jepa_jax import config, models

VARIANTS = {"vitb16": ("b", 800), "vitl16": ("l", 1600)}


def get_config(variant: str = "vitl16") -> ml_collections.ConfigDict:
  """One of VARIANTS."""
  config.choose("variant", variant, VARIANTS)
  size, epochs = VARIANTS[variant]
  c = config.defaults("data2vec")
  c.batch_size = 2048
  c.total = f"{epochs} epochs"

  c.data.name = "imagenet2012"
  c.data.num_examples = 1_281_167
  c.data.image_size = 224  # pixels
  c.data.crop_scale = (0.08, 1.0)  # share of the area
  c.data.flip = True
  c.data.color_jitter = 0.4
  # What is masked is the union of the targets: 60 % in the mean.
  c.masks.name = "corrected"
  c.masks.num_targets = 6
  c.masks.target_scale = (0.15, 0.2)
  c.masks.aspect_ratio = (0.3, 1 / 0.3)

  c.encoder.update(models.SIZES[size])
  c.encoder.patch_size = 16  # pixels
  c.encoder.class_token = True
  c.encoder.drop_path = 0.25
  c.method.layers = models.SIZES[size]["depth"] // 2
  c.method.beta = 2.0

  c.optimizer.warmup = "10 epochs"
  c.optimizer.lr_start = 0.0
  c.optimizer.lr = 2e-3
  c.optimizer.lr_end = 1e-5
  c.optimizer.weight_decay_start = 0.05
  c.optimizer.weight_decay_end = 0.05
  c.optimizer.clip_norm = 3.0
  c.momentum = (0.999, 0.9998)

  c.compute.dtype = "bfloat16"
  c.compute.remat = "dots"
  c.evaluations.imagenet = config.evaluation("label", test="validation")
  return c
