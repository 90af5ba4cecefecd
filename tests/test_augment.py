import colorsys
import io
import math
import types

import numpy as np
from PIL import Image, ImageOps
import pytest
import scipy.ndimage
import tensorflow as tf
import test_decode

from jepa_jax.data import augment, headers

HEIGHT, WIDTH = test_decode.HEIGHT, test_decode.WIDTH


def config(**changes):
  settings = {"crop_scale": (0.3, 1.0), "crop_ratio": (3 / 4, 4 / 3)}
  settings["image_size"] = 20
  return types.SimpleNamespace(**{**settings, "flip": False, **changes})


def crops(settings, sizes, orientations=None, seed=0, epoch=0, first=0):
  sizes = np.asarray(sizes)
  if orientations is None:
    orientations = np.ones(len(sizes), int)
  index = first + np.arange(len(sizes))
  return augment.random_crops(
    settings,
    sizes,
    orientations,
    seed=seed,
    epoch=np.full(len(sizes), epoch),
    index=index,
  )


# --- orientation ------------------------------------------------------------


@pytest.mark.parametrize(
  "encoding, size",
  [(x, (20, 20)) for x in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")]
  + [("PNG", (12, 26)), ("JPEG", (30, 11)), ("TIFF", (11, 30))],
)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation, encoding, size):
  exif = test_decode.exif_of(orientation)
  data = test_decode.encode(encoding=encoding, exif=exif)
  upright = Image.open(io.BytesIO(data))
  upright = ImageOps.exif_transpose(upright)
  header = headers.read_header(data)
  chosen = augment.central_crops(
    size,
    np.asarray([[header.height, header.width]]),
    np.asarray([header.orientation]),
  )
  got = test_decode.cut(data, chosen.boxes[0], chosen.flips[0], size)
  assert got.shape == (*size, 3)
  ratio = size[1] / size[0]
  width = min(upright.width, round(upright.height * ratio))
  height = min(upright.height, round(upright.width / ratio))
  top, left = (upright.height - height) // 2, (upright.width - width) // 2
  expected = upright.crop((left, top, left + width, top + height))
  expected = expected.resize(size[::-1], Image.Resampling.BILINEAR)
  expected = np.asarray(expected)
  # A central crop of odd margins may round to either side: one pixel.
  assert np.abs(got.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_random_boxes_are_those_of_the_image_as_displayed(orientation):
  exif = test_decode.exif_of(orientation)
  data = test_decode.encode(encoding="JPEG", exif=exif)
  stored, shown = (HEIGHT, WIDTH), (HEIGHT, WIDTH)
  if orientation >= 5:
    shown = (WIDTH, HEIGHT)
  chosen = crops(config(), [stored], np.asarray([orientation]), first=5)
  top, left, height, width = crops(config(), [shown], first=5).boxes[0]
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  expected = upright.crop((left, top, left + width, top + height))
  expected = np.asarray(expected.resize((20, 20), Image.Resampling.BILINEAR))
  got = test_decode.cut(data, chosen.boxes[0], chosen.flips[0])
  assert np.abs(got.astype(int) - expected).mean() < 1.5


# --- random crops -----------------------------------------------------------


def test_crops_have_the_scale_and_ratio_asked_for():
  sizes = np.tile([[500, 600]], (4000, 1))
  boxes = crops(config(), sizes).boxes.astype(float)
  top, left, height, width = boxes.T
  assert (top >= 0).all() and (top + height <= 500).all()
  assert (left >= 0).all() and (left + width <= 600).all()
  share, ratio = height * width / 300_000, width / height
  assert 0.295 < share.min() < 0.31 and share.max() <= 1
  assert 0.74 < ratio.min() < 0.76 and 1.31 < ratio.max() < 1.35
  # The two ends of the image are reached equally often.
  up, down = top / 500, (500 - top - height) / 500
  assert abs((up - down).mean()) < 5 * (up - down).std() / math.sqrt(4000)


def test_the_ratio_is_relative_to_the_images_size():
  sizes = np.tile([[500, 600]], (4000, 1))
  changed = config(image_size=(40, 20), crop_scale=(0.1, 0.4))
  height, width = crops(changed, sizes).boxes.astype(float).T[2:]
  ratio = 2 * width / height
  assert 0.73 < ratio.min() < 0.76 and 1.31 < ratio.max() < 1.36


def test_small_scales_are_uniform_in_area_and_log_ratio():
  settings = config(crop_scale=(0.1, 0.3))  # always fits at the first try
  boxes = crops(settings, np.tile([[1000, 1000]], (4000, 1))).boxes
  share = boxes[:, 2] * boxes[:, 3] / 1e6
  log_ratio = np.log(boxes[:, 3] / boxes[:, 2])
  for values, low, high in (
    (share, 0.1, 0.3),
    (log_ratio, math.log(3 / 4), math.log(4 / 3)),
  ):
    unit = np.sort((values - low) / (high - low))
    distance = np.abs(unit - (np.arange(4000) + 0.5) / 4000).max()
    assert distance < 2.0 / math.sqrt(4000)  # Kolmogorov-Smirnov, p ~ 7e-4


def test_where_no_try_fits_the_largest_central_crop_counts():
  boxes = crops(config(), [[10, 1000], [1000, 10], [1, 1]]).boxes
  np.testing.assert_array_equal(
    boxes, [[0, 493, 10, 13], [493, 0, 13, 10], [0, 0, 1, 1]]
  )


def test_a_crop_depends_on_seed_epoch_and_image_alone():
  sizes = np.tile([[50, 60]], (64, 1))
  base = crops(config(), sizes).boxes
  np.testing.assert_array_equal(crops(config(), sizes[:9]).boxes, base[:9])
  np.testing.assert_array_equal(
    crops(config(), sizes[:9], first=20).boxes, base[20:29]
  )
  for change in ({"seed": 1}, {"epoch": 1}, {"first": 64}):
    same = (crops(config(), sizes, **change).boxes == base).all(1)
    assert same.mean() < 0.2


def test_flip_mirrors_half_of_the_images_and_keeps_the_boxes():
  sizes = np.tile([[50, 60]], (4000, 1))
  plain, flipped = crops(config(), sizes), crops(config(flip=True), sizes)
  np.testing.assert_array_equal(plain.boxes, flipped.boxes)
  assert not plain.flips.any()
  assert not flipped.flips[:, :2].any()
  assert abs(flipped.flips[:, 2].mean() - 0.5) < 5 * math.sqrt(0.25 / 4000)
  data = test_decode.encode()
  mirrored = test_decode.cut(data, turn=(0, 0, 1))
  np.testing.assert_array_equal(mirrored, test_decode.cut(data)[:, ::-1])


def test_central_crops_are_the_largest_central_squares():
  sizes, upright = np.asarray([[5, 9], [8, 3]]), np.ones(2, int)
  chosen = augment.central_crops((7, 7), sizes, upright)
  np.testing.assert_array_equal(chosen.boxes, [[0, 2, 5, 5], [2, 0, 3, 3]])


# --- colours ----------------------------------------------------------------


OFF = {"blur": 0.0, "grayscale": 0.0, "solarize": 0.0, "image_size": 224}
OFF |= {"rand_augment": (0, 9.0), "mean": (0.5, 0.4, 0.3)}


def colors(count=4000, **changes):
  settings = {**OFF, "color_jitter": 0.5, **changes}
  return augment.random_colors(
    types.SimpleNamespace(**settings),
    seed=0,
    epoch=np.zeros(count),
    index=np.arange(count),
  )


def distort(image, color, **changes):
  settings = {**OFF, "color_jitter": 1.0, "blur": 1.0, **changes}
  return augment.distort(
    tf.constant(image, tf.float32),
    tf.constant(color, tf.float32),
    types.SimpleNamespace(**settings),
  ).numpy()


NONE = (1, 1, 1, 0, 0, 0)  # brightness, contrast, saturation, hue, grey, sigma


def test_colour_jitter_changes_four_fifths_within_its_range():
  drawn = colors()
  changed = (drawn[:, :4] != NONE[:4]).any(1)
  assert abs(changed.mean() - 0.8) < 5 * math.sqrt(0.16 / 4000)
  assert abs(drawn[:, 4].mean() - 0.2) < 5 * math.sqrt(0.16 / 4000)
  for column in drawn[:, :3].T:
    assert 0.6 <= column.min() < 0.62 and 1.38 < column.max() <= 1.4
  assert -0.1 <= drawn[:, 3].min() < -0.09 and 0.09 < drawn[:, 3].max() <= 0.1
  assert (drawn[:, 5] == 0).all()
  assert np.abs(np.corrcoef(drawn[:, :4].T) - np.eye(4)).max() < 0.6


def test_blur_alone_changes_no_colour():
  drawn = colors(color_jitter=0.0, blur=0.3)
  assert (drawn[:, :5] == NONE[:5]).all()
  blurred = drawn[:, 5] > 0
  assert abs(blurred.mean() - 0.3) < 5 * math.sqrt(0.21 / 4000)
  assert drawn[blurred, 5].min() >= 0.1 and drawn[:, 5].max() <= 2
  small = colors(color_jitter=0.0, blur=0.3, image_size=56)
  np.testing.assert_allclose(small[:, 5], drawn[:, 5] / 4, rtol=1e-5)


def test_grey_and_solarised_shares_are_those_named():
  drawn = colors(color_jitter=0.0, grayscale=0.4, solarize=0.3)
  shares = drawn[:, [4, 6]].mean(axis=0)
  np.testing.assert_allclose(shares, [0.4, 0.3], atol=5 * 0.49 / 4000**0.5)
  both = (drawn[:, 4] * drawn[:, 6]).mean()  # independent of one another
  np.testing.assert_allclose(both, 0.12, atol=5 * 0.33 / 4000**0.5)


def test_solarising_inverts_what_is_bright():
  image = np.asarray([[[0.0, 127, 128], [200, 255, 5]]])
  solarised = distort(
    image, (1, 1, 1, 0, 0, 0, 1), solarize=1.0, color_jitter=0.0, blur=0.0
  )
  np.testing.assert_array_equal(solarised, [[[0, 127, 127], [55, 0, 5]]])


def test_a_colour_depends_on_the_image_alone():
  np.testing.assert_array_equal(colors(4000)[:7], colors(7))


def test_neutral_values_leave_an_image_as_it_is():
  image = test_decode.picture().astype(np.float32)
  np.testing.assert_allclose(distort(image, NONE), image, atol=0.01)


def test_each_change_is_the_one_it_is_named_after():
  image = test_decode.picture(9, 11).astype(np.float32)
  grey = image @ np.asarray([[0.299], [0.587], [0.114]])
  blend = lambda base, share: np.clip(base + share * (image - base), 0, 255)
  expected = {
    (1.3, 1, 1, 0, 0, 0): np.clip(1.3 * image, 0, 255),
    (1, 0.4, 1, 0, 0, 0): blend(grey.mean(), 0.4),
    (1, 1, 0.4, 0, 0, 0): blend(grey, 0.4),
    (1, 1, 1, 0, 1, 0): np.repeat(grey, 3, -1),
  }
  for color, wanted in expected.items():
    np.testing.assert_allclose(distort(image, color), wanted, atol=0.02)
  turned = distort(image, (1, 1, 1, 0.1, 0, 0))[4, 5] / 255
  hue, saturation, value = colorsys.rgb_to_hsv(*(image[4, 5] / 255))
  wanted = colorsys.hsv_to_rgb((hue + 0.1) % 1, saturation, value)
  np.testing.assert_allclose(turned, wanted, atol=1e-3)


def test_blur_is_gaussian():
  image = np.random.default_rng(0).uniform(0, 255, (20, 26, 3))
  blurred = distort(image, (1, 1, 1, 0, 0, 1.5))
  wanted = scipy.ndimage.gaussian_filter(
    image, (1.5, 1.5, 0), mode="mirror", radius=(6, 6, 0)
  )
  np.testing.assert_allclose(blurred, wanted, atol=0.05)


def test_grey_images_are_distorted_too():
  image = np.full((8, 8, 1), 100.0)
  got = distort(image, (1.2, 0.5, 0.3, 0.2, 1, 1))
  np.testing.assert_allclose(got, 120, atol=0.01)
