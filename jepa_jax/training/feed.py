"""Batches on their way to the devices, a bounded number ahead."""

from collections.abc import Callable, Iterator
import queue
import threading
import time
from typing import Any

import jax
import numpy as np

_PATIENCE = 1.0  # seconds that data are waited for after a signal


class Feed:
  """Iterates over global arrays, which a thread puts on the devices.

  Attributes:
    wait_seconds: time that `next` has waited for data, since it was set to 0.
  """

  def __init__(
    self,
    batches: Iterator[dict[str, np.ndarray]],
    spec: dict[str, jax.ShapeDtypeStruct],
    ahead: int = 2,
    stopped: Callable[[], bool] = lambda: False,
  ):
    """Starts the thread.

    Args:
      batches: this process's share of every global batch.
      spec: Program.batch_spec, with shardings.
      ahead: batches that may wait on the devices, at least 1.
      stopped: whether a signal has come, so that data which never come are not
        waited for: there are no more batches then.
    """
    self.wait_seconds = 0.0
    self._stopped_by = stopped
    self._queue: queue.Queue[Any] = queue.Queue(maxsize=max(1, ahead))
    self._stopped = threading.Event()
    self._thread = threading.Thread(
      target=self._run, args=(batches, spec), daemon=True
    )
    self._thread.start()

  def __enter__(self) -> "Feed":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._stopped.set()
    self._thread.join(timeout=10)

  def __iter__(self) -> "Feed":
    return self

  def __next__(self) -> dict[str, jax.Array]:
    started = time.perf_counter()
    item = self._next()
    self.wait_seconds += time.perf_counter() - started
    if isinstance(item, BaseException):
      raise item
    return item

  def _next(self) -> Any:
    while True:
      last = self._stopped_by()
      try:
        return self._queue.get(timeout=_PATIENCE)
      except queue.Empty:
        if last:
          return StopIteration()

  def _run(self, batches, spec) -> None:
    try:
      for batch in batches:
        self._put(
          {
            name: jax.make_array_from_process_local_data(
              s.sharding, batch[name], s.shape
            )
            for name, s in spec.items()
          }
        )
        if self._stopped.is_set():
          return
      self._put(StopIteration())
    except BaseException as error:  # Handed to the thread that reads.
      self._put(error)

  def _put(self, item: Any) -> None:
    while not self._stopped.is_set():
      try:
        return self._queue.put(item, timeout=0.1)
      except queue.Full:
        continue
