"""Runs of two processes: the same run, however it is spread or interrupted."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jepa_jax import command, train
from jepa_jax.evaluation import run as evaluation
from jepa_jax.training import checkpoints, distributed, sharding
from jepa_jax.training import program as program_lib

STEPS = 9  # of the whole run; meshes are compared at CUT
CUT = 8

# Sizes that eight devices divide, or parameters would not be split at all.
CONFIG = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
import conftest
from jepa_jax import config

def get_config(data_dir):
  c = conftest.small_config()
  c.batch_size = 8
  c.total = "{STEPS} steps"
  c.data.data_dir = data_dir
  c.encoder.update(width=32, depth=2, num_heads=4)
  c.predictor.depth = 1
  c.optimizer.clip_norm = 1.0
  c.log_every = "1 steps"
  c.checkpoint.keep = 9
  c.mesh.data, c.mesh.fsdp = 1, -1
  c.evaluations.count = config.evaluation("count")
  c.evaluations.count.update(
    protocols=("knn",), features=("last",), baselines=("pixels",)
  )
  return c
"""

# Eight devices in one process, on one mesh: test_sharding has the others. argv
# is config file, workdir, a checkpoint folder of two processes, and where to
# save it again.
MESHES = f"""
import sys
from jepa_jax import command, train
from jepa_jax.evaluation import run as evaluation
from jepa_jax.training import checkpoints, sharding
from jepa_jax.training import program as program_lib

file, workdir, source, copy = sys.argv[1:]
config = command.load_config(file)
config.mesh.data, config.mesh.fsdp = 2, 4
code = train.train_and_evaluate(config, f"{{workdir}}/2x4", stop_at={CUT})
assert code == command.EXIT_PREEMPTED, code
program = program_lib.build(config, sharding.make_mesh(config.mesh))
with checkpoints.Checkpoints(source) as saved:
  state = saved.restore(program.state_spec, {CUT})
with checkpoints.Checkpoints(copy, config.checkpoint) as saved:
  saved.finish(state)
"""

# Two processes: argv is config file, a checkpoint folder of one process, where
# to save it again, a folder whose newest checkpoint is damaged, and one on a
# disk that is full for the second process, then for the first, then for none.
CHECKPOINTS = """
import argparse, resource, signal, sys
import numpy as np
from jepa_jax import command
from jepa_jax.training import checkpoints, distributed, sharding
from jepa_jax.training import program as program_lib

parser = argparse.ArgumentParser()
parser.add_argument("paths", nargs=5)
distributed.add_flags(parser)

def main(flags):
  import jax
  file, source, copy, damaged, full = flags.paths
  config = command.load_config(file)
  program = program_lib.build(config, sharding.make_mesh(config.mesh))
  with checkpoints.Checkpoints(source) as saved:
    state = saved.restore(program.state_spec)
  with checkpoints.Checkpoints(copy, config.checkpoint) as saved:
    saved.finish(state)
  with checkpoints.Checkpoints(damaged) as saved:
    print("fell back to", int(saved.restore(program.state_spec).step))
  me = jax.process_index()
  signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
  most = resource.getrlimit(resource.RLIMIT_FSIZE)
  with checkpoints.Checkpoints(full, config.checkpoint) as saved:
    for step, process in enumerate((1, 0, None)):
      state = state.replace(step=0 * state.step + step)
      if me == process:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, most[1]))
      saved.save(state)
      saved.wait()
      resource.setrlimit(resource.RLIMIT_FSIZE, most)
    print("saved", saved.steps())
  rows = np.arange(4 * 3).reshape(4, 3) + 12 * me
  whole = distributed.gather(rows, sharding.batch_sharding(program.mesh))
  np.testing.assert_array_equal(whole, np.arange(24).reshape(8, 3))
  assert not distributed.agree(me == 0) and distributed.agree(True)
  return 0

command.run(main, parser)
"""


def environment(devices):
  flags = os.environ["XLA_FLAGS"]
  flags += f" --xla_force_host_platform_device_count={devices}"
  return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def under_slurm(*arguments):
  """Two processes that know of each other what SLURM's srun tells them."""
  job = next(number for number in range(1, 4096) if _free(61440 + number))
  variables = dict(
    SLURM_JOB_ID=job, SLURM_STEP_NODELIST="127.0.0.1", SLURM_NTASKS=2
  )
  processes = []
  for i in range(2):
    variables |= dict(SLURM_PROCID=i, SLURM_LOCALID=i)
    processes.append(
      subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(4) | {k: str(v) for k, v in variables.items()},
      )
    )
  try:
    said = [process.communicate(timeout=900) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [process.returncode for process in processes], said


def _free(port):
  with socket.socket() as probe:
    return probe.connect_ex(("127.0.0.1", port)) != 0


def run(*arguments, devices=4):
  done = subprocess.run(
    [sys.executable, *map(str, arguments)],
    capture_output=True,
    text=True,
    timeout=900,
    env=environment(devices),
  )
  return done.returncode, done.stdout, done.stderr


class Pair:
  """Two processes of the train command that are started by hand."""

  def __init__(self, file, workdir):
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"--config {file} --workdir {workdir} --coordinator {address}"
    flags += " --num_processes 2 --process_id"
    self.errors = [f"{workdir}.{i}.err" for i in range(2)]
    self.processes = [
      subprocess.Popen(
        [sys.executable, "-m", "jepa_jax.train", *flags.split(), str(i)],
        stdout=subprocess.PIPE,
        stderr=open(path, "w"),
        text=True,
        env=environment(4),
      )
      for i, path in enumerate(self.errors)
    ]

  def at_step(self, step, signal_number, index):
    """Sends a signal to one of them once a step is done."""
    while not self.processes[0].stdout.readline().startswith(f"step {step} "):
      assert self.processes[0].poll() is None, self.said(0)
    self.processes[index].send_signal(signal_number)

  def end(self, timeout):
    """Exit codes of both, within so many seconds."""
    deadline = time.monotonic() + timeout
    try:
      for process in self.processes:
        process.communicate(timeout=max(1, deadline - time.monotonic()))
    finally:
      for process in self.processes:
        process.kill()
    return [process.returncode for process in self.processes]

  def said(self, index):
    return pathlib.Path(self.errors[index]).read_text(errors="replace")


@pytest.fixture(scope="module")
def file(tmp_path_factory, scenes_dir):
  path = tmp_path_factory.mktemp("config") / "small.py"
  path.write_text(CONFIG)
  return f"{path}:{scenes_dir}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, file):
  """A run of two processes that nothing interrupts."""
  workdir = tmp_path_factory.mktemp("two") / "whole"
  flags = f"-m jepa_jax.train --config {file} --workdir {workdir} --processes 2"
  code, _, errors = run(*flags.split())
  assert code == 0, errors[-3000:]
  return workdir


@pytest.fixture(scope="module")
def meshes(tmp_path_factory, file, whole):
  """A run on eight devices of one process, and a copy of whole's checkpoint."""
  folder = tmp_path_factory.mktemp("meshes")
  code, _, errors = run(
    *("-c", MESHES, file, folder, whole / "checkpoints", folder / "copy"),
    devices=8,
  )
  assert code == 0, errors[-3000:]
  return folder


def restore(file, checkpoint_folder, step=None):
  config = command.load_config(file)
  program = program_lib.build(config, sharding.make_mesh(config.mesh))
  with checkpoints.Checkpoints(checkpoint_folder) as saved:
    return program, saved.restore(program.state_spec, step)


def assert_equal(a, b):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_array_equal(x, y)


def losses(workdir):
  rows = [
    json.loads(line)
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  return {row["step"]: row["loss"] for row in rows if "loss" in row}


def test_two_processes_write_one_log_and_evaluate_alike(file, whole):
  record = json.loads((whole / "run.json").read_text())
  assert record["processes"] == 2 and record["devices"] == 8
  lines = (whole / "metrics.jsonl").read_text().splitlines()
  steps = [json.loads(line)["step"] for line in lines]
  assert steps == [*range(1, STEPS + 1), STEPS]  # the last is the evaluation
  assert len(list((whole / "tensorboard").iterdir())) == 1
  assert (whole / "report.html").exists()
  rows = json.loads((whole / "evaluations.json").read_text())
  alone = evaluation.evaluate(*restore(file, whole / "checkpoints"))
  strip = lambda rows: [{**r, "seconds": 0} for r in rows]
  assert strip(rows) == strip(alone)
  assert {r["encoder"] for r in rows} == {"trained", "pixels"}


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["1x1", "2x4"])
def test_meshes_and_processes_change_nothing_but_the_rounding(
  file, whole, meshes, tmp_path, mesh
):
  workdir = meshes / mesh
  if mesh == "1x1":
    workdir = tmp_path
    code = train.train_and_evaluate(
      command.load_config(file), workdir, stop_at=CUT
    )
    assert code == command.EXIT_PREEMPTED
  seen, expected = losses(workdir), losses(whole)
  for step in range(1, CUT + 1):
    np.testing.assert_allclose(seen[step], expected[step], rtol=1e-5)
  _, a = restore(file, workdir / "checkpoints", CUT)
  _, b = restore(file, whole / "checkpoints", CUT)
  for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params)):
    # Adam turns rounding of small gradients into steps: lr 1e-3, 8 of them.
    np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4)
    assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(y) + 1e-5


@pytest.mark.slow
def test_checkpoints_restore_on_other_meshes_and_process_counts(
  file, whole, meshes, tmp_path
):
  _, expected = restore(file, whole / "checkpoints", CUT)
  assert_equal(restore(file, meshes / "copy")[1], expected)
  damaged = tmp_path / "damaged"
  damaged.mkdir()
  for step in (4, 6):
    subprocess.run(
      ["cp", "-r", whole / "checkpoints" / str(step), damaged], check=True
    )
  hit = list((damaged / "6" / "state").glob("ocdbt.process_1/**/d/*"))
  assert hit  # what the second process wrote, each its share
  for path in hit:
    path.write_bytes(b"\0" * 50)
  source = meshes / "2x4" / "checkpoints"
  codes, said = under_slurm(
    *("-c", CHECKPOINTS, file, source, tmp_path / "copy", damaged),
    tmp_path / "full",
  )
  assert codes == [0, 0], said
  assert all("fell back to 4" in out for out, _ in said)
  errors = said[0][1] + said[1][1]
  assert "checkpoint 6" in errors and "trying the one before" in errors
  assert all("saved [2]" in out for out, _ in said), said
  assert "process 1 could not do its part); training goes on" in said[0][1]
  assert "checkpoint 1 could not be saved (OSError" in said[0][1]
  _, expected = restore(file, meshes / "2x4" / "checkpoints")
  assert_equal(restore(file, tmp_path / "copy")[1], expected)


@pytest.mark.slow
def test_what_one_process_finds_wrong_ends_all_with_a_line(file, tmp_path):
  flags = f"-m jepa_jax.train --config {file} --workdir {tmp_path / 'run'}"
  flags += " --processes 2 --config.batch_size=7"
  code, _, errors = run(*flags.split())
  assert code == command.EXIT_BAD_INPUT
  assert (
    "ValueError: batch_size 7 in 1 microbatches is not a multiple of 8"
    in errors
  )
  assert "process 0 could not do its part; its message says why." in errors
  assert "Check failure" not in errors and "Traceback" not in errors
  assert not (tmp_path / "run").exists()


@pytest.mark.slow  # three pairs of processes
def test_a_kill_ends_both_and_a_signal_stops_both_and_all_goes_on(
  file, whole, tmp_path
):
  workdir = tmp_path / "run"
  pair = Pair(file, workdir)
  pair.at_step(3, signal.SIGKILL, index=1)
  assert pair.end(60) == [distributed.EXIT_LOST, -signal.SIGKILL]
  line = pair.said(0).splitlines()[-1]
  assert "another process of the run is gone" in line
  assert "start all of them again" in line
  # What the kill may leave, beside checkpoint 2 that was whole by then.
  half = workdir / "checkpoints" / "4.orbax-checkpoint-tmp"
  half.mkdir(exist_ok=True)

  pair = Pair(file, workdir)
  pair.at_step(5, signal.SIGTERM, index=1)
  assert pair.end(60) == [command.EXIT_PREEMPTED] * 2, pair.said(0)
  assert "half-written checkpoint 4.orbax" in pair.said(0)
  with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
    steps = saved.steps()
  assert 5 <= steps[-1] < STEPS
  assert f"stopped and saved at step {steps[-1]}" in pair.said(0)

  flags = f"-m jepa_jax.train --config {file} --workdir {workdir} --processes 2"
  code, _, errors = run(*flags.split())
  assert code == 0, errors[-3000:]
  assert_equal(
    restore(file, workdir / "checkpoints", STEPS)[1],
    restore(file, whole / "checkpoints", STEPS)[1],
  )


@pytest.mark.parametrize(
  "flags, message",
  [
    ("--coordinator localhost:1", "give all three, or none"),
    ("--num_processes 3 --process_id 1", "give all three, or none"),
    (
      "--coordinator localhost:1 --num_processes 2 --process_id 2",
      "give 0 to 1",
    ),
    ("--processes 0", "a whole number, from 1 to"),
    ("--processes 2 --num_processes 2", "neither"),
  ],
)
def test_flags_that_do_not_fit_are_named(
  flags, message, monkeypatch, capsys, tmp_path
):
  monkeypatch.setattr(sys, "argv", ["train", *flags.split()])
  parser = train.argparse.ArgumentParser()
  distributed.add_flags(parser)
  with pytest.raises(SystemExit) as stopped:
    command.run(lambda flags: 0, parser)
  assert stopped.value.code == command.EXIT_BAD_INPUT
  assert message in capsys.readouterr().err
