"""What do frozen features know? A linear probe and nearest neighbours.

A protocol is a function (train, test, **options) -> dict of metrics, where
train and test are {"features": float32 [n, D], "labels": int [n]} as
`features.extract` returns them; PROTOCOLS names them. All are deterministic,
and every accuracy is in percent.

A number from a probe means little alone. `probe_table` runs the same probe on
a trained encoder, on the same architecture randomly initialised, and on raw
pixels.

Axes: n training images, B test images in a chunk, D features, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize
import tqdm

Examples = Mapping[str, np.ndarray]  # {"features": [n, D], "labels": [n]}

STRENGTHS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)  # L2, from strong to weak


def linear_probe(
  train: Examples,
  test: Examples,
  *,
  strengths: Sequence[float] = STRENGTHS,
  holdout: float = 0.15,
  seed: int = 0,
  max_iterations: int = 300,
  tolerance: float = 2e-4,
  per_class: bool = False,
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
    per_class: whether to add the accuracy of each class.

  Returns:
    top1, top5 (with more than 5 classes), majority (top-1 of always saying the
    commonest class), train_top1 and holdout_top1, in percent; strength;
    converged (bool) and iterations of the last fit; n_train, n_test, classes;
    with per_class, {label: percent}.

  Raises:
    ValueError: shapes disagree, labels are not integers, fewer than two
      classes, or no strength or holdout that makes sense.
  """
  _check(train, test)
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
  mean, scale = _statistics(train["features"])
  inputs = jnp.asarray((train["features"] - mean) / scale)
  held_out = _stratified(targets, holdout, seed)
  fit = _Regression(inputs, targets, len(classes), max_iterations, tolerance)

  parameters, since_best = None, 0
  scores, solutions = {}, {}  # by strength
  for strength in sorted(strengths, reverse=True):
    if len(strengths) == 1 or not held_out.any():
      break
    parameters, _ = fit(~held_out, strength, parameters)
    solutions[strength] = parameters
    predicted = np.argmax(_logits(inputs, *parameters), axis=1)
    score = _percent((predicted == targets)[held_out])
    improved = score > max(scores.values(), default=-1)
    since_best = 0 if improved else since_best + 1
    scores[strength] = score
    if since_best == 2:
      break
  best = max(scores, key=scores.get) if scores else max(strengths)
  parameters, outcome = fit(
    np.ones(len(targets), bool), best, solutions.get(best)
  )
  logits = _logits((test["features"] - mean) / scale, *parameters)
  fitted = np.argmax(_logits(inputs, *parameters), axis=1)
  return {
    **_accuracies(logits, classes, train, test, per_class),
    "train_top1": _percent(fitted == targets),
    "holdout_top1": scores.get(best),
    "strength": best,
    "converged": bool(outcome.success),
    "iterations": int(outcome.nit),
  }


def nearest_neighbours(
  train: Examples,
  test: Examples,
  *,
  k: int = 20,
  temperature: float = 0.07,
  chunk: int = 1024,
  seed: int = 0,
  per_class: bool = False,
) -> dict[str, Any]:
  """Classifies by the k training images of largest cosine similarity.

  Features are standardised first: averaged patches of a transformer have a
  large part in common, beside which the angles between images are tiny.

  A neighbour votes with weight exp(similarity / temperature); `top1_majority`
  is that of equal votes, where ties go to the larger weighted sum.

  Args:
    train: features [n, D], labels [n] integers of any values.
    test: features [B, D], labels [B].
    k: neighbours; at most n are used.
    temperature: of the weights, above 0.
    chunk: test images compared at a time, [chunk, n] similarities.
    seed: unused; here so that all protocols are called alike.
    per_class: whether to add the accuracy of each class.

  Returns:
    top1, top5 (with more than 5 classes), top1_majority, majority, in percent;
    k, temperature; n_train, n_test, classes; with per_class, {label: percent}.

  Raises:
    ValueError: shapes disagree, labels are not integers, or k, temperature or
      chunk is not positive.

  Reference: Wu et al. 2018, arXiv:1805.01978; k and temperature as in DINO,
    Caron et al. 2021, arXiv:2104.14294.
  """
  del seed
  _check(train, test)
  if min(k, temperature, chunk) <= 0:
    raise ValueError(
      f"k-NN got k={k}, temperature={temperature}, chunk={chunk}; all three "
      "must be positive."
    )
  classes, targets = np.unique(train["labels"], return_inverse=True)
  k = min(k, len(targets))
  mean, scale = _statistics(train["features"])
  bank = jnp.asarray(_unit_rows((train["features"] - mean) / scale))
  queries = _unit_rows((test["features"] - mean) / scale)
  weighted, votes = [], []
  for start in range(0, len(queries), chunk):
    similarities, neighbours = _neighbours(
      bank, queries[start : start + chunk], k
    )
    weights = np.exp((np.asarray(similarities) - 1) / temperature)  # [B, k]
    said = np.eye(len(classes), dtype=np.float32)[targets[neighbours]]
    weighted.append(np.einsum("bk,bkc->bc", weights, said))
    votes.append(said.sum(axis=1))
  weighted, votes = np.concatenate(weighted), np.concatenate(votes)
  tie_break = weighted / (1 + weighted.sum(axis=1, keepdims=True))  # below 1
  majority = _accuracies(votes + tie_break, classes, train, test, False)
  return {
    **_accuracies(weighted, classes, train, test, per_class),
    "top1_majority": majority["top1"],
    "k": k,
    "temperature": temperature,
  }


PROTOCOLS: dict[str, Callable[..., dict[str, Any]]] = {
  "linear": linear_probe,
  "knn": nearest_neighbours,
}


def probe_table(
  evaluation: str,
  encoders: Mapping[tuple[str, str], tuple[Examples, Examples]],
  *,
  protocols: Sequence[str] = ("linear", "knn"),
  seed: int = 0,
  progress: bool = True,
) -> list[dict[str, Any]]:
  """The same probes on the features of several encoders.

  Args:
    evaluation: what the labels are, e.g. "count"; goes into every row.
    encoders: {(encoder, features): (train, test)}, where encoder is "trained",
      "random" or "pixels" and features is "last", "last4" or "pixels".
    protocols: names from PROTOCOLS.
    seed: passed to each protocol.
    progress: whether there is a progress bar.

  Returns:
    Rows of plain Python values, ready for JSON: evaluation, protocol, features,
    encoder, seconds, and the protocol's metrics (top1, n_train, n_test, ...).

  Raises:
    ValueError: an unknown protocol, or what the protocol raises, with the
      names of evaluation and encoder in front.
  """
  for protocol in protocols:
    if protocol not in PROTOCOLS:
      raise ValueError(
        f'unknown protocol "{protocol}"; known: {", ".join(PROTOCOLS)}.'
      )
  rows = []
  jobs = [(p, *names) for p in protocols for names in encoders]
  bar = tqdm.tqdm(jobs, desc=f"probe {evaluation}", disable=not progress)
  for protocol, encoder, features in bar:
    train, test = encoders[encoder, features]
    bar.set_postfix_str(f"{protocol} {encoder} {features}")
    started = time.perf_counter()
    try:
      metrics = PROTOCOLS[protocol](train, test, seed=seed)
    except ValueError as error:
      raise ValueError(
        f"{evaluation}, {protocol} on {encoder} {features}: {error}"
      ) from error
    rows.append(
      {
        "evaluation": evaluation,
        "protocol": protocol,
        "features": features,
        "encoder": encoder,
        **metrics,
        "seconds": round(time.perf_counter() - started, 2),
      }
    )
  return rows


class _Regression:
  """Fits [D, K] weights and a [K] bias; one compilation for all its fits.

  L-BFGS runs on the host in float64 (SciPy), loss and gradient on the device.
  Features are correlated, which makes plain L-BFGS crawl, so it works on
  U = diag(1/s) V^T W instead of W: V are the features' principal axes and
  1/s_d^2 = variance_d / 4 + strength, about the curvature along each.
  """

  def __init__(self, inputs, targets, classes, max_iterations, tolerance):
    self.inputs = inputs  # [n, D]
    self.targets = jnp.asarray(targets, jnp.int32)
    self.shape = (inputs.shape[1], classes)
    self.options = {"maxiter": max_iterations, "maxfun": 5 * max_iterations}
    self.options |= {"gtol": tolerance, "ftol": 1e-9, "maxcor": 10}
    self.variances, self.axes = _principal_axes(inputs)

  def __call__(self, chosen, strength, start=None):
    """Fits the images of `chosen` bool [n]; returns (W, bias), SciPy result."""
    width, classes = self.shape
    scales = 1 / jnp.sqrt(self.variances / 4 + strength)  # [D]
    if start is None:
      start = jnp.zeros((width, classes)), jnp.zeros(classes)
    weights = self.axes.T @ start[0] / scales[:, None]
    shares = jnp.asarray(chosen / chosen.sum(), jnp.float32)

    def unpack(flat):
      flat = jnp.asarray(flat.reshape(width + 1, classes), jnp.float32)
      return flat[:width], flat[width]

    def loss_and_gradient(flat):
      loss, gradients = _objective(
        unpack(flat),
        self.axes,
        scales,
        strength,
        self.inputs,
        self.targets,
        shares,
      )
      return float(loss), np.concatenate(
        [np.asarray(g, np.float64).ravel() for g in gradients]
      )

    outcome = optimize.minimize(
      loss_and_gradient,
      np.concatenate([np.ravel(weights), np.ravel(start[1])]).astype(float),
      jac=True,
      method="L-BFGS-B",
      options=self.options,
    )
    weights, bias = unpack(outcome.x)
    return (self.axes @ (scales[:, None] * weights), bias), outcome


@jax.jit
def _principal_axes(inputs):
  """Variances [D] (at least 0) and axes [D, D], one a column."""
  with jax.default_matmul_precision("float32"):
    covariance = inputs.T @ inputs / len(inputs)
    variances, axes = jnp.linalg.eigh(covariance)
  return jnp.maximum(variances, 0), axes


@jax.jit
@functools.partial(jax.value_and_grad)
def _objective(parameters, axes, scales, strength, inputs, targets, shares):
  """Cross-entropy under `shares` [n] (they sum to 1), with the penalty."""
  weights, bias = parameters
  weights = scales[:, None] * weights
  with jax.default_matmul_precision("float32"):
    logits = inputs @ (axes @ weights) + bias  # [n, K]
  log_shares = jax.nn.log_softmax(logits)
  chosen = jnp.take_along_axis(log_shares, targets[:, None], axis=1)[:, 0]
  penalty = 0.5 * strength * jnp.sum(jnp.square(weights))  # axes keep lengths
  return penalty - jnp.sum(shares * chosen)


@functools.partial(jax.jit, static_argnames="k")
def _neighbours(bank, queries, k):
  """Similarities and indices, both [B, k], of the nearest rows of `bank`."""
  with jax.default_matmul_precision("float32"):
    return jax.lax.top_k(queries @ bank.T, k)


def _logits(inputs, weights, bias):
  return np.asarray(inputs, np.float32) @ np.asarray(weights) + np.asarray(bias)


def _statistics(features):
  """Mean and standard deviation [D]; 1 where a feature is constant."""
  mean = features.mean(axis=0, dtype=np.float64)
  scale = features.std(axis=0, dtype=np.float64)
  scale = np.where(scale <= 1e-6 * np.max(scale, initial=0), 1, scale)
  return mean.astype(np.float32), scale.astype(np.float32)


def _unit_rows(features):
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  return np.asarray(features / np.where(norms == 0, 1, norms), np.float32)


def _stratified(targets, share, seed):
  """Bool [n]: `share` of each class, but never a class's only image."""
  random = np.random.default_rng(seed)
  held_out = np.zeros(len(targets), bool)
  for target in range(targets.max() + 1):
    members = random.permutation(np.flatnonzero(targets == target))
    count = min(max(round(share * len(members)), 1), len(members) - 1)
    held_out[members[:count]] = True
  return held_out


def _accuracies(scores, classes, train, test, per_class):
  """Metrics of scores [B, K], one column a class of `classes`, in percent."""
  labels = np.asarray(test["labels"])
  ranked = classes[np.argsort(-scores, axis=1, kind="stable")[:, :5]]
  right = ranked == labels[:, None]  # [B, 5]
  seen, counts = np.unique(train["labels"], return_counts=True)
  result = {
    "top1": _percent(right[:, 0]),
    "majority": _percent(labels == seen[np.argmax(counts)]),
    "n_train": len(train["labels"]),
    "n_test": len(labels),
    "classes": len(classes),
  }
  if len(classes) > 5:
    result["top5"] = _percent(right.any(axis=1))
  if per_class:
    result["per_class"] = {
      str(label): _percent(right[labels == label, 0])
      for label in np.unique(labels)
    }
  return result


def _percent(right):
  return round(100 * float(np.mean(right)), 3)


def _check(train, test):
  """Raises ValueError unless train and test are [n, D] with integers [n]."""
  for name, examples in (("train", train), ("test", test)):
    features, labels = examples["features"], np.asarray(examples["labels"])
    if features.ndim != 2 or labels.shape != features.shape[:1]:
      raise ValueError(
        f"{name} features {features.shape} and labels {labels.shape} do not "
        "fit; a probe needs [images, features] and [images]."
      )
    if not len(labels) or not np.issubdtype(labels.dtype, np.integer):
      raise ValueError(
        f"{name} has {len(labels)} labels of type {labels.dtype}; a "
        "classification needs at least one, and integers."
      )
  if train["features"].shape[1] != test["features"].shape[1]:
    raise ValueError(
      f"train has {train['features'].shape[1]} features, test has "
      f"{test['features'].shape[1]}; both must come from one encoder."
    )
