"""The log of a run: a progress bar, a JSON line and TensorBoard events."""

import json
import math
import pathlib
import sys
from typing import Any

import jax
import tensorboardX
import tqdm


class Log:
  """Writes metrics into a workdir; processes but the first write nothing."""

  def __init__(self, workdir: pathlib.Path, *, start: int, total: int):
    """Opens the log.

    Args:
      workdir: metrics.jsonl and tensorboard/ go there, appended to.
      start: step of the run that this process begins with.
      total: steps of the run.
    """
    self._active = jax.process_index() == 0
    self._total = total
    # A bar that nobody watches would fill a file with half-drawn lines.
    self._bar = tqdm.tqdm(
      initial=start,
      total=total,
      unit="step",
      dynamic_ncols=True,
      disable=not (self._active and sys.stderr.isatty()),
    )
    if not self._active:
      return
    path = workdir / "metrics.jsonl"
    old = path.read_bytes() if path.exists() else b""
    cut = old and not old.endswith(b"\n")
    self._file = path.open("a", encoding="utf-8")
    if cut:  # A kill may have cut the last line short.
      self._file.write("\n")
    self._events = tensorboardX.SummaryWriter(str(workdir / "tensorboard"))

  def __enter__(self) -> "Log":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._bar.close()
    if self._active:
      self._file.close()
      self._events.close()

  def step(self) -> None:
    """Moves the bar on by a step."""
    self._bar.update()

  def write(self, step: int, metrics: dict[str, float]) -> None:
    """Writes one row.

    Args:
      step: steps done.
      metrics: name -> value; what is not finite becomes null in the JSON.
    """
    if not self._active or not metrics:
      return
    row = {
      name: value if math.isfinite(value) else None
      for name, value in metrics.items()
    }
    self._file.write(json.dumps({"step": step, **row}) + "\n")
    self._file.flush()
    for name, value in metrics.items():
      self._events.add_scalar(name, value, step)
    shown = {
      name: f"{metrics[name]:.4g}"
      for name in ("loss", "images_per_second", "data_wait_seconds")
      if name in metrics
    }
    if shown:
      self._bar.set_postfix(shown)
    if shown and self._bar.disable:
      text = ", ".join(f"{k} {v}" for k, v in shown.items())
      print(f"step {step} of {self._total}: {text}", flush=True)

  def say(self, text: str) -> None:
    """Prints a line without tearing the bar."""
    if self._active:
      self._bar.write(text, file=sys.stderr)
