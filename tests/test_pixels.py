"""What becomes of the pixels of images of every kind, and of hostile ones."""

import dataclasses
import io
import random
import struct
import tracemalloc

import numpy as np
from PIL import Image
import pytest
import test_decode
import tifffile

from jepa_jax.data import headers, pixels

SIZE = 6, 8  # of every image here, height and width
BACKGROUND = (0.2, 0.4, 0.8)  # 51, 102, 204


def ramp(top, channels=0):
  """[H, W] or [H, W, channels]; no two values alike, none beyond `top`."""
  shape = (*SIZE, channels) if channels else SIZE
  return np.linspace(0, top, int(np.prod(shape))).reshape(shape)


def file_of(image, encoding, **options):
  file = io.BytesIO()
  if encoding in ("WEBP", "AVIF", "HEIF"):
    options = {"lossless": True, "quality": -1, **options}
  if encoding == "AVIF":
    options = {"quality": 100, "subsampling": "4:4:4"}
  if encoding == "WEBP":
    options = {"lossless": True, "exact": True, **options}
    del options["quality"]
  image.save(file, encoding, **options)
  return file.getvalue()


def tiff(array, **options):
  file = io.BytesIO()
  tifffile.imwrite(file, array, **options)
  return file.getvalue()


def npy(array):
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def over(color, alpha):
  """`color` [H, W, 3] laid over BACKGROUND."""
  share = alpha[..., None] / 255
  return color * share + 255 * np.asarray(BACKGROUND) * (1 - share)


def grey(array):
  return np.repeat(np.asarray(array)[..., None], 3, -1)


# --- a table of modes and formats: what each is read as ---------------------

GREY = ramp(255).astype(np.uint8)
COLOR = ramp(255, 3).astype(np.uint8)
ALPHA = ramp(255)[::-1].astype(np.uint8)
BITS = GREY % 3 > 0
WORDS = ramp(65535).astype(np.uint16)
INDEX = np.arange(48).reshape(SIZE).astype(np.uint8) % 5
PALETTE = np.asarray(
  [(9, 8, 7), (250, 3, 99), (0, 90, 5), (1, 2, 3), (77, 7, 0)]
)


def indexed(**options):
  image = Image.fromarray(INDEX)
  image.putpalette(PALETTE.astype(np.uint8).tobytes())
  image.info.update(options)
  return image


def with_alpha(color=COLOR):
  return Image.fromarray(np.dstack([color, ALPHA]))


def cmyk():
  inks = np.dstack([COLOR, GREY // 2])
  return Image.fromarray(inks, "CMYK")


def png_colour16(array):
  import tensorflow as tf

  return tf.io.encode_png(array).numpy()


WORDS3, WORDS4 = (ramp(65535, c).astype(np.uint16) for c in (3, 4))
CASES = {  # name -> (file, [H, W, 3] as it is seen, how far it may be off)
  "png grey": (file_of(Image.fromarray(GREY), "PNG"), grey(GREY)),
  "png colour": (file_of(Image.fromarray(COLOR), "PNG"), COLOR),
  "png alpha": (file_of(with_alpha(), "PNG"), over(COLOR, ALPHA)),
  "png grey alpha": (
    file_of(with_alpha(GREY), "PNG"),
    over(grey(GREY), ALPHA),
  ),
  "png palette": (file_of(indexed(), "PNG"), PALETTE[INDEX]),
  "png palette, one transparent": (
    file_of(indexed(), "PNG", transparency=2),
    over(PALETTE[INDEX], 255 * (INDEX != 2)),
  ),
  "png grey, one transparent": (
    file_of(Image.fromarray(GREY), "PNG", transparency=int(GREY[2, 3])),
    over(grey(GREY), 255 * (GREY != GREY[2, 3])),
  ),
  "png 1 bit": (file_of(Image.fromarray(BITS), "PNG"), grey(255 * BITS)),
  "png 16 bits": (file_of(Image.fromarray(WORDS), "PNG"), grey(WORDS / 257)),
  "png 16 bits colour": (png_colour16(WORDS3), WORDS3 / 257),
  "png 16 bits alpha": (
    png_colour16(WORDS4),
    over(WORDS4[..., :3] / 257, WORDS4[..., 3] / 257),
  ),
  "gif": (file_of(indexed(), "GIF"), PALETTE[INDEX]),
  "gif, one transparent": (
    file_of(indexed(), "GIF", transparency=2),
    over(PALETTE[INDEX], 255 * (INDEX != 2)),
  ),
  "gif animated": (
    file_of(
      Image.fromarray(COLOR).quantize(48),
      "GIF",
      save_all=True,
      append_images=[Image.new("P", SIZE[::-1])] * 3,
    ),
    np.asarray(Image.fromarray(COLOR).quantize(48).convert("RGB")),
  ),
  "bmp 1 bit": (file_of(Image.fromarray(BITS), "BMP"), grey(255 * BITS)),
  "bmp palette": (file_of(indexed(), "BMP"), PALETTE[INDEX]),
  "bmp grey": (file_of(Image.fromarray(GREY), "BMP"), grey(GREY)),
  "bmp colour": (file_of(Image.fromarray(COLOR), "BMP"), COLOR),
  "webp colour": (file_of(Image.fromarray(COLOR), "WEBP"), COLOR),
  "webp alpha": (file_of(with_alpha(), "WEBP"), over(COLOR, ALPHA)),
  "webp animated": (
    file_of(
      Image.fromarray(COLOR),
      "WEBP",
      save_all=True,
      append_images=[Image.new("RGB", SIZE[::-1])] * 3,
    ),
    COLOR,
  ),
  "tiff grey": (file_of(Image.fromarray(GREY), "TIFF"), grey(GREY)),
  "tiff colour": (file_of(Image.fromarray(COLOR), "TIFF"), COLOR),
  "tiff lzw": (
    file_of(Image.fromarray(COLOR), "TIFF", compression="tiff_lzw"),
    COLOR,
  ),
  "tiff alpha": (file_of(with_alpha(), "TIFF"), over(COLOR, ALPHA)),
  "tiff palette": (file_of(indexed(), "TIFF"), PALETTE[INDEX]),
  "tiff 1 bit": (file_of(Image.fromarray(BITS), "TIFF"), grey(255 * BITS)),
  "tiff fax": (
    file_of(Image.fromarray(BITS), "TIFF", compression="group4"),
    grey(255 * BITS),
  ),
  "tiff cmyk": (
    file_of(cmyk(), "TIFF"),
    np.asarray(cmyk().convert("RGB")),
  ),
  "tiff 16 bits": (file_of(Image.fromarray(WORDS), "TIFF"), grey(WORDS / 257)),
  "tiff 16 bits, big endian": (
    tiff(WORDS, byteorder=">"),
    grey(WORDS / 257),
  ),
  "tiff 16 bits colour": (tiff(WORDS3, photometric="rgb"), WORDS3 / 257),
  "tiff 16 bits alpha": (
    tiff(WORDS4, photometric="rgb", extrasamples=["unassalpha"]),
    over(WORDS4[..., :3] / 257, WORDS4[..., 3] / 257),
  ),
  "tiff planes": (
    tiff(
      np.moveaxis(WORDS3, -1, 0), photometric="rgb", planarconfig="separate"
    ),
    WORDS3 / 257,
  ),
  "tiff tiles, deflate": (
    tiff(WORDS3, photometric="rgb", tile=(16, 16), compression="zlib"),
    WORDS3 / 257,
  ),
  "tiff floats": (
    tiff(ramp(1).astype(np.float32)),
    grey(ramp(255)),
  ),
  "tiff double floats": (tiff(ramp(1)), grey(ramp(255))),
  "tiff pages": (
    tiff(np.stack([GREY, 255 - GREY]), photometric="minisblack"),
    grey(GREY),
  ),
  "big tiff": (tiff(COLOR, photometric="rgb", bigtiff=True), COLOR),
  "avif": (file_of(Image.fromarray(COLOR), "AVIF"), COLOR),
  "avif alpha": (file_of(with_alpha(), "AVIF"), over(COLOR, ALPHA)),
  "heic": (file_of(Image.fromarray(COLOR), "HEIF"), COLOR),
  "npy grey": (npy(GREY), grey(GREY)),
  "npy one channel": (npy(GREY[..., None]), grey(GREY)),
  "npy colour": (npy(COLOR), COLOR),
  "npy fortran": (npy(np.asfortranarray(COLOR)), COLOR),
  "npy 16 bits": (npy(WORDS3), WORDS3 / 257),
  "npy signed": (
    npy((WORDS.astype(int) - 2**15).astype(np.int16)),
    grey(WORDS / 257),
  ),
  "npy floats": (npy(ramp(1, 3)), ramp(255, 3)),
  "npy truth": (npy(BITS), grey(255 * BITS)),
}
LOSSY = {"avif": 14, "avif alpha": 14, "heic": 40}


@pytest.mark.parametrize("name", CASES)
def test_pixels_are_those_that_are_seen(name):
  data, seen = CASES[name]
  got = test_decode.cut(data, (0, 0, *SIZE), size=SIZE, background=BACKGROUND)
  off = np.abs(got.astype(float) - seen)
  assert off.max() <= LOSSY.get(name, 1), off.max()
  assert got.dtype == np.uint8
  luma = np.asarray(seen) @ pixels.LUMA
  got = test_decode.cut(
    data, (0, 0, *SIZE), size=SIZE, background=BACKGROUND, channels=1
  )
  assert np.abs(got[..., 0] - luma).max() <= LOSSY.get(name, 1.1)


@pytest.mark.parametrize("channels", [2, 4, 5, 12])
@pytest.mark.parametrize("kind", ["npy", "tiff", "tiff planes", "tiff 8 bits"])
def test_any_number_of_channels_is_kept_as_it_is(kind, channels):
  words = ramp(65535, channels).astype(np.uint16)
  if kind == "npy":
    data = npy(words)
  elif kind == "tiff":
    data = tiff(words, photometric="minisblack", planarconfig="contig")
  elif kind == "tiff 8 bits":
    data = tiff(
      (words // 257).astype(np.uint8),
      photometric="minisblack",
      planarconfig="contig",
    )
  else:
    planes = np.moveaxis(words, -1, 0)
    data = tiff(planes, photometric="minisblack", planarconfig="separate")
  got = test_decode.cut(data, (0, 0, *SIZE), size=SIZE, channels=channels)
  assert np.abs(got.astype(float) - words / 257).max() <= 1
  for other in (1, 3, 7):
    with pytest.raises(ValueError, match=f"{channels} channels.*{other}"):
      pixels.read(data, pixels.Rules(channels=other))


def test_alpha_is_a_channel_where_the_config_wants_as_many():
  data = file_of(with_alpha(), "PNG")
  got = pixels.read(data, pixels.Rules(channels=4))
  np.testing.assert_array_equal(got, np.dstack([COLOR, ALPHA]))
  with pytest.raises(ValueError, match="3 channels; data.channels=4"):
    pixels.read(file_of(Image.fromarray(COLOR), "PNG"), pixels.Rules(4))


DARK = (1000 + ramp(3000)).astype(np.uint16)  # a camera's 12 bits of 16


@pytest.mark.parametrize(
  "range_, seen",
  [
    ("full", DARK / 257),
    ("file", (DARK - 1000) / 3000 * 255),
    ("4095", DARK / 4095 * 255),
    ("2000", np.minimum(DARK / 2000, 1) * 255),
  ],
)
@pytest.mark.parametrize("encoding", ["PNG", "TIFF", "npy"])
def test_the_range_of_16_bits_is_the_configs(encoding, range_, seen):
  array = Image.fromarray(DARK)
  data = npy(DARK) if encoding == "npy" else file_of(array, encoding)
  got = pixels.read(data, pixels.Rules(channels=1, range=range_))[..., 0]
  assert np.abs(got - seen).max() <= 0.51
  bytes_ = npy(GREY)  # 8 bits have their range
  got = pixels.read(bytes_, pixels.Rules(channels=1, range=range_))
  np.testing.assert_array_equal(got[..., 0], GREY)


def test_what_is_not_finite_is_the_least():
  array = ramp(1).astype(np.float32) * 4 - 1
  array[0, :3] = np.nan, np.inf, -np.inf
  for range_ in ("full", "file"):
    got = pixels.to_bytes(array, range_)
    assert got[0, :3].tolist() == [0, 0, 0] and got[-1, -1] == 255
  flat = np.full((2, 3), 7.0)
  assert not pixels.to_bytes(flat, "file").any()


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_rotation_of_a_tiff_that_pillow_does_not_read(orientation):
  tag = [(274, "H", 1, orientation, True)]
  data = tiff(WORDS3, photometric="rgb", extratags=tag)
  header = headers.read_header(data)
  assert header.decoder == "tifffile"
  assert (header.height, header.width) == SIZE  # as stored
  assert header.orientation == orientation


# --- hostile files ----------------------------------------------------------


def gif_of_frames(side, count):
  """Frames that say they are of side x side pixels, and have none."""
  frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x01\x04\0"
  screen = struct.pack("<HHBBB", side, side, 0x80, 0, 0)
  return b"GIF89a" + screen + bytes(6) + frame * count + b";"


def tiff_of(**changes):
  """A sound TIFF of which some tags say something else."""
  data = bytearray(tiff(GREY, tile=(16, 16), compression="zlib"))
  names = {"width": 256, "height": 257, "tile_width": 322, "tile_height": 323}
  for name, value in changes.items():
    start = data.index(struct.pack("<HH", names[name], 4), 8)
    data[start + 8 : start + 12] = struct.pack("<I", value)
  return bytes(data)


def npy_of(shape, dtype="|u1"):
  header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}}}"
  header = header.encode().ljust(117) + b"\n"
  size = struct.pack("<H", len(header))
  return b"\x93NUMPY\x01\x00" + size + header + bytes(40)


HOSTILE = {  # name -> (file, what is said of it)
  "gif of 40 frames": (gif_of_frames(8200, 40), "8200 x 8200 pixels"),
  "webp": (
    b"RIFF\x99\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xff\x2f\0" * 2 + bytes(90),
    "12288 x 12288 pixels",
  ),
  "bmp": (
    b"BM" + bytes(12) + struct.pack("<Iii", 40, 2**30, -(2**30)) + bytes(99),
    "1073741824 x 1073741824 pixels",
  ),
  "tiff": (tiff_of(width=100_000, height=100_000), "100000 x 100000 pixels"),
  "tiff of one huge tile": (
    tiff_of(tile_width=2**16, tile_height=2**16),
    "6 x 8 pixels of .* bytes",
  ),
  "big tiff of a place beyond any": (
    b"II+\0\x08\0\0\0" + b"\xff" * 8 + bytes(40),
    "cut within its header",
  ),
  "npy of many channels": (npy_of((9, 8, 10**9)), "that needs"),
  "npy that promises more": (npy_of((500, 500, 3)), "of 168 bytes that needs"),
  "npy of objects": (npy_of((2, 2), "|O"), "of object, not of pixels"),
  "npy of code": (npy_of("__import__('os')"), "broken header"),
  "npy of one axis": (npy_of((40,)), "not \\[H, W\\]"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_limits_hold_before_memory_is_taken(name):
  data, reason = HOSTILE[name]
  tracemalloc.start()
  try:
    with pytest.raises(ValueError, match=reason) as error:
      pixels.read(data, pixels.Rules())
    assert tracemalloc.get_traced_memory()[1] < 2**21
  finally:
    tracemalloc.stop()
  assert "\n" not in str(error.value)


def test_of_many_frames_the_first_alone_is_decoded():
  import PIL.GifImagePlugin

  frames = [Image.fromarray((INDEX + i) % 5) for i in range(4)]
  for frame in frames:
    frame.putpalette(PALETTE.astype(np.uint8).tobytes())
  data = file_of(frames[0], "GIF", save_all=True, append_images=frames[1:])
  with headers.opened(data, "gif") as image:
    assert isinstance(image, PIL.GifImagePlugin.GifImageFile)
    assert image.n_frames == 4
  got = pixels.read(data, pixels.Rules())
  np.testing.assert_array_equal(got, PALETTE[INDEX])
  # 40 frames would not fit; one does.
  limit = pixels.Rules(max_mib=3 * np.prod(SIZE) / 2**20)
  assert pixels.read(data, limit).shape == (*SIZE, 3)
  with pytest.raises(ValueError, match="more than data.max_mib"):
    pixels.read(data, dataclasses.replace(limit, max_mib=limit.max_mib * 0.99))


@pytest.mark.parametrize("seed", range(3))
def test_damage_ends_in_pixels_or_one_line(seed):
  import fuzz_images  # which takes its files from here

  rng = random.Random(seed)
  found = {fuzz_images.run_one(fuzz_images.damaged(rng)) for _ in range(40)}
  assert "read" in found and len(found) > 4
