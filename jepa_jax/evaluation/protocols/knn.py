"""Nearest neighbours among frozen features.

Axes: n training images, B test images in a chunk, D features, K classes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.evaluation import features
from jepa_jax.evaluation.protocols import accuracy, protocol


def nearest_neighbours(
  train: protocol.Examples,
  test: protocol.Examples,
  *,
  k: int = 20,
  temperature: float = 0.07,
  chunk: int = 1024,
  seed: int = 0,
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

  Returns:
    Those of accuracy.accuracies; top1_majority, in percent; k, temperature.

  Raises:
    ValueError: shapes disagree, labels are not integers, or k, temperature or
      chunk is not positive.

  Reference: Wu et al. 2018, arXiv:1805.01978; k and temperature as in DINO,
    Caron et al. 2021, arXiv:2104.14294.
  """
  del seed
  protocol.check(train, test, "class")
  if min(k, temperature, chunk) <= 0:
    raise ValueError(
      f"k-NN got k={k}, temperature={temperature}, chunk={chunk}; all three "
      "must be positive."
    )
  classes, targets = np.unique(train["labels"], return_inverse=True)
  k = min(k, len(targets))
  mean, scale = features.statistics(train["features"])
  bank = jnp.asarray(unit_rows((train["features"] - mean) / scale))
  queries = unit_rows((test["features"] - mean) / scale)
  weighted, votes = [], []
  for start in range(0, len(queries), chunk):
    similarities, nearest = neighbours(bank, queries[start : start + chunk], k)
    weights = np.exp((np.asarray(similarities) - 1) / temperature)  # [B, k]
    said = np.eye(len(classes), dtype=np.float32)[targets[nearest]]
    weighted.append(np.einsum("bk,bkc->bc", weights, said))
    votes.append(said.sum(axis=1))
  weighted, votes = np.concatenate(weighted), np.concatenate(votes)
  tie_break = weighted / (1 + weighted.sum(axis=1, keepdims=True))  # below 1
  majority = accuracy.accuracies(votes + tie_break, classes, train, test)
  return {
    **accuracy.accuracies(weighted, classes, train, test),
    "top1_majority": majority["top1"],
    "k": k,
    "temperature": temperature,
  }


@functools.partial(jax.jit, static_argnames="k")
def neighbours(
  bank: jax.Array, queries: Any, k: int
) -> tuple[jax.Array, jax.Array]:
  """Similarities and indices, both [B, k], of the nearest rows of `bank`."""
  with jax.default_matmul_precision("float32"):
    return jax.lax.top_k(queries @ bank.T, k)


def unit_rows(features: np.ndarray) -> np.ndarray:
  """Rows of length 1, float32; those of zeros stay."""
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  return np.asarray(features / np.where(norms == 0, 1, norms), np.float32)


ROW = protocol.Protocol(
  name="knn",
  title="k-NN",
  run=nearest_neighbours,
  score="top1",
  unit="%",
  higher_is_better=True,
  label="class",
)
