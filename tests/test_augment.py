import io
import math
import struct
import types

import numpy as np
from PIL import Image
from PIL import ImageOps
import pytest
import tensorflow as tf

from jepa_jax.data import augment

HEIGHT, WIDTH = 45, 70


def picture(height=HEIGHT, width=WIDTH):
  """Smooth colours, so that encoders lose little; no symmetry."""
  y, x = np.mgrid[:height, :width]
  channels = (3 * x, 4 * y, 255 - x - 2 * y)
  return np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8)


def encode(image=None, encoding="PNG", mode="RGB", **options):
  file = io.BytesIO()
  image = Image.fromarray(picture() if image is None else image).convert(mode)
  if encoding == "JPEG":
    options = {"quality": 95, "subsampling": 0, **options}
  image.save(file, encoding, **options)
  return file.getvalue()


def cut(data, box=None, turn=(0, 0, 0), size=20, channels=3, encoding=None):
  box = (0, 0, HEIGHT, WIDTH) if box is None else box
  return augment.decode_crop(
      tf.constant(data),
      tf.constant(box, tf.int32),
      tf.constant(np.asarray(turn, bool)),
      image_size=size,
      channels=channels,
      encoding=encoding,
  ).numpy()


def config(**changes):
  settings = {"crop_scale": (0.3, 1.0), "crop_ratio": (3 / 4, 4 / 3)}
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


# --- headers ----------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding, options",
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0"}),
    ],
)
def test_header_tells_format_and_size(encoding, options):
  header = augment.read_header(encode(encoding=encoding, **options))
  assert header == augment.Header(encoding.lower(), HEIGHT, WIDTH, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_header_tells_the_exif_orientation(orientation):
  exif = Image.Exif()
  exif[0x0110] = "a camera"
  exif[0x0112] = orientation
  header = augment.read_header(encode(encoding="JPEG", exif=exif.tobytes()))
  assert header.orientation == orientation


def png_of_size(height, width):
  ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + bytes(40)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "empty"),
        (b"not an image at all", "not a JPEG"),
        (b"<html>" * 30, "not a JPEG"),
        (encode(encoding="JPEG")[:30], "cut within its header"),
        (encode(encoding="JPEG")[:-400], "cut before its end"),
        (encode()[:18], "cut within its header"),
        (png_of_size(30_000, 30_000), "30000 x 30000"),
        (png_of_size(0, 5), "of 0 x 5"),
        (b"\xff\xd8\xff\xd9", "without a frame"),
        (b"\xff\xd8\x00\x00\x00\x00\x00", "broken header"),
    ],
)
def test_header_refuses_what_is_no_image(data, reason):
  with pytest.raises(ValueError, match=reason):
    augment.read_header(data)
  assert reason in augment.diagnose(data)


def test_damage_past_the_header_is_diagnosed():
  assert augment.diagnose(encode()[:-60]) == "damaged PNG data"


# --- decoding ---------------------------------------------------------------


@pytest.mark.parametrize("encoding", [None, "png"])
@pytest.mark.parametrize("box", [(0, 0, 45, 70), (10, 3, 30, 61), (5, 6, 9, 8)])
def test_crop_and_resize_as_pil_does_it(box, encoding):
  top, left, height, width = box
  expected = Image.fromarray(picture()).crop(
      (left, top, left + width, top + height)
  )
  expected = np.asarray(expected.resize((20, 20), Image.Resampling.BILINEAR))
  got = cut(encode(), box, encoding=encoding)
  assert got.dtype == np.uint8 and got.shape == (20, 20, 3)
  assert np.abs(got.astype(int) - expected).max() <= 1


def test_jpeg_decodes_the_crop_alone_and_the_same():
  data, box = encode(encoding="JPEG"), (7, 9, 31, 50)
  whole = tf.io.decode_jpeg(data).numpy()
  expected = cut(encode(whole), box)
  assert np.abs(cut(data, box).astype(int) - expected).max() <= 1
  np.testing.assert_array_equal(cut(data, box), cut(data, box, encoding="jpeg"))


def test_same_size_is_the_same_image():
  data = encode(picture(20, 20))
  np.testing.assert_array_equal(cut(data, (0, 0, 20, 20)), picture(20, 20))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "encoding, mode",
    [
        ("JPEG", "RGB"),
        ("JPEG", "L"),
        ("JPEG", "CMYK"),
        ("PNG", "RGB"),
        ("PNG", "L"),
        ("PNG", "LA"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("PNG", "1"),
        ("GIF", "P"),
        ("BMP", "RGB"),
        ("WEBP", "RGB"),
        ("WEBP", "RGBA"),
    ],
)
def test_any_kind_of_image_gets_the_channels_asked_for(encoding, mode, channels):
  data = encode(encoding=encoding, mode=mode)
  expected = Image.open(io.BytesIO(data)).convert("RGB")
  expected = expected.convert("L" if channels == 1 else "RGB")
  expected = expected.resize((20, 20), Image.Resampling.BILINEAR)
  expected = np.asarray(expected, int).reshape(20, 20, channels)
  got = cut(data, channels=channels)
  assert got.shape == (20, 20, channels)
  assert np.abs(got - expected).mean() < 2


def test_sixteen_bits_become_the_high_eight():
  values = np.arange(20 * 20, dtype=np.uint16).reshape(20, 20) * 160
  file = io.BytesIO()
  Image.fromarray(values).save(file, "PNG")
  got = cut(file.getvalue(), (0, 0, 20, 20), channels=1)
  assert np.abs(got[..., 0].astype(int) - values // 257).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(encoding="JPEG", exif=exif.tobytes())
  upright = Image.open(io.BytesIO(data))
  upright = ImageOps.exif_transpose(upright)
  header = augment.read_header(data)
  chosen = augment.central_crops(
      np.asarray([[header.height, header.width]]),
      np.asarray([header.orientation]),
  )
  got = cut(data, chosen.boxes[0], chosen.turns[0])
  width, height = upright.size
  side = min(width, height)
  top, left = (height - side) // 2, (width - side) // 2
  expected = upright.crop((left, top, left + side, top + side))
  expected = np.asarray(expected.resize((20, 20), Image.Resampling.BILINEAR))
  # A central crop of odd margins may round to either side: one pixel.
  assert np.abs(got.astype(int) - expected).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_random_boxes_are_those_of_the_image_as_displayed(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(encoding="JPEG", exif=exif.tobytes())
  stored, shown = (HEIGHT, WIDTH), (HEIGHT, WIDTH)
  if orientation >= 5:
    shown = (WIDTH, HEIGHT)
  chosen = crops(config(), [stored], np.asarray([orientation]), first=5)
  top, left, height, width = crops(config(), [shown], first=5).boxes[0]
  upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
  expected = upright.crop((left, top, left + width, top + height))
  expected = np.asarray(expected.resize((20, 20), Image.Resampling.BILINEAR))
  got = cut(data, chosen.boxes[0], chosen.turns[0])
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
  assert not plain.turns.any()
  assert not flipped.turns[:, :2].any()
  assert abs(flipped.turns[:, 2].mean() - 0.5) < 5 * math.sqrt(0.25 / 4000)
  mirrored = cut(encode(), turn=(0, 0, 1))
  np.testing.assert_array_equal(mirrored, cut(encode())[:, ::-1])


def test_central_crops_are_the_largest_central_squares():
  chosen = augment.central_crops(np.asarray([[5, 9], [8, 3]]), np.ones(2, int))
  np.testing.assert_array_equal(chosen.boxes, [[0, 2, 5, 5], [2, 0, 3, 3]])
