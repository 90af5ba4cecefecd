"""The linear probe with few labels: 1 %, 10 %, or so many images a class.

Axes: n training images, B test images, D features.
"""

import functools
from typing import Any

import numpy as np

from jepa_jax.evaluation.protocols import linear, protocol

DRAWS = 3  # of training images, each with a probe of its own


def low_shot(
  train: protocol.Examples,
  test: protocol.Examples,
  *,
  amount: float,
  draws: int = DRAWS,
  seed: int = 0,
) -> dict[str, Any]:
  """linear.linear_probe on several small draws of the training images.

  Args:
    train: features [n, D], labels [n] integers of any values.
    test: features [B, D], labels [B]; all of them judge each probe.
    amount: images a class where it is 1 or more, else the share of each class.
      Of a class with fewer all are taken, and always at least one.
    draws: how many.
    seed: of the draws; equal labels and seeds give equal draws.

  Returns:
    top1, mean of the draws; standard_error of that mean over the draws and the
    test images; draws, the top1 of each; lists, the numbers of the training
    images of each draw, ascending; n_train of a draw, n_test, classes.

  Raises:
    ValueError: what linear.linear_probe raises, or no draw.

  Reference: Assran et al. 2023, Table 2, arXiv:2301.08243.
    Differs: the paper's 1 % is one published list, and the better of linear and
    fine-tuning.
  """
  protocol.check(train, test, "class")
  if draws < 1 or amount <= 0:
    raise ValueError(
      f"low-shot got {draws} draws of {amount}; both need to be above 0."
    )
  labels = np.asarray(train["labels"])
  lists = [
    draw(labels, amount, np.random.default_rng((seed, i))) for i in range(draws)
  ]
  found = [
    linear.linear_probe(
      {"features": train["features"][chosen], "labels": labels[chosen]},
      test,
      seed=seed,
    )
    for chosen in lists
  ]
  scores = np.asarray([x["top1"] for x in found])
  spread = scores.std(ddof=1) / np.sqrt(draws) if draws > 1 else 0.0
  sampling = np.mean([x["standard_error"] for x in found])
  return {
    "top1": round(float(scores.mean()), 3),
    "standard_error": float(np.hypot(spread, sampling)),
    "draws": scores.tolist(),
    "majority": found[0]["majority"],
    "n_train": len(lists[0]),
    "n_test": found[0]["n_test"],
    "classes": found[0]["classes"],
    "lists": [chosen.tolist() for chosen in lists],
  }


def draw(
  labels: np.ndarray, amount: float, random: np.random.Generator
) -> np.ndarray:
  """Numbers of the images drawn, ascending; the same share of each class."""
  chosen = []
  for label in np.unique(labels):
    members = random.permutation(np.flatnonzero(labels == label))
    count = amount if amount >= 1 else max(round(amount * len(members)), 1)
    chosen.append(members[: int(count)])
  return np.sort(np.concatenate(chosen))


ROWS = tuple(
  protocol.Protocol(
    name=f"low_shot_{name}",
    title=f"linear probe, {words}",
    run=functools.partial(low_shot, amount=amount),
    score="top1",
    unit="%",
    higher_is_better=True,
    label="class",
  )
  for name, words, amount in (
    ("1pct", "1 % of the labels", 0.01),
    ("10pct", "10 % of the labels", 0.1),
    ("1", "1 image a class", 1),
    ("2", "2 images a class", 2),
    ("5", "5 images a class", 5),
    ("10", "10 images a class", 10),
  )
)
