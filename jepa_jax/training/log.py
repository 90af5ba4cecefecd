"""What a run writes of itself: metrics, how it was run, and a trace."""

import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import pathlib
import socket
import struct
import sys
import time
from typing import Any

from absl import logging
from etils import epath
import jax
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2, summary_pb2
import tqdm


def write_whole(path: os.PathLike[str], data: str | bytes) -> None:
  """Writes a file that a kill leaves as it was, or whole.

  Args:
    path: local, or of a bucket, whose objects appear whole anyway.
    data: all of it; text is written as UTF-8.
  """
  if isinstance(data, str):  # with names of bytes of no encoding, perhaps
    data = data.encode(errors="backslashreplace")
  if "://" in os.fspath(path):
    epath.Path(path).write_bytes(data)
    return
  path = pathlib.Path(path)
  beside = path.with_name(f".{path.name}.{os.getpid()}")
  try:
    with beside.open("wb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())  # or a power cut may leave the name alone
    beside.replace(path)
  finally:
    beside.unlink(missing_ok=True)


class Log:
  """Writes metrics into a workdir; processes but the first write nothing."""

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    start: int,
    total: int,
    quiet: bool = False,
  ):
    """Opens the log.

    Args:
      workdir: metrics.jsonl and tensorboard/ go there, appended to.
      start: step of the run that this process begins with.
      total: steps of the run.
      quiet: whether to show nothing of the rows.
    """
    self._active = jax.process_index() == 0
    self._start = start
    self._total = total
    self._quiet = quiet
    # A bar that nobody watches would fill a file with half-drawn lines.
    self._bar = tqdm.tqdm(
      initial=start,
      total=total,
      unit="step",
      dynamic_ncols=True,
      disable=quiet or not (self._active and sys.stderr.isatty()),
    )
    if not self._active:
      return
    path = workdir / "metrics.jsonl"
    self._last = _mend(path)
    self._file = path.open("a", encoding="utf-8")
    folder = workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    # Not SummaryWriter: its thread dies of a full disk, and then add_scalar
    # waits for it for ever.
    name = f"{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
    self._events = (folder / f"events.out.tfevents.{name}").open("ab")
    self._write_event(file_version="brain.Event:2")
    # TensorBoard forgets what a process before has written of later steps.
    begins = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write_event(step=start + 1, session_log=begins)
    self._failing = False

  def __enter__(self) -> "Log":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._bar.close()
    if self._active:
      for writer in (self._file, self._events):
        try:
          writer.close()
        except OSError as error:
          self._complain(error)

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
    try:
      self._write(step, metrics)
      self._failing = False
    except OSError as error:
      self._complain(error)
    shown = {
      name: f"{metrics[name]:.4g}"
      for name in ("loss", "images_per_second", "data_wait_seconds")
      if name in metrics
    }
    if shown:
      self._bar.set_postfix(shown)
    if shown and self._bar.disable and not self._quiet:
      text = ", ".join(f"{k} {v}" for k, v in shown.items())
      print(f"step {step} of {self._total}: {text}", flush=True)

  def _write(self, step: int, metrics: dict[str, float]) -> None:
    row = {
      name: value if math.isfinite(value) else None
      for name, value in metrics.items()
    }
    line = json.dumps({"step": step, **row})
    if line == self._last and step == self._start:
      return  # of the evaluation, before a kill in the report
    self._last = line
    self._file.write(line + "\n")
    values = [
      summary_pb2.Summary.Value(tag=name, simple_value=value)
      for name, value in metrics.items()
    ]
    self._write_event(step=step, summary=summary_pb2.Summary(value=values))
    for file in (self._file, self._events):
      file.flush()  # a kill loses nothing of it

  def _write_event(self, **content: Any) -> None:
    event = event_pb2.Event(wall_time=time.time(), **content)
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    for part in (length, data):
      checksum = record_writer.masked_crc32c(part)
      self._events.write(part + struct.pack("<I", checksum))

  def _complain(self, error: OSError) -> None:
    # What could not be written waits in memory for the next row.
    if not self._failing:
      self.say(f"the log cannot be written ({error}); training goes on")
    self._failing = True

  def say(self, text: str, *, everywhere: bool = False) -> None:
    """Prints a line without tearing the bar.

    Args:
      text: the line.
      everywhere: whether processes but the first say it too, of themselves.
    """
    if self._active:
      self._bar.write(text, file=sys.stderr)
    elif everywhere:
      print(f"process {jax.process_index()}: {text}", file=sys.stderr)


def _mend(path: pathlib.Path) -> str:
  """Drops a last line of metrics.jsonl that a kill has cut short.

  Returns:
    The last line that is whole, "" where there is none.
  """
  data = path.read_bytes() if path.exists() else b""
  whole, _, last = data.rpartition(b"\n")
  if not last:
    return whole.rpartition(b"\n")[2].decode(errors="replace")
  try:
    json.loads(last)
  except (RecursionError, ValueError):
    text = last[:60].decode(errors="replace")
    print(
      f"{path}: its last line was cut short, and is dropped: {text!r}",
      file=sys.stderr,
    )
    os.truncate(path, len(data) - len(last))
    return ""
  with path.open("ab") as file:
    file.write(b"\n")
  return last.decode()


class Trace:
  """A profile of some steps of process 0, for xprof and TensorBoard.

  Attributes:
    bounds: steps at which `at` is to be called.
  """

  def __init__(self, folder: pathlib.Path, settings: Any):
    """Takes config.profile; nothing happens yet."""
    self._folder = folder
    self._running = False
    self.bounds: tuple[int, ...] = ()
    if settings.start and settings.steps and not jax.process_index():
      self.bounds = (settings.start, settings.start + settings.steps)

  def __enter__(self) -> "Trace":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._stop()

  def at(self, step: int, state: Any) -> None:
    """Begins or ends the trace if that is due when `step` steps are done."""
    if step not in self.bounds:
      return
    jax.block_until_ready(state)  # the trace holds whole steps
    if step == self.bounds[0]:
      jax.profiler.start_trace(str(self._folder))
      self._running = True
    else:
      self._stop()

  def _stop(self) -> None:
    if self._running:
      self._running = False
      jax.profiler.stop_trace()


class Run:
  """What the report says of a run beside its metrics, kept in run.json."""

  def __init__(self, workdir: pathlib.Path, program: Any, start: int):
    """Begins the account of this start of the run.

    Args:
      workdir: of the run.
      program: program.Program.
      start: step of the run that this process begins with.
    """
    self._path = workdir / "run.json"
    self._program = program
    self._begun = time.perf_counter()
    if jax.process_index():
      return
    if start:
      print(f"resuming from step {start}", file=sys.stderr)
    for name, fact in program.objective.facts().items():
      print(f"{name}: {fact}", file=sys.stderr)
    now = datetime.datetime.now().astimezone()
    self._started = now.isoformat(timespec="seconds")
    self._before: dict[str, Any] = {}
    if start and self._path.exists():
      try:
        self._before = dict(json.loads(self._path.read_text()))
      except (RecursionError, TypeError, ValueError):
        logging.warning("%s is damaged: its times are lost", self._path)

  def write(self, step: int, images_per_second: float | None) -> None:
    """Writes the file; times add up over the starts of the run."""
    if jax.process_index():
      return
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    spec = self._program.state_spec
    sizes = {
      name: sum(leaf.size for leaf in jax.tree.leaves(part))
      for name, part in (spec.params | spec.frozen).items()
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
      "images_per_second": round(images_per_second, 1)
      if images_per_second
      else self._before.get("images_per_second"),
      "parameters": sizes,
      **{
        name: dataclasses.asdict(fact)
        for name, fact in self._program.objective.facts().items()
      },
      "packages": {name: importlib.metadata.version(name) for name in packages},
      "python": sys.version.split()[0],
    }
    write_whole(self._path, json.dumps(record, indent=2) + "\n")
