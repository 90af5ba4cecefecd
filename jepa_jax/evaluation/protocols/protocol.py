"""What a protocol says of itself, and what it may demand of its input."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

Examples = Mapping[str, np.ndarray]  # {"features": [n, D], "labels": [n]}

# Kind of label -> what it is, for messages.
KINDS = {
  "class": "classes: integers or text, one an image",
  "number": "numbers: floats or integers, one an image",
  "dense": "maps: numbers [height, width, ...] an image",
  "none": "no label",
}


@dataclasses.dataclass(frozen=True)
class Protocol:
  """A row of the table of protocols.

  The log, the report, the choice of the best checkpoint and the checks of a
  config read it, so that none of them knows a protocol by name.

  Attributes:
    name: in configs, in the log and in evaluations.json.
    title: for readers.
    run: (train, test, *, seed) -> metrics, plain Python values by name. train
      and test are Examples as features.extract makes them; without "labels"
      where the kind of label is "none". Deterministic.
    score: name of the metric that judges.
    unit: of the score; "%", or "" for a bare number.
    higher_is_better: whether a larger score is the better one.
    label: kind of label, one of KINDS.
  """

  name: str
  title: str
  run: Callable[..., dict[str, Any]]
  score: str
  unit: str
  higher_is_better: bool
  label: str

  def takes(self, dtype: Any, rank: int) -> bool:
    """Whether a label fits.

    Args:
      dtype: NumPy's type of the label.
      rank: number of axes that the label of one image has.
    """
    dtype = np.dtype(dtype)
    number = dtype.kind in "iuf"
    return {
      "class": rank == 0 and dtype.kind in "iubSUO",
      "number": rank == 0 and number,
      "dense": rank >= 2 and number,
      "none": True,
    }[self.label]


def check(train: Examples, test: Examples, kind: str) -> None:
  """Raises ValueError unless train and test are [n, D] with n labels each.

  Args:
    train, test: what a protocol was given.
    kind: "class" or "number".
  """
  for name, examples in (("train", train), ("test", test)):
    features, labels = examples["features"], np.asarray(examples["labels"])
    if features.ndim != 2 or labels.shape != features.shape[:1]:
      raise ValueError(
        f"{name} features {features.shape} and labels {labels.shape} do not "
        "fit; a probe needs [images, features] and [images]."
      )
    kinds, words, task = {
      "class": ("iu", "integers", "a classification"),
      "number": ("iuf", "numbers", "a regression"),
    }[kind]
    if not len(labels) or labels.dtype.kind not in kinds:
      raise ValueError(
        f"{name} has {len(labels)} labels of type {labels.dtype}; {task} "
        f"needs at least one, and {words}."
      )
  if train["features"].shape[1] != test["features"].shape[1]:
    raise ValueError(
      f"train has {train['features'].shape[1]} features, test has "
      f"{test['features'].shape[1]}; both must come from one encoder."
    )
