"""I-JEPA on your own images: a folder, and nothing else to say.

Command:   python -m jepa_jax.train --config experiments/folder.py:PATH \\
             --workdir runs/mine [--config.data.image_size=96] \\
             [--config.total="50 epochs"]
           PATH holds images at any depth. Sub-folders are classes, and are
           probed, where two or more are trained on; `train` and `test` folders
           are splits, else a tenth of the images is held out.
Hardware:  2 CPU cores: some 300 images of 64 pixels a second. A GPU: also
           --config.compute.dtype=bfloat16 --config.compute.scan=True.
Expected:  nothing known; judge by the report, beside a random encoder and
           pixels.
Seen:      20 pictures of mixed formats from nothing to a report in a minute.
"""

import ml_collections

from jepa_jax import config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """The variant is the folder."""
  if not variant:
    raise ValueError(
      "experiments/folder.py needs a folder of images: "
      "--config experiments/folder.py:PATH."
    )
  c = config.defaults()
  c.batch_size = 64
  c.total = "100 epochs"

  c.data.source = "folder"
  c.data.name = variant
  c.data.image_size = 64  # pixels
  c.masks.name = "corrected"
  c.masks.min_keep = 4  # patches, of a grid of 8 x 8

  c.encoder.update(width=128, depth=6, num_heads=4, mlp_ratio=4.0)
  # Pixels: 8 x 8 patches of images of any size, more of such as (64, 96).
  c.encoder.patch_size = c.data.get_ref("image_size") // _Parts(8)
  c.predictor.update(width=64, depth=4, num_heads=4)

  c.optimizer.warmup = "10 %"  # of the total
  c.optimizer.lr_start = 1e-4
  c.optimizer.lr = 5e-4
  c.compute.dtype = "float32"  # as fast as bfloat16 on a CPU
  c.compute.scan = False  # unrolled is faster on a CPU

  c.log_every = "10 steps"
  c.checkpoint.every = "10 epochs"
  from jepa_jax.data import folder

  if folder.is_labelled(variant):
    c.evaluations.classes = config.evaluation("label")
  return c


class _Parts:
  """`size // _Parts(n)` is an n-th of an image's shorter side."""

  def __init__(self, n: int):
    self._n = n

  def __rfloordiv__(self, size: int | tuple[int, int]) -> int:
    return (min(size) if isinstance(size, tuple) else size) // self._n
