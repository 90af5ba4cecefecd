"""What an image file says of itself before anything is decoded.

It tells where a crop may lie, so that a JPEG is decoded inside its crop alone;
which decoder reads the file; and it unmasks what is no image, or would take
more memory than is allowed.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import io
import struct
from typing import Any

import numpy as np
from PIL import Image

# Why most headers are not read by Pillow. Microseconds a header of an image of
# 500 x 375, ours and Pillow's (open and getexif), on one core of a shared Xeon:
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

MAX_MIB = 192  # of data.max_mib: 2**26 pixels in colour
READ = "JPEG, PNG, GIF, BMP, WebP, TIFF, AVIF or NumPy image"

# TIFF tags: name -> number.
_TAGS = dict(
  width=256,
  height=257,
  bits=258,
  photometric=262,
  orientation=274,
  samples=277,
  tile_width=322,
  tile_height=323,
  extra_samples=338,
  sample_format=339,
)
_TYPES = {1: "B", 3: "H", 4: "I", 16: "Q"}  # of TIFF's values, those of counts


try:
  import pillow_heif

  pillow_heif.register_heif_opener()
except ImportError:  # HEIC is not read then
  pillow_heif = None


class Missing(ValueError):
  """A package that is not installed."""


@dataclasses.dataclass(frozen=True)
class Header:
  """Stored size, EXIF orientation and kind of an image.

  Attributes:
    encoding: name of the format, in lower case.
    height: pixels, as stored.
    width: pixels, as stored.
    orientation: 1 to 8.
    decoder: what reads it, see `pixels`; "jpeg" and "png" are TensorFlow's.
    bytes_a_pixel: decoded; at least 3, for most is decoded in colour.
  """

  encoding: str
  height: int
  width: int
  orientation: int = 1
  decoder: str = "pillow"
  bytes_a_pixel: int = 3


def read_header(data: bytes, max_mib: float = MAX_MIB) -> Header:
  """Reads the header of an image, whatever its name.

  Args:
    data: the file.
    max_mib: MiB that it may decode to.

  Raises:
    ValueError: empty, of another format, cut within the header, or too large.
  """
  if not data:
    raise ValueError("empty or missing")
  try:
    header = _read(data)
  except (struct.error, IndexError, OverflowError):
    raise ValueError("cut within its header") from None
  height, width = header.height, header.width
  if height < 1 or width < 1:
    raise ValueError(f"of {height} x {width} pixels")
  if height * width * header.bytes_a_pixel > max_mib * 2**20:
    raise ValueError(
      f"{height} x {width} pixels of {header.bytes_a_pixel} bytes, more than"
      f" data.max_mib={max_mib:g}"
    )
  return header


def _read(data: bytes) -> Header:
  if data.startswith(b"\xff\xd8"):
    return _jpeg(data)
  if data.startswith(b"\x89PNG\r\n\x1a\n"):
    return _png(data)
  if data.startswith((b"GIF87a", b"GIF89a")):
    width, height = struct.unpack_from("<HH", data, 6)
    return Header("gif", height, width)
  if data.startswith(b"BM"):
    # OS/2's has numbers of 16 bits.
    old = struct.unpack_from("<I", data, 14)[0] == 12
    width, height = struct.unpack_from("<HH" if old else "<ii", data, 18)
    return Header("bmp", abs(height), width)
  if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
    return _webp(data)
  if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
    return _tiff(data)
  if data[4:8] == b"ftyp":
    return _heif(data)
  if data.startswith(b"\x93NUMPY"):
    return _numpy(data)
  raise ValueError(f"not a {READ}")


def _jpeg(data: bytes) -> Header:
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
      return Header("jpeg", height, width, orientation, "jpeg")
    if marker == 0xE1 and data[position + 2 : position + 8] == b"Exif\0\0":
      orientation = exif_orientation(data[position + 8 : position + length])
    position += length


def _png(data: bytes) -> Header:
  width, height, bits, color = struct.unpack_from(">IIBB", data, 16)
  orientation = exif_orientation(_chunk(data, 8, b"eXIf", ">I4s"))
  samples = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}.get(color, 3)
  if bits == 16:
    decoder = "png16"
  elif bits == 8 and color in (0, 2) and not _chunk(data, 8, b"tRNS", ">I4s"):
    decoder = "png"  # grey or colour without transparency
  else:
    decoder = "pillow"
  size = max(3, samples) * (2 if bits == 16 else 1)
  return Header("png", height, width, orientation, decoder, size)


def _webp(data: bytes) -> Header:
  kind, orientation = data[12:16], 1
  if kind == b"VP8X":
    width = 1 + int.from_bytes(data[24:27], "little")
    height = 1 + int.from_bytes(data[27:30], "little")
    if data[20] & 8:  # its flag of an EXIF chunk
      exif = _chunk(data, 12, b"EXIF", "<4sI")
      orientation = exif_orientation(exif.removeprefix(b"Exif\0\0"))
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


def exif_orientation(tiff: bytes) -> int:
  """Orientation 1 to 8 of an EXIF block; 1 where it has none or is broken."""
  if tiff[:2] not in (b"II", b"MM"):
    return 1
  try:
    (value,) = _tags(tiff).get(_TAGS["orientation"], (1,))[:1]
  except (struct.error, ValueError):
    return 1
  return value if 1 <= value <= 8 else 1


def _tags(data: bytes) -> dict[int, tuple[int, ...]]:
  """Whole numbers of a TIFF's first directory, by tag; at most 4 of each."""
  order = "<" if data[:2] == b"II" else ">"
  big = data[2:4] in (b"+\0", b"\0+")
  start, entries, entry, inline = (
    ("Q", "Q", "HHQ", 8) if big else ("I", "H", "HHI", 4)
  )
  unpack = lambda layout, at: struct.unpack_from(order + layout, data, at)
  (position,) = unpack(start, 8 if big else 4)
  (count,) = unpack(entries, position)
  position += struct.calcsize("=" + entries)
  found = {}
  for _ in range(min(count, 4096)):
    tag, kind, length = unpack(entry, position)
    place = position + struct.calcsize("=" + entry)
    position = place + inline
    if kind in _TYPES and length:
      size = struct.calcsize("=" + _TYPES[kind])
      if size * length > inline:
        (place,) = unpack(start, place)
      found[tag] = unpack(f"{min(length, 4)}{_TYPES[kind]}", place)
  return found


def _tiff(data: bytes) -> Header:
  """The header of a TIFF's first page.

  Pillow reads 8 bits of what it has a mode for, and one sample of up to 32;
  tifffile any other number of samples and bits.
  """
  tags = _tags(data)
  get = lambda name, default: tags.get(_TAGS[name], (default,))[0]
  height, width = get("height", 0), get("width", 0)
  bits, samples = get("bits", 1), get("samples", 1)
  photometric, orientation = get("photometric", 1), get("orientation", 1)
  modes = {0: (1,), 1: (1, 2), 2: (3, 4), 3: (1,), 5: (4,), 6: (3,)}
  usual = samples in modes.get(photometric, ())
  if samples == 2 and get("extra_samples", 0) not in (1, 2):
    usual = False  # the second is no alpha
  if get("sample_format", 1) != 1 and not (samples == 1 and bits == 32):
    usual = False
  if not usual or (bits > 8 and (samples > 1 or bits > 32)):
    decoder = "tifffile"
  else:
    decoder = "pillow"
    if orientation in (5, 6, 7, 8):  # Pillow undoes it as it reads
      height, width = width, height
    orientation = 1
  size = max(3, samples) * max(1, bits // 8)
  # A tile is decoded whole, however little of it is inside of the image.
  tile = get("tile_height", 0) * get("tile_width", 0)
  if height * width:
    size *= max(1, -(-tile // (height * width)))
  if not 1 <= orientation <= 8:
    orientation = 1
  return Header("tiff", height, width, orientation, decoder, size)


def _heif(data: bytes) -> Header:
  """AVIF, and HEIC where the package pillow_heif is installed."""
  brands = data[8 : int.from_bytes(data[:4], "big")]
  encoding = "avif" if b"avif" in brands or b"avis" in brands else "heif"
  try:
    with opened(data, encoding) as image:
      width, height = image.size
      orientation = image.getexif().get(0x0112, 1)
  except Missing:
    raise
  except Exception as error:
    raise ValueError(f"damaged {encoding.upper()} data") from error
  if orientation not in range(1, 9):
    orientation = 1
  return Header(encoding, height, width, orientation, bytes_a_pixel=4)


@contextlib.contextmanager
def opened(data: bytes, encoding: str) -> Iterator[Image.Image]:
  """Pillow's image of a format that is known, not decoded yet."""
  encoding = encoding.upper()
  if encoding == "HEIF" and pillow_heif is None:
    raise Missing("needs pillow_heif: pip install 'jepa_jax[images]'")
  Image.init()
  with Image.open(io.BytesIO(data), formats=[encoding]) as image:
    yield image


def _numpy(data: bytes) -> Header:
  """An array [H, W] or [H, W, C] of whole numbers, truth values or floats."""
  shape, dtype = numpy_shape(data)
  if len(shape) not in (2, 3):
    raise ValueError(f"a NumPy array of shape {shape}, not [H, W] or [H, W, C]")
  if dtype.kind not in "buif" or not min(shape):
    raise ValueError(f"a NumPy array {shape} of {dtype}, not of pixels")
  channels = shape[2] if len(shape) == 3 else 1
  size = max(3, channels) * dtype.itemsize
  return Header("npy", *shape[:2], 1, "npy", size)


def numpy_shape(data: bytes) -> tuple[tuple[int, ...], Any]:
  """Shape and dtype of a .npy file; ValueError where it is cut or none."""
  file = io.BytesIO(data)
  try:
    version = np.lib.format.read_magic(file)
    read = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    shape, _, dtype = read(file)
  except Exception as error:  # NumPy evaluates the header as Python
    raise ValueError("a NumPy file with a broken header") from error
  needed = file.tell() + dtype.itemsize * int(np.prod(shape, dtype=object))
  if needed > len(data):
    raise ValueError(f"a NumPy file of {len(data)} bytes that needs {needed}")
  return shape, dtype
