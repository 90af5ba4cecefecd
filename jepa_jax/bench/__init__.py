"""Times masks, input pipeline, train step or train loop on this machine.

    python -m jepa_jax.bench masks [--json]
    python -m jepa_jax.bench data [--config F:variant] [--resume] [--files N]
    python -m jepa_jax.bench step --config F:variant [--json]
    python -m jepa_jax.bench loop --config F:variant [--json]

What is compared runs in turns, several rounds; the numbers are medians over the
rounds. Other work on the machine still falsifies them.
"""

from collections.abc import Callable, Iterator
import statistics
import time
from typing import Any

Row = dict[str, Any]  # of a table: name -> value


def in_turns(
  turns: dict[Any, Callable[[], float]], rounds: int
) -> dict[Any, float]:
  """Calls all in turns, once untimed; the median of what each returns."""
  times: dict[Any, list[float]] = {name: [] for name in turns}
  for number in range(rounds + 1):
    # Back and forth, so that a drift of the machine falls on all alike.
    for name in list(turns)[:: 1 if number % 2 else -1]:
      taken = turns[name]()
      if number:
        times[name].append(taken)
  return {name: statistics.median(taken) for name, taken in times.items()}


def seconds(batches: Iterator[Any], count: int) -> float:
  """Seconds that the next so many batches take."""
  began = time.perf_counter()
  for _ in range(count):
    next(batches)
  return time.perf_counter() - began
