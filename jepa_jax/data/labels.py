"""Labels of evaluations: numbers, classes and text of a record."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from jepa_jax.data import scenes, sources

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
    text all that there are, in sorted order, which reads every record. None
    for any other label.
  """
  found = [sources.open_source(config, split) for split in splits]
  if (names := found[0].class_names(label)) is not None:
    return names
  texts: set[bytes] = set()
  for source in found:
    record = lambda index, source=source: tf.numpy_function(
      lambda i: source.read(np.asarray([i]))[0], [index], tf.string
    )
    of = function(label)
    dataset = tf.data.Dataset.range(len(source)).map(
      _plain(lambda i: of(source.features(tf.reshape(record(i), []), i)))
    )
    if dataset.element_spec != tf.TensorSpec([], tf.string):
      return None
    texts |= set(dataset.as_numpy_iterator())
  return [text.decode(errors="replace") for text in sorted(texts)]


def function(
  label: str, names: Sequence[str] | None = None
) -> Callable[[dict[str, Any]], tf.Tensor]:
  """Finds how to make a label of the features of one example.

  Args:
    label: a name of scenes.LABELS, or of a feature.
    names: of the classes, where text is to become their numbers.

  Returns:
    Function of a source's features: int32 of integers and truth values,
    float32 of floats, text without names as it is. Raises ValueError, with the
    labels that there are, where there is none of that name.
  """

  def feature(features):
    # `depth` is a feature that only needs another unit.
    derived = {
      name: of
      for name, of in scenes.LABELS.items()
      if ("depth" if name == "depth" else "objects") in features
    }
    if label not in derived and label not in features:
      known = sorted(set(features) | set(derived)) or ["none"]
      raise ValueError(f'no label "{label}"; there are: {", ".join(known)}')
    if label in derived:
      value = derived[label](features)
    else:
      value = features[label]
    if value.dtype == tf.string and names is not None:
      return tf.argmax(tf.equal(list(names), value), output_type=tf.int32)
    if value.dtype == tf.string:
      return value
    return tf.cast(value, tf.float32 if value.dtype.is_floating else tf.int32)

  return feature
