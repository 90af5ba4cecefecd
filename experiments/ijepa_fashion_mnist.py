"""I-JEPA on Fashion-MNIST: 60,000 images of 28 pixels in grey.

Command:   python -m jepa_jax.train \\
             --config experiments/ijepa_fashion_mnist.py \\
             --workdir runs/fashion_mnist --config.data.data_dir=DIR
           DIR holds TFDS's fashion_mnist/3.0.1.
Hardware:  2 CPU cores, half an hour.
Expected:  the paper has no such experiment. The released PyTorch code at this
           size and budget: linear 79.2, 20-NN 75.4 (random encoder 75.5 and
           60.7, raw pixels 83.5 and 86.2).
Seen:      three seeds, last layer: linear 81.0, 82.2, 82.2; 20-NN
           75.2, 76.9, 76.8 (random encoder: linear
           77.8, 78.6, 77.7; 20-NN 64.9, 57.5, 63.5).
"""

import ml_collections

from jepa_jax import config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """No variants."""
  config.choose("variant", variant, ("",))
  c = config.defaults()
  c.batch_size = 128
  c.total = "2808 steps"  # 6 epochs

  c.data.name = "fashion_mnist"
  c.data.num_examples = 60_000
  c.data.image_size = 28  # pixels
  c.data.channels = 1
  c.data.mean = (0.286,)  # of the training images
  c.data.std = (0.353,)
  c.masks.min_keep = 4  # patches, of a grid of 7 x 7
  # The mean of what the sampler leaves. The released code cuts a batch to its
  # smallest context, 7 here: with that 20-NN was 1.4 points lower (seed 0).
  c.masks.context_patches = 14

  c.encoder.update(width=128, depth=6, num_heads=4, mlp_ratio=4.0)
  c.encoder.patch_size = 4  # pixels
  c.predictor.update(width=64, depth=4, num_heads=4)

  c.optimizer.warmup = "1 epochs"
  c.compute.dtype = "float32"  # as fast as bfloat16 on a CPU
  c.compute.scan = False  # unrolled is faster on a CPU

  c.log_every = "20 steps"
  c.checkpoint.every = "500 steps"
  c.evaluations.clothing = config.evaluation("label")
  return c
