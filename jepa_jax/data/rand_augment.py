"""RandAugment: a few operations on an image, drawn at random, of one strength.

What is drawn is NumPy, a function of (seed, epoch, image); applying it is
TensorFlow.

Axes: B images, L operations an image, H W pixels, C channels.

Reference: Cubuk et al. 2019, arXiv:1909.13719, with the operations and ranges
that timm calls "rand-m9-mstd0.5-inc1", which MAE's fine-tuning takes: a larger
strength is a larger change, strengths vary by a deviation of .5, and each
operation is left out in one case of two.
  Differs: affine operations interpolate bilinearly, always, and shear about the
  centre; posterizing keeps at least one bit.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from jepa_jax.data import decode
from jepa_jax.masks import counter_rng

MOST = 10.0  # the largest strength
_DEVIATION = 0.5
NUMBERS = 3  # that say what an operation does: which, its strength, its sign


def draw(count: int, strength: float, keys: np.ndarray) -> np.ndarray:
  """What becomes of each image of a batch.

  Args:
    count: L.
    strength: mean, of 0 to MOST.
    keys: of counter_rng, [B, ...], an image each.

  Returns:
    float32 [B, L * NUMBERS]: the operation's number in OPERATIONS, or -1 for
    none; its strength over MOST, in [0, 1]; its sign, -1 or 1.
  """
  u = counter_rng.random_bits(np, keys, 5 * count) / 2.0**32
  which, left_out, sign, radius, angle = np.moveaxis(
    u.reshape(-1, count, 5), -1, 0
  )
  normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)
  drawn = np.clip(strength + _DEVIATION * normal, 0, MOST) / MOST
  number = np.where(left_out < 0.5, -1, np.floor(which * len(OPERATIONS)))
  made = np.stack([number, drawn, np.where(sign < 0.5, -1, 1)], axis=-1)
  return made.reshape(len(made), -1).astype(np.float32)


def apply(
  image: tf.Tensor, drawn: tf.Tensor, fill: tuple[float, ...]
) -> tf.Tensor:
  """Applies what was drawn for an image, one operation after another.

  Args:
    image: float32 [H, W, C] on a scale of 0 to 255.
    drawn: float32 [L * NUMBERS], a row of `draw`'s.
    fill: [C], on a scale of 0 to 1, of what comes in at the edges.

  Returns:
    As image.
  """
  fill = 255 * tf.constant(fill, tf.float32)
  for i in range(drawn.shape[0] // NUMBERS):
    number, strength, sign = tf.unstack(drawn[i * NUMBERS : (i + 1) * NUMBERS])
    branches = [
      lambda of=of, x=image, s=strength, g=sign: tf.ensure_shape(
        tf.clip_by_value(of(tf.round(x), s, g, fill), 0, 255), image.shape
      )
      for of in OPERATIONS.values()
    ]
    same = lambda x=image: x
    image = tf.switch_case(tf.cast(number, tf.int32), branches, default=same)
  return image


def _autocontrast(x, strength, sign, fill):
  """Each channel stretched to 0 ... 255."""
  del strength, sign, fill
  low = tf.reduce_min(x, axis=(0, 1))
  span = tf.reduce_max(x, axis=(0, 1)) - low
  return tf.where(span > 0, (x - low) * 255 / tf.maximum(span, 1), x)


def _equalize(x, strength, sign, fill):
  """Each channel's values spread evenly, by its histogram."""
  del strength, sign, fill
  channels = []
  for values in tf.unstack(tf.cast(x, tf.int32), axis=2):
    counts = tf.math.bincount(tf.reshape(values, [-1]), minlength=256)
    last = tf.gather(counts, tf.reduce_max(values))
    step = (tf.reduce_sum(counts) - last) // 255
    table = tf.cumsum(counts, exclusive=True) + step // 2
    table = tf.minimum(table // tf.maximum(step, 1), 255)
    channels.append(tf.where(step > 0, tf.gather(table, values), values))
  return tf.cast(tf.stack(channels, axis=2), tf.float32)


def _invert(x, strength, sign, fill):
  del strength, sign, fill
  return 255 - x


def _posterize(x, strength, sign, fill):
  """Keeps 4 bits to 1."""
  del sign, fill
  step = 2.0 ** (8 - tf.maximum(4 - tf.floor(4 * strength), 1))
  return tf.floor(x / step) * step


def _solarize(x, strength, sign, fill):
  """Inverts what is at least so bright."""
  del sign, fill
  return tf.where(x >= 256 - tf.floor(256 * strength), 255 - x, x)


def _solarize_add(x, strength, sign, fill):
  """Brightens the darker half of the scale."""
  del sign, fill
  return tf.where(x < 128, x + tf.floor(110 * strength), x)


def _blended(other: Callable[[tf.Tensor], tf.Tensor]):
  """An operation that goes from `other` of an image, past it, by a factor."""

  def operation(x, strength, sign, fill):
    del fill
    base = other(x)
    return base + (1 + sign * 0.9 * strength) * (x - base)

  return operation


def _grey(x):
  return decode.to_grey(x) if x.shape[2] == 3 else x


def _smooth(x):
  """A mean of 3 x 3 that weighs the middle five times; the edge as it is."""
  kernel = tf.constant([[1.0, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
  kernel = tf.tile(kernel[:, :, None, None], (1, 1, x.shape[2], 1))
  inner = tf.nn.depthwise_conv2d(x[None], kernel, (1, 1, 1, 1), "VALID")[0]
  paddings = ((1, 1), (1, 1), (0, 0))
  edge = tf.pad(tf.zeros_like(inner), paddings, constant_values=1)
  return tf.where(edge > 0, x, tf.pad(inner, paddings))


def _affine(matrix: Callable[..., list]):
  """An operation that reads (x, y) at matrix (x, y, 1), from the centre."""

  def operation(x, strength, sign, fill):
    height, width = x.shape[:2]
    a, b, c, d, e, f = matrix(sign * strength, height, width)
    x0, y0 = (width - 1) / 2, (height - 1) / 2
    c = c + x0 - a * x0 - b * y0
    f = f + y0 - d * x0 - e * y0
    moved = tf.raw_ops.ImageProjectiveTransformV3(
      images=(x - fill)[None],
      transforms=tf.stack([a, b, c, d, e, f, 0.0, 0.0])[None],
      output_shape=(height, width),
      fill_value=0.0,
      interpolation="BILINEAR",
      fill_mode="CONSTANT",
    )
    return moved[0] + fill

  return operation


def _rotation(s, height, width):
  del height, width
  angle = s * np.pi / 6  # 30 degrees at most
  cos, sin = tf.cos(angle), tf.sin(angle)
  return [cos, -sin, 0.0, sin, cos, 0.0]


def _shift(columns, rows):
  """By shares of the image's sides."""
  return lambda s, height, width: [
    *(1.0, 0.0, columns * s * width),
    *(0.0, 1.0, rows * s * height),
  ]


OPERATIONS = {
  "autocontrast": _autocontrast,
  "equalize": _equalize,
  "invert": _invert,
  "posterize": _posterize,
  "solarize": _solarize,
  "solarize_add": _solarize_add,
  "color": _blended(_grey),
  "contrast": _blended(lambda x: tf.round(tf.reduce_mean(_grey(x)))),
  "brightness": _blended(tf.zeros_like),
  "sharpness": _blended(_smooth),
  "rotate": _affine(_rotation),
  "shear_x": _affine(lambda s, h, w: [1.0, 0.3 * s, 0.0, 0.0, 1.0, 0.0]),
  "shear_y": _affine(lambda s, h, w: [1.0, 0.0, 0.0, 0.3 * s, 1.0, 0.0]),
  "translate_x": _affine(_shift(0.45, 0.0)),
  "translate_y": _affine(_shift(0.0, 0.45)),
}
