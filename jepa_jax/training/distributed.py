"""Many processes as one run: how they meet, stop together and lose each other.

Each process reads its share of every batch and takes part in every step;
process 0 alone writes logs and results.
"""

import argparse
from collections.abc import Iterator
import contextlib
import ctypes
import os
import re
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from jepa_jax import keys

EXIT_LOST = 69  # EX_UNAVAILABLE: another process is gone; start all again

HEARTBEAT_SECONDS = 30  # without a sign of life, a process counts as lost
_BARRIER_SECONDS = 24 * 3600  # process 0 may have a data set to prepare

_LOST = re.compile(
  "gloo|nccl|coordination|barrier|UNAVAILABLE|DEADLINE_EXCEEDED|"
  "(closed|reset) by peer",
  re.IGNORECASE,
)
_said = threading.Lock()


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags that say how a run is spread over processes."""
  group = parser.add_argument_group(
    "several processes", "found out on TPU pods and under SLURM or Open MPI"
  )
  keys.add_flag(
    group,
    "--processes",
    keys.whole(1, 1024),
    default=1,
    metavar="N",
    help="start N processes on the CPU of this machine",
  )
  keys.add_flag(
    group,
    "--coordinator",
    keys.Text("HOST:PORT", False, r"\S+:\d{1,5}"),
    metavar="HOST:PORT",
    help="process 0's host, and a port that is free there",
  )
  keys.add_flag(
    group,
    "--num_processes",
    keys.whole(1, 10**6),
    metavar="N",
    help="1: run alone",
  )
  keys.add_flag(
    group,
    "--process_id",
    keys.whole(0, 10**6),
    metavar="I",
    help="from 0",
  )


def join(flags: argparse.Namespace) -> None:
  """Joins the processes of the run, if it has several.

  To be called before JAX touches a device. Afterwards a process that is gone
  ends the others with one line and EXIT_LOST.

  Args:
    flags: of `add_flags`; what they leave open, JAX finds out from the
      environment of TPU pods, SLURM, Open MPI and Kubernetes.

  Raises:
    ValueError: flags that do not fit together.
  """
  given = (flags.coordinator, flags.num_processes, flags.process_id)
  if flags.num_processes == 1:
    return
  if any(x is not None for x in given) and None in given:
    raise ValueError(
      f"got --coordinator {given[0]}, --num_processes {given[1]}, "
      f"--process_id {given[2]}; give all three, or none."
    )
  if given[1] is not None and not 0 <= given[2] < given[1]:
    raise ValueError(
      f"--process_id is {given[2]} of {given[1]} processes; give 0 to "
      f"{given[1] - 1}, each once."
    )
  import jax

  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  _say_what_abort_means(True)
  try:
    jax.distributed.initialize(
      *given,
      cluster_detection_method="deactivate" if flags.coordinator else None,
      heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
    )
  except ValueError as error:
    # What JAX says where it finds no cluster: an ordinary run.
    if flags.coordinator or "coordinator_address" not in str(error):
      raise
    _say_what_abort_means(False)
    return
  jax.devices()  # All processes meet here, before one may have to wait.
  if not active():
    _say_what_abort_means(False)


def active() -> bool:
  """Whether the run has several processes."""
  # An error in a flag is not to wait for JAX, nor for its devices.
  jax = sys.modules.get("jax")
  return (
    jax is not None
    and jax.distributed.is_initialized()
    and jax.process_count() > 1
  )


# A process that misses another is ended by JAX's runtime, in a thread of C++
# that calls abort(): a page of addresses, and no way to catch it but a handler
# of C. Python's own handlers would run after the process is gone.
@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _on_abort(number: int) -> None:
  del number
  leave_lost()


def _say_what_abort_means(wanted: bool) -> None:
  handler = _on_abort if wanted else ctypes.c_void_p(int(signal.SIG_DFL))
  ctypes.CDLL(None).signal(int(signal.SIGABRT), handler)


def lost(error: BaseException) -> bool:
  """Whether an error means that another process is gone."""
  return (
    active()
    and not isinstance(error, OSError | FloatingPointError)
    and bool(_LOST.search(f"{type(error).__name__}: {error}"))
  )


def leave_lost(why: object = "") -> None:
  """Ends this process at once, with the line that says why."""
  _said.acquire()  # for good: a second thread that comes here waits
  text = " ".join(str(why).split())[:200]
  sys.stderr.write(
    f"another process of the run is gone{f' ({text})' if text else ''}; start "
    "all of them again, and they go on from the last checkpoint.\n"
  )
  sys.stderr.flush()
  os._exit(EXIT_LOST)


def part(code: int) -> None:
  """Ends this process together with the others of the run, if it has any.

  Python would wait for threads first, and one may never end: Orbax's, after a
  save that failed. The others would miss this process meanwhile.
  """
  if active():
    import jax

    jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave(code: int) -> None:
  """Ends this process at once if others may wait for it in a collective.

  An orderly end would wait for them in turn.
  """
  if active():
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def barrier(name: str) -> None:
  """Returns when every process has come here; each name once a run."""
  import jax
  import orbax.checkpoint as ocp

  if active():
    # Not by a collective of the devices: those have time limits.
    ocp.multihost.sync_global_processes(
      name,
      timeout=_BARRIER_SECONDS,
      processes=set(range(jax.process_count())),
    )


class GivenUp(Exception):
  """Another process has given up what it was to do; see its own message."""


def meet(name: str, task: str, seconds: float) -> None:
  """Returns when every process has come here; each name once a run.

  Raises:
    GivenUp: a process has given the task up; TimeoutError: one does not come.
  """
  import jax
  import orbax.checkpoint as ocp

  store = ocp.multihost.get_jax_distributed_client()
  store.key_value_increment(name, 1)
  deadline = time.monotonic() + seconds
  while int(store.key_value_try_get(name)) < jax.process_count():
    # The folder of keys: to ask for a key that was not set is an error.
    for _, process in store.key_value_dir_get(_given_up(task)):
      raise GivenUp(f"process {process} could not do its part")
    if time.monotonic() > deadline:
      raise TimeoutError(f"a process did not come within {seconds:.0f} s")
    time.sleep(0.2)


def give_up(task: str) -> None:
  """Ends the others' wait in `meet`, which this process will not reach."""
  import jax
  import orbax.checkpoint as ocp

  if active():
    store = ocp.multihost.get_jax_distributed_client()
    me = str(jax.process_index())
    store.key_value_set(_given_up(task) + me, me, allow_overwrite=True)


def _given_up(task: str) -> str:
  return f"jepa_jax/given_up/{task}/"


@contextlib.contextmanager
def first_process_first(name: str) -> Iterator[None]:
  """Process 0 runs the body alone, the others after it.

  For what process 0 makes and the others find, such as a prepared data set.
  Nothing in it may be collective.

  Raises:
    GivenUp: the body has failed in process 0, which raises its own error.
  """
  import jax

  if not active():
    yield
  elif jax.process_index():
    meet(name, name, _BARRIER_SECONDS)
    yield
  else:
    try:
      yield
    except Exception:
      give_up(name)
      jax.distributed.shutdown()  # returns when the others have left
      raise
    meet(name, name, _BARRIER_SECONDS)


def agree(value: bool) -> bool:
  """Whether the value is true on all processes; collective."""
  from jax.experimental import multihost_utils

  if not active():
    return value
  return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))


def add_up(x: np.ndarray) -> np.ndarray:
  """The sum of the arrays of all processes, in their type; collective."""
  from jax.experimental import multihost_utils

  if not active():
    return x
  return multihost_utils.process_allgather(x).sum(axis=0, dtype=x.dtype)


def gather(rows: Any, sharding: Any) -> np.ndarray:
  """The rows of all processes on the host of each; collective.

  Args:
    rows: this process's rows of an array [B, ...], or the global array.
    sharding: of the leading axis, as of batches.

  Returns:
    [B, ...], in the order of the global array.
  """
  import jax
  from jax.experimental import multihost_utils

  if not active():
    return np.asarray(rows)
  if not isinstance(rows, jax.Array):
    rows = jax.make_array_from_process_local_data(sharding, rows)
  return np.asarray(multihost_utils.process_allgather(rows, tiled=True))


_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


def end_signals() -> set[signal.Signals]:
  """Signals that end a run: those of the platform that are not ignored."""
  numbers = {getattr(signal, name, None) for name in _SIGNALS} - {None}
  return {n for n in numbers if signal.getsignal(n) != signal.SIG_IGN}


class Stopped(Exception):
  """A signal has ended something that can be done again."""


class Stopper:
  """Notes a signal to end, so that all processes stop after one step.

  SIGTERM and SIGINT, and SIGUSR1 and SIGHUP, which schedulers and terminals
  send before they take the machine away; not those that are ignored already,
  as under nohup.

  Attributes:
    stopped: whether the loop is to end.
  """

  def __init__(self):
    self.stopped = False

  def __enter__(self) -> "Stopper":
    self._active = active()
    numbers = end_signals()
    if self._active:
      # JAX has taken SIGTERM, to tell the other processes of it.
      numbers.discard(signal.SIGTERM)
    handler = self._pass_on if self._active else self._stop
    self._old = {number: signal.signal(number, handler) for number in numbers}
    return self

  def __exit__(self, *unused: Any) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def check(self, step: int) -> bool:
    """Whether to stop after this step; every process asks after every step."""
    if self._active:
      from jax.experimental import multihost_utils

      self.stopped |= multihost_utils.reached_preemption_sync_point(step)
    return self.stopped

  def interrupt(self) -> None:
    """Raises Stopped after a signal; for work between two steps.

    With several processes a signal waits for the next step: all of them have
    to stop at the same place.
    """
    if self.stopped:
      raise Stopped

  def _stop(self, number: int, frame: Any) -> None:
    del frame
    self.stopped = True
    # A second signal ends the process as it would without us.
    signal.signal(number, self._old[number])

  def _pass_on(self, number: int, frame: Any) -> None:
    del number, frame
    signal.raise_signal(signal.SIGTERM)
