"""From encoded bytes to a crop of fixed size, uint8.

A header is read in Python, before anything is decoded: it says where a crop
may lie, so that a JPEG is decoded inside its crop alone, and it unmasks files
that are no image, or one too large to decode.
"""

from collections.abc import Callable
import dataclasses
import struct

import tensorflow as tf

# Why headers are not read by Pillow. Microseconds a header of an image of 500 x
# 375, ours and Pillow's (open and getexif), on one core of a shared Xeon:
#
#   JPEG 2 and 37, with EXIF 4 and 78, WebP 2 and 101, PNG 4 and 5,650
#
# The pipeline takes 3,460 for such a JPEG (python -m jepa_jax.bench data), so
# Pillow's are 1 to 2 % of a core; but Python runs one thread at a time, and of
# that one they are 17 to 36 % where 16 cores decode. Of a PNG it decodes all
# pixels, as EXIF may lie behind them, and its errors tell neither "cut before
# its end" nor the size of what is too large.
#
#   python -m timeit -s "import io; from PIL import Image" \
#     -s "data = open('a.png', 'rb').read()" \
#     "Image.open(io.BytesIO(data)).getexif()"

MAX_PIXELS = 2**26  # 192 MiB decoded; a larger image is refused unread

_LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue, ITU-R BT.601


@dataclasses.dataclass(frozen=True)
class Header:
  """What an image file says of itself: stored size and EXIF orientation."""

  encoding: str
  height: int
  width: int
  orientation: int = 1


def read_header(data: bytes) -> Header:
  """Reads the header of a JPEG, PNG, GIF, BMP or WebP image, whatever its name.

  Raises:
    ValueError: empty, of another format, cut within the header, or of more
      than MAX_PIXELS pixels.
  """
  if not data:
    raise ValueError("empty or missing")
  try:
    if data.startswith(b"\xff\xd8"):
      header = _jpeg_header(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
      header = _png_header(data)
    elif data.startswith((b"GIF87a", b"GIF89a")):
      width, height = struct.unpack_from("<HH", data, 6)
      header = Header("gif", height, width)
    elif data.startswith(b"BM"):
      width, height = struct.unpack_from("<ii", data, 18)
      header = Header("bmp", abs(height), width)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
      header = _webp_header(data)
    else:
      raise ValueError("not a JPEG, PNG, GIF, BMP or WebP image")
  except (struct.error, IndexError):
    raise ValueError("cut within its header") from None
  if header.height < 1 or header.width < 1:
    raise ValueError(f"of {header.height} x {header.width} pixels")
  if header.height * header.width > MAX_PIXELS:
    raise ValueError(
      f"{header.height} x {header.width} pixels, more than {MAX_PIXELS}"
    )
  return header


def diagnose(data: bytes) -> str:
  """Says in a few words why an image could not be decoded."""
  try:
    header = read_header(data)
  except ValueError as error:
    return str(error)
  return f"damaged {header.encoding.upper()} data"


def _jpeg_header(data: bytes) -> Header:
  position, orientation = 2, 1
  while True:
    if data[position] != 0xFF:
      raise ValueError("a JPEG with a broken header")
    marker = data[position + 1]
    if marker == 0xFF:  # padding
      position += 1
      continue
    position += 2
    if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # no payload
      continue
    if marker in (0xD9, 0xDA):
      raise ValueError("a JPEG without a frame")
    (length,) = struct.unpack_from(">H", data, position)
    if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
      height, width = struct.unpack_from(">HH", data, position + 3)
      # Without its end marker the image was cut, even if a crop might not
      # show it. Embedded thumbnails have theirs before this point.
      if data.rfind(b"\xff\xd9", position) < 0:
        raise ValueError("a JPEG cut before its end")
      return Header("jpeg", height, width, orientation)
    if marker == 0xE1 and data[position + 2 : position + 8] == b"Exif\0\0":
      orientation = _exif_orientation(data[position + 8 : position + length])
    position += length


def _png_header(data: bytes) -> Header:
  width, height = struct.unpack_from(">II", data, 16)
  exif = _chunk(data, 8, b"eXIf", ">I4s")
  return Header("png", height, width, _exif_orientation(exif))


def _webp_header(data: bytes) -> Header:
  kind, orientation = data[12:16], 1
  if kind == b"VP8X":
    width = 1 + int.from_bytes(data[24:27], "little")
    height = 1 + int.from_bytes(data[27:30], "little")
    if data[20] & 8:  # its flag of an EXIF chunk
      exif = _chunk(data, 12, b"EXIF", "<4sI")
      orientation = _exif_orientation(exif.removeprefix(b"Exif\0\0"))
  elif kind == b"VP8L":
    (bits,) = struct.unpack_from("<I", data, 21)
    width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
  else:
    width, height = (x & 0x3FFF for x in struct.unpack_from("<HH", data, 26))
  return Header("webp", height, width, orientation)


def _chunk(data: bytes, position: int, name: bytes, layout: str) -> bytes:
  """Data of a PNG's or WebP's first chunk of a name; b"" where it has none.

  Args:
    data: the file.
    position: of its first chunk.
    name: the chunk's.
    layout: of what comes before a chunk's data: PNG's ">I4s" of length and name
      (a checksum follows the data), or WebP's "<4sI" (data are padded to even).
  """
  while position + 8 <= len(data):
    head = struct.unpack_from(layout, data, position)
    png = isinstance(head[0], int)
    length, found = head if png else head[::-1]
    position += 8
    if found == name:
      return data[position : position + length]
    position += length + (4 if png else length % 2)
  return b""


def _exif_orientation(tiff: bytes) -> int:
  """Orientation 1 to 8 of an EXIF block; 1 where it has none or is broken."""
  order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
  if order is None:
    return 1
  try:
    (start,) = struct.unpack_from(order + "I", tiff, 4)
    (count,) = struct.unpack_from(order + "H", tiff, start)
    for i in range(count):
      tag, _, _, value = struct.unpack_from(
        order + "HHIH", tiff, start + 2 + 12 * i
      )
      if tag == 0x0112:
        return value if 1 <= value <= 8 else 1
  except struct.error:
    pass
  return 1


def decode_crop(
  encoded: tf.Tensor,
  box: tf.Tensor,
  flips: tf.Tensor,
  *,
  image_size: int,
  channels: int,
  encoding: str | None = None,
  distort: Callable[[tf.Tensor], tf.Tensor] | None = None,
) -> tf.Tensor:
  """Decodes, crops and resizes one image.

  Colour and grey convert to each other, CMYK to colour; alpha is dropped
  and 16 bits become 8.

  Args:
    encoded: scalar string.
    box: int32 [4]; top, left, height, width in stored pixels.
    flips: bool [3]; as `augment.Crops.flips`.
    image_size: side of the result, pixels.
    channels: 1 or 3.
    encoding: "jpeg" or "png" where known, None to detect it.
    distort: maps the crop, float32 on a scale of 0 to 255, before rounding.

  Returns:
    uint8 [image_size, image_size, channels].
  """

  # Not every decoder converts colour to grey: images of an unknown format are
  # decoded in colour and converted after resizing.
  decoded = channels if encoding else 3

  def jpeg():
    return tf.image.decode_and_crop_jpeg(encoded, box, channels=decoded)

  def png():
    return _crop(tf.image.decode_png(encoded, channels=decoded), box)

  def other():
    image = tf.io.decode_image(
      encoded, channels=decoded, expand_animations=False
    )
    return _crop(image, box)

  if encoding == "jpeg":
    image = jpeg()
  elif encoding == "png":
    image = png()
  else:
    image = tf.cond(tf.image.is_jpeg(encoded), jpeg, other)
  image = _resize(image, image_size)
  if decoded > channels:
    image = to_grey(image)
  if distort is not None:
    image = tf.clip_by_value(distort(image), 0, 255)
  image = tf.cast(image + 0.5, tf.uint8)  # rounds: nothing here is negative
  image = tf.ensure_shape(image, (image_size, image_size, channels))
  return tf.cond(
    tf.reduce_any(flips), lambda: _flip(image, flips), lambda: image
  )


def to_grey(image: tf.Tensor) -> tf.Tensor:
  """Luma of a colour image: float32 [H, W, 3] -> [H, W, 1]."""
  return tf.linalg.matmul(image, tf.constant(_LUMA)[:, None])


def _resize(image: tf.Tensor, size: int) -> tf.Tensor:
  """uint8 [H, W, C] -> float32 [size, size, C], without aliasing.

  Differs: an image that shrinks in both directions is averaged over areas, four
    times as fast as the released code's filter (PIL's bilinear, a triangle that
    widens with the scale), which serves where one direction grows.
  """
  shape = tf.shape(image)[:2]
  target = tf.constant([size, size])

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

  resized = tf.cond(tf.reduce_all(shape >= size), average, interpolate)
  return tf.ensure_shape(resized, (size, size, image.shape[-1]))


def _crop(image: tf.Tensor, box: tf.Tensor) -> tf.Tensor:
  zero = tf.zeros([1], tf.int32)
  full = tf.shape(image)[2:]
  return tf.slice(
    image, tf.concat([box[:2], zero], 0), tf.concat([box[2:], full], 0)
  )


def _flip(image: tf.Tensor, flips: tf.Tensor) -> tf.Tensor:
  """Transposes and flips a square image as `augment.Crops.flips` says."""
  image = tf.where(flips[0], tf.transpose(image, (1, 0, 2)), image)
  image = tf.where(flips[1], image[::-1], image)
  return tf.where(flips[2], image[:, ::-1], image)
