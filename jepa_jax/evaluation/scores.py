"""Rows of evaluations as metrics of the log, and what judges a checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from jepa_jax import config as config_lib

Rows = Sequence[Mapping[str, Any]]  # of evaluations.json


def scores(rows: Rows) -> dict[str, float]:
  """Rows as metrics of the log: "eval/<name>/<protocol> <features>"."""
  return {
    f"eval/{row['evaluation']}/{row['protocol']} {row['features']}": row[
      row["score"]
    ]
    for row in rows
    if row["encoder"] == "trained"
  }


def best(rows: Rows, config: ml_collections.ConfigDict) -> float | None:
  """The score that keeps the best checkpoint, None without evaluations.

  Larger is better: a score of which less is better is negated.
  """
  named = {
    f"{row['evaluation']}/{row['protocol']}/{row['features']}": row
    for row in rows
    if row["encoder"] == "trained"
  }
  if not named:
    return None
  wanted = config.checkpoint.best_metric or next(iter(named))
  config_lib.choose("checkpoint.best_metric", wanted, named)
  row = named[wanted]
  return row[row["score"]] * (1 if row["higher_is_better"] else -1)


def split_lists(rows: Rows) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Rows without their lists of images, and those lists.

  Args:
    rows: of which some have "lists", the numbers of the training images of each
      draw. All encoders and features of a protocol have the same.

  Returns:
    The rows, and {evaluation/protocol: lists}.
  """
  lists = {
    f"{row['evaluation']}/{row['protocol']}": row["lists"]
    for row in rows
    if "lists" in row
  }
  return [{k: x for k, x in r.items() if k != "lists"} for r in rows], lists
