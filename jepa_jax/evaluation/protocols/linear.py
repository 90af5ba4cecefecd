"""The linear probe: logistic regression on frozen features.

Axes: n training images, B test images, D features, K classes.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import optimize

from jepa_jax.evaluation import bank as bank_lib
from jepa_jax.evaluation.protocols import accuracy, protocol

TEST_CHUNK = 4096  # images that are scored at a time
STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # L2, from strong to weak


def linear_probe(
  train: protocol.Examples,
  test: protocol.Examples,
  *,
  strengths: Sequence[float] = STRENGTHS,
  holdout: float = 0.15,
  seed: int = 0,
  max_iterations: int = 300,
  tolerance: float = 2e-4,
) -> dict[str, Any]:
  """Multinomial logistic regression on standardised features.

  Minimises mean cross-entropy + strength / 2 |W|^2 (the bias is free) over all
  images at once by L-BFGS. The strength is the one with the best accuracy on a
  stratified part of the training images held out (ties: the strongest); then
  all of them are fitted. Each fit starts from the last one's solution, and the
  path ends once two strengths in a row did worse than the best.

  Differs: the paper trains by LARS on augmented images, 50 epochs, the best of
    three learning rates *on the test set*. This sees each image once, without
    augmentation, and chooses without the test set.

  Args:
    train: features [n, D], labels [n] integers of any values.
    test: features [B, D], labels [B]; a label unseen in training counts as an
      error.
    strengths: L2 strengths to choose from, in any order.
    holdout: share of the training images that chooses, in (0, 1).
    seed: of the choice of the images held out.
    max_iterations: L-BFGS iterations a fit, at most.
    tolerance: a fit has converged when the largest entry of the gradient, with
      respect to preconditioned parameters, is below it (or when the loss no
      longer falls).

  Returns:
    Those of accuracy.accuracies; train_top1 and holdout_top1, in percent;
    strength; converged (bool) and iterations of the last fit.

  Raises:
    ValueError: shapes disagree, labels are not integers, fewer than two
      classes, or no strength or holdout that makes sense.
  """
  return fit(
    train, test, strengths=strengths, holdout=holdout, seed=seed,
    max_iterations=max_iterations, tolerance=tolerance,
  )[0]  # fmt: skip


def fit(
  train: protocol.Examples,
  test: protocol.Examples,
  *,
  strengths: Sequence[float] = STRENGTHS,
  holdout: float = 0.15,
  seed: int = 0,
  max_iterations: int = 300,
  tolerance: float = 2e-4,
) -> tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]:
  """`linear_probe`, and a function from features [B, D] to classes [B]."""
  protocol.check(train, test, "class")
  if not 0 < holdout < 1 or not strengths or min(strengths) <= 0:
    raise ValueError(
      f"linear probe got holdout={holdout}, strengths={tuple(strengths)}; it "
      "needs 0 < holdout < 1 and at least one strength above 0."
    )
  classes, targets = np.unique(train["labels"], return_inverse=True)
  if len(classes) < 2:
    raise ValueError(
      f"linear probe got {len(classes)} class in {len(targets)} training "
      "images; it needs at least 2: use more images or another label."
    )
  bank = bank_lib.Bank(train["features"])
  held_out = stratified(targets, holdout, seed)
  regression = Regression(
    bank, targets, len(classes), max_iterations, tolerance
  )

  scores, solutions = {}, {}
  if len(strengths) > 1 and held_out.any():
    scores, solutions = _along_path(regression, strengths, targets, held_out)
  best = max(scores, key=scores.get) if scores else max(strengths)
  parameters, outcome = regression(
    np.ones(len(targets), bool), best, solutions.get(best)
  )
  scores_of_test = regression.logits(test["features"], *parameters)
  fitted = regression.classify(*parameters)
  metrics = {
    **accuracy.accuracies(scores_of_test, classes, train, test),
    "train_top1": accuracy.percent(fitted == targets),
    "holdout_top1": scores.get(best),
    "strength": best,
    "converged": bool(outcome.success),
    "iterations": int(outcome.nit),
  }
  return metrics, lambda features: classes[
    regression.logits(features, *parameters).argmax(axis=1)
  ]


def _along_path(fit, strengths, targets, held_out):
  """Accuracy on the images held out, and solution, by strength."""
  parameters, since_best = None, 0
  scores, solutions = {}, {}
  for strength in sorted(strengths, reverse=True):
    parameters, _ = fit(~held_out, strength, parameters)
    solutions[strength] = parameters
    score = accuracy.percent((fit.classify(*parameters) == targets)[held_out])
    improved = score > max(scores.values(), default=-1)
    since_best = 0 if improved else since_best + 1
    scores[strength] = score
    if since_best == 2:
      break
  return scores, solutions


class Regression:
  """Fits [D, K] weights and a [K] bias; one compilation for all its fits.

  L-BFGS runs on the host in float64 (SciPy), loss and gradient on the device.
  Features are correlated, which makes plain L-BFGS crawl, so it works on
  U = diag(1/s) V^T W instead of W: V are the features' principal axes and
  1/s_d^2 = variance_d / 4 + strength, about the curvature along each.
  """

  def __init__(
    self, bank, targets, classes, max_iterations, tolerance, loss=None
  ):
    """Takes a Bank, targets [n, ...] and (logits, targets) -> [n]."""
    self.bank = bank
    self.targets = bank.place(np.asarray(targets, np.int32))
    self.loss = loss or optax.softmax_cross_entropy_with_integer_labels
    self.shape = (bank.width, classes)
    self.options = {"maxiter": max_iterations, "maxfun": 5 * max_iterations}
    self.options |= {"gtol": tolerance, "ftol": 1e-9, "maxcor": 10}
    self.variances, self.axes = _principal_axes(bank.rows, bank.count)

  def __call__(self, chosen, strength, start=None):
    """Fits the images of `chosen` bool [n]; returns (W, bias), SciPy result."""
    width, classes = self.shape
    scales = 1 / jnp.sqrt(self.variances / 4 + strength)  # [D]
    if start is None:
      start = np.zeros((width, classes), np.float32), np.zeros(classes)
    weights = self.bank.host(self.axes.T @ start[0] / scales[:, None])
    shares = self.bank.place(np.float32(chosen / chosen.sum()))

    def unpack(flat):
      flat = np.asarray(flat.reshape(width + 1, classes), np.float32)
      return flat[:width], flat[width]

    def loss_and_gradient(flat):
      loss, gradients = _objective(
        unpack(flat),
        self.axes,
        scales,
        strength,
        self.bank.rows,
        self.targets,
        shares,
        self.loss,
      )
      loss, *gradients = map(self.bank.host, (loss, *gradients))
      return float(loss), np.concatenate(
        [g.astype(np.float64).ravel() for g in gradients]
      )

    outcome = optimize.minimize(
      loss_and_gradient,
      np.concatenate([np.ravel(weights), np.ravel(start[1])]).astype(float),
      jac=True,
      method="L-BFGS-B",
      options=self.options,
    )
    weights, bias = unpack(outcome.x)
    weights = self.bank.host(self.axes @ (scales[:, None] * weights))
    return (weights, bias), outcome

  def classify(self, weights, bias):
    """Columns [n] that the training images are given."""
    found = _logits(self.bank.rows, weights, bias).argmax(axis=1)
    return self.bank.host(found)[: self.bank.count]

  def train_logits(self, weights, bias):
    """Scores [n, K] of the training images."""
    return self.bank.host(_logits(self.bank.rows, weights, bias))[
      : self.bank.count
    ]

  def logits(self, features, weights, bias):
    """Scores [B, K] of other features [B, D]."""
    parts = self.bank.chunks(features, TEST_CHUNK)
    return np.concatenate([logits(x, weights, bias) for x in parts])


@functools.partial(jax.jit, static_argnums=1)
def _principal_axes(inputs, count):
  """Variances [D] (at least 0) and axes [D, D], one a column."""
  with jax.default_matmul_precision("float32"):
    covariance = inputs.T @ inputs / count
    variances, axes = jnp.linalg.eigh(covariance)
  return jnp.maximum(variances, 0), axes


@functools.partial(jax.jit, static_argnums=7)
@jax.value_and_grad
def _objective(
  parameters, axes, scales, strength, inputs, targets, shares, loss
):
  """The loss under `shares` [n] (they sum to 1), with the penalty."""
  weights, bias = parameters
  weights = scales[:, None] * weights
  with jax.default_matmul_precision("float32"):
    said = inputs @ (axes @ weights) + bias  # [n, K]
  penalty = 0.5 * strength * jnp.sum(jnp.square(weights))  # axes keep lengths
  return penalty + jnp.sum(shares * loss(said, targets))


@jax.jit
def _logits(inputs, weights, bias):
  with jax.default_matmul_precision("float32"):
    return inputs @ weights + bias


def logits(inputs: Any, weights: Any, bias: Any) -> np.ndarray:
  """Scores [n, K] of standardised features [n, D]."""
  return np.asarray(inputs, np.float32) @ np.asarray(weights) + np.asarray(bias)


def stratified(targets, share, seed):
  """Bool [n]: `share` of each class, but never a class's only image."""
  random = np.random.default_rng(seed)
  held_out = np.zeros(len(targets), bool)
  for target in range(targets.max() + 1):
    members = random.permutation(np.flatnonzero(targets == target))
    count = min(max(round(share * len(members)), 1), len(members) - 1)
    held_out[members[:count]] = True
  return held_out


ROW = protocol.Protocol(
  name="linear",
  title="linear probe",
  run=linear_probe,
  score="top1",
  unit="%",
  higher_is_better=True,
  label="class",
)
