"""Several processes on one machine, as --processes asks for them."""

import argparse
import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from jepa_jax.training import distributed


def processes(arguments: argparse.Namespace) -> int:
  """Runs this command as several processes on the CPU of this machine.

  Signals are passed on to all of them. Where one of them ends badly, the
  others follow by themselves, or are ended after a minute. Where this process
  is killed, they save and stop.

  Args:
    arguments: parsed flags, with those of distributed.add_flags.

  Returns:
    The exit code of all, or else of the one that was to blame.

  Raises:
    ValueError: flags that do not fit together.
  """
  count = arguments.processes
  if count < 1 or arguments.coordinator or arguments.num_processes:
    raise ValueError(
      f"got --processes {count}; it needs at least 1, and neither "
      "--coordinator nor --num_processes beside it."
    )
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  # The last of two equal flags counts.
  flags = ["--processes=1", f"--coordinator={address}"]
  flags += [f"--num_processes={count}"]
  children = [
    subprocess.Popen(
      [sys.executable, *sys.orig_argv[1:], *flags, f"--process_id={i}"],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      # A terminal's Ctrl-C reaches them through this process alone.
      start_new_session=True,
      preexec_fn=_end_with_parent if sys.platform == "linux" else None,
    )
    for i in range(count)
  ]

  def pass_on(number: int, frame: Any) -> None:
    del frame
    for child in children:
      child.send_signal(number)

  for number in distributed.end_signals():
    signal.signal(number, pass_on)
  deadline = math.inf
  while any(child.poll() is None for child in children):
    if any(child.returncode not in (None, 0) for child in children):
      deadline = min(deadline, time.monotonic() + 60)
    if time.monotonic() > deadline:
      for child in children:
        child.kill()
    time.sleep(0.1)
  codes = [child.returncode for child in children]
  for i, code in enumerate(codes):
    if code < 0:
      name = signal.Signals(-code).name
      print(f"process {i} was ended by {name}", file=sys.stderr)
  blamed = [c for c in codes if c > 0 and c != distributed.EXIT_LOST]
  return max(blamed, default=distributed.EXIT_LOST if any(codes) else 0)


_PR_SET_PDEATHSIG = 1  # of Linux's prctl
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _end_with_parent() -> None:
  """Of a child: SIGTERM, once the process that has started it is gone."""
  _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
