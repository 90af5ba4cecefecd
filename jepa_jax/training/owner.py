"""One run, one workdir: two processes that wrote into one would spoil both.

The owner is named in a file, owner.json, and touches it again and again. A
process that is gone from this machine is seen at once. Of another machine, or
of another container, nothing but the touches can be seen: they work on every
file system that several machines share, where locks often do not.
"""

from collections.abc import Callable
import datetime
import json
import os
import pathlib
import re
import socket
import sys
import threading
import time
from typing import Any
import uuid

BEAT_SECONDS = 10  # between two touches
STALE_SECONDS = 60  # without a touch, the owner counts as gone
_LOOK_SECONDS = 0.5
_EXIT_LOST = 2  # as for bad input: to start again would not help


class Owner:
  """The right to write into a workdir, held until the end of the context.

  One process of a run needs it, process 0. A killed one leaves its file
  behind, and the next start says that it takes over.
  """

  def __init__(self, workdir: pathlib.Path):
    """Nothing happens yet; see `acquire`."""
    self._workdir = workdir
    self._path = workdir / "owner.json"
    self._text = ""  # what our file holds, once we are the owner
    self._ended = threading.Event()

  def __enter__(self) -> "Owner":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._ended.set()
    if self._text and _read(self._path)[0] == self._text:
      self._path.unlink(missing_ok=True)

  def acquire(self) -> None:
    """Becomes the owner, if this is not the owner already.

    The workdir must exist. Where the owner may live on another machine, this
    waits for its next touch, STALE_SECONDS at most.

    Raises:
      ValueError: another process is the owner.
    """
    if self._text:
      return
    now = datetime.datetime.now().astimezone()
    text = json.dumps(
      {
        "process": os.getpid(),
        "host": socket.gethostname(),
        "since": now.isoformat(" ", "seconds"),
        "machine": _machine(),
        "born": _born(os.getpid()),
        "token": uuid.uuid4().hex,
      }
    )
    while not self._create(text):
      self._wait_until_gone()
    self._text = text
    self._sweep()
    threading.Thread(target=self._keep, daemon=True).start()

  def _create(self, text: str) -> bool:
    try:
      with self._path.open("x") as file:
        file.write(text)
    except FileExistsError:
      return False
    return True

  def _wait_until_gone(self) -> None:
    """Removes the file of an owner that is gone."""
    first, touched = _read(self._path)
    said = False
    while True:
      text, now_touched = _read(self._path)
      if not text and now_touched is None:
        return  # it has ended
      record = _parse(text)
      who = (
        f"process {record['process']} on {record['host']}, since "
        f"{record['since']}"
      )
      alive = _alive(record)
      if alive or (alive is None and (text, now_touched) != (first, touched)):
        raise ValueError(
          f"workdir {self._workdir} is in use by another run ({who}); wait for "
          "its end, stop it, or use another workdir."
        )
      if alive is False or self._age(now_touched) > STALE_SECONDS:
        if self._remove(text):
          _say(f"workdir {self._workdir}: {who}, is gone; this run takes over")
        return
      if not said:
        said = True
        _say(
          f"workdir {self._workdir}: {who}, may be alive; waiting for a sign "
          f"of it, {STALE_SECONDS} s at most"
        )
      time.sleep(_LOOK_SECONDS)

  def _sweep(self) -> None:
    """Removes what killed processes had begun to write; see log.write_whole."""
    if sys.platform != "linux":
      return  # `_born` tells nothing
    for path in self._workdir.glob(".*"):
      process = re.fullmatch(r"\..+\.(\d+)", path.name)
      if process and not _born(int(process[1])):
        path.unlink(missing_ok=True)

  def _age(self, touched: float) -> float:
    """Seconds since then, by the clock that the file system has."""
    probe = self._beside()
    probe.touch()
    try:
      return probe.stat().st_mtime - touched
    finally:
      probe.unlink(missing_ok=True)

  def _beside(self) -> pathlib.Path:
    return self._path.with_name(f".owner.{uuid.uuid4().hex}.{os.getpid()}")

  def _remove(self, text: str) -> bool:
    """Removes the file if it still holds that; of many, one is told True."""
    aside = self._beside()
    try:
      self._path.rename(aside)  # of those who try, one succeeds
    except FileNotFoundError:
      return False
    if _read(aside)[0] != text and not self._path.exists():
      aside.rename(self._path)  # another one was faster, and owns it by now
      return False
    aside.unlink(missing_ok=True)
    return True

  def _keep(self) -> None:
    """Touches the file; ends the process if it is another's."""
    while not self._ended.wait(BEAT_SECONDS):
      try:
        text, _ = _read(self._path)
        if text == self._text:
          os.utime(self._path)
        elif text and not self._ended.is_set():
          # As after a stop of the machine, or of this process.
          other = _parse(text)
          _say(
            f"workdir {self._workdir} was taken over by process "
            f"{other['process']} on {other['host']} while this one gave no "
            "sign of life: it ends, without saving"
          )
          os._exit(_EXIT_LOST)
        elif self._workdir.is_dir():
          self._create(self._text)
      except OSError:
        pass  # the next touch may succeed


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


def _read(path: pathlib.Path) -> tuple[str, float | None]:
  """Text and time of change of a file, ("", None) where there is none."""
  try:
    # To open it makes NFS ask for what it would have from its cache.
    with path.open(errors="replace") as file:
      return file.read(), os.fstat(file.fileno()).st_mtime
  except FileNotFoundError:
    return "", None


def _parse(text: str) -> dict[str, Any]:
  try:
    record = dict(json.loads(text))
  except (TypeError, ValueError):  # a file that was not written to its end
    record = {}
  keys = ("process", "host", "since", "machine", "born")
  return {key: record.get(key, "?") for key in keys}


def _alive(record: dict[str, Any]) -> bool | None:
  """Whether the process of a record lives; None: not to be seen from here."""
  if record["machine"] != _machine():
    return None
  try:
    os.kill(int(record["process"]), 0)
  except PermissionError:
    pass
  except (OSError, ValueError):
    return False
  return _born(int(record["process"])) == record["born"]


def _machine() -> str:
  """What tells apart machines, their starts, and their containers."""
  boot = _or_nothing(
    lambda: pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
  )
  processes = _or_nothing(lambda: os.readlink("/proc/self/ns/pid"))
  return " ".join((socket.gethostname(), boot.strip(), processes))


def _born(process: int) -> str:
  """When a process began, in Linux's ticks: its number may be used again."""
  stat = _or_nothing(lambda: pathlib.Path(f"/proc/{process}/stat").read_text())
  fields = stat.rpartition(")")[2].split()
  # A killed one that nobody has asked after is a zombie.
  return "" if not fields or fields[0] in "ZX" else fields[19]


def _or_nothing(read: Callable[[], str]) -> str:
  try:
    return read()
  except OSError:  # no Linux
    return ""
