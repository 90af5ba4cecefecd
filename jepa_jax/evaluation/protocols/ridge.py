"""Ridge regression of a number, such as the distance of the nearest object.

Axes: n training images, B test images, D features.
"""

from collections.abc import Sequence
import math
from typing import Any

import numpy as np

from jepa_jax.evaluation import features
from jepa_jax.evaluation.protocols import protocol

STRENGTHS = tuple(10.0**power for power in range(1, -7, -1))  # L2
CHUNK = 4096  # images whose features are in float64 at a time


def ridge(
  train: protocol.Examples,
  test: protocol.Examples,
  *,
  strengths: Sequence[float] = STRENGTHS,
  holdout: float = 0.15,
  seed: int = 0,
) -> dict[str, Any]:
  """Linear least squares with an L2 penalty, on standardised features.

  Minimises mean (y - x w - b)^2 + strength |w|^2 (the bias b is free) in
  closed form, in float64. The strength is the one with the smallest error on a
  random part of the training images held out (ties: the strongest); then all
  of them are fitted.

  Args:
    train: features [n, D], labels [n] numbers in any unit.
    test: features [B, D], labels [B].
    strengths: L2 strengths to choose from, in any order.
    holdout: share of the training images that chooses, in (0, 1).
    seed: of the choice of the images held out.

  Returns:
    r2, 1 - squared error / variance of the test labels: 1 is perfect, 0 is
    what their mean scores; standard_error of r2 over the test images; rmse and
    baseline_rmse (of always saying the mean of train), in the label's unit;
    train_r2, holdout_r2; strength; n_train, n_test.

  Raises:
    ValueError: shapes disagree, labels are not finite numbers or all the same,
      fewer than three training images, or no strength or holdout that makes
      sense.
  """
  return fit(train, test, strengths=strengths, holdout=holdout, seed=seed)[0]


def fit(
  train: protocol.Examples,
  test: protocol.Examples,
  *,
  strengths: Sequence[float] = STRENGTHS,
  holdout: float = 0.15,
  seed: int = 0,
) -> tuple[dict[str, Any], np.ndarray]:
  """`ridge`, and what it says of the test images, float64 [B]."""
  protocol.check(train, test, "number")
  if not 0 < holdout < 1 or not strengths or min(strengths) <= 0:
    raise ValueError(
      f"ridge regression got holdout={holdout}, strengths={tuple(strengths)}; "
      "it needs 0 < holdout < 1 and at least one strength above 0."
    )
  labels = [np.asarray(x["labels"], np.float64) for x in (train, test)]
  for name, values in zip(("train", "test"), labels):
    if not np.isfinite(values).all() or np.ptp(values) == 0:
      raise ValueError(
        f"{name} labels are not finite, or all the same; ridge regression "
        "needs numbers that vary."
      )
  count = len(labels[0])
  if count < 3:
    raise ValueError(
      f"ridge regression got {count} training images; it needs at least 3."
    )
  held = np.random.default_rng(seed).permutation(count)
  held = held[: min(max(round(holdout * count), 1), count - 2)]
  inputs = [_Standardised(train, x["features"]) for x in (train, test)]
  kept = np.setdiff1d(np.arange(count), held)
  moments = [inputs[0].moments(rows, labels[0]) for rows in (kept, held)]
  errors = {}
  path = _Solutions(moments[0])
  for strength in sorted(strengths, reverse=True):
    predicted = inputs[0].predict(held, *path(strength))
    errors[strength] = np.mean((predicted - labels[0][held]) ** 2)
  best = min(errors, key=errors.get)
  solution = _Solutions([a + b for a, b in zip(*moments)])(best)
  predicted = [x.predict(np.arange(len(x)), *solution) for x in inputs]
  spread = np.var(labels[0][held])
  metrics = {
    **_scores(predicted[1], labels[1]),
    "baseline_rmse": float(
      np.sqrt(np.mean((labels[1] - labels[0].mean()) ** 2))
    ),
    "train_r2": _scores(predicted[0], labels[0])["r2"],
    "holdout_r2": float(1 - errors[best] / spread) if spread else None,
    "strength": best,
    "n_train": count,
    "n_test": len(labels[1]),
  }
  return metrics, predicted[1]


class _Standardised:
  """Features by the mean and deviation of train; float64 a chunk at a time."""

  def __init__(self, train, values):
    self._mean, self._scale = features.statistics(train["features"])
    self._values = values

  def __len__(self):
    return len(self._values)

  def _chunks(self, rows):
    for start in range(0, len(rows), CHUNK):
      chosen = rows[start : start + CHUNK]
      values = (self._values[chosen] - self._mean) / self._scale
      yield chosen, values.astype(np.float64)

  def moments(self, rows, labels):
    """Sums over rows: 1, x [D], y, x x^T [D, D] and x y [D]."""
    width = len(self._mean)
    sums = [0, np.zeros(width), 0.0, np.zeros((width, width)), np.zeros(width)]
    for chosen, x in self._chunks(rows):
      y = labels[chosen]
      new = [len(x), x.sum(axis=0), y.sum(), x.T @ x, x.T @ y]
      sums = [a + b for a, b in zip(sums, new)]
    return sums

  def predict(self, rows, weights, bias):
    return np.concatenate([x @ weights + bias for _, x in self._chunks(rows)])


class _Solutions:
  """Weights [D] and bias for any strength, from one eigendecomposition."""

  def __init__(self, moments):
    count, x, y, xx, xy = moments
    self._x, self._y = x / count, y / count
    covariance = xx / count - np.outer(self._x, self._x)
    self._values, self._axes = np.linalg.eigh(covariance)
    self._projected = self._axes.T @ (xy / count - self._x * self._y)

  def __call__(self, strength):
    curvature = np.maximum(self._values, 0) + strength
    weights = self._axes @ (self._projected / curvature)
    return weights, self._y - self._x @ weights


def _scores(predicted, labels):
  """r2 with its standard error, and rmse; r2 is a ratio of two means."""
  squares = (predicted - labels) ** 2
  deviations = (labels - labels.mean()) ** 2
  ratio = squares.mean() / deviations.mean()
  influence = (squares - ratio * deviations) / deviations.mean()
  return {
    "r2": float(1 - ratio),
    "standard_error": float(influence.std() / math.sqrt(len(labels))),
    "rmse": float(np.sqrt(squares.mean())),
  }


ROW = protocol.Protocol(
  name="ridge",
  title="ridge regression",
  run=ridge,
  score="r2",
  unit="",
  higher_is_better=True,
  label="number",
)
