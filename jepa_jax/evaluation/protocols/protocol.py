"""What a protocol says of itself, and what it may demand of its input."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

# {"features": [n, D], "labels": [n], "width": features of one layer; of more,
# those of the last layer are the last}
Examples = Mapping[str, Any]

# Kind of label -> what it is, for messages.
KINDS = {
  "class": "classes: integers or text, one an image, or one-hot [classes]",
  "classes": "any number of classes an image: 0 or 1 [classes], or a list",
  "number": "numbers: floats or integers, one an image",
  "dense": "maps: numbers [height, width, ...] an image",
  "mask": "maps of classes: integers [height, width] an image",
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
    patches: whether it takes the features of patches, float16 [n, N, D] with
      "grid" (h, w) beside them, N = h w; else those averaged.
    logits: whether it takes "logits" [n, K] of an objective that classifies,
      and so is not for random encoders or pixels.
    train_variants, test_variants: names of variants.apply; the features of the
      images so changed are in "variants", {name: [n, D]}, of train and of test.
  """

  name: str
  title: str
  run: Callable[..., dict[str, Any]]
  score: str
  unit: str
  higher_is_better: bool
  label: str
  patches: bool = False
  logits: bool = False
  train_variants: tuple[str, ...] = ()
  test_variants: tuple[str, ...] = ()

  def takes(self, dtype: Any, rank: int) -> bool:
    """Whether a label fits.

    Args:
      dtype: NumPy's type of the label.
      rank: number of axes that the label of one image has.
    """
    dtype = np.dtype(dtype)
    number = dtype.kind in "iuf"
    return {
      "class": rank == 0 and dtype.kind in "iubSUO" or rank == 1 and number,
      "classes": rank == 1 and (number or dtype.kind in "SUO"),
      "number": rank == 0 and number,
      "dense": rank >= 2 and number,
      "mask": rank == 2 and dtype.kind in "iu",
      "none": True,
    }[self.label]


def fit(labels: np.ndarray, kind: str) -> np.ndarray:
  """Labels as the protocols of a kind take them.

  Args:
    labels: [n, ...].
    kind: one of KINDS.

  Returns:
    Of "class" integers [n], also where they are one-hot; of "classes" int32
    [n, K]; else the labels.

  Raises:
    ValueError: an image has none or several classes where it needs one, or
      something else than 0 or 1 where that says which classes it has.
  """
  labels = np.asarray(labels)
  if kind not in ("class", "classes") or labels.ndim != 2:
    return labels
  if not np.isin(labels, (0, 1)).all():
    odd = labels[~np.isin(labels, (0, 1))].ravel()[0]
    raise ValueError(
      f"labels of {labels.shape[1]} values an image hold {odd:g}; as classes "
      "each needs to be 0 or 1; take another label."
    )
  counts = labels.sum(axis=1)
  if kind == "classes":
    return labels.astype(np.int32)
  if (counts != 1).any():
    row = int(np.argmax(counts != 1))
    raise ValueError(
      f"an image has {counts[row]:g} classes of {labels.shape[1]}, and this "
      "protocol takes one an image; use multilabel, for any number of them."
    )
  return labels.argmax(axis=1).astype(np.int32)


def check(train: Examples, test: Examples, kind: str) -> None:
  """Raises ValueError unless train and test are [n, D] with n labels each.

  Args:
    train, test: what a protocol was given.
    kind: "class", "classes" (labels [n, K]) or "number".
  """
  for name, examples in (("train", train), ("test", test)):
    features, labels = examples["features"], np.asarray(examples["labels"])
    axes, rank = "[images]", 1
    if kind == "classes":
      axes, rank = "[images, classes]", 2
    if (
      features.ndim != 2 or labels.ndim != rank or len(labels) != len(features)
    ):
      raise ValueError(
        f"{name} features {features.shape} and labels {labels.shape} do not "
        f"fit; a probe needs [images, features] and {axes}."
      )
    kinds, words, task = {
      "class": ("iu", "integers", "a classification"),
      "classes": ("iu", "integers", "a classification"),
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


def check_patches(train: Examples, test: Examples) -> None:
  """Raises ValueError unless both are [n, N, D] of one N and D, with labels."""
  shapes = [np.shape(x["features"]) for x in (train, test)]
  counts = [len(x["labels"]) for x in (train, test)]
  if (
    {len(x) for x in shapes} != {3}
    or shapes[0][1:] != shapes[1][1:]
    or counts != [x[0] for x in shapes]
    or not min(counts)
  ):
    raise ValueError(
      f"features {shapes[0]} and {shapes[1]} with {counts[0]} and {counts[1]} "
      "labels do not fit; a probe of patches needs [images, patches, features]."
    )
