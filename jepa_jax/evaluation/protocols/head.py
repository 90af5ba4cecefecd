"""How often a fine-tuned network's own head is right."""

from typing import Any

import numpy as np

from jepa_jax.evaluation.protocols import accuracy, protocol


def head(
  train: protocol.Examples, test: protocol.Examples, *, seed: int = 0
) -> dict[str, Any]:
  """The class of the largest logit; nothing is fitted.

  Args:
    train: labels [n], by which the commonest class is known.
    test: logits [B, K] of the classes 0 to K - 1; labels [B].
    seed: unused; here so that all protocols are called alike.

  Returns:
    Those of accuracy.accuracies.

  Raises:
    ValueError: labels are not integers.
  """
  del seed
  protocol.check(train, test, "class")
  classes = np.arange(test["logits"].shape[1])
  return accuracy.accuracies(test["logits"], classes, train, test)


ROW = protocol.Protocol(
  name="head",
  title="the network's own head",
  run=head,
  score="top1",
  unit="%",
  higher_is_better=True,
  label="class",
  logits=True,
)
