"""Batches of decoded images, from what is planned for each step.

A batch is decoded as a whole; only where that fails is it decoded again, image
by image.
"""

from collections.abc import Callable, Mapping
import os
from typing import Any

import numpy as np
import tensorflow as tf

from jepa_jax import models
from jepa_jax.data import augment, decode, pixels, sources
from jepa_jax.data import headers as headers_lib

# AutoGraph has nothing to convert here, and takes its time to find out.
plain = tf.autograph.experimental.do_not_convert
# By decoding.
_CONSUMED = ("encoded", "kind", "box", "flips", "record", "color")


def decoded(
  steps: tf.data.Dataset,
  plan: Callable[[np.ndarray], tuple[Any, ...]],
  spec: Mapping[str, tf.TensorSpec],
  source: sources.Source,
  config: Any,
  size: int,
  features: Callable[[dict[str, tf.Tensor]], dict[str, Any]] | None = None,
) -> tf.data.Dataset:
  """Reads, decodes and batches what `plan` says of each step.

  Args:
    steps: int64 scalars.
    plan: step -> (encoded, kind, box, flips, index, *what `spec` names), of a
      batch.
    spec: names and types of what plan gives besides.
    source: where the images come from.
    config: config.data.
    size: images a batch.
    features: makes more entries from an example of all of the above.

  Returns:
    (step, batch): image [B, ...], readable bool [B], index, the spec's, the
    features'.
  """
  spec = {
    "encoded": tf.TensorSpec([size], tf.string),
    "kind": tf.TensorSpec([size], tf.int32),
    "box": tf.TensorSpec([size, 4], tf.int32),
    "flips": tf.TensorSpec([size, 3], tf.bool),
    "index": tf.TensorSpec([size], tf.int64),
    **spec,
  }

  rules = pixels.Rules.from_config(config)
  image_size = models.height_and_width(config.image_size)

  def read(step):
    types = [x.dtype for x in spec.values()]
    values = tf.numpy_function(plan, [step], types, stateful=False)
    values = zip(spec, values)
    return step, {k: tf.ensure_shape(x, spec[k].shape) for k, x in values}

  def example(x, image, readable):
    more = features(x) if features else {}
    keep = {k: v for k, v in x.items() if k not in _CONSUMED}
    return {"image": image, "readable": readable, **keep, **more}

  def sound(x):
    distort = None
    if "color" in x:
      distort = lambda image: augment.distort(image, x["color"], config)
    image = decode.decode_crop(
      x["encoded"],
      x["box"],
      x["flips"],
      x["kind"],
      image_size=image_size,
      rules=rules,
      encoding=source.encoding,
      distort=distort,
    )
    return example(x, image, tf.constant(True))

  def blank(x):
    shape = [*image_size, config.channels]
    return example(x, tf.zeros(shape, tf.uint8), tf.constant(False))

  threads = config.threads or os.cpu_count()
  decode_batch = lambda step, batch: _decode_batch(
    step, batch, plain(sound), plain(blank), size, threads
  )
  return steps.map(plain(read), num_parallel_calls=2).interleave(
    plain(decode_batch),
    cycle_length=2,
    num_parallel_calls=2,
    deterministic=True,
  )


def _decode_batch(
  step: tf.Tensor,
  batch: dict[str, tf.Tensor],
  sound: Callable[..., Any],
  blank: Callable[..., Any],
  size: int,
  threads: int,
) -> tf.data.Dataset:
  """A data set of one decoded batch.

  The batch is decoded as a whole. Only where that fails is it decoded again,
  image by image, to find out which are to blame; so sound data pay nothing.
  """

  def one(x):
    image = tf.data.Dataset.from_tensors(x)
    sound_or_none = image.map(sound).ignore_errors()
    return sound_or_none.concatenate(image.map(blank)).take(1)

  images = tf.data.Dataset.from_tensor_slices(batch)
  whole = images.map(sound, num_parallel_calls=threads)
  whole = whole.batch(size, drop_remainder=True).ignore_errors()
  again = images.flat_map(plain(one)).batch(size, drop_remainder=True)
  return whole.concatenate(again).take(1).map(plain(lambda x: (step, x)))


def headers(
  encoded: list[bytes], rules: pixels.Rules
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """Encoded images, kinds [B], sizes [B, 2] and orientations [B], from headers.

  An image whose header says that it cannot be read is emptied, so that decoding
  it fails.
  """
  found = []
  for i, data in enumerate(encoded):
    try:
      header = headers_lib.read_header(data, rules.max_mib)
    except ValueError:
      header = headers_lib.Header("", 1, 1)
      encoded[i] = b""
    found.append(header)
  kinds = np.asarray([decode.kind_of(x) for x in found], np.int32)
  sizes = np.asarray([(x.height, x.width) for x in found])
  orientations = np.asarray([x.orientation for x in found])
  return strings(encoded), kinds, sizes, orientations


def strings(values: list[bytes]) -> np.ndarray:
  """Bytes as an array [B] that TensorFlow takes for strings."""
  # dtype object, or NumPy would strip trailing zero bytes.
  result = np.empty(len(values), object)
  result[:] = values
  return result
