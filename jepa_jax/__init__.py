"""I-JEPA in JAX: pretraining, evaluation and reports.

    model = jepa_jax.load("encoder.npz")  # or a run, or foreign weights
    features = model.encode(images)       # see jepa_jax.pretrained

Importing this package loads neither TensorFlow nor JAX.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Public names that are imported when they are used.
_LAZY = {
  "Pretrained": "jepa_jax.pretrained",
  "load": "jepa_jax.pretrained",
  "push_to_hub": "jepa_jax.convert.push",
  "warm_start": "jepa_jax.convert.warm_start",
}


def __getattr__(name: str) -> Any:
  if name not in _LAZY:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
  return sorted([*globals(), *_LAZY])
