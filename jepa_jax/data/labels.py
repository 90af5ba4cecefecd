"""Labels of evaluations: numbers, classes and text of a record."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from jepa_jax import paths
from jepa_jax.data import scenes, sources

MOST_CLASSES = 100_000  # that numbers in lists may stand for
_plain = tf.autograph.experimental.do_not_convert  # nothing to convert: faster


def class_names(
  config: Any, splits: Sequence[str], label: str
) -> list[str] | None:
  """What the classes of a label are called.

  Args:
    config: config.data.
    splits: those that use the label; the names of all are numbered alike.
    label: as for `function`.

  Returns:
    Names by number: of the classes of a folder or of TFDS's ClassLabel, and of
    text, or of lists of any length, all that there are, in sorted order, which
    reads every record. None for any other label.

  Raises:
    ValueError: a list holds a number that is no class's.
  """
  found = [sources.open_source(config, split) for split in splits]
  if (names := found[0].class_names(label)) is not None:
    return names
  texts: set[bytes] = set()
  numbers: set[int] = set()
  for source in found:
    dataset = _values(source, label, np.arange(len(source)))
    spec = dataset.element_spec
    listed = spec.shape.rank == 1 and spec.shape[0] is None
    if spec.dtype == tf.string and (listed or spec.shape.rank == 0):
      values = dataset.as_numpy_iterator()
      texts |= {x for value in values for x in np.ravel(value).tolist()}
    elif spec.dtype == tf.int32 and listed:
      values = dataset.as_numpy_iterator()
      numbers |= {x for value in values for x in value.tolist()}
    else:
      return None
  if numbers and not 0 <= min(numbers) <= max(numbers) < MOST_CLASSES:
    raise ValueError(
      f'label "{label}" lists numbers from {min(numbers)} to {max(numbers)}; '
      f"as classes they need to be in [0, {MOST_CLASSES})."
    )
  if numbers:
    return [str(number) for number in range(max(numbers) + 1)]
  return [
    paths.printable(text.decode(errors="replace")) for text in sorted(texts)
  ]


def check_classes(
  config: Any, names: Sequence[str] | None, classes: int
) -> None:
  """Do the labels that an objective learns fit its classes?

  Args:
    config: config.data.
    names: of the classes, see class_names; None where they have none: then
      some images' labels are looked at.
    classes: that the objective tells apart, from 0 on.

  Raises:
    ValueError: config.label is no number of a class, or there are more.
  """
  count = len(names or ())
  if names is None:
    dtype = spec(config, config.split, config.label).dtype
    if not dtype.is_integer and not dtype.is_bool:
      raise ValueError(
        f'data.label "{config.label}" is {dtype.name}; the objective learns '
        "classes: integers or text."
      )
    values, _ = sample(config, config.split, config.label)
    found = np.unique(values)
    if found.min() < 0:
      raise ValueError(
        f'data.label "{config.label}" is {found.min()} for an image; classes '
        "count from 0 on."
      )
    count = int(found.max()) + 1
  if count > classes:
    raise ValueError(
      f'data.label "{config.label}" has {count} classes and method.classes is '
      f"{classes}; set --config.method.classes={count}."
    )


def sample(
  config: Any, split: str, label: str, limit: int = 512
) -> tuple[list[np.ndarray], bool]:
  """Labels of a split, or of some of its images, evenly over all of it.

  Args:
    config: config.data.
    split: which.
    label: as for `function`.
    limit: images at most, whose records are read.

  Returns:
    The labels, as they are stored, and whether they are those of all images.
  """
  source = sources.open_source(config, split)
  count = min(limit, len(source))
  indices = np.linspace(0, len(source) - 1, count).round().astype(np.int64)
  values = _values(source, label, indices).as_numpy_iterator()
  return list(values), count == len(source)


def spec(config: Any, split: str, label: str) -> tf.TensorSpec:
  """Shape and type of one image's label, as `sample` gives it; reads nothing.

  Args:
    config: config.data.
    split: which.
    label: as for `function`.

  Raises:
    ValueError: no such split or label.
  """
  source = sources.open_source(config, split)
  return _values(source, label, []).element_spec


def _values(source, label, indices):
  """A data set of the label of some records; no image is decoded."""
  # Stateless, so that nothing is read where a label needs no record.
  record = lambda index: tf.numpy_function(
    lambda i: source.read(np.asarray([i]))[0],
    [index],
    tf.string,
    stateful=False,
  )
  of = function(label)
  return tf.data.Dataset.from_tensor_slices(np.asarray(indices, np.int64)).map(
    _plain(lambda i: of(source.features(tf.reshape(record(i), []), i)))
  )


def function(
  label: str, names: Sequence[str] | None = None
) -> Callable[[dict[str, Any]], tf.Tensor]:
  """Finds how to make a label of the features of one example.

  Args:
    label: a name of scenes.LABELS, or of a feature.
    names: of the classes, where text is to become their numbers, and lists
      of text or of numbers a truth value a class.

  Returns:
    Function of a source's features: int32 of integers and truth values,
    float32 of floats, text without names as it is, int32 [classes] of lists
    with names. Raises ValueError, with the labels that there are, where there
    is none of that name.
  """

  def feature(features):
    # `depth` is a feature that only needs another unit.
    derived = {
      name: of
      for name, of in scenes.LABELS.items()
      if all(x in features for x in scenes.NEEDS[name])
    }
    if label not in derived and label not in features:
      known = sorted(set(features) | set(derived)) or ["none"]
      raise ValueError(f'no label "{label}"; there are: {", ".join(known)}')
    if label in derived:
      value = derived[label](features)
    else:
      value = features[label]
    if names is not None and value.shape.rank == 1:
      known = list(names) if value.dtype == tf.string else np.arange(len(names))
      same = tf.equal(value[:, None], tf.constant(known, value.dtype))
      return tf.cast(tf.reduce_any(same, axis=0), tf.int32)
    if value.dtype == tf.string and names is not None:
      return tf.argmax(tf.equal(list(names), value), output_type=tf.int32)
    if value.dtype == tf.string:
      return value
    return tf.cast(value, tf.float32 if value.dtype.is_floating else tf.int32)

  return feature
