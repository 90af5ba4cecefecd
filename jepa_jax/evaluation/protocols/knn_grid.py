"""k-NN over a grid of k and temperatures, chosen without the test set."""

from collections.abc import Sequence
import functools
from typing import Any

import numpy as np

from jepa_jax.evaluation import bank as bank_lib
from jepa_jax.evaluation.protocols import accuracy, knn, protocol

NEIGHBOURS = (1, 5, 10, 20, 50, 100, 200)
TEMPERATURES = (0.02, 0.07, 0.2, 1.0)


def knn_grid(
  train: protocol.Examples,
  test: protocol.Examples,
  *,
  neighbours: Sequence[int] = NEIGHBOURS,
  temperatures: Sequence[float] = TEMPERATURES,
  chunk: int = 1024,
  seed: int = 0,
) -> dict[str, Any]:
  """Weighted k-NN as protocols.knn, with k and temperature by leave-one-out.

  Every training image is classified by the others (it never finds itself); the
  pair that is best there (ties: the larger k, then the higher temperature)
  classifies the test images.

  Args:
    train: features [n, D], labels [n] integers of any values.
    test: features [B, D], labels [B].
    neighbours: values of k; those above n - 1 are left out.
    temperatures: of the weights, above 0.
    chunk: images compared at a time, [chunk, n] similarities. The
      classes of all pairs are kept, and the scores [B, K] of one.
    seed: unused; here so that all protocols are called alike.

  Returns:
    Those of accuracy.accuracies; k, temperature; train_top1, by leave-one-out;
    best_on_test, the top1 of the pair that is best on the test images, which
    is no fair score, with best_on_test_k and best_on_test_temperature.

  Raises:
    ValueError: shapes disagree, labels are not integers, or no k or temperature
      is left that makes sense.
  """
  del seed
  protocol.check(train, test, "class")
  classes, targets = np.unique(train["labels"], return_inverse=True)
  ks = sorted((k for k in neighbours if 0 < k < len(targets)), reverse=True)
  heats = sorted(temperatures, reverse=True)
  if not ks or not heats or heats[-1] <= 0:
    raise ValueError(
      f"k-NN got neighbours={tuple(neighbours)} for {len(targets)} images and "
      f"temperatures={tuple(temperatures)}; it needs k in [1, images) and "
      "temperatures above 0."
    )
  bank = bank_lib.Bank(train["features"], unit=True)
  pairs = [(k, t) for k in ks for t in heats]
  classified = functools.partial(
    _classified, bank, targets, len(classes), pairs, chunk
  )
  found, _ = classified(train["features"], None)
  own = {pair: accuracy.percent(x == targets) for pair, x in found.items()}
  best = max(own, key=own.get)
  found, scores = classified(test["features"], best)
  labels = np.asarray(test["labels"])
  top1 = {
    pair: accuracy.percent(classes[x] == labels) for pair, x in found.items()
  }
  luckiest = max(top1, key=top1.get)
  return {
    **accuracy.accuracies(scores, classes, train, test),
    "k": best[0],
    "temperature": best[1],
    "train_top1": own[best],
    "best_on_test": top1[luckiest],
    "best_on_test_k": luckiest[0],
    "best_on_test_temperature": luckiest[1],
  }


def _classified(bank, targets, count, pairs, chunk, queries, kept):
  """The class's number [B] by (k, temperature), and scores [B, K] of one.

  Args:
    bank: of the training images.
    targets: the numbers [n] of their classes.
    count: K.
    pairs: (k, temperature), the largest k first.
    chunk: queries at a time.
    queries: features [B, D].
    kept: the pair whose scores are kept. None: the queries are the training
      images, none of which may find itself, and no scores are kept.
  """
  itself = kept is None
  most, start = pairs[0][0], 0
  found = {pair: [] for pair in pairs}
  scores = []
  for part in bank.chunks(queries, chunk):
    near, who = knn.neighbours(bank, part, most + int(itself))
    if itself:
      near, who = _others(near, who, np.arange(start, start + len(part)))
      start += len(part)
    for k, t in pairs:
      weights = np.exp((near[:, :k] - 1) / t)
      cells = np.arange(len(part))[:, None] * count + targets[who[:, :k]]
      votes = np.bincount(cells.ravel(), weights.ravel(), len(part) * count)
      votes = votes.reshape(len(part), count)
      found[k, t].append(votes.argmax(axis=1))
      if (k, t) == kept:
        scores.append(votes.astype(np.float32))
  found = {pair: np.concatenate(x) for pair, x in found.items()}
  return found, None if itself else np.concatenate(scores)


def _others(near, who, itself):
  """Neighbours [B, k] of [B, k + 1] without the query's own row."""
  other = who != itself[:, None]
  # Where copies of an image crowd it out, the farthest goes in its place.
  other[other.all(axis=1), -1] = False
  shape = len(who), who.shape[1] - 1
  return near[other].reshape(shape), who[other].reshape(shape)


ROW = protocol.Protocol(
  name="knn_grid",
  title="k-NN, k and temperature chosen",
  run=knn_grid,
  score="top1",
  unit="%",
  higher_is_better=True,
  label="class",
)
