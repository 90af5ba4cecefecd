"""The input pipeline: a step's number in, its batch out.

Every batch is a pure function of (config, step): the order of images is a
keyed permutation of record numbers, crops and masks come from a counter-based
generator. So hosts agree without talking, and resuming costs one seek.
"""

from collections.abc import Callable, Mapping
import os
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from jepa_jax import masks, models
from jepa_jax.data import augment, decode, order, sources, tf_masks
from jepa_jax.data import unreadable as unreadable_lib

_plain = tf.autograph.experimental.do_not_convert  # nothing to convert: faster
Provider = Callable[[tf.Tensor, dict[str, tf.Tensor]], dict[str, tf.Tensor]]
_CONSUMED = ("encoded", "box", "turn", "record", "color")  # by decoding


def num_examples(config: Any, split: str | None = None) -> int:
  """Images of an epoch of config.data (or of another split of it)."""
  return len(sources.open_source(config, split))


class _Request(NamedTuple):
  """What the providers of a training batch are made from."""

  config: Any
  spec: Mapping[str, Any]
  source: sources.Source


def _images(request: _Request) -> Provider:
  del request
  return lambda step, batch: {"image": batch["image"]}


def _masks(request: _Request) -> Provider:
  config, data = request.config, request.config.data
  grid = models.patch_grid(
    data.image_size, data.image_size, config.encoder.patch_size
  )
  masks.mask_shapes(config.masks, grid)  # fail now, not in the first batch
  return lambda step, batch: tf_masks.sample(
    config.masks,
    grid,
    seed=config.seed,
    step=step,
    epoch=batch["epoch"],
    index=batch["index"],
  )


def _labels(request: _Request) -> Provider:
  dtype = request.spec["label"].dtype
  return lambda step, batch: {"label": tf.cast(batch["label"], dtype)}


# What a training batch may hold: name -> what makes a provider of it, a
# function (step, batch) -> arrays by name. Some make several at once.
PROVIDERS: dict[str, Callable[[_Request], Provider]] = {
  "image": _images,
  "label": _labels,
  "context_ids": _masks,
  "context_valid": _masks,
  "target_ids": _masks,
  "target_valid": _masks,
}


def train_dataset(
  config: Any,
  batch_spec: Mapping[str, Any],
  *,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  unreadable: unreadable_lib.Unreadable | None = None,
) -> tf.data.Dataset:
  """Endless batches of what an objective declares, from any step on.

  Each image comes once an epoch; batches run on over the ends of epochs. A
  process reads its contiguous share of every global batch. Where an image
  cannot be read, another one of its batch stands in, with masks of its own.

  Args:
    config: the whole configuration; reads seed, batch_size, data, masks and
      encoder.patch_size.
    batch_spec: name -> shape and type of a global batch's array; the names are
      those of PROVIDERS.
    start_step: first step, 0 or more; nothing before it is read.
    process_index: of this process.
    process_count: number of processes; must divide the batch size.
    unreadable: where to count images that are skipped; call its `check`.

  Returns:
    Batches of exactly those arrays, as many rows as this process's share.

  Raises:
    ValueError: a name without a provider, arrays of other shapes than config
      makes, or source, sizes, label or masks that cannot be had.
  """
  data = config.data
  for name in batch_spec:
    if name not in PROVIDERS:
      raise ValueError(
        f'the objective "{config.objective}" asks for batches with "{name}", '
        f"which nothing provides; there are: {', '.join(PROVIDERS)}."
      )
  if config.batch_size % process_count:
    raise ValueError(
      f"batch size {config.batch_size} does not divide by {process_count}"
      " processes; set batch_size to a multiple"
    )
  share = config.batch_size // process_count
  source = sources.open_source(data)
  request = _Request(config, batch_spec, source)
  makers = dict.fromkeys(PROVIDERS[name] for name in batch_spec)
  providers = [make(request) for make in makers]
  label_of = None
  if "label" in batch_spec:
    if not data.label:
      raise ValueError(
        f'the objective "{config.objective}" learns labels and data.label is '
        'empty; name one, such as data.label="label".'
      )
    label_of = _label_function(data.label)
  if unreadable is None:
    unreadable = unreadable_lib.Unreadable(data.max_unreadable)
  places = process_index * share + np.arange(share)
  distorts = augment.distorts(data)

  def plan(step):
    epoch, index = order.of_source(
      source, step * config.batch_size + places, config.seed
    )
    records = source.read(index)
    encoded, sizes, orientations = _headers(source.images(records))
    draw = dict(seed=config.seed, epoch=epoch, index=index)
    crops = augment.random_crops(data, sizes, orientations, **draw)
    plans = [encoded, crops.boxes, crops.flips, index, epoch]
    if label_of is not None:
      plans.append(_strings(records))
    if distorts:
      plans.append(augment.random_colors(data, **draw))
    return tuple(plans)

  def finish(step, batch):
    keys = ("image",) if label_of is None else ("image", "label")
    batch = batch | unreadable_lib.mend(batch, keys, source, unreadable)
    made = {}
    for provide in providers:
      made |= provide(step, batch)
    return {name: made[name] for name in batch_spec}

  spec = {"epoch": tf.TensorSpec([share], tf.int64)}
  if label_of is not None:
    spec["record"] = tf.TensorSpec([share], tf.string)
  if distorts:
    spec["color"] = tf.TensorSpec([share, 6], tf.float32)
  steps = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max)
  dataset = _decoded(
    steps, plan, spec, source, data, share, _label_feature(source, label_of)
  ).map(_plain(finish))
  _check_spec(dataset.element_spec, batch_spec)
  return _finish(dataset, data)


def _check_spec(made: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
  """Raises ValueError where arrays differ but for the number of rows."""
  for name, x in needed.items():
    have = tuple(made[name].shape[1:]), made[name].dtype.as_numpy_dtype
    need = tuple(x.shape[1:]), np.dtype(x.dtype).type
    if have != need:
      raise ValueError(
        f'the objective asks for "{name}" of {need[1].__name__} {need[0]} an '
        f"image and the config makes {have[1].__name__} {have[0]}; change "
        "data, masks or the objective's batch_spec."
      )


def _label_feature(
  source: sources.Source, label_of: Callable[..., Any] | None
) -> Callable[[dict[str, tf.Tensor]], dict[str, Any]]:
  """A function from an example of `_decoded` to {"label"}, {} without one."""

  def features(example):
    if label_of is None:
      return {}
    record = example["record"]
    return {"label": label_of(source.features(record, example["index"]))}

  return features


def evaluation_dataset(
  config: Any,
  *,
  batch_size: int,
  label: str | None = None,
  split: str | None = None,
  process_index: int = 0,
  process_count: int = 1,
  unreadable: unreadable_lib.Unreadable | None = None,
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
    unreadable = unreadable_lib.Unreadable(config.max_unreadable)
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
    # Counts what "valid" leaves out.
    unreadable_lib.mend(batch, ("index",), source, unreadable)
    example = {
      "image": batch["image"],
      "valid": batch["valid"] & batch["readable"],
    }
    if label_of is not None:
      example["label"] = batch["label"]
    return example

  spec = {
    "record": tf.TensorSpec([share], tf.string),
    "valid": tf.TensorSpec([share], tf.bool),
  }
  starts = tf.data.Dataset.range(0, count, batch_size)
  features = _label_feature(source, label_of)
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
