"""Sources, order, augmentation and masks: what feeds a training step.

The only room that imports TensorFlow at module level. TensorFlow decodes and
resizes on the host; it must never claim an accelerator, so every device but
the CPU is hidden from it here, before any module of the room runs.
"""

import tensorflow as tf

for _kind in ("GPU", "TPU"):
  tf.config.set_visible_devices([], _kind)
