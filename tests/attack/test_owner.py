"""A workdir has one owner, however many want it, and however one ends."""

import concurrent.futures
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from jepa_jax import train
from jepa_jax.training import owner as owner_lib

HOLD = """
import pathlib, sys, time
from jepa_jax.training import owner
owner.BEAT_SECONDS = 0.05
with owner.Owner(pathlib.Path(sys.argv[1])) as mine:
  mine.acquire()
  print("mine", flush=True)
  time.sleep(60)
"""


@pytest.fixture
def hold(tmp_path):
  """Starts a process that owns tmp_path."""
  started = []

  def start():
    process = subprocess.Popen(
      [sys.executable, "-c", HOLD, tmp_path],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    started.append(process)
    assert process.stdout.readline() == "mine\n"
    return process

  yield start
  for process in started:
    process.kill()


def acquire(workdir):
  with owner_lib.Owner(workdir) as owner:
    owner.acquire()
    return json.loads((workdir / "owner.json").read_text())


def test_a_second_process_is_told_who_is_at_work(tmp_path, hold):
  first = hold()
  with pytest.raises(
    ValueError, match=f"in use by another run .process {first.pid} on"
  ):
    acquire(tmp_path)
  assert first.poll() is None and (tmp_path / "owner.json").exists()


def test_a_second_run_ends_before_it_does_anything(tmp_path, hold, config):
  hold()
  before = set(tmp_path.iterdir())
  with pytest.raises(ValueError, match="in use by another run"):
    train.train_and_evaluate(config, tmp_path)
  assert set(tmp_path.iterdir()) == before


def test_a_killed_owner_is_followed_aloud(tmp_path, hold, capsys):
  first = hold()
  first.kill()
  # It stays as a zombie, which nobody has asked after.
  os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
  assert acquire(tmp_path)["process"] == os.getpid()
  said = capsys.readouterr().err
  assert f"process {first.pid} on" in said and "this run takes over" in said
  assert not list(tmp_path.iterdir())


def test_a_number_that_is_used_again_is_another_process(tmp_path):
  record = owner_lib._parse("{}") | {
    "machine": owner_lib._machine(),
    "process": os.getpid(),
    "born": owner_lib._born(os.getpid()),
  }
  assert owner_lib._alive(record) is True
  assert owner_lib._alive(record | {"born": "1"}) is False
  assert owner_lib._alive(record | {"process": "?"}) is False
  assert owner_lib._alive(record | {"machine": "another"}) is None


@pytest.fixture
def elsewhere(monkeypatch):
  """This process is on another machine than those that are started."""
  monkeypatch.setattr(owner_lib, "_machine", lambda: "elsewhere")
  monkeypatch.setattr(owner_lib, "STALE_SECONDS", 1.5)
  monkeypatch.setattr(owner_lib, "_LOOK_SECONDS", 0.05)


def test_touches_of_another_machine_are_seen(tmp_path, hold, elsewhere, capsys):
  hold()
  with pytest.raises(ValueError, match="in use by another run"):
    acquire(tmp_path)
  assert "may be alive; waiting for a sign" in capsys.readouterr().err


def test_without_touches_another_machine_is_gone(
  tmp_path, hold, elsewhere, capsys
):
  first = hold()
  first.send_signal(signal.SIGSTOP)
  started = time.monotonic()
  assert acquire(tmp_path)["process"] == os.getpid()
  assert 1 < time.monotonic() - started < 20
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 2 and "takes over" in said[1]


def test_one_who_was_taken_for_gone_ends(tmp_path, hold, elsewhere):
  first = hold()
  first.send_signal(signal.SIGSTOP)
  with owner_lib.Owner(tmp_path) as owner:
    owner.acquire()
    first.send_signal(signal.SIGCONT)
    _, errors = first.communicate(timeout=20)
    assert first.returncode == 2
    assert re.fullmatch(r"workdir .* was taken over by .*\n", errors)
    assert (tmp_path / "owner.json").exists()


@pytest.mark.parametrize("text", ["", "[]", '{"process": 3', "\0"])
def test_a_torn_file_is_that_of_an_unknown_owner(tmp_path, elsewhere, text):
  path = tmp_path / "owner.json"
  path.write_text(text)
  os.utime(path, (time.time() - 100,) * 2)
  assert acquire(tmp_path)["process"] == os.getpid()


def test_what_a_killed_process_has_left_is_removed(tmp_path, hold):
  first = hold()
  first.kill()
  os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)
  (tmp_path / f".run.json.{first.pid}").touch()
  for name in (f".run.json.{os.getpid()}", ".hidden", "run.json.1"):
    (tmp_path / name).touch()
  acquire(tmp_path)
  assert {p.name for p in tmp_path.iterdir()} == {
    f".run.json.{os.getpid()}",
    ".hidden",
    "run.json.1",
  }


def test_of_many_at_once_one_gets_it(tmp_path):
  path = tmp_path / "owner.json"
  for text in ("", json.dumps({"machine": owner_lib._machine()})):
    if text:
      path.write_text(text)  # of a process that is gone
    owners = [owner_lib.Owner(tmp_path) for _ in range(8)]

    def try_it(owner):
      try:
        owner.acquire()
      except ValueError:
        return 0
      return 1

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
      assert sum(pool.map(try_it, owners)) == 1
    for owner in owners:
      owner.__exit__()
    assert list(tmp_path.iterdir()) == []


LAUNCH = """
import argparse, sys
from jepa_jax import launch
launch.processes(argparse.Namespace(
  processes=2, coordinator=None, num_processes=None))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_children_end_with_a_killed_launcher(tmp_path):
  program = tmp_path / "program.py"
  program.write_text(f"""
import os, pathlib, sys, time
if any(x.startswith("--process_id") for x in sys.argv):
  (pathlib.Path({str(tmp_path)!r}) / f"child{{os.getpid()}}").touch()
  time.sleep(60)
  sys.exit()
{LAUNCH}""")
  launcher = subprocess.Popen([sys.executable, program])
  deadline = time.monotonic() + 60
  while len(found := list(tmp_path.glob("child*"))) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.05)
  launcher.kill()
  launcher.wait()
  for child in found:
    stat = pathlib.Path(f"/proc/{child.name.removeprefix('child')}/stat")
    while stat.exists() and stat.read_text().rpartition(")")[2][1] != "Z":
      assert time.monotonic() < deadline
      time.sleep(0.05)
