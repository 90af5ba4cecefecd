"""A decoder (RCDM) of what I-JEPA predicts: Figure 6 of the paper.

Command:   python -m jepa_jax.train --config experiments/decoder.py:scenes \\
             --workdir runs/decoder --config.init_from=runs/quickstart
           --config.method.condition=target decodes averaged targets (Figures
           7 and 8 of the paper), and needs a target encoder alone:
           --config.init_which=target.
Hardware:  scenes: 1 CPU core, 25 minutes, after experiments/quickstart.py.
           in1k: GPUs or a TPU slice; `python -m jepa_jax.plan` says how many.
           The network has 422 million parameters.
Data:      in1k: TFDS imagenet2012, prepared by hand from the two archives.
Expected:  samples of a prediction agree in what is predicted, such as pose and
           category of an object, and differ in detail and background.
Seen:      in1k: not run here. scenes, averaged targets: error of the noise
           .045; samples keep number and colours of things, and find their image
           again among 64 for a third. Averaged predictions: samples are scenes,
           and hardly their image's. docs/pictures.md.

in1k follows appendix E of Assran et al. 2023 (arXiv:2301.08243), which takes
the defaults of Bordes et al. 2022 (arXiv:2112.09164): 300,000 iterations, 1,000
steps, a linear schedule, images of 128 pixels, 256 channels, 2 blocks a level,
a learning rate of 1e-4. The batch size is not stated there; 256 is that of
Dhariwal and Nichol 2021 (arXiv:2105.05233), as is the average's decay.
"""

import ml_collections
import quickstart

from jepa_jax import config, models


def get_config(variant: str = "scenes") -> ml_collections.ConfigDict:
  """Variants: "scenes" and "in1k"."""
  config.choose("variant", variant, ("scenes", "in1k"))
  c = _scenes() if variant == "scenes" else _in1k()
  c.init_which = "all"
  c.optimizer.weight_decay_start = c.optimizer.weight_decay_end = 0.0
  c.evaluations = {}  # the encoder's were made where it was trained
  return c


def _scenes() -> ml_collections.ConfigDict:
  """Images of 32 pixels of what the quickstart's networks say of 64."""
  c = config.defaults("decoder")
  start = quickstart.get_config()
  for part in ("data", "masks", "encoder", "predictor", "compute"):
    c[part].update(start[part].to_dict())
  c.batch_size = 32
  c.total = "6000 steps"
  c.method.image_size = 32  # pixels
  c.method.pixels = "data"  # scenes are low in contrast
  c.method.channels = 24
  c.method.multipliers = (1, 2, 3)
  c.method.blocks = 1
  c.method.attention = (4,)
  c.method.patch_size = 2  # pixels
  c.momentum = (0.995, 0.999)
  c.optimizer.warmup = "100 steps"
  c.optimizer.lr_start = 1e-4
  c.optimizer.lr = 1e-3
  c.optimizer.lr_end = 1e-4
  c.log_every = "20 steps"
  c.checkpoint.every = "200 steps"
  return c


def _in1k() -> ml_collections.ConfigDict:
  """The paper's, of ViT-H/14."""
  c = config.defaults("decoder")
  c.batch_size = 256
  c.total = "300000 steps"
  c.data.name = "imagenet2012"
  c.data.num_examples = 1_281_167
  c.data.image_size = 224  # pixels, of the encoder
  c.data.crop_scale = (1.0, 1.0)
  c.encoder.update(models.SIZES["h"])
  c.encoder.patch_size = 14  # pixels
  c.predictor.update(width=384, depth=12, num_heads=16)
  c.momentum = (0.9999, 0.9999)
  c.optimizer.warmup = "0 steps"
  c.optimizer.lr = c.optimizer.lr_end = 1e-4
  c.compute.dtype = "bfloat16"
  c.compute.remat = "full"
  c.checkpoint.every = "5000 steps"
  return c
