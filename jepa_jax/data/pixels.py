"""Decoding of what TensorFlow does not read, or not as it should.

TensorFlow decodes JPEG, and PNG of 8 bits in grey or colour: most images, and
the fastest. Everything else is read here, by Pillow where it has a mode for it,
else by tifffile or NumPy, and becomes uint8 with `data.channels` channels.
"""

from collections.abc import Callable
import dataclasses
import io
import logging
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError
import tensorflow as tf

from jepa_jax.data import headers

LUMA = (0.299, 0.587, 0.114)  # grey of red, green and blue, ITU-R BT.601
COLOR = (1, 3)  # channels that colour and grey are converted to


@dataclasses.dataclass(frozen=True)
class Rules:
  """How images of all kinds become uint8 [H, W, C].

  Attributes:
    channels: of the result. 1 and 3: colour and grey are converted and
      transparency is laid over the background; any other number: an image must
      have as many, transparency included, and keeps them.
    background: red, green and blue, on a scale of 0 to 1.
    range: what becomes 0 to 255 where there are more than 8 bits: "full", of
      the type (of floats: 0 to 1); "file", from the least to the greatest value
      of the file; or a number as text, from 0 to it.
    max_mib: that a file may have, and decode to.
  """

  channels: int = 3
  background: tuple[float, ...] = (1.0, 1.0, 1.0)
  range: str = "full"
  max_mib: float = headers.MAX_MIB

  @classmethod
  def from_config(cls, config: Any) -> "Rules":
    """Of config.data."""
    return cls(
      config.channels,
      tuple(config.background),
      config.range,
      config.max_mib,
    )


def read(data: bytes, rules: Rules, channels: int = 0) -> np.ndarray:
  """Decodes an image of any kind.

  Args:
    data: the file.
    rules: what becomes of its pixels.
    channels: in place of rules.channels.

  Returns:
    uint8 [H, W, C], as stored: the header's orientation is still to be undone.

  Raises:
    ValueError: it cannot be read, or not with these channels.
  """
  array, alpha = stored(data, rules.max_mib)
  return _with_channels(array, alpha, channels or rules.channels, rules)


def stored(
  data: bytes, max_mib: float = headers.MAX_MIB
) -> tuple[np.ndarray, bool]:
  """An image's values [H, W, C] of any type, and whether the last is alpha.

  Raises:
    ValueError: it cannot be read.
  """
  header = headers.read_header(data, max_mib)
  try:
    array, alpha = _READERS[header.decoder](data, header)
  except headers.Missing:
    raise
  except Exception as error:  # a decoder's own, of many kinds
    raise ValueError(f"{_damaged(header)}{_short(error)}") from error
  if array.shape[:2] != (header.height, header.width):
    raise ValueError(
      f"{_damaged(header)}: {array.shape[:2]} pixels, not"
      f" {header.height} x {header.width}"
    )
  return array, alpha


def diagnose(data: bytes, rules: Rules) -> str:
  """Says in a few words why an image could not be read."""
  try:
    read(data, rules)
  except ValueError as error:
    return str(error)
  return "it could be read now, and could not before"


def _damaged(header: headers.Header) -> str:
  return f"damaged {header.encoding.upper()} data"


def _short(error: Exception) -> str:
  """A decoder's words, where they are few; TensorFlow's are of its graph."""
  text = " ".join(str(error).split())
  vague = isinstance(error, (tf.errors.OpError, UnidentifiedImageError))
  return "" if vague or not text else f": {text[:100]}"


def _with_channels(
  array: np.ndarray, alpha: bool, channels: int, rules: Rules
) -> np.ndarray:
  """uint8 of an array [H, W, C] whose last channel may be alpha."""
  found = array.shape[-1]
  if channels not in COLOR or (found - alpha not in COLOR):
    if found != channels:
      raise ValueError(f"{found} channels; data.channels={channels}")
    return to_bytes(array, rules.range)
  if alpha:
    opacity = to_bytes(array[..., -1:], "full").astype(np.float32) / 255
    color = to_bytes(array[..., :-1], rules.range)
    behind = np.asarray(rules.background, np.float32) * 255
    array = _rounded(color * opacity + behind * (1 - opacity))  # [H, W, 3]
  else:
    array = to_bytes(array, rules.range)
  if channels == array.shape[-1]:
    return array
  if channels == 1:
    return _rounded(array @ np.asarray(LUMA, np.float32)[:, None])
  return np.repeat(array, 3, axis=-1)


def to_bytes(array: np.ndarray, range_: str) -> np.ndarray:
  """uint8 of values of any type, as `Rules.range` says.

  What is not finite becomes the least.
  """
  if array.dtype == np.uint8:
    return array
  if array.dtype == np.bool_:
    return array * np.uint8(255)
  floats = array.dtype.kind == "f"
  if range_ == "file":
    finite = array[np.isfinite(array)] if floats else array
    low, high = (finite.min(), finite.max()) if finite.size else (0, 1)
  elif range_ == "full":
    info = None if floats else np.iinfo(array.dtype)
    low, high = (0, 1) if floats else (info.min, info.max)
  else:
    low, high = 0, float(range_)
  low, high = float(low), float(high)
  wide = array.astype(np.result_type(array.dtype, np.float32))
  share = (wide - low) / (high - low if high > low else 1.0)
  share = np.nan_to_num(share, nan=0.0, posinf=0.0, neginf=0.0)
  return _rounded(255 * np.clip(share, 0, 1))


def _rounded(array: np.ndarray) -> np.ndarray:
  return (array + np.float32(0.5)).astype(np.uint8)


def _pillow(data: bytes, header: headers.Header) -> tuple[np.ndarray, bool]:
  with headers.opened(data, header.encoding) as image:
    mode = image.mode
    if "transparency" in image.info or mode in ("PA", "La", "RGBa"):
      image = image.convert("LA" if mode in ("1", "L", "La") else "RGBA")
    elif mode == "1":
      image = image.convert("L")
    elif mode in ("P", "CMYK", "YCbCr", "HSV"):
      image = image.convert("RGB")
    elif mode not in ("L", "LA", "RGB", "RGBA", "RGBX", "I", "F") and (
      not mode.startswith("I;16")
    ):
      raise ValueError(f"mode {mode}")
    array = np.asarray(image)
    mode = image.mode
  if array.ndim == 2:
    array = array[..., None]
  return array, mode in ("LA", "RGBA")


def _tensorflow(data: bytes, header: headers.Header) -> tuple[np.ndarray, bool]:
  decode = {"jpeg": tf.io.decode_jpeg, "png": tf.io.decode_png}
  return decode[header.decoder](data, channels=3).numpy(), False


def _png16(data: bytes, header: headers.Header) -> tuple[np.ndarray, bool]:
  del header  # Pillow drops half of the bits of colour
  array = tf.io.decode_png(data, dtype=tf.uint16).numpy()
  return array, array.shape[-1] in (2, 4)


def _tifffile(data: bytes, header: headers.Header) -> tuple[np.ndarray, bool]:
  del header
  try:
    import tifffile
  except ImportError:
    raise headers.Missing(
      "needs tifffile: pip install 'jepa_jax[images]'"
    ) from None
  # What it says of each damaged tag; the error says enough.
  logging.getLogger("tifffile").setLevel(logging.CRITICAL)
  with tifffile.TiffFile(io.BytesIO(data)) as file:
    page = file.pages[0]
    array, axes = page.asarray(maxworkers=1), page.axes
    alpha = bool(page.extrasamples) and page.extrasamples[-1] in (1, 2)
  if axes == "SYX":  # a plane a channel
    array = np.moveaxis(array, 0, -1)
  elif axes == "YX":
    array = array[..., None]
  elif axes != "YXS":
    raise ValueError(f"axes {axes}, not those of an image")
  return array, alpha


def _npy(data: bytes, header: headers.Header) -> tuple[np.ndarray, bool]:
  del header
  array = np.load(io.BytesIO(data), allow_pickle=False)
  return array if array.ndim == 3 else array[..., None], False


_READERS: dict[
  str, Callable[[bytes, headers.Header], tuple[np.ndarray, bool]]
] = {
  "jpeg": _tensorflow,
  "png": _tensorflow,
  "png16": _png16,
  "pillow": _pillow,
  "tifffile": _tifffile,
  "npy": _npy,
}
