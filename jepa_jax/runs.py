"""Several runs under one folder: each a process of its own, resumable."""

from collections.abc import Callable
import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
from typing import Any

import tqdm

from jepa_jax import command


@dataclasses.dataclass(frozen=True)
class Run:
  """One training of a sweep.

  Attributes:
    cell: config key -> value as text, of what is swept.
    seed: of the run.
    folder: its workdir.
    overrides: "--config.key=value" of everything that is changed.
  """

  cell: dict[str, str]
  seed: int
  folder: pathlib.Path
  overrides: tuple[str, ...]

  @property
  def name(self) -> str:
    """The cell in words: the last part of each key, and the value."""
    pairs = (f"{k.rpartition('.')[2]}={v}" for k, v in self.cell.items())
    return " ".join(pairs) or "all"

  @property
  def done(self) -> bool:
    """Whether it ran to its end: the report is written last."""
    return (self.folder / "report.html").exists()

  def command(self, config: str) -> list[str]:
    """What trains it."""
    return [
      *(sys.executable, "-m", "jepa_jax.train", "--config", config),
      *("--workdir", str(self.folder), *self.overrides),
    ]


def claim(workdir: pathlib.Path, name: str, mine: dict[str, Any]) -> None:
  """Makes the folder of a sweep, or sees that it is of the same one.

  Args:
    workdir: of all runs.
    name: of the file there that says what it is of; its stem names the kind.
    mine: what that is, as JSON values.

  Raises:
    ValueError: it holds something else.
  """
  from jepa_jax.training import log

  if workdir.exists() and not workdir.is_dir():
    raise ValueError(f"workdir {workdir} is a file; name a folder.")
  path = workdir / name
  if path.exists():
    try:
      theirs = json.loads(path.read_text())
    except ValueError:
      theirs = None
    if theirs != mine:
      raise ValueError(
        f"{path} is of another {path.stem} ({theirs}; this one: {mine}); use "
        "another workdir."
      )
  elif workdir.exists() and any(workdir.iterdir()):
    raise ValueError(
      f"workdir {workdir} is not empty and holds no {path.stem}; use another "
      "one."
    )
  workdir.mkdir(parents=True, exist_ok=True)
  log.write_whole(path, json.dumps(mine, indent=2) + "\n")


def train(run: Run, config: str) -> int:
  """Trains one run, its output in the folder's own log; the exit code."""
  run.folder.mkdir(exist_ok=True)
  with open(run.folder / "output.txt", "a") as output:
    process = subprocess.Popen(
      run.command(config), stdout=output, stderr=subprocess.STDOUT
    )
    stop = lambda number, frame: process.send_signal(number)
    before = {
      s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)
    }
    try:
      return process.wait()
    finally:
      for number, handler in before.items():
        signal.signal(number, handler)


def train_all(
  runs: list[tuple[Run, str]], collect: Callable[[], str], page: pathlib.Path
) -> int:
  """Trains what is not done; the exit code.

  Args:
    runs: each with its experiment.
    collect: writes what is done, and returns it as text.
    page: which it writes.
  """
  failed = []
  bar = tqdm.tqdm(runs, desc="runs", unit="run")
  for run, config in bar:
    bar.set_postfix_str(run.folder.name)
    if run.done:
      continue
    code = train(run, config)
    if code in (command.EXIT_PREEMPTED, -signal.SIGTERM, -signal.SIGINT):
      bar.close()
      print(f"stopped in {run.folder}; the same command goes on.")
      return command.EXIT_PREEMPTED
    if code:
      failed.append(run)
      last = (run.folder / "output.txt").read_text().strip().splitlines()
      bar.write(f"{run.folder} failed with code {code}: {last[-1:]}")
    collect()
  bar.close()
  print(collect())
  print(f"page: {page}")
  if failed:
    print(f"{len(failed)} of {len(runs)} runs failed; see output.txt of each.")
  return 1 if failed else 0
