"""What tells whether a data set is still the one that a run began with."""

import hashlib
import os
from typing import Any

import numpy as np

from jepa_jax.data import sources

_NAMES = 100_000  # of so many records, evenly spread, the names are read


def fingerprint(config: Any) -> dict[str, Any]:
  """The count of a data set's images and a digest of what they are called.

  The digest is of the names of records, and of the names and sizes of files
  that hold many: an image that is exchanged for one of the same name shows only
  in the latter. Where the files lie is no part of it.

  Args:
    config: config.data.

  Returns:
    "images" and "digest", as JSON values.
  """
  source = sources.open_source(config)
  digest = hashlib.sha256()
  count = len(source)
  for index in np.unique(np.linspace(0, count - 1, min(count, _NAMES)).round()):
    digest.update(f"{source.name(int(index))}\n".encode(errors="replace"))
  for path, numbers in sorted(source.places().items()):
    size = os.path.getsize(path) if os.path.isfile(path) else None
    place = f"{os.path.basename(path)} {size} {len(numbers)}\n"
    digest.update(place.encode(errors="replace"))
  return {"images": count, "digest": digest.hexdigest()[:16]}
