"""The input pipeline: a step's number in, its batch out.

Every batch is a pure function of (config, step): the order of images is a
keyed permutation of record numbers, crops and masks come from counter-based
words. So hosts agree without talking, and resuming at step s costs one seek.
"""

import threading
from typing import Any

from jepa_jax.data import augment
from jepa_jax.data import masks as tf_masks
from jepa_jax.data import sources
from jepa_jax.objectives import masks
from jepa_jax.objectives import words
import numpy as np
import tensorflow as tf

_ROUNDS = 6  # of the permutation's Feistel network


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

  def add(self, name: str, reason: str) -> None:
    with self._lock:
      self._reasons.setdefault(name, reason)

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
    if len(reasons) > self._limit:
      shown = [f"{name} ({why})" for name, why in list(reasons.items())[:3]]
      raise ValueError(
          f"{len(reasons)} images could not be read, more than"
          f" data.max_unreadable={self._limit}: {', '.join(shown)}"
          f"{', ...' if len(reasons) > 3 else ''}; mend or remove them, or"
          " raise data.max_unreadable"
      )


def order(
    positions: np.ndarray, num_examples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
  """The image at each position of a run: a fresh permutation every epoch.

  A Feistel network of keyed hashes permutes the smallest power of four that
  holds all images; numbers past the end are permuted again until they fall
  inside. Nothing is stored, and no position depends on another.

  Args:
    positions: int [B], step * batch size + place in the batch, global.
    num_examples: images of an epoch, less than 2**32.
    seed: the run's seed.

  Returns:
    epoch and image number, int64 [B] each.

  Reference: Black & Rogaway 2002, "Ciphers with arbitrary finite domains".
  """
  epoch, value = np.divmod(np.asarray(positions, np.int64), num_examples)
  half = max(1, ((num_examples - 1).bit_length() + 1) // 2)
  key = words.stream_key(seed, words.ORDER)
  keys = [
      words.fold(np, words.fold(np, key, epoch.astype(np.uint32)), round_)
      for round_ in np.arange(_ROUNDS, dtype=np.uint32)[:, None]
  ]
  outside = np.ones(value.shape, bool)
  while outside.any():
    left = (value[outside] >> half).astype(np.uint32)
    right = (value[outside] & (2**half - 1)).astype(np.uint32)
    for key in keys:
      mixed = words.fold(np, key[outside], right) & np.uint32(2**half - 1)
      left, right = right, left ^ mixed
    value[outside] = (left.astype(np.int64) << half) | right
    outside = value >= num_examples
  return epoch, value


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
  process reads its contiguous share of every global batch.

  Args:
    config: the whole configuration; reads seed, batch_size, data, masks and
      encoder.patch_size.
    start_step: first step, 0 or more; nothing before it is read.
    process_index: of this process.
    process_count: number of processes; must divide the batch size.
    unreadable: where to count images that are skipped.

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
  grid = patch_grid(data.image_size, config.encoder.patch_size)
  masks.mask_shapes(config.masks, grid)  # fail now, not in the first batch
  source = sources.open_source(data)
  unreadable = unreadable or Unreadable(data.max_unreadable)
  first = process_index * share

  def read(step):
    positions = step * config.batch_size + first + np.arange(share)
    epoch, index = order(positions, len(source), config.seed)
    _, encoded, headers = _read(source, index, unreadable)
    crops = augment.random_crops(
        data, *headers, seed=config.seed, epoch=epoch, index=index
    )
    return encoded, crops.boxes, crops.turns, epoch, index

  def plan(step):
    encoded, box, turn, epoch, index = tf.numpy_function(
        read,
        [step],
        [tf.string, tf.int32, tf.bool, tf.int64, tf.int64],
        stateful=False,
    )
    return {
        "encoded": tf.ensure_shape(encoded, (share,)),
        "box": tf.ensure_shape(box, (share, 4)),
        "turn": tf.ensure_shape(turn, (share, 3)),
        "epoch": tf.ensure_shape(epoch, (share,)),
        "index": tf.ensure_shape(index, (share,)),
        "step": tf.fill((share,), step),
    }

  def decode(x):
    image = augment.decode_crop(
        x.pop("encoded"),
        x.pop("box"),
        x.pop("turn"),
        image_size=data.image_size,
        channels=data.channels,
        encoding=source.encoding,
    )
    return {"image": image, **x}

  def add_masks(x):
    drawn = tf_masks.sample(
        config.masks,
        grid,
        seed=config.seed,
        step=x["step"][0],
        epoch=x["epoch"],
        index=x["index"],
    )
    return {"image": x["image"], **drawn}

  parallel = data.threads or tf.data.AUTOTUNE
  dataset = tf.data.Dataset.range(start_step, np.iinfo(np.int64).max)
  dataset = dataset.map(plan, num_parallel_calls=2)
  dataset = dataset.unbatch().map(decode, num_parallel_calls=parallel)
  dataset = dataset.batch(share, drop_remainder=True).map(add_masks)
  return _finish(dataset, data)


def evaluation_dataset(
    config: Any,
    *,
    batch_size: int,
    label: str | None = None,
    split: str | None = None,
) -> tf.data.Dataset:
  """Every image of a split once, in order, cut to its central square.

  Args:
    config: config.data.
    batch_size: images a batch; the last one is padded.
    label: name of a label of `scenes.LABELS`, or of a scalar feature; None for
      no labels.
    split: in place of config.split.

  Returns:
    Batches {image uint8 [B, H, W, C], label [B], valid bool [B]}; padding has
    valid False, image and label 0.

  Raises:
    ValueError: source or label that cannot be had.
  """
  source = sources.open_source(config, split)
  label_of = None if label is None else _label_function(label)
  unreadable = Unreadable(config.max_unreadable)
  count = len(source)

  def read(start):
    index = np.arange(start, min(start + batch_size, count))
    records, encoded, headers = _read(source, index, unreadable)
    crops = augment.central_crops(*headers)
    return _strings(records), encoded, crops.boxes, crops.turns, index

  def plan(start):
    types = [tf.string, tf.string, tf.int32, tf.bool, tf.int64]
    record, encoded, box, turn, index = tf.numpy_function(
        read, [start], types, stateful=False
    )
    for x, shape in ((box, (None, 4)), (turn, (None, 3))):
      x.set_shape(shape)
    for x in (record, encoded, index):
      x.set_shape((None,))
    return record, encoded, box, turn, index

  def decode(record, encoded, box, turn, index):
    example = {
        "image": augment.decode_crop(
            encoded,
            box,
            turn,
            image_size=config.image_size,
            channels=config.channels,
            encoding=source.encoding,
        ),
        "valid": tf.constant(True),
    }
    if label_of is not None:
      example["label"] = label_of(source.features(record, index))
    return example

  parallel = config.threads or tf.data.AUTOTUNE
  dataset = tf.data.Dataset.range(0, count, batch_size)
  dataset = dataset.map(plan, num_parallel_calls=2).unbatch()
  dataset = dataset.map(decode, num_parallel_calls=parallel)
  spec = dataset.element_spec
  padding = -count % batch_size
  if padding:
    zeros = {k: tf.zeros([padding, *s.shape], s.dtype) for k, s in spec.items()}
    dataset = dataset.concatenate(tf.data.Dataset.from_tensor_slices(zeros))
  dataset = dataset.batch(batch_size, drop_remainder=True)
  return _finish(dataset, config)


def patch_grid(image_size: int, patch_size: int) -> tuple[int, int]:
  """(H, W) in patches of a square image; ValueError where it does not divide."""
  if image_size % patch_size:
    divisors = [p for p in range(1, image_size + 1) if image_size % p == 0]
    near = sorted(sorted(divisors, key=lambda p: abs(p - patch_size))[:2])
    raise ValueError(
        f"image size {image_size} is not a multiple of patch size"
        f" {patch_size}; nearest patch sizes that divide it:"
        f" {', '.join(map(str, near))}"
    )
  return image_size // patch_size, image_size // patch_size


def _read(
    source: sources.Source, index: np.ndarray, unreadable: Unreadable
) -> tuple[list[bytes], np.ndarray, tuple[np.ndarray, np.ndarray]]:
  """Records, encoded images, and (sizes [B, 2], orientations [B])."""
  records = source.read(index)
  encoded = source.images(records)
  if source.image_size is not None:
    sizes = np.tile(source.image_size, (len(index), 1))
    return records, _strings(encoded), (sizes, np.ones(len(index), np.int64))
  headers = []
  for i, data in enumerate(encoded):
    try:
      headers.append(augment.read_header(data))
    except ValueError as error:
      headers.append(None)
      unreadable.add(source.name(int(index[i])), str(error))
  good = [i for i, header in enumerate(headers) if header]
  if not good:
    raise ValueError(
        f"no image of this batch can be read, {source.name(int(index[0]))} for"
        " one; mend or remove them"
    )
  for i, header in enumerate(headers):
    if header is None:  # the next readable image of the batch stands in
      other = next((j for j in good if j > i), good[0])
      headers[i], encoded[i] = headers[other], encoded[other]
  sizes = np.asarray([(h.height, h.width) for h in headers])
  orientations = np.asarray([h.orientation for h in headers])
  return records, _strings(encoded), (sizes, orientations)


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
