"""From encoded bytes to a crop of fixed size, uint8.

What decodes an image is chosen by its header: TensorFlow where it is fastest
and right, `pixels` elsewhere.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from jepa_jax.data import headers, pixels

KINDS = ("jpeg", "png", "other")  # of decoders, as numbers in a batch


def kind_of(header: headers.Header) -> int:
  """Number in KINDS of what decodes an image."""
  known = header.decoder in KINDS
  return KINDS.index(header.decoder if known else "other")


def decode_crop(
  encoded: tf.Tensor,
  box: tf.Tensor,
  flips: tf.Tensor,
  kind: tf.Tensor,
  *,
  image_size: tuple[int, int],
  rules: pixels.Rules,
  encoding: str | None = None,
  distort: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tf.Tensor:
  """Decodes, crops and resizes one image.

  Args:
    encoded: scalar string.
    box: int32 [4]; top, left, height, width in stored pixels.
    flips: bool [3]; as `augment.Crops.flips`.
    kind: int32 scalar; number in KINDS of what decodes it.
    image_size: height and width of the result, pixels.
    rules: what becomes of the pixels of images of all kinds.
    encoding: "jpeg" or "png" where all images are such, None elsewhere.
    distort: maps the crop, float32 on a scale of 0 to 255, before rounding.

  Returns:
    uint8 [*image_size, rules.channels].
  """
  channels = rules.channels
  # TensorFlow's decoders convert colour to grey each in its own way: images of
  # an unknown format are decoded in colour and converted after resizing.
  decoded = 3 if encoding is None and channels == 1 else channels

  def jpeg():
    return tf.image.decode_and_crop_jpeg(encoded, box, channels=decoded)

  def png():
    return _crop(tf.io.decode_png(encoded, channels=decoded), box)

  def other():
    read = lambda data: _read_or_none(data, rules, decoded)
    image = tf.numpy_function(read, [encoded], tf.uint8, stateful=False)
    return _crop(tf.ensure_shape(image, (None, None, decoded)), box)

  def fast():
    known = {"jpeg": jpeg, "png": png}.get(encoding)
    if known:
      return known()
    return tf.cond(tf.equal(kind, KINDS.index("jpeg")), jpeg, png)

  if channels in pixels.COLOR:
    image = tf.cond(tf.equal(kind, KINDS.index("other")), other, fast)
  else:
    image = other()
  image = _resize(image, image_size, flips[0])
  if decoded > channels:
    image = to_grey(image)
  if distort is not None:
    image = tf.clip_by_value(distort(image), 0, 255)
  image = tf.cast(image + 0.5, tf.uint8)  # rounds: nothing here is negative
  return tf.cond(
    tf.reduce_any(flips[1:]), lambda: _mirror(image, flips), lambda: image
  )


def _read_or_none(
  data: bytes | np.ndarray, rules: pixels.Rules, channels: int
) -> np.ndarray:
  """As pixels.read; no pixels, so that cropping fails, where that fails.

  An error's traceback would be printed by TensorFlow, for every image.
  """
  if isinstance(data, np.ndarray):
    data = data.item()
  try:
    return pixels.read(data, rules, channels)
  except ValueError:
    return np.zeros((0, 0, channels), np.uint8)


def to_grey(image: tf.Tensor) -> tf.Tensor:
  """Luma of a colour image: float32 [H, W, 3] -> [H, W, 1]."""
  return tf.linalg.matmul(image, tf.constant(pixels.LUMA)[:, None])


def _resize(
  image: tf.Tensor, size: tuple[int, int], transposed: tf.Tensor
) -> tf.Tensor:
  """uint8 [h, w, C] -> float32 [*size, C], without aliasing; transposes.

  Differs: an image that shrinks in both directions is averaged over areas, four
    times as fast as the released code's filter (PIL's bilinear, a triangle that
    widens with the scale), which serves where one direction grows.
  """
  shape = tf.shape(image)[:2]
  target = tf.constant(size)
  if size[0] != size[1]:
    target = tf.where(transposed, tf.constant(size[::-1]), target)

  def average():
    return tf.raw_ops.ResizeArea(images=image[None], size=target)[0]

  def interpolate():
    return tf.raw_ops.ScaleAndTranslate(
      images=image[None],
      size=target,
      scale=tf.cast(target, tf.float32) / tf.cast(shape, tf.float32),
      translation=tf.zeros(2),
      kernel_type="triangle",
      antialias=True,
    )[0]

  resized = tf.cond(tf.reduce_all(shape >= target), average, interpolate)
  resized = tf.cond(
    transposed, lambda: tf.transpose(resized, (1, 0, 2)), lambda: resized
  )
  return tf.ensure_shape(resized, (*size, image.shape[-1]))


def _crop(image: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
  zero = tf.zeros([1], tf.int32)
  full = tf.shape(image)[2:]
  return tf.slice(
    image, tf.concat([box[:2], zero], 0), tf.concat([box[2:], full], 0)
  )


def _mirror(image: tf.Tensor, flips: tf.Tensor) -> tf.Tensor:
  """Flips rows and columns as `augment.Crops.flips` says."""
  image = tf.where(flips[1], image[::-1], image)
  return tf.where(flips[2], image[:, ::-1], image)
