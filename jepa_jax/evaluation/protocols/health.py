"""How healthy features are, without any label: rank, decay and spread.

Axes: B test images, D features.
"""

from typing import Any

import numpy as np

from jepa_jax.evaluation.protocols import protocol

PAIRS = 4096  # images at most whose pairs are compared
ROWS = 4096  # or columns, in float64 at a time
SMALL = 1e-7  # added to every share of RankMe, as in the paper
# Ranks over which a power law is fitted, as shares of their number.
FITTED = (0.02, 0.5)
SHOWN = 100  # eigenvalues that are kept of a spectrum


def health(
  train: protocol.Examples, test: protocol.Examples, *, seed: int = 0
) -> dict[str, Any]:
  """Four measures of the features of the test images.

  Args:
    train: not looked at.
    test: features [B, D].
    seed: of the images whose pairs are compared, where there are many.

  Returns:
    rankme (see `rankme`), alpha (see `alpha_req`), uniformity (see
    `uniformity`); spectrum, the shares of the largest SHOWN eigenvalues of the
    covariance, largest first; width, D; n_test.

  Raises:
    ValueError: fewer than three images.
  """
  del train
  features = np.asarray(test["features"])
  if len(features) < 3:
    raise ValueError(
      f"health got {len(features)} images; it needs at least 3, and for a "
      "figure that says something some thousands."
    )
  some = np.random.default_rng(seed).permutation(len(features))[:PAIRS]
  return {
    "rankme": rankme(features),
    "alpha": alpha_req(features),
    "uniformity": uniformity(features[some].astype(np.float64)),
    "spectrum": spectrum(features)[:SHOWN].round(6).tolist(),
    "width": features.shape[1],
    "n_test": len(features),
  }


def rankme(features: np.ndarray) -> float:
  """Exponential of the entropy of the normalised singular values.

  Args:
    features: [B, D], not centred, as in the paper.

  Returns:
    About 1 where one direction is all there is, min(B, D) where all singular
    values are alike. Comparable at equal B and D only.

  Reference: Garrido et al. 2023, eq. 3, arXiv:2210.02885. The log's
    collapse.effective_rank is that of centred features.
  """
  values = np.sqrt(_eigenvalues(features, np.zeros(features.shape[1])))
  shares = values / max(values.sum(), 1e-300) + SMALL
  return float(np.exp(-np.sum(shares * np.log(shares))))


def spectrum(features: np.ndarray) -> np.ndarray:
  """Shares of the eigenvalues of the covariance, [min(B, D)], falling.

  Args:
    features: [B, D].

  Returns:
    float64, whose sum is 1, or zeros where all rows are alike.
  """
  values = _eigenvalues(features, features.mean(axis=0, dtype=np.float64))
  return values / max(values.sum(), 1e-300)


def _eigenvalues(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
  """Squares of the singular values of features - mean, falling.

  Features of a large data set may fill the memory: only a part of them is in
  float64 at a time.
  """
  short = min(features.shape)
  gram = np.zeros((short, short))
  if short == features.shape[1]:
    for start in range(0, len(features), ROWS):
      part = features[start : start + ROWS] - mean
      gram += part.T @ part
  else:
    for start in range(0, len(mean), ROWS):
      part = features[:, start : start + ROWS] - mean[start : start + ROWS]
      gram += part @ part.T
  return np.maximum(np.linalg.eigvalsh(gram)[::-1], 0)


def alpha_req(features: np.ndarray) -> float:
  """Exponent of the power law that the spectrum of the covariance follows.

  The eigenvalue of rank i is about i^-alpha; a line is fitted by least squares
  to their logarithms, over the ranks FITTED of those that are not rounding.

  Args:
    features: [B, D].

  Returns:
    alpha: near 1 in the encoders that the paper finds best; far above, few
    directions hold all; near 0, noise fills all of them. NaN with fewer than
    three eigenvalues.

  Reference: Agrawal et al. 2022, arXiv:2202.05808.
    Differs: the range of ranks that is fitted is ours.
  """
  values = spectrum(features)
  values = values[values > 1e-12 * values[0]]
  if len(values) < 3:
    return float("nan")
  ranks = np.arange(1, len(values) + 1)
  first, last = (int(share * len(values)) for share in FITTED)
  fitted = slice(first, max(last, first + 3))
  slope, _ = np.polyfit(np.log(ranks[fitted]), np.log(values[fitted]), 1)
  return float(-slope)


def uniformity(features: np.ndarray, t: float = 2.0) -> float:
  """Logarithm of the mean Gaussian potential of all pairs of unit features.

  Args:
    features: [B, D].
    t: of exp(-t |u - v|^2).

  Returns:
    0 where all images are alike, lower the more evenly they are spread over
    the sphere; at least -4 t.

  Reference: Wang & Isola 2020, arXiv:2005.10242.
  """
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  units = features / np.where(norms == 0, 1, norms)
  squares = 2 - 2 * np.clip(units @ units.T, -1, 1)
  pairs = squares[np.triu_indices(len(units), k=1)]
  return float(np.log(np.mean(np.exp(-t * pairs))))


ROW = protocol.Protocol(
  name="health",
  title="health without labels",
  run=health,
  score="rankme",
  unit="",
  higher_is_better=True,
  label="none",
)
