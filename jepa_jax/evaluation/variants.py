"""Images changed before they are encoded: random views, and corruptions.

A variant is named, such as "view 3", "crop 0", "mirror 0" or "noise 5". It is a
function of the image and that name alone, so that neither batches nor processes
matter.

Axes: B images, H W pixels, C channels.
"""

from collections.abc import Callable, Iterable, Mapping
import io
from typing import Any
import zlib

import numpy as np
from PIL import Image
from scipy import ndimage

# Random resized crops, mirrored in one case of two: share of the area.
CROPS = {"view": (0.3, 1.0), "crop": (0.08, 1.0)}
_RATIO = (3 / 4, 4 / 3)  # width over height, of a square image
# Strengths of the levels 1 to 5.
NOISE = (0.08, 0.12, 0.18, 0.26, 0.38)  # standard deviation, of a scale of 1
BLUR = (1, 2, 3, 4, 6)  # standard deviation in pixels, of an image of 224,
LEAST_BLUR = (0.4, 0.6, 0.7, 0.8, 1.0)  # and of smaller ones, at least
CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # factor
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added, of a scale of 1
JPEG = (25, 18, 15, 10, 7)  # quality
LEVELS = 5


def apply(variant: str, images: np.ndarray) -> np.ndarray:
  """Changes each image.

  Noise is Gaussian, of each number by itself; blur is Gaussian with reflected
  borders; contrast scales the distance from each channel's mean; brightness is
  added to every channel; JPEG is encoded and decoded.

  Args:
    variant: a key of CROPS and a number, which draws another crop; "mirror 0";
      or one of CORRUPTIONS and its level, 1 to 5.
    images: uint8 [B, H, W, C].

  Returns:
    As images.

  Raises:
    ValueError: images that JPEG cannot hold.

  Reference: Hendrycks & Dietterich 2019, arXiv:1903.12261; the levels are those
    of its ImageNet-C, of small images' blur those of CIFAR-10-C, as found in
    copies of its code.
    Differs: brightness is added to red, green and blue, not to the value of
    HSV; blur is in proportion to the image, but for small ones.
  """
  kind, number = variant.split()
  number = int(number)
  if kind in CROPS:
    change = lambda x: _crop(x, CROPS[kind], _random(x, variant))
  elif kind == "mirror":
    change = lambda x: x[:, ::-1]
  else:
    change = lambda x: CORRUPTIONS[kind](x, number, variant)
  return np.stack([change(x) for x in np.asarray(images)])


def corruptions() -> tuple[str, ...]:
  """The names of all corruptions at all levels."""
  return tuple(
    f"{kind} {level}" for kind in CORRUPTIONS for level in range(1, LEVELS + 1)
  )


def named(encoder: str, variant: str) -> str:
  """What an encoder of changed images is called."""
  return f"{encoder} @ {variant}"


def encoders(
  encode: Mapping[str, Callable[[Any], Any]],
  names: Iterable[str],
  variants: Iterable[str],
) -> dict[str, Callable[[Any], Any]]:
  """Encoders, and some of them once more for each variant of the images."""
  found = dict(encode)
  for variant in sorted(variants):
    for name in names:
      found[named(name, variant)] = lambda images, of=encode[name], x=variant: (
        of(apply(x, images))
      )
  return found


def of(
  encoder: str, features: Mapping[str, np.ndarray], columns: slice
) -> dict[str, np.ndarray]:
  """{variant: [n, D]} of an encoder, among the features of all of them."""
  start = named(encoder, "")
  return {
    name.removeprefix(start): x[:, columns]
    for name, x in features.items()
    if name.startswith(start)
  }


def _random(image, variant):
  """A generator that the image and the variant determine."""
  return np.random.default_rng(
    (zlib.crc32(np.ascontiguousarray(image)), zlib.crc32(variant.encode()))
  )


def _crop(image, scale, random):
  """The first of ten random boxes that fits, or the whole; maybe mirrored."""
  height, width = image.shape[:2]
  box = (0, 0, width, height)
  for _ in range(10):
    area = height * width * random.uniform(*scale)
    ratio = width / height * np.exp(random.uniform(*np.log(_RATIO)))
    w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = (
        random.integers(width - w + 1),
        random.integers(height - h + 1),
      )
      box = (left, top, left + w, top + h)
      break
  channels = [
    np.asarray(
      Image.fromarray(image[..., c]).resize(
        (width, height), Image.Resampling.BILINEAR, box
      )
    )
    for c in range(image.shape[2])
  ]
  image = np.stack(channels, axis=-1)
  return image[:, ::-1] if random.integers(2) else image


def _noise(image, level, variant):
  noise = _random(image, variant).standard_normal(image.shape, np.float32)
  return _bytes(image + 255 * NOISE[level - 1] * noise)


def _blur(image, level, variant):
  del variant
  sigma = BLUR[level - 1] * min(image.shape[:2]) / 224
  sigma = max(sigma, LEAST_BLUR[level - 1])
  blurred = ndimage.gaussian_filter(
    image.astype(np.float32), (sigma, sigma, 0), mode="mirror"
  )
  return _bytes(blurred)


def _contrast(image, level, variant):
  del variant
  mean = image.mean(axis=(0, 1), dtype=np.float32)
  return _bytes(mean + CONTRAST[level - 1] * (image - mean))


def _brightness(image, level, variant):
  del variant
  return _bytes(image + np.float32(255 * BRIGHTNESS[level - 1]))


def _jpeg(image, level, variant):
  del variant
  if image.shape[2] not in (1, 3):
    raise ValueError(
      f"JPEG holds images of 1 or 3 channels, and these have {image.shape[2]}; "
      "do without the protocol robustness."
    )
  file = io.BytesIO()
  grey = image[..., 0] if image.shape[2] == 1 else image
  Image.fromarray(grey).save(file, "JPEG", quality=JPEG[level - 1])
  return np.asarray(Image.open(file)).reshape(image.shape)


def _bytes(values):
  return np.clip(np.rint(values), 0, 255).astype(np.uint8)


CORRUPTIONS: Mapping[str, Callable[[np.ndarray, int, str], np.ndarray]] = {
  "noise": _noise,
  "blur": _blur,
  "contrast": _contrast,
  "brightness": _brightness,
  "jpeg": _jpeg,
}
