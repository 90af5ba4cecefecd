"""Trains an experiment and evaluates what came of it.

    python -m jepa_jax.train --config experiments/quickstart.py --workdir DIR

The same command goes on after a stop. Exit codes: 0 done, 2 something in the
input is wrong, 69 another process of the run is gone, 75 stopped by a signal
with everything saved.
"""

import argparse
from collections.abc import Iterable
import functools
import json
import pathlib
from typing import Any, NamedTuple

from jepa_jax import command, keys, paths
from jepa_jax.training import distributed


def train_and_evaluate(
  config: Any,
  workdir: str | pathlib.Path,
  *,
  stop_at: int = 0,
  accept_changes: bool = False,
) -> int:
  """Runs an experiment from its newest checkpoint to its report.

  Args:
    config: see jepa_jax.config.defaults.
    workdir: of this run alone; made if missing.
    stop_at: step at which to save and return early; 0 for the end.
    accept_changes: goes on in a workdir whose run had other settings.

  Returns:
    Exit code: 0, or command.EXIT_PREEMPTED.

  Raises:
    ValueError: config or workdir are not fit, or another run is at work there;
      FloatingPointError: the loss is not finite.
  """
  from jepa_jax.training import owner as owner_lib

  workdir = paths.local(workdir, "workdir")
  with owner_lib.Owner(workdir) as owner:
    parts = _prepare(config, workdir, owner, accept_changes)
    total = parts.program.total_steps
    return _run(parts, workdir, min(stop_at or total, total))


class _Parts(NamedTuple):
  """What a run is made of.

  Attributes:
    program: training.program.Program.
    claim: the config as JSON values.
    open_data: function from a step to the data from there on.
    unreadable: what could not be read.
    changes: settings that differ from those that the run began with.
  """

  program: Any
  claim: dict[str, Any]
  open_data: Any
  unreadable: Any
  changes: list[str]


def _run(parts: _Parts, workdir: pathlib.Path, end: int) -> int:
  """Trains from the newest checkpoint on; the exit code."""
  from jepa_jax.evaluation import run as evaluation
  from jepa_jax.evaluation import scores
  from jepa_jax.training import checkpoints as checkpoints_lib
  from jepa_jax.training import feed
  from jepa_jax.training import log as log_lib

  program, claim, open_data, unreadable, changes = parts
  config = program.config
  with (
    distributed.Stopper() as stopper,
    checkpoints_lib.Checkpoints(
      workdir / "checkpoints", config.checkpoint, claim
    ) as checkpoints,
  ):
    state = _first_state(program, checkpoints)
    start = int(state.step)
    run = log_lib.Run(workdir, program, start)
    with (
      log_lib.Log(workdir, start=start, total=program.total_steps) as log,
      log_lib.Trace(workdir / "profile", config.profile) as trace,
      feed.Feed(
        open_data(start).as_numpy_iterator(),
        program.batch_spec,
        config.data.prefetch,
        lambda: stopper.stopped,
      ) as batches,
    ):
      if changes:
        log.say(f"goes on from step {start} with {'; '.join(changes)}")
      loop = _make_loop(
        program, state, batches, log, stopper, unreadable, end, checkpoints
      )
      _train(loop, program, checkpoints, log, trace, stopper, end)
      loop.meter.check()
      checkpoints.finish(loop.state, loop.meter.losses)
      run.write(loop.step, loop.meter.images_per_second)
      if loop.step < program.total_steps:
        log.say(f"stopped and saved at step {loop.step}")
        return command.EXIT_PREEMPTED
      try:
        rows = evaluation.evaluate(program, loop.state, check=stopper.interrupt)
      except distributed.Stopped:
        log.say(
          f"stopped in the evaluation: training is done and step {loop.step} "
          "saved; the same command evaluates it, or python -m "
          f"jepa_jax.evaluate --workdir {workdir}"
        )
        return command.EXIT_PREEMPTED
      log.write(loop.step, scores.scores(rows))
    evaluation.report(program, loop.state, rows, workdir)
  distributed.barrier("done")
  return 0


def _prepare(
  config: Any, workdir: pathlib.Path, owner: Any, accept: bool
) -> _Parts:
  """The parts of a run.

  All that is wrong with config, workdir, data and evaluations shows here, not
  after hours of training; only then is the workdir made.
  """
  import jax

  from jepa_jax import config as config_lib
  from jepa_jax.data import fingerprint, pipeline
  from jepa_jax.data import unreadable as unreadable_lib
  from jepa_jax.evaluation import run as evaluation
  from jepa_jax.training import log as log_lib
  from jepa_jax.training import program as program_lib
  from jepa_jax.training import sharding
  from jepa_jax.training import workdir as workdir_lib

  config_lib.check(config)
  evaluation.check(config)
  claim = workdir_lib.describe(config)
  unreadable = unreadable_lib.Unreadable(config.data.max_unreadable)
  with distributed.first_process_first("data"):
    changes = workdir_lib.check(claim, workdir, accept)
    first = not jax.process_index()
    if first and workdir.exists():
      owner.acquire()  # before anything takes long
    config = evaluation.resolve(config)
    program = program_lib.build(config, sharding.make_mesh(config.mesh))
    program_lib.check_memory(program)
    start = _check_first_state(program, workdir)

    @functools.cache
    def open_data(start):
      return pipeline.train_dataset(
        config,
        program.objective.batch_spec(config.batch_size),
        start_step=start,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        unreadable=unreadable,
      )

    open_data(start)
    if first:  # the others see the same files
      found = fingerprint.fingerprint(config.data)
      changes += workdir_lib.check_data(found, workdir, accept)
    evaluation.check_data(config)
    workdir.mkdir(parents=True, exist_ok=True)
    if first:
      owner.acquire()
      workdir_lib.check(
        claim, workdir, accept
      )  # another run may have begun here
      text = json.dumps(claim, indent=2) + "\n"
      log_lib.write_whole(workdir / "config.json", text)
      log_lib.write_whole(workdir / "data.json", json.dumps(found) + "\n")
  return _Parts(program, claim, open_data, unreadable, changes)


def _check_first_state(program: Any, workdir: pathlib.Path) -> int:
  """The step that `_first_state` will most likely be of.

  Raises ValueError where it would, while nothing is written yet.
  """
  from jepa_jax.training import checkpoints

  config = program.config
  begun = checkpoints.steps(workdir / "checkpoints")
  if begun and not config.checkpoint.resume:
    raise ValueError(
      f"{workdir} holds checkpoints and checkpoint.resume is off; use "
      "another workdir."
    )
  if config.init_from and not begun:
    from jepa_jax.convert import warm_start

    try:
      warm_start.check(
        program.state_spec,
        config.init_from,
        which=config.init_which,
        strict=config.init_strict,
        networks=program.objective.networks,
      )
    except ValueError as error:
      raise ValueError(f'init_from is "{config.init_from}": {error}') from error
  return max(begun, default=0)


def _first_state(program: Any, checkpoints: Any) -> Any:
  """The newest checkpoint's state, or a fresh one, perhaps with weights."""
  config = program.config
  if config.checkpoint.resume:
    state = checkpoints.restore(program.state_spec)
    if state is not None:
      return state
  state = program.init(config.seed)
  if config.init_from:
    from jepa_jax.convert import warm_start

    state = warm_start.warm_start(
      state,
      config.init_from,
      which=config.init_which,
      strict=config.init_strict,
      networks=program.objective.networks,
    )
  return state


def _make_loop(
  program: Any,
  state: Any,
  batches: Any,
  log: Any,
  stopper: Any,
  unreadable: Any,
  end: int,
  checkpoints: Any,
) -> Any:
  """The loop, with what it is to watch."""
  from jepa_jax.evaluation import collapse
  from jepa_jax.planning import chips
  from jepa_jax.training import loop as loop_lib

  limits = program.config.collapse.to_dict()
  chip = chips.find(program.mesh.devices.flat[0])
  return loop_lib.Loop(
    program,
    state,
    batches,
    log,
    stopper,
    end,
    watch=collapse.collapse_metrics,
    alarm=lambda row: collapse.collapse_warning(row, limits),
    skipped=unreadable.news,
    peak_flops=chip and chip.bfloat16_flops,
    losses=checkpoints.losses,
  )


def _train(
  loop: Any,
  program: Any,
  checkpoints: Any,
  log: Any,
  trace: Any,
  stopper: Any,
  end: int,
) -> None:
  """Trains until `end` or a signal; saves and evaluates where it is due."""
  from jepa_jax import config as config_lib
  from jepa_jax.evaluation import run as evaluation
  from jepa_jax.evaluation import scores

  config = program.config
  save_every, evaluate_every = (
    config_lib.steps(config, key)
    for key in ("checkpoint.every", "evaluate_every")
  )
  if loop.step < end:
    log.say("compiling the train step")
  while loop.step < end and not stopper.stopped:
    trace.at(loop.step, loop.state)
    due = (save_every, evaluate_every)
    loop.advance(_next_due(loop.step, due, (*trace.bounds, end)))
    if loop.step == end or stopper.stopped:
      return  # what is due then is done after the loop
    if evaluate_every and loop.step % evaluate_every == 0:
      try:
        rows = evaluation.evaluate(program, loop.state, check=stopper.interrupt)
      except distributed.Stopped:
        log.say(f"the evaluation of step {loop.step} is left out")
        return
      log.write(loop.step, scores.scores(rows))
      loop.meter.check()
      checkpoints.save(loop.state, scores.best(rows, config), loop.meter.losses)
      loop.meter.pause()
    elif save_every and loop.step % save_every == 0:
      loop.meter.check()
      checkpoints.save(loop.state, losses=loop.meter.losses)


def _next_due(step: int, every: Iterable[int], at: Iterable[int]) -> int:
  """The first step after `step` with something to do beside training."""
  due = [(step // n + 1) * n for n in every if n]
  return min([*due, *(n for n in at if n > step)])


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  from jepa_jax.training import compile_cache

  compile_cache.use(arguments.config.compute.cache)
  return train_and_evaluate(
    arguments.config,
    arguments.workdir,
    stop_at=arguments.stop_at,
    accept_changes=arguments.accept_changes,
  )


if __name__ == "__main__":
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.train",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  command.add_config_flag(flags)
  distributed.add_flags(flags)
  keys.add_flag(
    flags,
    "--workdir",
    keys.FOLDER,
    required=True,
    help="folder of this run; resumed if it holds one",
  )
  keys.add_flag(
    flags,
    "--stop_at",
    keys.STEP,
    default=0,
    metavar="STEP",
    help="save and stop at this step (exit code 75); 0: the end",
  )
  flags.add_argument(
    "--accept_changes",
    action="store_true",
    help="go on from the newest checkpoint of a workdir whose run had other "
    "settings, and say which",
  )
  command.run(main, flags, tune_allocator=True)
