"""How well a linear probe holds out when images are corrupted."""

from typing import Any

import numpy as np

from jepa_jax.evaluation import variants
from jepa_jax.evaluation.protocols import accuracy, linear, protocol


def robustness(
  train: protocol.Examples, test: protocol.Examples, *, seed: int = 0
) -> dict[str, Any]:
  """linear.linear_probe of clean images, scored on corrupted ones.

  Args:
    train: features [n, D], labels [n] integers of any values.
    test: features [B, D], labels [B]; "variants", {corruption and level:
      features [B, D]}.
    seed: of the images held out.

  Returns:
    corrupted_top1, the mean of all corruptions and levels; top1 of the clean
    images; kept, the first in percent of the second; corruptions, {name: top1
    of the levels 1 to 5}; standard_error of corrupted_top1 over the test
    images; majority, strength, n_train, n_test, classes.

  Raises:
    ValueError: what linear.linear_probe raises.

  Reference: Hendrycks & Dietterich 2019, arXiv:1903.12261.
    Differs: five of its corruptions, and plain accuracy, not an error relative
    to AlexNet's.
  """
  clean, classify = linear.fit(train, test, seed=seed)
  labels = np.asarray(test["labels"])
  right = {
    name: classify(features) == labels
    for name, features in test["variants"].items()
    if name.split()[0] in variants.CORRUPTIONS
  }
  shares = np.mean(list(right.values()), axis=0)  # [B]
  corrupted = accuracy.percent(shares)
  return {
    "corrupted_top1": corrupted,
    "standard_error": 100 * float(shares.std() / np.sqrt(len(shares))),
    "top1": clean["top1"],
    "kept": round(100 * corrupted / max(clean["top1"], 1e-9), 3),
    "corruptions": {
      kind: [
        accuracy.percent(right[f"{kind} {level}"])
        for level in range(1, variants.LEVELS + 1)
      ]
      for kind in variants.CORRUPTIONS
    },
    **{k: clean[k] for k in ("majority", "strength", "n_train", "n_test")},
    "classes": clean["classes"],
  }


ROW = protocol.Protocol(
  name="robustness",
  title="linear probe, corrupted images",
  run=robustness,
  score="corrupted_top1",
  unit="%",
  higher_is_better=True,
  label="class",
  test_variants=variants.corruptions(),
)
