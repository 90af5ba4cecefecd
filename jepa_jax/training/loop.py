"""The train loop: steps, the rows of the log, and nothing else.

It knows no data set, no evaluation and no hardware: what it says of them comes
from what it is given.
"""

from collections.abc import Callable, Sequence
import math
import resource
import sys
import time
from typing import Any

import jax

from jepa_jax import config as config_lib
from jepa_jax.training import program as program_lib

Row = dict[str, float]


class Loop:
  """What happens at every step; the benchmark of the loop times the same.

  Attributes:
    state: the newest TrainState.
    step: steps done.
    meter: see Meter.
  """

  def __init__(
    self,
    program: program_lib.Program,
    state: program_lib.TrainState,
    batches: Any,
    log: Any,
    stopper: Any,
    end: int,
    *,
    watch: Callable[[jax.Array], dict[str, jax.Array]] = lambda features: {},
    alarm: Callable[[Row], str] = lambda row: "",
    skipped: Callable[[], list[str]] = lambda: [],
    peak_flops: float | None = None,
    losses: Sequence[tuple[int, float]] = (),
  ):
    """Takes the parts of a run; nothing happens yet.

    Args:
      program: what to run.
      state: to start from.
      batches: training.feed.Feed.
      log: training.log.Log.
      stopper: training.distributed.Stopper.
      end: step whose row is written in any case.
      watch: metrics of features [B, D] of a batch, for the log.
      alarm: a loud sentence if a row says collapse, else "".
      skipped: a line for every image that was skipped since the last call;
        raises ValueError where they are too many.
      peak_flops: operations a second of one device, None where not known.
      losses: Meter.losses when the state was saved.
    """
    self.state = state
    self.step = self._start = int(state.step)
    self.meter = Meter(program, batches, watch, peak_flops, losses)
    self._program = program
    self._batches = batches
    self._log = log
    self._log_every = _log_every(program)
    self._stopper = stopper
    self._end = end
    self._alarm = alarm
    self._skipped = skipped

  def advance(self, until: int) -> None:
    """Trains until that step is done, or until the stopper says so."""
    while self.step < until and not self._stopper.stopped:
      batch = next(self._batches, None)
      if batch is None:  # data that did not come until a signal did
        return
      self.state, metrics, features = self._program.step(self.state, batch)
      self.step += 1
      self.meter.add(self.step, metrics)
      self._log.step()
      if (
        self._stopper.check(self.step)
        or self.step in (self._start + 1, self._end)
        or self.step % self._log_every == 0
      ):
        self._write(features)

  def _write(self, features: Any) -> None:
    row = self.meter.read(features)
    self._log.write(self.step, row)
    if warning := self._alarm(row):
      self._log.say(f"step {self.step}: {warning}")
    for line in self._skipped():
      self._log.say(line, everywhere=True)


def _log_every(program: program_lib.Program) -> int:
  return max(1, config_lib.steps(program.config, "log_every"))


class Meter:
  """Collects the metrics of steps without waiting for the device.

  Attributes:
    losses: (step, loss) since the last step that log_every divides: what the
      next row averages, wherever the run was stopped and resumed.
  """

  def __init__(
    self,
    program: program_lib.Program,
    batches: Any,
    watch: Callable[[jax.Array], dict[str, jax.Array]],
    peak_flops: float | None,
    losses: Sequence[tuple[int, float]],
  ):
    """Takes what it reads; see Loop."""
    self._config = program.config
    self._batches = batches
    self._devices = program.mesh.size
    self._flops = program.objective.flops()
    self._peak = peak_flops and peak_flops * self._devices
    self._log_every = _log_every(program)
    self.losses: list[tuple[int, Any]] = list(losses)
    self._metrics: dict[str, Any] = {}
    self._watch = jax.jit(lambda features: watch(features[:256]))
    self._images = 0  # since the first step, which compiles
    self._seconds = 0.0
    self._since: float | None = None
    self._steps = 0

  def add(self, step: int, metrics: dict[str, Any]) -> None:
    """Takes the metrics of a step, still on the device."""
    if (step - 1) % self._log_every == 0:  # all before it are in a row
      self.losses = []
    self.losses.append((step, metrics["loss"]))
    self._metrics = metrics
    self._steps += 1

  def check(self) -> None:
    """Raises FloatingPointError at a loss that is not finite."""
    # All at once: one wait for the device, not one a step.
    self.losses = jax.device_get(self.losses)
    for step, loss in self.losses:
      if not math.isfinite(loss):
        raise FloatingPointError(
          f"the loss of step {step} is {loss}; the last checkpoint "
          "is of a step before it. Try a lower optimizer.lr, a longer "
          "optimizer.warmup or optimizer.clip_norm=1."
        )

  def read(self, features: jax.Array | None) -> Row:
    """The row of the log since the last call; waits for the device."""
    watched = {} if features is None else self._watch(features)
    self.check()
    row = jax.device_get(self._metrics | watched)
    row = {name: float(value) for name, value in row.items()}
    losses = [float(loss) for _, loss in self.losses]
    row["loss"] = sum(losses) / len(losses)
    now = time.perf_counter()
    if self._since is not None:
      seconds = now - self._since
      images = self._steps * self._config.batch_size
      row["step_seconds"] = seconds / self._steps
      row["images_per_second"] = images / seconds
      row["images_per_second_per_chip"] = images / seconds / self._devices
      if self._peak and self._flops:  # no peak is known of a CPU
        done = self._flops * images / seconds
        row["model_flops_utilisation"] = done / self._peak
      row["data_wait_seconds"] = self._batches.wait_seconds / self._steps
      self._images += images
      self._seconds += seconds
    # The pipeline's share too: it lives in this process. Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row["host_memory_gib"] = peak / (
      2**30 if sys.platform == "darwin" else 2**20
    )
    self.pause()
    return row

  @property
  def images_per_second(self) -> float | None:
    """Of the whole run, compilation left out; None before the second row."""
    return self._images / self._seconds if self._seconds else None

  def pause(self) -> None:
    """Starts the clock anew, after work that is not training."""
    self._steps = 0
    self._batches.wait_seconds = 0.0
    self._since = time.perf_counter()
