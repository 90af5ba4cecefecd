"""Images that cannot be read: counted, named, and replaced in their batch."""

import threading

import numpy as np
import tensorflow as tf

from jepa_jax.data import pixels, sources

_SAID: set[str] = set()  # lines, of training and of every evaluation


class Unreadable:
  """Counts and names the images that a pipeline had to skip.

  The pipeline adds from its threads; the train loop calls `check`.

  Args:
    limit: distinct images after which `check` fails (config.max_unreadable).
  """

  def __init__(self, limit: int):
    self._limit = limit
    self._lock = threading.Lock()
    self._reasons: dict[str, str] = {}
    self._fatal = ""
    self._told = 0  # images that `news` has told of

  def add(self, name: str, reason: str) -> None:
    with self._lock:
      self._reasons.setdefault(name, reason)

  def stop(self, name: str, count: int) -> None:
    """Makes `check` fail: a whole batch, from `name` on, cannot be read."""
    self._fatal = f"none of the {count} images of a batch could be read: {name}"

  def news(self) -> list[str]:
    """As `check`; then as `unsaid`."""
    self.check()
    return self.unsaid()

  def unsaid(self) -> list[str]:
    """A line for every image of which this process has told none before."""
    new = list(self.reasons.items())[self._told :]
    self._told += len(new)
    lines = [f"skipped unreadable image {name}: {why}" for name, why in new]
    lines = [line for line in lines if line not in _SAID]
    _SAID.update(lines)
    return lines

  def __len__(self) -> int:
    return len(self._reasons)

  @property
  def reasons(self) -> dict[str, str]:
    """What is wrong with each image, by name, in the order of discovery."""
    with self._lock:
      return dict(self._reasons)

  def check(self) -> None:
    """Raises ValueError where more images were unreadable than allowed."""
    reasons = self.reasons
    if self._fatal:
      raise ValueError(f"{self._fatal} and the rest; mend or remove them")
    if len(reasons) > self._limit:
      shown = [f"{name} ({why})" for name, why in list(reasons.items())[:3]]
      raise ValueError(
        f"{len(reasons)} images could not be read, more than"
        f" data.max_unreadable={self._limit}: {', '.join(shown)}"
        f"{', ...' if len(reasons) > 3 else ''}; mend or remove them, or"
        " raise data.max_unreadable"
      )


def mend(
  batch: dict[str, tf.Tensor],
  keys: tuple[str, ...],
  source: sources.Source,
  rules: pixels.Rules,
  unreadable: Unreadable,
) -> dict[str, tf.Tensor]:
  """Puts the next readable example of the batch in an unreadable one's place.

  Args:
    batch: with readable bool [B] and index int64 [B].
    keys: of the arrays [B, ...] that are replaced together.
    source: of the images.
    rules: as which they are read.
    unreadable: where they are counted.

  Returns:
    Those arrays.
  """
  arrays, readable = {key: batch[key] for key in keys}, batch["readable"]

  def report(readable, index):
    bad = np.flatnonzero(~readable)
    for number in np.unique(index[bad]):
      (record,) = source.images(source.read(np.asarray([number])))
      why = source.problem(int(number)) or pixels.diagnose(record, rules)
      unreadable.add(source.name(int(number)), why)
    good = np.flatnonzero(readable)
    if not len(good):
      unreadable.stop(f"{source.name(int(index[0]))} ({why})", len(index))
      return np.arange(len(readable), dtype=np.int32)
    following = np.searchsorted(good, np.arange(len(readable))) % len(good)
    return good[following].astype(np.int32)

  def replace():
    rows = tf.numpy_function(report, [readable, batch["index"]], tf.int32)
    rows = tf.ensure_shape(rows, readable.shape)
    return {key: tf.gather(x, rows) for key, x in arrays.items()}

  return tf.cond(tf.reduce_all(readable), lambda: arrays, replace)
