"""The input pipeline: a step's number in, its batch out.

Every batch is a pure function of (config, step): the order of images is a
keyed permutation of record numbers, crops and masks come from a counter-based
generator. So hosts agree without talking, and resuming costs one seek.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
import numpy as np
import tensorflow as tf

from jepa_jax import masks, models
from jepa_jax.data import augment, batches, order, pixels, sources, tf_masks
from jepa_jax.data import labels as labels_lib
from jepa_jax.data import unreadable as unreadable_lib
from jepa_jax.masks import counter_rng

Provider = Callable[[tf.Tensor, dict[str, tf.Tensor]], dict[str, tf.Tensor]]


def num_examples(config: Any, split: str | None = None) -> int:
  """Images of an epoch of config.data (or of another split of it)."""
  return len(sources.open_source(config, split))


def _crops(config: Any, batch_spec: Mapping[str, Any]) -> Provider:
  del config
  names = [name for name in _CROPS if name in batch_spec]
  return lambda step, batch: {name: batch[name] for name in names}


def _masks(config: Any, batch_spec: Mapping[str, Any]) -> Provider:
  del batch_spec
  grid = models.patch_grid(
    *models.height_and_width(config.data.image_size), config.encoder.patch_size
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


def _labels(config: Any, batch_spec: Mapping[str, Any]) -> Provider:
  if not config.data.label:
    raise ValueError(
      f'the objective "{config.objective}" learns labels and data.label is '
      'empty; name one, such as data.label="label".'
    )
  dtype = batch_spec["label"].dtype
  return lambda step, batch: {"label": tf.cast(batch["label"], dtype)}


def _keys(config: Any, batch_spec: Mapping[str, Any]) -> Provider:
  del batch_spec

  def provide(step: tf.Tensor, batch: dict[str, tf.Tensor]) -> dict[str, Any]:
    del step
    xp, key = (
      tf_masks.TensorFlow,
      counter_rng.stream_key(config.seed, counter_rng.OBJECTIVE),
    )
    for value in (batch["epoch"], batch["index"]):
      key = counter_rng.fold_in(xp, key, tf.cast(value, tf.uint32))
    return {"key": counter_rng.random_bits(xp, key, 2)}

  return provide


# Random crops of an image: one of image_size, several of it, or several of the
# spec's size that show data.local_scale of it.
_CROPS = ("image", "views", "local_views")
_FIRST_LOCAL_VIEW = 1000  # of the numbers that views are drawn by

# What a training batch may hold: name -> what makes, of a config and a spec, a
# function (step, batch) -> arrays by name. Some give several at once.
PROVIDERS: dict[str, Callable[[Any, Mapping[str, Any]], Provider]] = {
  "image": _crops,
  "views": _crops,  # [B, V, H, W, C]
  "local_views": _crops,
  "label": _labels,
  "key": _keys,  # uint32 [B, 2], of JAX: other in every epoch
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
  share = _share(config.batch_size, process_count)
  source = sources.open_source(data)
  providers = _providers(config, batch_spec)
  label_of = {}
  if "label" in batch_spec:
    names = labels_lib.class_names(data, [data.split], data.label)
    if "classes" in config.method:
      labels_lib.check_classes(data, names, config.method.classes)
    label_of["label"] = labels_lib.function(data.label, names)
  if unreadable is None:
    unreadable = unreadable_lib.Unreadable(data.max_unreadable)
  places = process_index * share + np.arange(share)
  steps = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max)
  crops = [name for name in _CROPS if name in batch_spec] or ["image"]
  first = crops[0]
  decoded = {
    name: _decoded(
      *(config, name, batch_spec.get(name), steps, source, places),
      label_of if name == first else {},
    )
    for name in crops
  }
  rules = pixels.Rules.from_config(data)

  def finish(found):
    step, batch = found[first]
    batch = batch | {name: found[name][1][name] for name in crops}
    readable = [x["readable"] for _, x in found.values()]
    batch["readable"] = tf.reduce_all(readable, axis=0)
    keys = (*crops, *label_of)
    batch = batch | unreadable_lib.mend(batch, keys, source, rules, unreadable)
    made = {}
    for provide in providers:
      made |= provide(step, batch)
    return {name: made[name] for name in batch_spec}

  dataset = tf.data.Dataset.zip(decoded).map(batches.plain(finish))
  _check_spec(dataset.element_spec, batch_spec)
  return _finish(dataset, data)


def _decoded(
  config: Any,
  name: str,
  wanted: Any,
  steps: tf.data.Dataset,
  source: sources.Source,
  places: np.ndarray,
  label_of: Mapping[str, Callable[..., Any]],
) -> tf.data.Dataset:
  """Random crops of the images of each step.

  Args:
    config: the whole configuration.
    name: one of _CROPS; each view is read as if it were an image of its own.
    wanted: shape and type of the array.
    steps: int64 scalars.
    source: of the images.
    places: of this process's images in a batch.
    label_of: see _label_features.

  Returns:
    (step, batch) of batches.decoded, the crops under their name.
  """
  data, count, view = config.data, 1, None
  if name != "image":
    count = wanted.shape[1]
    view = np.tile(np.arange(count), len(places))
  if name == "local_views":
    data = ml_collections.ConfigDict(data).copy_and_resolve_references()
    with data.ignore_type():  # of image_size
      data.image_size = tuple(wanted.shape[2:4])
    data.crop_scale = data.local_scale
    view += _FIRST_LOCAL_VIEW
  distorts = augment.distorts(data)
  rules = pixels.Rules.from_config(data)
  size = count * len(places)

  def plan(step):
    epoch, index = order.of_source(
      source, step * config.batch_size + places, config.seed
    )
    records = source.read(index)
    found = batches.headers(source.images(records), rules)
    encoded, kinds, sizes, orientations, epoch, index = (
      np.repeat(x, count, axis=0) for x in (*found, epoch, index)
    )
    draw = dict(seed=config.seed, epoch=epoch, index=index, view=view)
    crops = augment.random_crops(data, sizes, orientations, **draw)
    plans = [encoded, kinds, crops.boxes, crops.flips, index, epoch]
    if label_of:
      plans.append(np.repeat(batches.strings(records), count))
    if distorts:
      plans.append(augment.random_colors(data, **draw))
    return tuple(plans)

  spec = {"epoch": tf.TensorSpec([size], tf.int64)}
  if label_of:
    spec["record"] = tf.TensorSpec([size], tf.string)
  if distorts:
    spec["color"] = tf.TensorSpec([size, augment.colors(data)], tf.float32)

  def by_image(step, batch):
    """Views of an image side by side, the rest once an image."""
    batch = dict(batch)
    image, readable = batch.pop("image"), batch["readable"]
    if view is not None:
      image = tf.reshape(image, (-1, count, *image.shape[1:]))
      readable = tf.reduce_all(tf.reshape(readable, (-1, count)), axis=1)
      batch = {key: x[::count] for key, x in batch.items()}
    return step, batch | {name: image, "readable": readable}

  return batches.decoded(
    steps, plan, spec, source, data, size, _label_features(source, label_of)
  ).map(batches.plain(by_image))


def _share(batch_size: int, process_count: int) -> int:
  """Images of a global batch that one process reads."""
  if batch_size % process_count:
    raise ValueError(
      f"batch size {batch_size} does not divide by {process_count}"
      " processes; set batch_size to a multiple"
    )
  return batch_size // process_count


def _providers(config: Any, batch_spec: Mapping[str, Any]) -> list[Provider]:
  """What makes the arrays of a spec, each once."""
  for name in batch_spec:
    if name not in PROVIDERS:
      raise ValueError(
        f'the objective "{config.objective}" asks for batches with "{name}", '
        f"which nothing provides; there are: {', '.join(PROVIDERS)}."
      )
  makers = dict.fromkeys(PROVIDERS[name] for name in batch_spec)
  return [make(config, batch_spec) for make in makers]


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


def _label_features(
  source: sources.Source, functions: Mapping[str, Callable[..., Any]]
) -> Callable[[dict[str, tf.Tensor]], dict[str, Any]]:
  """A function from an example of `batches.decoded` to its labels by name."""

  def features(example):
    if not functions:
      return {}
    known = source.features(example["record"], example["index"])
    return {name: of(known) for name, of in functions.items()}

  return features


def evaluation_dataset(
  config: Any,
  *,
  batch_size: int,
  labels: Sequence[str] = (),
  names: Mapping[str, Sequence[str]] | None = None,
  split: str | None = None,
  indices: np.ndarray | None = None,
  process_index: int = 0,
  process_count: int = 1,
  unreadable: unreadable_lib.Unreadable | None = None,
) -> tf.data.Dataset:
  """Every image of a split once, in order, cut to its central part.

  A process reads its contiguous share of every global batch.

  Args:
    config: config.data.
    batch_size: images a global batch; the last one is padded.
    labels: names of labels of `scenes.LABELS`, or of features.
    names: of classes by label, see labels.class_names; text becomes the number
      of its name.
    split: in place of config.split.
    indices: of some images of the split, in place of all.
    process_index: of this process.
    process_count: number of processes; must divide the batch size.
    unreadable: where to count images that are skipped.

  Returns:
    Batches {image uint8 [B, H, W, C], labels {name: [B, ...]}, valid bool [B]},
    B being this process's share. Integers and truth values are int32, floats
    float32, text without names is text. Padding, and what cannot be read, has
    valid False.

  Raises:
    ValueError: source, label or share that cannot be had.
  """
  source = sources.open_source(config, split)
  names = names or {}
  label_of = {x: labels_lib.function(x, names.get(x)) for x in labels}
  if unreadable is None:
    unreadable = unreadable_lib.Unreadable(config.max_unreadable)
  indices = np.arange(len(source)) if indices is None else indices
  count = len(indices)
  rules = pixels.Rules.from_config(config)
  image_size = models.height_and_width(config.image_size)
  share = _share(batch_size, process_count)
  offsets = process_index * share + np.arange(share)

  def plan(start):
    place = start + offsets
    index = indices[np.minimum(place, count - 1)]  # the last pads its batch
    records = source.read(index)
    encoded, kinds, sizes, orientations = batches.headers(
      source.images(records), rules
    )
    crops = augment.central_crops(image_size, sizes, orientations)
    return (
      *(encoded, kinds, crops.boxes, crops.flips, index),
      *(batches.strings(records), place < count),
    )

  def finish(start, batch):
    del start
    # Counts what "valid" leaves out.
    unreadable_lib.mend(batch, ("index",), source, rules, unreadable)
    return {
      "image": batch["image"],
      "valid": batch["valid"] & batch["readable"],
      "labels": batch["labels"],
    }

  spec = {"record": tf.TensorSpec([share], tf.string)}
  spec["valid"] = tf.TensorSpec([share], tf.bool)
  starts = tf.data.Dataset.range(0, count, batch_size)
  made = _label_features(source, label_of)
  features = lambda example: {"labels": made(example)}
  dataset = batches.decoded(starts, plan, spec, source, config, share, features)
  return _finish(dataset.map(batches.plain(finish)), config)


def _finish(dataset: tf.data.Dataset, config: Any) -> tf.data.Dataset:
  """Bounds threads and prefetching."""
  options = tf.data.Options()
  options.deterministic = True
  if config.threads:
    options.threading.private_threadpool_size = config.threads
    options.threading.max_intra_op_parallelism = 1
  options.autotune.enabled = True
  return dataset.prefetch(config.prefetch).with_options(options)
