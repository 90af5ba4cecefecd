"""Do the labels of an evaluation fit its protocols? Asked before any step.

Types are known without reading; values are those of a sample of the records,
or of all where there are few.
"""

from typing import Any

import ml_collections
import numpy as np

from jepa_jax.data import labels as labels_lib
from jepa_jax.data import sources
from jepa_jax.evaluation import protocols
from jepa_jax.evaluation.protocols import protocol as protocol_lib

NAMED = 5  # classes that a line names, at most


def names(settings: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Names of the labels to read: none where all protocols do without."""
  kinds = {protocols.find(x).label for x in settings.protocols}
  return (settings.label,) if kinds - {"none"} else ()


def check_type(
  name: str, settings: ml_collections.ConfigDict, spec: Any
) -> None:
  """Raises ValueError where a protocol does not take labels of that type.

  Args:
    name: of the evaluation.
    settings: config.evaluations[name].
    spec: tf.TensorSpec of an image's label.
  """
  dtype, rank = spec.dtype.as_numpy_dtype, spec.shape.rank
  listed = rank == 1 and spec.shape[0] is None  # of any length: not one-hot

  def takes(row):
    return row.takes(dtype, rank) and not (listed and row.label == "class")

  for row in map(protocols.find, settings.protocols):
    if not takes(row):
      fit = [
        x.name
        for x in protocols.PROTOCOLS.values()
        if takes(x) and x.label != "none"
      ]
      raise ValueError(
        f'evaluation {name}: label "{settings.label}" is {spec.dtype.name} of '
        f"shape {tuple(spec.shape)} an image, and protocol {row.name} "
        f"takes {protocol_lib.KINDS[row.label]}; take another label or "
        f"protocols that it fits ({', '.join(fit) or 'none here'})."
      )


def check_values(
  name: str,
  settings: ml_collections.ConfigDict,
  data: ml_collections.ConfigDict,
) -> list[str]:
  """Finds labels that no protocol can learn from, and what is odd of them.

  Args:
    name: of the evaluation.
    settings: config.evaluations[name].
    data: config.data of the evaluation.

  Returns:
    Lines about classes without images, with one image, or in test alone.

  Raises:
    ValueError: values that do not fit a protocol, or none to tell apart.
  """
  if not names(settings):
    return []
  known = sources.open_source(data, settings.train).class_names(settings.label)
  found = [
    labels_lib.sample(data, split, settings.label)
    for split in (settings.train, settings.test)
  ]
  train, test = (values for values, _ in found)
  whole = all(all_of_them for _, all_of_them in found)
  notes: list[str] = []
  kinds = dict.fromkeys(protocols.find(x).label for x in settings.protocols)
  try:
    if "class" in kinds:
      notes += _classes(train, test, whole, known)
    if "classes" in kinds and len({x.shape for x in train + test}) == 1:
      protocol_lib.fit(np.stack(train + test), "classes")
    if "number" in kinds:
      _numbers(train, whole)
      _numbers(test, whole)
  except ValueError as error:
    raise ValueError(
      f'evaluation {name}: label "{settings.label}": {error} To do without it, '
      f"give --config.evaluations.{name}="
    ) from error
  return [f"evaluation {name}: {note}" for note in notes]


def _classes(train, test, whole, known):
  """Lines about classes; ValueError where there are none to tell apart."""
  train, test = (protocol_lib.fit(np.stack(x), "class") for x in (train, test))
  seen, counts = np.unique(train, return_counts=True)
  if not whole:
    return []
  words = lambda values: _words(values, known)
  if len(seen) < 2:
    raise ValueError(
      f"all {len(train)} training images are of one class, {words(seen)}; a "
      "probe needs at least 2: use more images or another label."
    )
  notes = []
  absent = np.setdiff1d(np.arange(len(known or ())), seen)
  if len(absent):
    notes.append(f"no training image of {words(absent)}")
  if counts.max() == 1:
    notes.append(
      "one training image a class: no regularisation can be chosen on images "
      "held out, the strongest is used"
    )
  unseen = ~np.isin(test, seen)
  if unseen.any():
    notes.append(
      f"{unseen.sum()} of {len(test)} test images are of classes that no "
      f"training image has ({words(np.unique(test[unseen]))}); they count as "
      "errors"
    )
  return notes


def _numbers(values, whole):
  """ValueError where there is nothing to regress."""
  values = np.asarray(values, np.float64)
  bad = int((~np.isfinite(values)).sum())
  if bad:
    raise ValueError(
      f"{bad} of {len(values)} images looked at have no finite number; mend "
      "the data or take another label."
    )
  if whole and np.ptp(values) == 0:
    raise ValueError(
      f"is {values[0]:g} for all {len(values)} images; a regression needs "
      "numbers that vary."
    )


def _words(values, known):
  """Classes by name, the first NAMED of them."""
  texts = [
    value.decode(errors="replace")
    if isinstance(value, bytes)
    else known[int(value)]
    if known
    else str(value)
    for value in values[:NAMED].tolist()
  ]
  more = f" and {len(values) - NAMED} more" if len(values) > NAMED else ""
  return ", ".join(texts) + more
