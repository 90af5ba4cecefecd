"""Checkpoints of a run: asynchronous, the newest and the best kept.

The position of the data is the step, since order is a function of it; so the
state is all that a checkpoint holds.
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import itertools
import logging as py_logging
import pathlib
import shutil
import tempfile
from typing import Any

from absl import logging
import jax
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jepa_jax.training import digests as digests_lib
from jepa_jax.training import distributed
from jepa_jax.training import program as program_lib

_saves = itertools.count()  # alike in all processes
_PROBE = ".probe"  # before the name of a folder that is removed at once
_HALF = "*.orbax-checkpoint-tmp*"  # names that Orbax gives while it writes


def _is_ours(record: Any) -> bool:
  # Orbax's threads each report a failure with their whole stack: hundreds of
  # lines for a full disk, which `Checkpoints` names in one. It also warns of
  # what was asked for: a folder that is only read.
  failed = record.exc_info or record.levelno >= py_logging.ERROR
  read = "read only" in str(record.msg).replace("_", " ")
  path = pathlib.Path(record.pathname).parts
  return not ((failed or read) and "orbax" in path)


class Checkpoints:
  """The checkpoints in a folder.

  A kill while saving leaves a folder with a temporary name, which the next
  start names and removes; what has its final name is whole. Each holds the
  digests of its arrays, so that what the disk changes later is found. With
  several processes, all of them open the same folder and call the same methods.

  Attributes:
    losses: of the checkpoint restored: (step, loss) that `save` was given.
  """

  def __init__(
    self,
    folder: pathlib.Path | str,
    settings: ml_collections.ConfigDict | None = None,
    claim: dict[str, Any] | None = None,
  ):
    """Opens a folder.

    Args:
      folder: made when the first checkpoint is saved.
      settings: config.checkpoint; None opens it for reading alone.
      claim: the whole config as JSON values, kept with each checkpoint.

    Raises:
      ValueError: the folder is not there, or cannot be written to.
    """
    self._folder = pathlib.Path(folder).resolve()
    self._settings = settings
    self._claim = claim
    logging.get_absl_logger().addFilter(_is_ours)  # once, if it is there
    self.losses: list[tuple[int, float]] = []
    if settings is not None:
      with distributed.first_process_first("folder of checkpoints"):
        if not jax.process_index():
          self._try_to_write()
    elif not self._folder.is_dir():
      raise ValueError(f"no checkpoints in {self._folder}.")
    self._saving: int | None = None  # step that is not known to be on disk
    self._task = ""  # the name that all processes have for that save
    self._broken = False  # whether the last save has failed
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    settings = self._settings
    policies: list[Any] = []
    if settings is not None:
      # Before anything is saved: Orbax would remove these in a thread, which
      # fails the save where that of the manager before is still at it.
      self._remove_half_written()
    if settings is not None:
      policies.append(preservation_policy.LatestN(settings.keep))
      if settings.keep_best:
        policies.append(
          preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics["score"],
            n=settings.keep_best,
            keep_checkpoints_without_metrics=False,
          )
        )
    return ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies)
        if policies
        else None,
        read_only=settings is None,
        create=False,
        async_options=ocp.options.AsyncOptions(barrier_sync_fn=self._meet)
        if distributed.active()
        else None,
        # Barriers by the coordinator: the default is a collective of the
        # devices, which would get between those of the steps.
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=0, active_processes=set(range(jax.process_count()))
        )
        if distributed.active()
        else ocp.options.MultiprocessingOptions(),
      ),
    )

  def _remove_half_written(self) -> None:
    if jax.process_index():
      return
    for half in self._folder.glob(f"{_PROBE}*"):
      shutil.rmtree(half, ignore_errors=True)
    for half in self._folder.glob(_HALF):
      logging.warning("half-written checkpoint %s is removed", half.name)
      shutil.rmtree(half, ignore_errors=True)

  def _meet(self, *, key: str, timeout_ms: int) -> None:
    # Where one process cannot write its part, the others are not to wait for
    # it until Orbax's time is up.
    distributed.meet(key, self._task, timeout_ms / 1000)

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
    if error is None or not distributed.lost(error):
      self.wait()
      if not self._broken:
        self._manager.close()

  def save(
    self,
    state: program_lib.TrainState,
    score: float | None = None,
    losses: Sequence[tuple[int, float]] = (),
  ) -> None:
    """Starts saving a state and returns once it is copied off the device.

    Where it fails, as on a full disk, a warning says so and training may go
    on: the next call tries again with the state of then.

    Args:
      state: what to save; a step that is there already is not saved again.
      score: what keep_best compares, larger is better.
      losses: (step, loss) of the steps that the next row of the log averages
        with those to come.
    """
    step = int(state.step)
    self.wait()
    if not distributed.agree(not self._broken):
      # After a failure Orbax fails once more, for what it still has in hand.
      with contextlib.suppress(Exception):
        self._manager.close()
      self._manager = self._open()  # removes what is there of the last one
      self._broken = False
    if step in self._manager.all_steps():
      return
    self._saving, self._task = step, f"save {next(_saves)}"
    try:
      self._check_room()
    except OSError as error:
      self._warn(error)
    if not distributed.agree(not self._broken):
      self._saving = None  # nothing was begun
      return
    parts = _parts(state)
    record = {
      "digests": digests_lib.digests(parts),
      "losses": [[step, float(loss)] for step, loss in losses],
      "config": self._claim,
    }
    try:
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(parts),
          record=ocp.args.JsonSave(digests_lib.seal(record)),
        ),
        metrics=None if score is None else {"score": score},
        force=True,
      )
    except Exception as error:  # Orbax and tensorstore raise many kinds.
      self._warn(error)

  def _try_to_write(self) -> None:
    """Raises ValueError if nothing can be saved: now, not in hours."""
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._probe()
    except OSError as error:
      raise ValueError(
        f"no checkpoints can be saved in {self._folder} "
        f"({error.strerror or error}); make room or change its rights, or use "
        "another workdir."
      ) from None

  def _probe(self) -> None:
    """Raises OSError if no folder and no file in it can be made."""
    with tempfile.TemporaryDirectory(dir=self._folder, prefix=_PROBE) as folder:
      (pathlib.Path(folder) / "probe").write_bytes(bytes(4096))

  def _check_room(self) -> None:
    # Where Orbax's own folder cannot be made, in process 0, the others wait
    # for it until Orbax's time is up.
    if distributed.active() and not jax.process_index():
      self._probe()

  def wait(self) -> bool:
    """Waits for a save under way; whether it came to be on disk."""
    if self._saving is not None:
      try:
        self._manager.wait_until_finished()
      except Exception as error:  # Of the thread that writes: many kinds.
        self._warn(error)
        return False
      self._saving = None
    return True

  def _warn(self, error: Exception) -> None:
    step, self._saving, self._broken = self._saving, None, True
    distributed.give_up(self._task)
    logging.error(
      "checkpoint %s could not be saved (%s: %.300s); training goes on and "
      "tries again at the next one",
      step,
      type(error).__name__,
      # Tensorstore appends how it was called, which is long.
      " ".join(str(error).split()).partition(" [tensorstore_spec")[0],
    )

  def finish(
    self,
    state: program_lib.TrainState,
    losses: Sequence[tuple[int, float]] = (),
  ) -> None:
    """Saves a state and returns when it is on disk; see `save`.

    Raises:
      ValueError: it cannot be saved.
    """
    step = int(state.step)
    self.save(state, losses=losses)
    if not self.wait() or step not in self._manager.all_steps():
      kept = ", ".join(map(str, self.steps())) or "none"
      raise ValueError(
        f"step {step} could not be saved in {self._folder}, see above; make "
        f"room and start again: it goes on from a checkpoint there ({kept})."
      )
    # A thread of a save that failed may have written on for a while.
    self._remove_half_written()

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    return sorted(self._manager.all_steps())

  def _reader(self) -> ocp.CheckpointManager:
    # Each process reads its own shards by itself: where one finds damage, the
    # others are not to wait for it.
    me = jax.process_index()
    return ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        read_only=True,
        create=False,
        multiprocessing_options=ocp.options.MultiprocessingOptions(
          primary_host=me, active_processes={me}
        ),
      ),
    )

  def restore(
    self, spec: program_lib.TrainState, step: int | None = None
  ) -> program_lib.TrainState | None:
    """Loads a state.

    Args:
      spec: shapes and shardings, Program.state_spec.
      step: which; None for the newest that can be read: a damaged one is
        named and the one before it taken.

    Returns:
      The state, or None where there is no checkpoint.

    Raises:
      ValueError: no checkpoint of that step, or none that can be read.
    """
    steps = self.steps()
    if step is not None and step not in steps:
      raise ValueError(
        f"no checkpoint of step {step} in {self._folder}; there are: "
        f"{', '.join(map(str, steps)) or 'none'}."
      )
    wanted = [step] if step is not None else steps[::-1]
    reader = self._reader() if distributed.active() else self._manager
    for candidate in wanted:
      state, error = None, None
      try:
        restored = reader.restore(
          candidate,
          args=ocp.args.Composite(state=ocp.args.StandardRestore(_parts(spec))),
        )
        state = spec.replace(**restored["state"])
      except Exception as problem:  # Orbax raises many for damaged files.
        error = problem
      # Damage may lie in what one process reads and not in what another does.
      if distributed.agree(error is None):
        try:
          self._verify(candidate, state)
        except ValueError as problem:
          error = problem
        if distributed.agree(error is None):
          return state
      if error is not None:
        logging.error(
          "checkpoint %s of %s cannot be read (%s: %.300s); trying the one "
          "before it",
          candidate,
          self._folder,
          type(error).__name__,
          " ".join(str(error).split()),
        )
    if wanted:
      raise ValueError(
        f"none of the checkpoints {', '.join(map(str, wanted))} in "
        f"{self._folder} can be read; see the log for why."
      )
    return None

  def _verify(self, step: int, state: program_lib.TrainState) -> None:
    """Raises ValueError if a state is not the one that was saved."""
    digests_lib.verify(_parts(state), self._folder / str(step))
    if int(state.step) != step:
      raise ValueError(f"its state is that of step {int(state.step)}")
    record = digests_lib.read(self._folder / str(step)) or {}
    self.losses = [(n, loss) for n, loss in record.get("losses", ())]


def steps(folder: pathlib.Path) -> list[int]:
  """Steps of the checkpoints in a folder, ascending; none where it is missing.

  A checkpoint that is not whole yet has a longer name.
  """
  return sorted(int(p.name) for p in folder.glob("*") if p.name.isdecimal())


def claim_of_newest(folder: pathlib.Path) -> dict[str, Any] | None:
  """The config that the newest checkpoint with one was saved with."""
  for step in reversed(steps(folder)):
    with contextlib.suppress(ValueError):
      if (record := digests_lib.read(folder / str(step))) is not None:
        return record["config"]
  return None


def _parts(state: program_lib.TrainState) -> dict[str, Any]:
  """The state by name, without what is empty: older checkpoints lack that."""
  parts = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
  optional = ("frozen", "buffers")
  return {k: v for k, v in parts.items() if k not in optional or v}
