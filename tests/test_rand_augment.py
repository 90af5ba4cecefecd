"""RandAugment: what is drawn, and each operation against Pillow's."""

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest
import tensorflow as tf
import test_augment

from jepa_jax.data import rand_augment

OPERATIONS = list(rand_augment.OPERATIONS)
GREY = (0.5, 0.4, 0.3)


def picture(channels=3):
  """A wave in each channel, 26 rows by 37 columns, of a part of the scale."""
  y, x = np.mgrid[:26, :37]
  waves = [
    120 + 70 * np.sin(x / 5 + c) * np.cos(y / (4 + c)) for c in range(channels)
  ]
  return np.stack(waves, axis=-1).round().astype(np.uint8)


def apply(name, strength=0.9, sign=1.0, image=None):
  image = picture() if image is None else image
  row = (OPERATIONS.index(name) if name else -1, strength, sign)
  return rand_augment.apply(
    tf.constant(image, tf.float32),
    tf.constant(row, tf.float32),
    GREY[: image.shape[-1]],
  ).numpy()


PILLOW = {
  "autocontrast": lambda x: ImageOps.autocontrast(x),
  "equalize": lambda x: ImageOps.equalize(x),
  "invert": lambda x: ImageOps.invert(x),
  "posterize": lambda x: ImageOps.posterize(x, 2),  # 4 - int(4 x .6)
  "solarize": lambda x: ImageOps.solarize(x, 256 - 153),
  "color": lambda x: ImageEnhance.Color(x).enhance(1.54),
  "contrast": lambda x: ImageEnhance.Contrast(x).enhance(1.54),
  "brightness": lambda x: ImageEnhance.Brightness(x).enhance(1.54),
  "sharpness": lambda x: ImageEnhance.Sharpness(x).enhance(1.54),
}


@pytest.mark.parametrize("name", PILLOW)
def test_operations_are_pillows(name):
  expected = PILLOW[name](Image.fromarray(picture()))
  tolerance = 2 if name in ("color", "contrast", "sharpness") else 1.01
  np.testing.assert_allclose(
    apply(name, 0.6), np.asarray(expected, np.float32), atol=tolerance
  )


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
  "name, matrix",
  [
    ("shear_x", (1, 0.18, 0, 0, 1, 0)),
    ("shear_y", (1, 0, 0, 0.18, 1, 0)),
    ("translate_x", (1, 0, 0.27 * 37, 0, 1, 0)),
    ("translate_y", (1, 0, 0, 0, 1, 0.27 * 26)),
    ("rotate", None),
  ],
)
def test_affine_operations_are_pillows_about_the_centre(name, matrix, sign):
  image = Image.fromarray(picture())
  fill = tuple(round(255 * x) for x in GREY)
  bilinear = Image.Resampling.BILINEAR
  if matrix is None:
    expected = image.rotate(18 * sign, bilinear, fillcolor=fill)
  else:
    signed = np.asarray(matrix, float) - np.eye(2, 3).ravel()
    a, b, c, d, e, f = np.eye(2, 3).ravel() + sign * signed
    x, y = 18.5, 13.0  # Pillow's centre, of pixels' corners
    c, f = c + x - a * x - b * y, f + y - d * x - e * y
    expected = image.transform(
      image.size, Image.Transform.AFFINE, (a, b, c, d, e, f), bilinear,
      fillcolor=fill,
    )  # fmt: skip
  expected = np.asarray(expected, np.float32)
  found = apply(name, 0.6, sign)
  near = np.abs(found - expected).max(axis=2) < 3
  assert near.mean() > 0.9  # but for the rim, where Pillow does not blend


def test_solarize_add_and_none_by_hand():
  image = picture().astype(np.float32)
  expected = np.where(image < 128, np.minimum(image + 66, 255), image)
  np.testing.assert_allclose(apply("solarize_add", 0.6), expected, atol=1e-3)
  np.testing.assert_array_equal(apply(None), image)
  dark = np.zeros((4, 5, 3), np.uint8)  # nothing to stretch or spread
  for name in ("autocontrast", "equalize"):
    np.testing.assert_array_equal(apply(name, image=dark), 0)


def test_grey_images_are_changed_too():
  for name in OPERATIONS:
    changed = apply(name, image=picture(1))
    assert changed.shape == (26, 37, 1) and np.isfinite(changed).all()


def test_operations_are_drawn_evenly_and_their_strength_as_said():
  drawn = test_augment.colors(4000, rand_augment=(2, 6.0), color_jitter=0.0)
  assert drawn.shape == (4000, 7 + 2 * 3)
  which, strength, sign = np.moveaxis(drawn[:, 7:].reshape(-1, 2, 3), -1, 0)
  assert abs(np.mean(which == -1) - 0.5) < 0.03
  shares = np.bincount(which[which >= 0].astype(int)) / np.sum(which >= 0)
  assert len(shares) == len(OPERATIONS)
  assert np.abs(shares - 1 / len(OPERATIONS)).max() < 0.02
  assert strength.mean() == pytest.approx(0.6, abs=0.003)
  assert strength.std() == pytest.approx(0.05, abs=0.002)
  assert abs(sign.mean()) < 0.05
  assert abs(np.corrcoef(which.T)[0, 1]) < 0.05  # the two are independent
  plain = test_augment.colors(4000, color_jitter=0.0)
  np.testing.assert_array_equal(drawn[:, :7], plain)  # nothing else is redrawn


def test_an_image_goes_through_all_of_its_operations():
  numbers = [OPERATIONS.index(x) for x in ("invert", "solarize_add")]
  color = [1, 1, 1, 0, 0, 0, 0]
  for number in numbers:
    color += [number, 0.5, 1]
  image = picture().astype(np.float32)
  found = test_augment.distort(
    image, color, rand_augment=(2, 9.0), color_jitter=0, blur=0
  )
  inverted = 255 - image
  expected = np.where(inverted < 128, inverted + 55, inverted)
  np.testing.assert_allclose(found, np.minimum(expected, 255), atol=1e-3)
