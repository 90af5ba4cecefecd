"""Checkpoints of a run: asynchronous, the newest and the best kept.

The position of the data is the step, since order is a function of it; so the
state is all that a checkpoint holds.
"""

import pathlib
from typing import Any

from absl import logging
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from jepa_jax.training import program as program_lib


class Checkpoints:
  """The checkpoints in a folder.

  A kill while saving leaves a folder with a temporary name, which the next
  start removes; what has its final name is whole.
  """

  def __init__(
    self,
    folder: pathlib.Path | str,
    settings: ml_collections.ConfigDict | None = None,
  ):
    """Opens a folder.

    Args:
      folder: made when the first checkpoint is saved.
      settings: config.checkpoint; None opens it for reading alone.
    """
    self._folder = pathlib.Path(folder).resolve()
    policies: list[Any] = []
    if settings is not None:
      self._folder.mkdir(parents=True, exist_ok=True)
      policies.append(preservation_policy.LatestN(settings.keep))
      if settings.keep_best:
        policies.append(
          preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics["score"],
            n=settings.keep_best,
            keep_checkpoints_without_metrics=False,
          )
        )
    elif not self._folder.is_dir():
      raise ValueError(f"no checkpoints in {self._folder}.")
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies)
        if policies
        else None,
        read_only=settings is None,
        cleanup_tmp_directories=settings is not None,
      ),
    )

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._manager.close()

  def save(
    self, state: program_lib.TrainState, score: float | None = None
  ) -> None:
    """Starts saving a state and returns once it is copied off the device.

    Args:
      state: what to save; a step that is there already is not saved again.
      score: what keep_best compares, larger is better.
    """
    step = int(state.step)
    if step in self._manager.all_steps():
      return
    self._manager.save(
      step,
      args=ocp.args.Composite(state=ocp.args.StandardSave(state)),
      metrics=None if score is None else {"score": score},
      force=True,
    )

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self._manager.wait_until_finished()

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    return sorted(self._manager.all_steps())

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
    for candidate in wanted:
      try:
        restored = self._manager.restore(
          candidate,
          args=ocp.args.Composite(state=ocp.args.StandardRestore(spec)),
        )
        return restored["state"]
      except Exception as error:  # Orbax raises many kinds for damaged files.
        logging.error(
          "checkpoint %s of %s cannot be read (%s: %s); trying the one "
          "before it",
          candidate,
          self._folder,
          type(error).__name__,
          str(error).splitlines()[0] if str(error) else "",
        )
    if wanted:
      raise ValueError(
        f"none of the checkpoints {', '.join(map(str, wanted))} in "
        f"{self._folder} can be read; see the log for why."
      )
    return None
