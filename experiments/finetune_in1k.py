"""Fine-tuning of I-JEPA on ImageNet-1k, with all labels or 1 % of them.

Command:   python -m jepa_jax.train \\
             --config experiments/finetune_in1k.py:vith14_1pct \\
             --workdir with a folder that every host sees \\
             --config.init_from=WEIGHTS
           WEIGHTS: a run, an export, a released checkpoint or a Hugging Face
           folder, see jepa_jax.load; of any image size, for positions are
           computed.
Hardware:  a TPU slice or GPUs; `python -m jepa_jax.plan` says how many.
Data:      TFDS imagenet2012, and imagenet2012_subset/1pct.
Expected:  top-1, Tables 2 and 15 of Assran et al. 2023 (arXiv:2301.08243), the
           better of fine-tuning and linear probe: vitl16_1pct 69.4, vith14_1pct
           73.3, vith16_448_1pct 77.3; vith16_448 87.1.
Seen:      not run here.

RandAugment is as MAE's. That images of 448 pixels have crops of (.08, 1) and a
warm-up of 5 epochs are guesses.
"""

import ml_collections

from jepa_jax import config, models

VARIANTS = {
  # size, patch size, image size, weight decay
  "vitl16_1pct": ("l", 16, 224, 0.05),
  "vith14_1pct": ("h", 14, 224, 0.4),
  "vith16_448_1pct": ("h", 16, 448, 0.4),
  "vith16_448": ("h", 16, 448, 0.04),
}


def get_config(variant: str = "vith14_1pct") -> ml_collections.ConfigDict:
  """One of VARIANTS; those that end with _1pct learn from 1 % of the labels."""
  config.choose("variant", variant, VARIANTS)
  size, patch_size, image_size, weight_decay = VARIANTS[variant]
  few = variant.endswith("_1pct")
  c = config.defaults("supervised")
  c.batch_size = 512 if few else 528
  c.total = "50 epochs"

  c.data.name = "imagenet2012_subset/1pct" if few else "imagenet2012"
  c.data.num_examples = 12_811 if few else 1_281_167
  c.data.image_size = image_size  # pixels
  c.data.crop_scale = (0.08, 1.0)  # share of the area
  c.data.flip = True
  c.data.rand_augment = (2, 9.0)  # operations, strength
  c.method.classes = 1000
  c.method.layer_decay = 0.75
  c.method.label_smoothing = 0.1 if few else 0.0
  c.method.mixup = 0.0 if few else 0.8
  c.method.cutmix = 0.0 if few else 1.0

  c.encoder.update(models.SIZES[size])
  c.encoder.patch_size = patch_size  # pixels
  c.encoder.drop_path = 0.0 if few else 0.25

  c.optimizer.warmup = "5 epochs"
  c.optimizer.lr_start = 0.0
  c.optimizer.lr = 3e-5 if few else 1e-4
  c.optimizer.lr_end = 0.0
  c.optimizer.weight_decay_start = weight_decay
  c.optimizer.weight_decay_end = weight_decay

  c.compute.dtype = "bfloat16"
  c.compute.remat = "dots"
  c.evaluations.imagenet = config.evaluation(
    "label",
    test="validation",
    protocols=("head",),
    name="imagenet2012",
  )
  c.evaluations.imagenet.update(
    features=("last",), baselines=(), train="train[:1000]"
  )
  return c
