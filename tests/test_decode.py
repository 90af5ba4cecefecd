import io
import struct

import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

from jepa_jax.data import decode, headers, pixels

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


def cut(data, box=None, turn=(0, 0, 0), size=(20, 20), encoding=None, **rules):
  box = (0, 0, HEIGHT, WIDTH) if box is None else box
  return decode.decode_crop(
    tf.constant(data),
    tf.constant(box, tf.int32),
    tf.constant(np.asarray(turn, bool)),
    tf.constant(decode.kind_of(headers.read_header(data))),
    image_size=size,
    rules=pixels.Rules(**rules),
    encoding=encoding,
  ).numpy()


def header_of(header):
  return header.encoding, header.height, header.width, header.orientation


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
  header = headers.read_header(encode(encoding=encoding, **options))
  assert header_of(header) == (encoding.lower(), HEIGHT, WIDTH, 1)


def exif_of(orientation):
  exif = Image.Exif()
  exif[0x0110] = "a camera"  # of odd length: WebP pads it
  exif[0x0112] = orientation
  return exif.tobytes()


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_header_tells_the_exif_orientation(orientation, encoding):
  data = encode(encoding=encoding, exif=exif_of(orientation))
  found = header_of(headers.read_header(data))
  assert found == (encoding.lower(), HEIGHT, WIDTH, orientation)


def test_exif_is_found_behind_the_pixels_of_a_png_too():
  data = encode(exif=exif_of(6))
  start = data.index(b"eXIf") - 4
  length = 12 + int.from_bytes(data[start : start + 4], "big")
  chunk, rest = data[start : start + length], data[start + length :]
  moved = data[:start] + rest[:-12] + chunk + rest[-12:]  # before IEND
  assert headers.read_header(moved).orientation == 6
  assert Image.open(io.BytesIO(moved)).load() is not None  # it is sound


@pytest.mark.parametrize("encoding", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_turns_nothing(encoding):
  exif = exif_of(6)
  for broken in (exif[:20], exif.replace(b"\x12\x01", b"\x13\x01")):
    broken = broken.replace(b"\x01\x12", b"\x01\x13")
    data = encode(encoding=encoding, exif=broken)
    assert headers.read_header(data).orientation == 1


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
    headers.read_header(data)
  assert reason in pixels.diagnose(data, pixels.Rules())


def test_damage_past_the_header_is_diagnosed():
  assert pixels.diagnose(encode()[:-60], pixels.Rules()) == "damaged PNG data"


# --- decoding ---------------------------------------------------------------


def resized(image, size):
  """By areas where both sides shrink, else as PIL's bilinear."""
  if min(image.size) < size:
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(image, int)

  def weights(length):  # [size, length]: overlap of each pixel with each area
    edges = np.arange(size + 1)[:, None] * length / size
    pixels = np.arange(length)
    overlap = np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels)
    return overlap.clip(0) * size / length

  pixels = np.asarray(image, float).reshape(image.height, image.width, -1)
  rows, columns = weights(image.height), weights(image.width)
  return np.einsum("hH,HWc,wW->hwc", rows, pixels, columns).round().astype(int)


@pytest.mark.parametrize("encoding", [None, "png"])
@pytest.mark.parametrize("box", [(0, 0, 45, 70), (10, 3, 30, 61), (5, 6, 9, 8)])
def test_crops_shrink_by_area_and_grow_as_pil_grows_them(box, encoding):
  top, left, height, width = box
  expected = Image.fromarray(picture()).crop(
    (left, top, left + width, top + height)
  )
  expected = resized(expected, 20)
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
def test_any_kind_of_image_gets_its_channels(encoding, mode, channels):
  data = encode(encoding=encoding, mode=mode)
  expected = Image.open(io.BytesIO(data)).convert("RGB")
  expected = expected.convert("L" if channels == 1 else "RGB")
  expected = resized(expected, 20).reshape(20, 20, channels)
  got = cut(data, channels=channels)
  assert got.shape == (20, 20, channels)
  assert np.abs(got - expected).mean() < 2


def test_sixteen_bits_become_the_high_eight():
  values = np.arange(20 * 20, dtype=np.uint16).reshape(20, 20) * 160
  file = io.BytesIO()
  Image.fromarray(values).save(file, "PNG")
  got = cut(file.getvalue(), (0, 0, 20, 20), channels=1)
  assert np.abs(got[..., 0].astype(int) - values // 257).max() <= 1
