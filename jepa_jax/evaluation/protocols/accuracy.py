"""How often a classification is right: metrics of scores, in percent."""

from collections.abc import Callable
import math
from typing import Any

import numpy as np

from jepa_jax.evaluation.protocols import protocol

PER_CLASS = 100  # classes up to which each has its own accuracy
CONFUSED = 20  # and up to which it is counted what each is taken for
GROUPS = 20  # of test images, for jackknife


def accuracies(
  scores: np.ndarray,
  classes: np.ndarray,
  train: protocol.Examples,
  test: protocol.Examples,
) -> dict[str, Any]:
  """Metrics of a classification.

  Args:
    scores: [B, K], one column a class.
    classes: [K], the label of each column, ascending.
    train, test: what the classifier learned from and is judged by; a label of
      test that classes lacks counts as an error.

  Returns:
    top1; mean_per_class, over the classes of the test images; top5 with more
    than 5 classes; standard_error of top1 over the test images; majority, the
    top1 of always saying the commonest class of train; per_class, {label:
    percent}, with at most PER_CLASS classes; confusion, {label: {what it is
    taken for: test images}}, with at most CONFUSED classes; n_train, n_test,
    classes; unseen, test images of a class that train lacks, if any.
  """
  labels = np.asarray(test["labels"])
  ranked = classes[np.argsort(-scores, axis=1, kind="stable")[:, :5]]
  right = ranked == labels[:, None]  # [B, 5]
  seen, counts = np.unique(train["labels"], return_counts=True)
  share = float(np.mean(right[:, 0]))
  result = {
    "top1": percent(right[:, 0]),
    "standard_error": 100 * math.sqrt(share * (1 - share) / len(labels)),
    "majority": percent(labels == seen[np.argmax(counts)]),
    "n_train": len(train["labels"]),
    "n_test": len(labels),
    "classes": len(classes),
  }
  each = [np.mean(right[labels == label, 0]) for label in np.unique(labels)]
  result["mean_per_class"] = round(100 * float(np.mean(each)), 3)
  if unseen := int(np.sum(~np.isin(labels, seen))):
    result["unseen"] = unseen
  if len(classes) > 5:
    result["top5"] = percent(right.any(axis=1))
  if len(classes) <= PER_CLASS:
    result["per_class"] = {
      str(label): percent(right[labels == label, 0])
      for label in np.unique(labels)
    }
  if len(classes) <= CONFUSED:
    result["confusion"] = {
      str(label): {
        str(said): int(count)
        for said, count in zip(
          *np.unique(ranked[labels == label, 0], return_counts=True)
        )
      }
      for label in np.unique(labels)
    }
  return result


def percent(right: np.ndarray) -> float:
  """Share of what is true, in percent."""
  return round(100 * float(np.mean(right)), 3)


def jackknife(score: Callable[[np.ndarray], float], count: int) -> float | None:
  """Standard error over the test images of a score that is no mean of theirs.

  By leaving out one of GROUPS random groups of images at a time.

  Args:
    score: of which images are kept, bool [count]; NaN where they have none.
    count: images.

  Returns:
    In the score's unit; None where there are no two scores to tell it by.

  Reference: Kott 2001, The delete-a-group jackknife, J. Official Statistics.
  """
  groups = min(GROUPS, count)
  if groups < 2:
    return None
  member = np.random.default_rng(0).permutation(count) % groups
  scores = np.asarray([score(member != group) for group in range(groups)])
  scores = scores[np.isfinite(scores)]
  if len(scores) < 2:
    return None
  return float(math.sqrt(len(scores) - 1) * np.std(scores))
