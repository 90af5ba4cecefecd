"""Random crops, flips and colours.

All random choices are made in NumPy, for a whole batch at a time, as a function
of (seed, epoch, image); only applying them is TensorFlow.
"""

import dataclasses
from typing import Any

import numpy as np
import tensorflow as tf

from jepa_jax import models
from jepa_jax.data import decode, rand_augment
from jepa_jax.masks import counter_rng

_CROP_ATTEMPTS = 10
# EXIF orientation -> (transpose, then flip rows, then flip columns).
_FLIPS = {
  1: (0, 0, 0),
  2: (0, 0, 1),
  3: (0, 1, 1),
  4: (0, 1, 0),
  5: (1, 0, 0),
  6: (1, 0, 1),
  7: (1, 1, 1),
  8: (1, 1, 0),
}
_JITTER_SHARE, _GREY_SHARE = 0.8, 0.2  # of the images, with colour jitter on
_SOLARIZED = 128  # what is at least as bright is inverted, of 0 to 255
COLORS = 7  # numbers that say what becomes of an image's colours
_BLUR_SIGMA = (0.1, 2.0)  # pixels, of an image of 224


@dataclasses.dataclass(frozen=True)
class Crops:
  """The crop of each image of a batch, and how to flip it.

  Attributes:
    boxes: int32 [B, 4]; top, left, height, width in *stored* pixels.
    flips: bool [B, 3]; transpose, then flip rows, then flip columns.
  """

  boxes: np.ndarray
  flips: np.ndarray


def random_crops(
  config: Any,
  sizes: np.ndarray,
  orientations: np.ndarray,
  *,
  seed: int,
  epoch: np.ndarray,
  index: np.ndarray,
  view: np.ndarray | None = None,
) -> Crops:
  """Random resized crops, and flips where config.flip says so.

  A crop's share of the area is uniform in crop_scale, its aspect ratio (width
  over height, relative to image_size's) log-uniform in crop_ratio. The first of
  ten draws that fits in the image counts; if none fits, the largest central
  crop of a legal ratio.

  Args:
    config: config.data.
    sizes: [B, 2] height and width as stored, pixels.
    orientations: [B] EXIF orientation.
    seed: the run's seed.
    epoch: [B].
    index: [B] index of each image in its source.
    view: [B], of several crops of an image; None for the only one.

  Reference: Szegedy et al. 2014, section 6, arXiv:1409.4842, as torchvision's
    RandomResizedCrop does it.
  """
  flips = np.asarray([_FLIPS[int(x)] for x in orientations], bool)
  height, width = _displayed(sizes, flips)
  key = _key(seed, epoch, index, view)
  u = (
    counter_rng.random_bits(np, key, 4 * _CROP_ATTEMPTS + 1) / 2.0**32
  )  # [B, 41]
  scale, ratio, top, left = np.split(u[:, :-1], 4, axis=1)

  low, high = config.crop_scale
  area = (height * width)[:, None] * (low + scale * (high - low))
  sides = models.height_and_width(config.image_size)
  ratios = np.asarray(config.crop_ratio) * (sides[1] / sides[0])
  low, high = np.log(ratios)
  ratio = np.exp(low + ratio * (high - low))
  w = np.round(np.sqrt(area * ratio)).astype(np.int64)
  h = np.round(np.sqrt(area / ratio)).astype(np.int64)
  fits = (0 < w) & (w <= width[:, None]) & (0 < h) & (h <= height[:, None])
  top = np.floor(top * (height[:, None] - h + 1)).astype(np.int64)
  left = np.floor(left * (width[:, None] - w + 1)).astype(np.int64)
  boxes = np.stack([top, left, h, w], -1)  # [B, 10, 4]
  chosen = boxes[np.arange(len(boxes)), fits.argmax(1)]
  box = np.where(
    fits.any(1)[:, None],
    chosen,
    _central_box(height, width, *ratios),
  )
  if config.flip:
    mirrored = u[:, -1] < 0.5
  else:
    mirrored = np.zeros(len(u), bool)
  # The box is chosen in the image as displayed; the crop is mirrored after it.
  box = _stored(box, height, width, flips)
  flips = flips ^ np.stack([0 * mirrored, 0 * mirrored, mirrored], -1) > 0
  return Crops(box, flips)


def _key(
  seed: int, epoch: np.ndarray, index: np.ndarray, view: np.ndarray | None
) -> np.ndarray:
  """Of each image of a batch, or of each view of an image."""
  key = counter_rng.stream_key(seed, counter_rng.AUGMENT)
  for value in (epoch, index):
    key = counter_rng.fold_in(np, key, value.astype(np.uint32))
  if view is not None:  # 1 is the colours', 0 RandAugment's
    key = counter_rng.fold_in(np, key, (view + 2).astype(np.uint32))
  return key


def central_crops(
  image_size: tuple[int, int], sizes: np.ndarray, orientations: np.ndarray
) -> Crops:
  """The largest central part of each image with image_size's ratio.

  Args:
    image_size: height and width, in any unit.
    sizes: as for `random_crops`.
    orientations: as for `random_crops`.
  """
  flips = np.asarray([_FLIPS[int(x)] for x in orientations], bool)
  height, width = _displayed(sizes, flips)
  ratio = image_size[1] / image_size[0]
  box = _central_box(height, width, ratio, ratio)
  return Crops(_stored(box, height, width, flips), flips)


def _displayed(
  sizes: np.ndarray, flips: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Heights and widths of the images as displayed, int64 [B] each."""
  sizes = np.where(flips[:, :1], sizes[:, ::-1], sizes).astype(np.int64)
  return sizes[:, 0], sizes[:, 1]


def _central_box(
  height: np.ndarray, width: np.ndarray, low: float, high: float
) -> np.ndarray:
  """Largest central boxes whose width over height is in [low, high]."""
  w = np.minimum(width, np.round(height * high)).astype(np.int64)
  h = np.minimum(height, np.round(width / low)).astype(np.int64)
  w, h = np.maximum(w, 1), np.maximum(h, 1)
  return np.stack([(height - h) // 2, (width - w) // 2, h, w], -1)


def _stored(
  box: np.ndarray, height: np.ndarray, width: np.ndarray, flips: np.ndarray
) -> np.ndarray:
  """Boxes of the displayed image in coordinates of the stored one."""
  top, left, h, w = box.T
  top = np.where(flips[:, 1], height - top - h, top)
  left = np.where(flips[:, 2], width - left - w, left)
  box = np.stack([top, left, h, w], -1)
  box = np.where(flips[:, :1], box[:, [1, 0, 3, 2]], box)
  return box.astype(np.int32)


def distorts(config: Any) -> bool:
  """Whether config.data changes colours or blurs."""
  return bool(
    config.color_jitter
    or config.blur
    or config.grayscale
    or config.solarize
    or config.rand_augment[0]
  )


def colors(config: Any) -> int:
  """Numbers that say what becomes of an image's colours."""
  return COLORS + rand_augment.NUMBERS * config.rand_augment[0]


def random_colors(
  config: Any,
  *,
  seed: int,
  epoch: np.ndarray,
  index: np.ndarray,
  view: np.ndarray | None = None,
) -> np.ndarray:
  """Random parameters of `distort` for a batch of images.

  With colour jitter of strength s, 80 % of the images change brightness,
  contrast and saturation by factors uniform in 1 +- .8 s (not below 0), and hue
  by up to .2 s of the circle (at most half); 20 % turn grey, or
  config.grayscale if that is more. A share config.blur is blurred, with a
  deviation of .1 to 2 pixels at 224 pixels, a share config.solarize solarised.

  Args:
    config: config.data.
    seed: the run's seed.
    epoch: [B].
    index: [B] index of each image in its source.
    view: see random_crops.

  Returns:
    float32 [B, colors(config)]: brightness, contrast, saturation, hue, grey,
    sigma, solarise, and what rand_augment.draw gives.

  Reference: Chen et al. 2020, appendix A, arXiv:2002.05709.
  """
  key = _key(seed, epoch, index, view)
  operations = counter_rng.fold_in(np, key, np.uint32([0]))
  key = counter_rng.fold_in(np, key, np.uint32([1]))  # not the crop's bits
  u = counter_rng.random_bits(np, key, 9) / 2.0**32
  strength = config.color_jitter
  factor = np.maximum(1 + 0.8 * strength * (2 * u[:, :3] - 1), 0)
  hue = min(0.2 * strength, 0.5) * (2 * u[:, 3:4] - 1)
  jitter = u[:, 4:5] < _JITTER_SHARE
  grey_share = max(config.grayscale, _GREY_SHARE if strength else 0)
  grey = u[:, 5:6] < grey_share
  low, high = (_scale(config) * x for x in _BLUR_SIGMA)
  sigma = np.where(u[:, 6:7] < config.blur, low + u[:, 7:8] * (high - low), 0)
  parts = (np.where(jitter, factor, 1), np.where(jitter, hue, 0), grey, sigma)
  parts += (u[:, 8:] < config.solarize,)
  if config.rand_augment[0]:
    parts += (rand_augment.draw(*config.rand_augment, operations),)
  return np.concatenate(parts, axis=1).astype(np.float32)


def distort(image: tf.Tensor, color: tf.Tensor, config: Any) -> tf.Tensor:
  """Changes the colours of an image and blurs it.

  Differs: torchvision shuffles the order of the four changes.

  Args:
    image: float32 [H, W, C] on a scale of 0 to 255.
    color: float32 [colors(config)], as `random_colors` gives it.
    config: config.data.

  Returns:
    As image.
  """
  if config.color_jitter:
    image = tf.clip_by_value(image * color[0], 0, 255)
    mean = tf.reduce_mean(_grey(image))
    image = tf.clip_by_value(mean + (image - mean) * color[1], 0, 255)
    if image.shape[-1] == 3:
      grey = _grey(image)
      image = tf.clip_by_value(grey + (image - grey) * color[2], 0, 255)
      image = tf.image.adjust_hue(image / 255, color[3]) * 255
  if image.shape[-1] == 3 and (config.color_jitter or config.grayscale):
    image = tf.where(color[4] > 0, _grey(image), image)
  if config.blur:
    image = _blur(image, color[5], _scale(config))
  if config.solarize:
    bright = (image >= _SOLARIZED) & (color[6] > 0)
    image = tf.where(bright, 255 - image, image)
  if config.rand_augment[0]:
    image = rand_augment.apply(image, color[COLORS:], tuple(config.mean))
  return image


def _grey(image: tf.Tensor) -> tf.Tensor:
  return decode.to_grey(image) if image.shape[-1] == 3 else image


def _scale(config: Any) -> float:
  """Pixels of the shorter side for one of an image of 224 pixels."""
  return min(models.height_and_width(config.image_size)) / 224


def _blur(image: tf.Tensor, sigma: tf.Tensor, scale: float) -> tf.Tensor:
  """Gaussian blur with reflected borders; sigma 0 changes nothing."""
  radius = int(np.ceil(3 * _BLUR_SIGMA[1] * scale))
  offsets = np.arange(-radius, radius + 1, dtype=np.float32)
  kernel = tf.exp(-(offsets**2) / (2 * tf.maximum(sigma, 1e-2) ** 2))
  kernel = kernel / tf.reduce_sum(kernel)
  for axis in (0, 1):
    pads = [[radius, radius] if i == axis else [0, 0] for i in range(3)]
    padded = tf.pad(image, pads, "REFLECT")
    length = image.shape[axis]
    begin = [0, 0, 0]
    image = 0.0
    for i in range(2 * radius + 1):
      begin[axis] = i
      size = [-1, -1, -1]
      size[axis] = length
      image += kernel[i] * tf.slice(padded, begin, size)
  return image
