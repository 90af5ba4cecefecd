"""The input pipeline: a step's number in, its batch out.

Every batch is a pure function of (config, step): the order of images is a
keyed permutation of record numbers, crops and masks come from a counter-based
generator. So hosts agree without talking, and resuming costs one seek.
"""

from collections.abc import Callable, Mapping
import os
import threading
from typing import Any

import numpy as np
import tensorflow as tf

from jepa_jax import masks, models
from jepa_jax.data import augment, decode, order, sources, tf_masks

_plain = tf.autograph.experimental.do_not_convert  # nothing to convert: faster
_CONSUMED = ("encoded", "box", "turn", "record", "color")  # by decoding


class Unreadable:
  """Counts and names the images that a pipeline had to skip.

  The pipeline adds from its threads; the train loop calls `check`.

  Args:
    limit: distinct images after which `check` fails (config.max_unreadable).
  """

  def __init__(self, limit: int):
    self._limit = limit
    self._lock = threading.Lock()
    self._reasons: dict[str, str] = {}
    self._fatal = ""

  def add(self, name: str, reason: str) -> None:
    with self._lock:
      self._reasons.setdefault(name, reason)

  def stop(self, name: str, count: int) -> None:
    """Makes `check` fail: a whole batch, from `name` on, cannot be read."""
    self._fatal = f"none of the {count} images of a batch could be read: {name}"

  def __len__(self) -> int:
    return len(self._reasons)

  @property
  def reasons(self) -> dict[str, str]:
    """What is wrong with each image, by name, in the order of discovery."""
    with self._lock:
      return dict(self._reasons)

  def check(self) -> None:
    """Raises ValueError where more images were unreadable than allowed."""
    reasons = self.reasons
    if self._fatal:
      raise ValueError(f"{self._fatal} and the rest; mend or remove them")
    if len(reasons) > self._limit:
      shown = [f"{name} ({why})" for name, why in list(reasons.items())[:3]]
      raise ValueError(
        f"{len(reasons)} images could not be read, more than"
        f" data.max_unreadable={self._limit}: {', '.join(shown)}"
        f"{', ...' if len(reasons) > 3 else ''}; mend or remove them, or"
        " raise data.max_unreadable"
      )


def num_examples(config: Any, split: str | None = None) -> int:
  """Images of an epoch of config.data (or of another split of it)."""
  return len(sources.open_source(config, split))


def train_dataset(
  config: Any,
  *,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  unreadable: Unreadable | None = None,
) -> tf.data.Dataset:
  """Endless batches of crops and masks, from any step on.

  Each image comes once an epoch; batches run on over the ends of epochs. A
  process reads its contiguous share of every global batch. Where an image
  cannot be read, another one of its batch stands in, with masks of its own.

  Args:
    config: the whole configuration; reads seed, batch_size, data, masks and
      encoder.patch_size.
    start_step: first step, 0 or more; nothing before it is read.
    process_index: of this process.
    process_count: number of processes; must divide the batch size.
    unreadable: where to count images that are skipped; call its `check`.

  Returns:
    Batches {image uint8 [B, H, W, C], context_ids int32 [B, S, K],
    context_valid bool [B, S, K], target_ids int32 [B, M, T], target_valid
    bool [B, M, T]}, B being this process's share.

  Raises:
    ValueError: source, sizes or masks that cannot be had.
  """
  data = config.data
  if config.batch_size % process_count:
    raise ValueError(
      f"batch size {config.batch_size} does not divide by {process_count}"
      " processes; set batch_size to a multiple"
    )
  share = config.batch_size // process_count
  grid = models.patch_grid(
    data.image_size, data.image_size, config.encoder.patch_size
  )
  masks.mask_shapes(config.masks, grid)  # fail now, not in the first batch
  source = sources.open_source(data)
  if unreadable is None:
    unreadable = Unreadable(data.max_unreadable)
  places = process_index * share + np.arange(share)

  def plan(step):
    epoch, index = order.of_source(
      source, step * config.batch_size + places, config.seed
    )
    encoded, sizes, orientations = _headers(source.images(source.read(index)))
    crops = augment.random_crops(
      data, sizes, orientations, seed=config.seed, epoch=epoch, index=index
    )
    plans = (encoded, crops.boxes, crops.flips, index, epoch)
    if not augment.distorts(data):
      return plans
    return *plans, augment.random_colors(
      data, seed=config.seed, epoch=epoch, index=index
    )

  def finish(step, batch):
    drawn = tf_masks.sample(
      config.masks,
      grid,
      seed=config.seed,
      step=step,
      epoch=batch["epoch"],
      index=batch["index"],
    )
    return {"image": _mended(batch, source, unreadable), **drawn}

  spec = {"epoch": tf.TensorSpec([share], tf.int64)}
  if augment.distorts(data):
    spec["color"] = tf.TensorSpec([share, 6], tf.float32)
  steps = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max)
  dataset = _decoded(steps, plan, spec, source, data, share)
  return _finish(dataset.map(_plain(finish)), data)


def evaluation_dataset(
  config: Any,
  *,
  batch_size: int,
  label: str | None = None,
  split: str | None = None,
  process_index: int = 0,
  process_count: int = 1,
  unreadable: Unreadable | None = None,
) -> tf.data.Dataset:
  """Every image of a split once, in order, cut to its central square.

  A process reads its contiguous share of every global batch.

  Args:
    config: config.data.
    batch_size: images a global batch; the last one is padded.
    label: name of a label of `scenes.LABELS`, or of a scalar feature; None for
      no labels.
    split: in place of config.split.
    process_index: of this process.
    process_count: number of processes; must divide the batch size.
    unreadable: where to count images that are skipped.

  Returns:
    Batches {image uint8 [B, H, W, C], label [B, ...], valid bool [B]}, B being
    this process's share. Padding, and what cannot be read, has valid False.

  Raises:
    ValueError: source, label or share that cannot be had.
  """
  source = sources.open_source(config, split)
  label_of = None if label is None else _label_function(label)
  if unreadable is None:
    unreadable = Unreadable(config.max_unreadable)
  count = len(source)
  if batch_size % process_count:
    raise ValueError(
      f"batch size {batch_size} does not divide by {process_count}"
      " processes; use a multiple"
    )
  share = batch_size // process_count
  offsets = process_index * share + np.arange(share)

  def plan(start):
    place = start + offsets
    index = np.minimum(place, count - 1)  # the last image pads its batch
    records = source.read(index)
    encoded, sizes, orientations = _headers(source.images(records))
    crops = augment.central_crops(sizes, orientations)
    return (
      *(encoded, crops.boxes, crops.flips, index),
      *(_strings(records), place < count),
    )

  def finish(start, batch):
    del start
    _mended(batch, source, unreadable)  # counts what "valid" leaves out
    example = {
      "image": batch["image"],
      "valid": batch["valid"] & batch["readable"],
    }
    if label_of is not None:
      example["label"] = batch["label"]
    return example

  def features(example):
    if label_of is None:
      return {}
    record = example["record"]
    return {"label": label_of(source.features(record, example["index"]))}

  spec = {
    "record": tf.TensorSpec([share], tf.string),
    "valid": tf.TensorSpec([share], tf.bool),
  }
  starts = tf.data.Dataset.range(0, count, batch_size)
  dataset = _decoded(starts, plan, spec, source, config, share, features)
  return _finish(dataset.map(_plain(finish)), config)


def _decoded(
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
    plan: step -> (encoded, box, turn, index, *what `spec` names), of a batch.
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
    "box": tf.TensorSpec([size, 4], tf.int32),
    "turn": tf.TensorSpec([size, 3], tf.bool),
    "index": tf.TensorSpec([size], tf.int64),
    **spec,
  }

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
      x["turn"],
      image_size=config.image_size,
      channels=config.channels,
      encoding=source.encoding,
      distort=distort,
    )
    return example(x, image, tf.constant(True))

  def blank(x):
    shape = [config.image_size, config.image_size, config.channels]
    return example(x, tf.zeros(shape, tf.uint8), tf.constant(False))

  threads = config.threads or os.cpu_count()
  decode_batch = lambda step, batch: _decode_batch(
    step, batch, _plain(sound), _plain(blank), size, threads
  )
  return steps.map(_plain(read), num_parallel_calls=2).interleave(
    _plain(decode_batch),
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
  again = images.flat_map(_plain(one)).batch(size, drop_remainder=True)
  return whole.concatenate(again).take(1).map(_plain(lambda x: (step, x)))


def _headers(
  encoded: list[bytes],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Encoded images, sizes [B, 2] and orientations [B], from their headers.

  An image whose header says that it cannot be read is emptied, so that decoding
  it fails.
  """
  headers = []
  for i, data in enumerate(encoded):
    try:
      headers.append(decode.read_header(data))
    except ValueError:
      headers.append(decode.Header("", 1, 1))
      encoded[i] = b""
  sizes = np.asarray([(x.height, x.width) for x in headers])
  orientations = np.asarray([x.orientation for x in headers])
  return _strings(encoded), sizes, orientations


def _mended(
  batch: dict[str, tf.Tensor],
  source: sources.Source,
  unreadable: Unreadable,
) -> tf.Tensor:
  """The images, others of the batch for the unreadable ones; counts those."""
  image, readable = batch["image"], batch["readable"]

  def report(readable, index):
    bad = np.flatnonzero(~readable)
    for number in np.unique(index[bad]):
      (record,) = source.images(source.read(np.asarray([number])))
      unreadable.add(source.name(int(number)), decode.diagnose(record))
    good = np.flatnonzero(readable)
    if not len(good):
      unreadable.stop(source.name(int(index[0])), len(index))
      return np.arange(len(readable), dtype=np.int32)
    following = np.searchsorted(good, np.arange(len(readable))) % len(good)
    return good[following].astype(np.int32)

  def replace():
    rows = tf.numpy_function(report, [readable, batch["index"]], tf.int32)
    return tf.gather(image, tf.ensure_shape(rows, readable.shape))

  return tf.cond(tf.reduce_all(readable), lambda: image, replace)


def _strings(values: list[bytes]) -> np.ndarray:
  # dtype object, or NumPy would strip trailing zero bytes.
  result = np.empty(len(values), object)
  result[:] = values
  return result


def _label_function(label: str) -> Any:
  from jepa_jax.data import scenes

  if label in scenes.LABELS:
    return scenes.LABELS[label]

  def feature(features):
    if label not in features:
      known = sorted(set(features) | set(scenes.LABELS))
      raise ValueError(f'no label "{label}"; there are: {", ".join(known)}')
    return tf.cast(features[label], tf.int32)

  return feature


def _finish(dataset: tf.data.Dataset, config: Any) -> tf.data.Dataset:
  """Bounds threads and prefetching."""
  options = tf.data.Options()
  options.deterministic = True
  if config.threads:
    options.threading.private_threadpool_size = config.threads
    options.threading.max_intra_op_parallelism = 1
  options.autotune.enabled = True
  return dataset.prefetch(config.prefetch).with_options(options)
