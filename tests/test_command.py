"""A command's process: the allocator's settings, and who says what of them."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import argparse, os, subprocess, sys
from jepa_jax import command

def main(flags):
  print(flags.name, os.environ.get("GLIBC_TUNABLES"), flush=True)
  if flags.name == "parent":
    return subprocess.run([sys.executable, __file__, "child"]).returncode

parser = argparse.ArgumentParser()
parser.add_argument("name")
parser.add_argument("--config")
command.run(main, parser, tune_allocator=sys.argv[-1] != "plain")
"""


@pytest.fixture
def run(tmp_path):
  path = tmp_path / "script.py"
  path.write_text(SCRIPT)

  def run(*arguments, **variables):
    unset = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    return subprocess.run(
      [sys.executable, str(path), *arguments],
      capture_output=True,
      text=True,
      env=unset | {"JAX_PLATFORMS": "cpu"} | variables,
    )

  return run


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_process_started_anew_says_so_once(run):
  done = run("parent")
  assert done.returncode == 0, done.stderr
  settings = done.stdout.split()[1]
  assert "glibc.malloc.mmap_max=0" in settings.split(":")
  assert done.stdout.splitlines() == [f"parent {settings}", f"child {settings}"]
  assert done.stderr.count("\n") == 1
  assert f"started anew with GLIBC_TUNABLES={settings}," in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_a_process_is_started_anew_before_it_loads_anything(run, tmp_path):
  path = tmp_path / "experiment.py"
  path.write_text(
    "from jepa_jax.config import defaults as get_config\nprint('loaded')\n"
  )
  assert run("child", "--config", str(path)).stdout.count("loaded") == 1


@pytest.mark.parametrize(
  "name, variables, settings",
  [
    ("own", {"GLIBC_TUNABLES": ""}, ""),  # the user's word counts
    ("tpu", {"JAX_PLATFORMS": "tpu"}, "None"),
    ("plain", {}, "None"),  # a command that does not ask
  ],
)
def test_a_process_is_left_alone(run, name, variables, settings):
  done = run(name, **variables)
  assert (done.stdout, done.stderr) == (f"{name} {settings}\n", "")


def test_bad_flags_end_before_a_process_is_started_anew(run):
  done = run("own", "--nme")
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1 and "--nme" in done.stderr
