"""Kills at random moments: a run that goes on ends in the same bits.

A start of a run takes seconds, most of them for imports. So one process imports
everything and does nothing else; each start of the run is a fork of it. It has
no home, and may open 256 files.
"""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import conftest
import pytest

STEPS = 24
# argv: folder of the scenes. A line of input is a workdir; a fork of this
# process trains there, and its number is printed.
SERVER = f"""
import os, resource, sys
from absl import logging
import jax, tensorflow, tensorflow_datasets, matplotlib.pyplot
import orbax.checkpoint
from jepa_jax import command, train
from jepa_jax import config as config_lib
from jepa_jax.data import pipeline, scenes
from jepa_jax.evaluation import report, run
from jepa_jax.training import checkpoints, compile_cache, owner

def config():
  c = config_lib.defaults()
  c.batch_size, c.total, c.optimizer.warmup = 4, "{STEPS} steps", "2 steps"
  c.data.source, c.data.num_scenes, c.data.num_examples = "scenes", (24, 10), 24
  c.data.image_size, c.masks.min_keep, c.data.data_dir = 40, 2, sys.argv[1]
  c.encoder.update(width=12, depth=1, num_heads=3, mlp_ratio=3.0, patch_size=8)
  c.predictor.update(width=8, depth=1, num_heads=1, mlp_ratio=2.0)
  c.compute.dtype, c.log_every, c.checkpoint.every = (
    "float32", "3 steps", "2 steps"
  )
  return c

resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
for line in sys.stdin:
  if child := os.fork():
    print(child, flush=True)
    continue
  os.setsid()
  workdir = line.strip()
  sys.stderr.flush()
  errors = os.open(workdir + ".err", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
  os.dup2(errors, 2)
  os.dup2(os.open(workdir + ".out", os.O_CREAT | os.O_APPEND | os.O_WRONLY), 1)
  code = 1
  try:
    compile_cache.use(sys.argv[1] + "/compiled")
    code = train.train_and_evaluate(config(), workdir)
  except BaseException:
    import traceback
    traceback.print_exc()
  sys.stderr.flush()
  os._exit(code)
"""


class Server:
  """Starts runs; `start` gives the number of the process."""

  def __init__(self, folder):
    self.folder = folder
    kept = {
      k: v for k, v in os.environ.items() if "CACHE" not in k and k != "HOME"
    }
    self.process = subprocess.Popen(
      [sys.executable, "-c", SERVER, str(folder)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      text=True,
      env=kept | {"PYTHONPATH": str(conftest.ROOT)},
    )

  def start(self, workdir):
    self.process.stdin.write(f"{workdir}\n")
    self.process.stdin.flush()
    return int(self.process.stdout.readline())

  def kill(self, number, after=None, deadline=600):
    """Kills a run at a moment, or waits for its end; whether it was killed."""
    end = time.monotonic() + (deadline if after is None else after)
    while time.monotonic() < end:
      if not alive(number):
        return False
      time.sleep(0.01)
    if alive(number):
      os.kill(number, signal.SIGKILL)
    while alive(number):
      time.sleep(0.01)
    return True


def alive(number):
  stat = pathlib.Path(f"/proc/{number}/stat")
  try:
    return stat.read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  server = Server(tmp_path_factory.mktemp("kills"))
  yield server
  server.process.kill()
  server.process.wait()


@pytest.fixture(scope="module")
def whole(server):
  """A run that nothing interrupts, and the seconds that it takes."""
  workdir = server.folder / "whole"
  started = time.monotonic()
  server.kill(server.start(workdir))
  assert (workdir / "report.html").exists(), errors(workdir)
  # It has rendered the scenes and compiled; the others take half of that.
  return results(workdir), (time.monotonic() - started) / 2


def errors(workdir):
  return pathlib.Path(f"{workdir}.err").read_text()[-3000:]


def results(workdir):
  """Digests of the last state's arrays, and the last loss of every step."""
  record = workdir / f"checkpoints/{STEPS}/record/metadata"
  rows = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    rows.setdefault(row["step"], set()).add(row.get("loss"))
  assert all(len(losses) == 1 for losses in rows.values()), rows
  # Where a start began has a row of its own.
  due = {step: rows[step] for step in range(3, STEPS + 1, 3)}
  return json.loads(record.read_text())["digests"], due


def attack(server, whole, name, kills):
  """Kills a run so often, at random moments, and lets it end."""
  expected, seconds = whole
  workdir = server.folder / name
  generator = random.Random(name)
  done = 0
  while done < kills:
    number = server.start(workdir)
    done += server.kill(number, generator.uniform(0.1, 1.0) * seconds)
    if (workdir / "report.html").exists():
      if done:
        break  # it has ended before it was killed
      shutil.rmtree(workdir)  # the machine is faster now than it was
      seconds /= 2
  server.kill(server.start(workdir))
  assert (workdir / "report.html").exists(), errors(workdir)
  assert results(workdir) == expected, errors(workdir)
  left = [p.name for p in workdir.rglob("*") if "tmp" in p.name]
  assert not left + [p.name for p in workdir.rglob(".*")]
  assert not (workdir / "owner.json").exists()
  return done


def test_a_run_killed_three_times_ends_in_the_same_bits(server, whole):
  assert attack(server, whole, "few", 3)


@pytest.mark.attack
def test_a_hundred_kills_lose_nothing(server, whole):
  done, run = 0, 0
  while done < 100:
    done += attack(server, whole, f"run{run}", 6)
    run += 1
    print(f"{done} kills of {run} runs", flush=True)
