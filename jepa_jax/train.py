"""Trains an experiment and evaluates what came of it.

    python -m jepa_jax.train --config experiments/quickstart.py --workdir DIR

The same command goes on after a stop. Exit codes: 0 done, 2 something in the
input is wrong, 75 stopped by a signal with everything saved.
"""

import argparse
import dataclasses
import datetime
import json
import math
import pathlib
import resource
import signal
import sys
import time
from typing import Any

from jepa_jax import command

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
  check_workdir(claim, workdir)
  config = evaluate.resolve(config)
  program = program_lib.build(config, sharding.make_mesh(config.mesh))
  log_every, save_every, evaluate_every = (
    config_lib.steps(config, key)
    for key in ("log_every", "checkpoint.every", "evaluate_every")
  )
  unreadable = pipeline.Unreadable(config.data.max_unreadable)
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
  (workdir / "config.json").write_text(json.dumps(claim, indent=2) + "\n")
  end = min(stop_at or program.total_steps, program.total_steps)

  with (
    Stopper() as stopper,
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
    step = start = int(state.step)
    if start:
      print(f"resuming from step {start}", file=sys.stderr)
      dataset = open_data(start)
    run = Run(workdir, config, program, start)
    with (
      log_lib.Log(workdir, start=start, total=program.total_steps) as log,
      feed.Feed(
        dataset.as_numpy_iterator(),
        program.batch_spec,
        config.data.prefetch,
      ) as batches,
    ):
      meter = Meter(config, batches)
      while step < end and not stopper.stopped:
        state, metrics, features = program.step(state, next(batches))
        step += 1
        meter.add(step, metrics)
        log.step()
        last = step == end or stopper.stopped
        if step == start + 1 or step % max(1, log_every) == 0 or last:
          row = meter.read(features)
          log.write(step, row)
          if warning := meter.warning(row):
            log.say(f"step {step}: {warning}")
          for line in meter.skipped(unreadable):
            log.say(line)
        if evaluate_every and step % evaluate_every == 0 and not last:
          rows = evaluate.evaluate(program, state)
          log.write(step, evaluate.scores(rows))
          meter.check()
          checkpoints.save(state, evaluate.best(rows, config))
          meter.pause()
        elif save_every and step % save_every == 0:
          meter.check()
          checkpoints.save(state)
      # Also where a signal came after the loop had looked for it.
      meter.check()
      checkpoints.save(state)
      checkpoints.wait()
      run.write(step, meter)
      if step < program.total_steps:
        print(f"stopped and saved at step {step}", file=sys.stderr)
        return command.EXIT_PREEMPTED
      rows = evaluate.evaluate(program, state)
      log.write(step, evaluate.scores(rows))
    evaluate.report(program, state, rows, workdir)
  return 0


class Stopper:
  """Notes SIGTERM and SIGINT, so that the loop ends after its step."""

  def __init__(self):
    self.stopped = False

  def __enter__(self) -> "Stopper":
    self._old = {
      number: signal.signal(number, self._stop)
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    return self

  def __exit__(self, *unused: Any) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _stop(self, number: int, frame: Any) -> None:
    del frame
    self.stopped = True
    # A second signal ends the process as it would without us.
    signal.signal(number, self._old[number])


class Meter:
  """Collects the metrics of steps without waiting for the device."""

  def __init__(self, config: Any, batches: Any):
    import jax

    from jepa_jax.evaluation import collapse

    self._config = config
    self._batches = batches
    self._losses: list[tuple[int, Any]] = []
    self._metrics: dict[str, Any] = {}
    self._named: set[str] = set()
    self._collapse = jax.jit(
      lambda features: collapse.collapse_metrics(features[:256])
    )
    self.images = 0  # since the first step, which compiles
    self.seconds = 0.0
    self._since: float | None = None
    self._steps = 0

  def add(self, step: int, metrics: dict[str, Any]) -> None:
    """Takes the metrics of a step, still on the device."""
    self._losses.append((step, metrics["loss"]))
    self._metrics = metrics
    self._steps += 1

  def check(self) -> None:
    """Raises FloatingPointError at a loss that is not finite."""
    for step, loss in self._losses:
      if not math.isfinite(float(loss)):
        raise FloatingPointError(
          f"the loss of step {step} is {float(loss)}; the last checkpoint "
          "is of a step before it. Try a lower optimizer.lr, a longer "
          "optimizer.warmup or optimizer.clip_norm=1."
        )

  def read(self, features: Any) -> dict[str, float]:
    """The row of the log since the last call; waits for the device."""
    self.check()
    losses = [float(loss) for _, loss in self._losses]
    row = {name: float(value) for name, value in self._metrics.items()}
    row["loss"] = sum(losses) / len(losses)
    row |= {k: float(v) for k, v in self._collapse(features).items()}
    now = time.perf_counter()
    if self._since is not None:
      seconds = now - self._since
      images = self._steps * self._config.batch_size
      row["step_seconds"] = seconds / self._steps
      row["images_per_second"] = images / seconds
      row["data_wait_seconds"] = self._batches.wait_seconds / self._steps
      self.images += images
      self.seconds += seconds
    # The pipeline's share too: it lives in this process. Linux counts in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    row["host_memory_gib"] = peak / (
      2**30 if sys.platform == "darwin" else 2**20
    )
    self.pause()
    return row

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

  def skipped(self, unreadable: Any) -> list[str]:
    """A line for every image that was skipped since the last call."""
    unreadable.check()
    new = {k: v for k, v in unreadable.reasons.items() if k not in self._named}
    self._named |= set(new)
    return [f"skipped unreadable image {k}: {v}" for k, v in new.items()]


class Run:
  """What the report says of a run beside its metrics, kept in run.json."""

  def __init__(
    self, workdir: pathlib.Path, config: Any, program: Any, start: int
  ):
    self._path = workdir / "run.json"
    self._config = config
    self._program = program
    self._begun = time.perf_counter()
    self._masks = getattr(program.objective, "shapes", None)
    if self._masks is not None:
      m = self._masks
      print(
        f"masks: {m.num_contexts} x {m.context_patches} context patches "
        f"({m.context_padding:.1%} padding), {m.num_targets} x "
        f"{m.target_patches} target patches ({m.target_padding:.1%})",
        file=sys.stderr,
      )
    now = datetime.datetime.now().astimezone()
    self._started = now.isoformat(timespec="seconds")
    self._before: dict[str, Any] = {}
    if start and self._path.exists():
      self._before = json.loads(self._path.read_text())

  def write(self, step: int, meter: Meter) -> None:
    """Writes the file; times add up over the starts of the run."""
    import importlib.metadata

    import jax

    if jax.process_index():
      return
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    sizes = {
      name: sum(leaf.size for leaf in jax.tree.leaves(part))
      for name, part in self._program.state_spec.params.items()
    }
    device = self._program.mesh.devices.flat[0]
    seconds = time.perf_counter() - self._begun
    record = {
      "command": " ".join(sys.argv),
      "started": self._before.get("started", self._started),
      "device": device.device_kind,
      "devices": self._program.mesh.size,
      "processes": jax.process_count(),
      "steps": step,
      "seconds": round(seconds + self._before.get("seconds", 0.0), 1),
      "images_per_second": round(meter.images / meter.seconds, 1)
      if meter.seconds
      else self._before.get("images_per_second"),
      "parameters": sizes,
      "masks": self._masks and dataclasses.asdict(self._masks),
      "packages": {name: importlib.metadata.version(name) for name in packages},
      "python": sys.version.split()[0],
    }
    self._path.write_text(json.dumps(record, indent=2) + "\n")


def describe(config: Any) -> dict[str, Any]:
  """A config as plain JSON values."""
  return json.loads(json.dumps(config.to_dict()))


def check_workdir(claim: dict[str, Any], workdir: pathlib.Path) -> None:
  """Raises ValueError if the workdir holds a run of another config."""
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
  command.run(main, flags)
