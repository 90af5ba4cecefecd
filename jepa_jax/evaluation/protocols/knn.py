"""Nearest neighbours among frozen features.

Axes: n training images, B test images in a chunk, D features, K classes.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.evaluation import bank as bank_lib
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
  bank = bank_lib.Bank(train["features"], unit=True)
  weighted, votes = [], []
  for queries in bank.chunks(test["features"], chunk):
    similarities, nearest = neighbours(bank, queries, k)
    weights = np.exp((similarities - 1) / temperature)  # [B, k]
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


def neighbours(
  bank: bank_lib.Bank, queries: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Similarities and indices, both [B, k], of the nearest rows of a bank."""
  found = _neighbours(bank.rows, queries, k, bank.count, bank.shards)
  return tuple(map(bank.host, found))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _neighbours(rows, queries, k, count, shards):
  """The nearest of each device's rows first, [B, S, k], then those of all."""
  rows = rows.reshape(shards, -1, rows.shape[1])
  with jax.default_matmul_precision("float32"):
    similarities = jnp.einsum("bd,snd->bsn", queries, rows)
  numbers = jnp.arange(rows.shape[0] * rows.shape[1])
  numbers = numbers.reshape(rows.shape[:2])  # [S, n]
  similarities = jnp.where(numbers < count, similarities, -jnp.inf)
  nearest, places = jax.lax.top_k(similarities, min(k, rows.shape[1]))
  places = jnp.take_along_axis(numbers[None], places, axis=2)
  nearest, places = (x.reshape(len(queries), -1) for x in (nearest, places))
  nearest, chosen = jax.lax.top_k(nearest, k)
  return nearest, jnp.take_along_axis(places, chosen, axis=1)


ROW = protocol.Protocol(
  name="knn",
  title="k-NN",
  run=nearest_neighbours,
  score="top1",
  unit="%",
  higher_is_better=True,
  label="class",
)
