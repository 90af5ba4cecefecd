"""Trains an experiment and evaluates what came of it.

    python -m jepa_jax.train --config experiments/quickstart.py --workdir DIR

The same command goes on after a stop. Exit codes: 0 done, 2 something in the
input is wrong, 69 another process of the run is gone, 75 stopped by a signal
with everything saved.
"""

import argparse
from collections.abc import Iterable
import json
import math
import pathlib
import resource
import sys
import time
from typing import Any

from jepa_jax import command
from jepa_jax.training import distributed

# What may differ between the starts of one run without changing its result.
_FREE_KEYS = (
  "log_every",
  "checkpoint.",
  "collapse.",
  "evaluat",
  "data.data_dir",
  "data.max_unreadable",
  "data.prefetch",
  "data.threads",
  "mesh.",
  "sharding",
  "profile.",
  "compute.scan",
  "compute.remat",
)


def train_and_evaluate(
  config: Any, workdir: str | pathlib.Path, *, stop_at: int = 0
) -> int:
  """Runs an experiment from its newest checkpoint to its report.

  Args:
    config: see jepa_jax.config.defaults.
    workdir: of this run alone; made if missing.
    stop_at: step at which to save and return early; 0 for the end.

  Returns:
    Exit code: 0, or command.EXIT_PREEMPTED.

  Raises:
    ValueError: config or workdir are not fit; FloatingPointError: the loss is
      not finite.
  """
  import jax

  from jepa_jax import config as config_lib
  from jepa_jax import evaluate, pretrained
  from jepa_jax.data import pipeline
  from jepa_jax.training import checkpoints as checkpoints_lib
  from jepa_jax.training import feed, sharding
  from jepa_jax.training import log as log_lib
  from jepa_jax.training import program as program_lib

  workdir = pathlib.Path(workdir)
  config_lib.check(config)
  claim = describe(config)
  unreadable = pipeline.Unreadable(config.data.max_unreadable)
  with distributed.first_process_first("data"):
    check_workdir(claim, workdir)
    config = evaluate.resolve(config)
    program = program_lib.build(config, sharding.make_mesh(config.mesh))
    open_data = lambda start: pipeline.train_dataset(
      config,
      start_step=start,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      unreadable=unreadable,
    )
    # What is wrong with any data shows here, not after hours of training.
    dataset = open_data(0)
    evaluate.check_data(config)
    workdir.mkdir(parents=True, exist_ok=True)
    if not jax.process_index():
      text = json.dumps(claim, indent=2) + "\n"
      (workdir / "config.json").write_text(text)
  save_every, evaluate_every = (
    config_lib.steps(config, key)
    for key in ("checkpoint.every", "evaluate_every")
  )
  end = min(stop_at or program.total_steps, program.total_steps)

  with (
    distributed.Stopper() as stopper,
    checkpoints_lib.Checkpoints(
      workdir / "checkpoints", config.checkpoint
    ) as checkpoints,
  ):
    state = None
    if config.checkpoint.resume:
      state = checkpoints.restore(program.state_spec)
    elif checkpoints.steps():
      raise ValueError(
        f"{workdir} holds checkpoints and checkpoint.resume is off; use "
        "another workdir."
      )
    if state is None:
      state = program.init(config.seed)
      if config.init_from:
        state = pretrained.warm_start(
          state,
          config.init_from,
          which=config.init_which,
          strict=config.init_strict,
        )
    start = int(state.step)
    if start:
      dataset = open_data(start)
    run = log_lib.Run(workdir, program, start)
    with (
      log_lib.Log(workdir, start=start, total=program.total_steps) as log,
      log_lib.Trace(workdir / "profile", config.profile) as trace,
      feed.Feed(
        dataset.as_numpy_iterator(),
        program.batch_spec,
        config.data.prefetch,
      ) as batches,
    ):
      loop = Loop(program, state, batches, log, stopper, unreadable, end)
      while loop.step < end and not stopper.stopped:
        trace.at(loop.step, loop.state)
        due = (save_every, evaluate_every)
        loop.advance(_next_due(loop.step, due, (*trace.bounds, end)))
        if loop.step == end or stopper.stopped:
          break  # what is due then follows below
        if evaluate_every and loop.step % evaluate_every == 0:
          rows = evaluate.evaluate(program, loop.state)
          log.write(loop.step, evaluate.scores(rows))
          loop.meter.check()
          checkpoints.save(loop.state, evaluate.best(rows, config))
          loop.meter.pause()
        elif save_every and loop.step % save_every == 0:
          loop.meter.check()
          checkpoints.save(loop.state)
      loop.meter.check()
      checkpoints.finish(loop.state)
      run.write(loop.step, loop.meter.images_per_second)
      if loop.step < program.total_steps:
        log.say(f"stopped and saved at step {loop.step}")
        return command.EXIT_PREEMPTED
      rows = evaluate.evaluate(program, loop.state)
      log.write(loop.step, evaluate.scores(rows))
    evaluate.report(program, loop.state, rows, workdir)
  distributed.barrier("done")
  return 0


def _next_due(step: int, every: Iterable[int], at: Iterable[int]) -> int:
  """The first step after `step` with something to do beside training."""
  due = [(step // n + 1) * n for n in every if n]
  return min([*due, *(n for n in at if n > step)])


class Loop:
  """What happens at every step; the benchmark of the loop times the same.

  Attributes:
    state: the newest TrainState.
    step: steps done.
    meter: see Meter.
  """

  def __init__(
    self,
    program: Any,
    state: Any,
    batches: Any,
    log: Any,
    stopper: Any,
    unreadable: Any,
    end: int,
  ):
    """Takes the parts of a run; nothing happens yet.

    Args:
      program: training.program.Program.
      state: TrainState to start from.
      batches: training.feed.Feed.
      log: training.log.Log.
      stopper: training.distributed.Stopper.
      unreadable: data.pipeline.Unreadable.
      end: step whose row is written in any case.
    """
    from jepa_jax import config as config_lib

    self.state = state
    self.step = self._start = int(state.step)
    self.meter = Meter(program, batches, unreadable)
    self._program = program
    self._batches = batches
    self._log = log
    self._log_every = max(1, config_lib.steps(program.config, "log_every"))
    self._stopper = stopper
    self._end = end

  def advance(self, until: int) -> None:
    """Trains until that step is done, or until the stopper says so."""
    while self.step < until and not self._stopper.stopped:
      batch = next(self._batches)
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
    if warning := self.meter.warning(row):
      self._log.say(f"step {self.step}: {warning}")
    for line in self.meter.skipped():
      self._log.say(line, everywhere=True)


class Meter:
  """Collects the metrics of steps without waiting for the device."""

  def __init__(self, program: Any, batches: Any, unreadable: Any):
    """Takes what it reads; see Loop."""
    import jax

    from jepa_jax.evaluation import collapse
    from jepa_jax.models import flops
    from jepa_jax.planning import chips

    self._config = program.config
    self._batches = batches
    self._unreadable = unreadable
    self._devices = program.mesh.size
    chip = chips.find(program.mesh.devices.flat[0])
    self._peak = chip and chip.bfloat16_flops * self._devices
    self._flops = flops.step(program.objective, self._config.batch_size)
    self._losses: list[tuple[int, Any]] = []
    self._metrics: dict[str, Any] = {}
    self._named: set[str] = set()
    self._collapse = jax.jit(
      lambda features: collapse.collapse_metrics(features[:256])
    )
    self._images = 0  # since the first step, which compiles
    self._seconds = 0.0
    self._since: float | None = None
    self._steps = 0

  def add(self, step: int, metrics: dict[str, Any]) -> None:
    """Takes the metrics of a step, still on the device."""
    self._losses.append((step, metrics["loss"]))
    self._metrics = metrics
    self._steps += 1

  def check(self) -> None:
    """Raises FloatingPointError at a loss that is not finite."""
    import jax

    # All at once: one wait for the device, not one a step.
    self._losses = jax.device_get(self._losses)
    for step, loss in self._losses:
      if not math.isfinite(loss):
        raise FloatingPointError(
          f"the loss of step {step} is {loss}; the last checkpoint "
          "is of a step before it. Try a lower optimizer.lr, a longer "
          "optimizer.warmup or optimizer.clip_norm=1."
        )

  def read(self, features: Any) -> dict[str, float]:
    """The row of the log since the last call; waits for the device."""
    import jax

    collapse = self._collapse(features)
    self.check()
    row = jax.device_get(self._metrics | collapse)
    row = {name: float(value) for name, value in row.items()}
    losses = [float(loss) for _, loss in self._losses]
    row["loss"] = sum(losses) / len(losses)
    now = time.perf_counter()
    if self._since is not None:
      seconds = now - self._since
      images = self._steps * self._config.batch_size
      row["step_seconds"] = seconds / self._steps
      row["images_per_second"] = images / seconds
      row["images_per_second_per_chip"] = images / seconds / self._devices
      if self._peak and self._flops:  # no peak is known of a CPU
        done = self._flops * self._steps / seconds
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
    self._losses = []
    self._steps = 0
    self._batches.wait_seconds = 0.0
    self._since = time.perf_counter()

  def warning(self, row: dict[str, float]) -> str:
    """A loud sentence if the row says collapse, else nothing."""
    from jepa_jax.evaluation import collapse

    return collapse.collapse_warning(row, self._config.collapse.to_dict())

  def skipped(self) -> list[str]:
    """A line for every image that was skipped since the last call."""
    self._unreadable.check()
    reasons = self._unreadable.reasons
    new = {k: v for k, v in reasons.items() if k not in self._named}
    self._named |= set(new)
    return [f"skipped unreadable image {k}: {v}" for k, v in new.items()]


def describe(config: Any) -> dict[str, Any]:
  """A config as plain JSON values."""
  return json.loads(json.dumps(config.to_dict()))


def check_workdir(claim: dict[str, Any], workdir: pathlib.Path) -> None:
  """Raises ValueError if the workdir holds a run of another config."""
  from jepa_jax import config as config_lib

  path = workdir / "config.json"
  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"workdir {workdir} is a file; name a folder.")
  if not path.exists():
    return
  try:
    old = command.flatten(json.loads(path.read_text()))
  except ValueError:
    raise ValueError(
      f"{path} cannot be read; remove it or use another workdir."
    ) from None
  # A key that an older version did not have holds what it defaults to.
  old = command.flatten(describe(config_lib.defaults())) | old
  new = command.flatten(claim)
  changed = [
    f"{key}={old.get(key)!r} there, {new.get(key)!r} here"
    for key in sorted(old.keys() | new.keys())
    if old.get(key) != new.get(key) and not key.startswith(_FREE_KEYS)
  ]
  if changed:
    raise ValueError(
      f"workdir {workdir} holds a run of another config ("
      f"{'; '.join(changed)}); use another workdir or that config."
    )


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  return train_and_evaluate(
    arguments.config, arguments.workdir, stop_at=arguments.stop_at
  )


if __name__ == "__main__":
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.train",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  command.add_config_flag(flags)
  distributed.add_flags(flags)
  flags.add_argument(
    "--workdir",
    required=True,
    help="folder of this run; resumed if it holds one",
  )
  flags.add_argument(
    "--stop_at",
    type=int,
    default=0,
    metavar="STEP",
    help="save and stop at this step (exit code 75); 0: the end",
  )
  command.run(main, flags, tune_allocator=True)
