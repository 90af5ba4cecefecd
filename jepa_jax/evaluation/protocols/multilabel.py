"""The linear probe where an image has any number of classes.

Axes: n training images, B test images, D features, K classes.
"""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np
import optax

from jepa_jax.evaluation import bank as bank_lib
from jepa_jax.evaluation.protocols import accuracy, linear, protocol


def multilabel(
  train: protocol.Examples,
  test: protocol.Examples,
  *,
  strengths: Sequence[float] = linear.STRENGTHS,
  holdout: float = 0.15,
  seed: int = 0,
  max_iterations: int = 300,
  tolerance: float = 2e-4,
) -> dict[str, Any]:
  """A logistic regression a class, on standardised features.

  Minimises the mean over images of the classes' summed binary cross-entropies
  + strength / 2 |W|^2 (biases are free). The strength is the one with the best
  mAP on a random part of the training images held out (ties: the strongest);
  then all of them are fitted.

  Args:
    train: features [n, D], labels [n, K], 1 for every class of an image, else
      0.
    test: features [B, D], labels [B, K].
    strengths: L2 strengths to choose from, in any order.
    holdout: share of the training images that chooses, in (0, 1).
    seed: of the choice of the images held out.
    max_iterations: L-BFGS iterations a fit, at most.
    tolerance: see linear.linear_probe.

  Returns:
    mAP, the mean of the average precisions of the classes that some test image
    has, in percent; standard_error of mAP over the test images; chance, the mAP
    of scores that say nothing: the mean share of images with a class;
    per_class, {column: average precision in percent}; train_mAP, holdout_mAP;
    strength, converged; n_train, n_test, classes, and unseen, classes of test
    images that no training image has.

  Raises:
    ValueError: shapes disagree, no class has images with and without it, or no
      strength or holdout that makes sense.
  """
  targets, wanted = _checked(train, test, strengths, holdout)
  bank = bank_lib.Bank(train["features"])
  fit = linear.Regression(
    bank, targets, targets.shape[1], max_iterations, tolerance, _loss
  )
  held = np.zeros(len(targets), bool)
  count = min(max(round(holdout * len(targets)), 1), len(targets) - 1)
  held[np.random.default_rng(seed).permutation(len(targets))[:count]] = True
  scores, start = {}, None
  for strength in sorted(strengths, reverse=True):
    if len(strengths) == 1 or not targets[held].any():
      break
    start, _ = fit(~held, strength, start)
    said = fit.train_logits(*start)
    scores[strength] = _mean(average_precisions(said[held], targets[held]))
  best = max(scores, key=scores.get) if scores else max(strengths)
  parameters, outcome = fit(np.ones(len(targets), bool), best)
  said = fit.logits(test["features"], *parameters)
  precisions = average_precisions(said, wanted)
  fitted = average_precisions(fit.train_logits(*parameters), targets)
  return {
    "mAP": _mean(precisions),
    "standard_error": accuracy.jackknife(
      lambda kept: _mean(average_precisions(said[kept], wanted[kept])),
      len(wanted),
    ),
    "chance": 100 * float(wanted.mean(axis=0)[wanted.any(axis=0)].mean()),
    "train_mAP": _mean(fitted),
    "holdout_mAP": scores.get(best),
    "strength": best,
    "converged": bool(outcome.success),
    "per_class": {
      str(i): round(100 * float(value), 3)
      for i, value in enumerate(precisions)
      if not np.isnan(value)
    },
    "n_train": len(targets),
    "n_test": len(wanted),
    "classes": targets.shape[1],
    "unseen": int((wanted.any(axis=0) & ~targets.any(axis=0)).sum()),
  }


def _checked(train, test, strengths, holdout):
  """Labels of both sides, [n, K] and [B, K]."""
  protocol.check(train, test, "classes")
  if not 0 < holdout < 1 or not strengths or min(strengths) <= 0:
    raise ValueError(
      f"multilabel got holdout={holdout}, strengths={tuple(strengths)}; it "
      "needs 0 < holdout < 1 and at least one strength above 0."
    )
  targets, wanted = (np.asarray(x["labels"]) for x in (train, test))
  if targets.shape[1] != wanted.shape[1]:
    raise ValueError(
      f"train has {targets.shape[1]} classes, test has {wanted.shape[1]}; both "
      "need the same columns."
    )
  varies = (targets.max(axis=0) == 1) & (targets.min(axis=0) == 0)
  if not varies.any() or not wanted.any():
    raise ValueError(
      "no class that only a part of the training images has, or none in the "
      "test images; use more images or another label."
    )
  return targets, wanted


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Average precision of each class.

  The sum over images with the class, in the order of falling scores, of the
  precision among the images up to there, divided by their number. Images of
  equal scores count as one step.

  Args:
    scores: [B, K].
    labels: [B, K], 0 or 1.

  Returns:
    float64 [K] in [0, 1], NaN where no image has the class.
  """
  result = np.full(scores.shape[1], np.nan)
  for k in np.flatnonzero(labels.any(axis=0)):
    order = np.argsort(-scores[:, k], kind="stable")
    ranked, hits = scores[order, k], np.cumsum(labels[order, k])
    last = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    gained = np.diff(hits[last], prepend=0)
    result[k] = np.sum(gained * hits[last] / (last + 1)) / hits[-1]
  return result


def _loss(logits, targets):
  return optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)


def _mean(precisions):
  known = precisions[~np.isnan(precisions)]
  return round(100 * float(known.mean()), 3) if len(known) else math.nan


ROW = protocol.Protocol(
  name="multilabel",
  title="linear probe, several classes",
  run=multilabel,
  score="mAP",
  unit="%",
  higher_is_better=True,
  label="classes",
)
