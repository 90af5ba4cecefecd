"""Retrieval: do the nearest images have the same class?

Axes: n test images, which are queries and gallery at once; B queries of a
chunk, D features.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jepa_jax.evaluation import bank as bank_lib
from jepa_jax.evaluation.protocols import protocol

RANKS = (1, 5, 10)


def retrieval(
  train: protocol.Examples,
  test: protocol.Examples,
  *,
  ranks: Sequence[int] = RANKS,
  chunk: int = 256,
  seed: int = 0,
) -> dict[str, Any]:
  """Ranks all other test images by cosine similarity to each.

  Features are standardised first, as for k-NN. A query never finds itself, and
  one whose class no other image has is not counted.

  Args:
    train: not looked at.
    test: features [n, D], labels [n] integers of any values.
    ranks: the k of recall@k.
    chunk: queries compared at a time, [chunk, n] similarities, which are sorted
      on the host.
    seed: unused; here so that all protocols are called alike.

  Returns:
    mAP, the mean over queries of the average precision, in percent, with its
    standard_error over them; recall_1, recall_5 and recall_10, the share of
    queries that have an image of their class among the nearest so many; chance,
    the share of other images that have a query's class; alone, queries that are
    not counted; n_test, classes. `python -m jepa_jax.visualize neighbours`
    draws some.

  Raises:
    ValueError: shapes disagree, or no class has two images.
  """
  del train, seed
  protocol.check(test, test, "class")
  classes, targets, counts = np.unique(
    test["labels"], return_inverse=True, return_counts=True
  )
  others = counts[targets] - 1  # images of a query's class, without itself
  queries = np.flatnonzero(others)
  if not len(queries):
    raise ValueError(
      f"retrieval got {len(targets)} images of as many classes; a query needs "
      "another image of its class."
    )
  bank = bank_lib.Bank(test["features"], unit=True)
  rows = bank.host(bank.rows)[: bank.count]
  precision, found = [], []
  for start in range(0, len(queries), chunk):
    chosen = queries[start : start + chunk]
    similarities = rows[chosen] @ rows.T
    similarities[np.arange(len(chosen)), chosen] = -np.inf  # itself: the last
    order = np.argsort(-similarities, axis=1, kind="stable")[:, :-1]
    hits = targets[order] == targets[chosen][:, None]  # [B, n - 1]
    ranked = np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)
    precision.append((ranked * hits).sum(axis=1) / others[chosen])
    found.append([hits[:, :k].any(axis=1) for k in ranks])
  precision = np.concatenate(precision)
  found = np.concatenate(found, axis=1)
  return {
    "mAP": round(100 * float(precision.mean()), 3),
    "standard_error": 100 * float(precision.std() / np.sqrt(len(queries))),
    **{
      f"recall_{k}": round(100 * float(x.mean()), 3)
      for k, x in zip(ranks, found)
    },
    "chance": 100 * float(others[queries].mean() / (len(targets) - 1)),
    "alone": len(targets) - len(queries),
    "n_test": len(targets),
    "classes": len(classes),
  }


ROW = protocol.Protocol(
  name="retrieval",
  title="retrieval",
  run=retrieval,
  score="mAP",
  unit="%",
  higher_is_better=True,
  label="class",
)
