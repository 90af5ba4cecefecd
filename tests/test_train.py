"""Whole runs of the command's function: resume, stop, report, misuse."""

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import types

import conftest
import jax
import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto import event_pb2

from jepa_jax import command, durations, evaluate, pretrained, train
from jepa_jax import config as config_lib
from jepa_jax.evaluation import encoders
from jepa_jax.objectives import ijepa
from jepa_jax.planning import chips
from jepa_jax.training import checkpoints, distributed, log
from jepa_jax.training import workdir as workdir_lib


@pytest.fixture
def run_config(config, scenes_dir):
  config.data.data_dir = scenes_dir
  return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, scenes_dir):
  """A whole run with evaluations, of six steps: not to be changed."""
  config = conftest.small_config()
  config.data.data_dir = scenes_dir
  config.evaluations.count = config_lib.evaluation("count")
  config.evaluate_every = "4 steps"
  workdir = tmp_path_factory.mktemp("runs") / "finished"
  assert train.train_and_evaluate(config, workdir) == 0
  return workdir


@pytest.fixture(scope="module")
def _stopped(tmp_path_factory, scenes_dir):
  config = conftest.small_config()
  config.data.data_dir = scenes_dir
  workdir = tmp_path_factory.mktemp("runs") / "stopped"
  code = train.train_and_evaluate(config, workdir, stop_at=4)
  assert code == command.EXIT_PREEMPTED
  return workdir


@pytest.fixture
def stopped(_stopped, tmp_path):
  """A copy of run_config's run, stopped at step 4, saved at 2 and 4."""
  return shutil.copytree(_stopped, tmp_path / "stopped")


def final_params(config, workdir, step=None):
  program = conftest.build(config)
  with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
    state = saved.restore(program.state_spec, step)
  return jax.tree.map(np.asarray, state)


def metrics(workdir):
  rows = {}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    rows.setdefault(row["step"], {}).update(row)
  return rows


def points(workdir):
  """(step, tag) of what TensorBoard shows, a START heeded as it does it."""
  found = []
  for path in sorted((workdir / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      event = event_pb2.Event.FromString(data[12 : 12 + length])
      for start, crc in ((0, 8), (12, 12 + length)):
        seen = record_writer.masked_crc32c(data[start:crc])
        assert struct.pack("<I", seen) == data[crc : crc + 4]
      data = data[16 + length :]
      if event.session_log.status == event_pb2.SessionLog.START:
        found = [point for point in found if point[0] < event.step]
      found += [(event.step, value.tag) for value in event.summary.value]
  return found


def assert_no_point_twice(workdir):
  found = points(workdir)
  assert len(found) == len(set(found))
  steps = {step for step, row in metrics(workdir).items() if "loss" in row}
  assert {step for step, tag in found if tag == "loss"} == steps


def assert_stops_and_goes_on(config, workdir, whole, stop_at, end):
  """In two halves, the run ends in the bits of the whole one."""
  code = train.train_and_evaluate(config, workdir, stop_at=stop_at)
  assert code == command.EXIT_PREEMPTED
  assert train.train_and_evaluate(config, workdir) == 0
  a, b = (final_params(config, d) for d in (whole, workdir))
  assert int(a.step) == int(b.step) == end
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_array_equal(x, y)
  rows, of_whole = metrics(workdir), metrics(whole)
  assert {stop_at, stop_at + 1} <= rows.keys() and end in of_whole
  for step in rows.keys() & of_whole.keys():
    assert rows[step]["loss"] == of_whole[step]["loss"], step
  assert_no_point_twice(workdir)


def test_stop_and_resume_is_the_uninterrupted_run_to_the_bit(
  run_config, finished, tmp_path
):
  # Nor do evaluations, which the whole run has, change its bits.
  assert_stops_and_goes_on(run_config, tmp_path, finished, stop_at=3, end=6)


@pytest.mark.slow
def test_the_quickstart_stopped_at_step_60_of_120_ends_in_the_same_bits(
  tmp_path, scenes_dir
):
  config = command.load_config(
    "experiments/quickstart.py",
    ["--config.total=120 steps", "--config.optimizer.warmup=20 steps"],
  ).unlock()
  config.data.num_examples, config.data.num_scenes = 256, (256, 16)
  config.data.data_dir = scenes_dir
  config.batch_size = 16
  config.evaluations = {}
  whole = tmp_path / "whole"
  assert train.train_and_evaluate(config, whole) == 0
  assert_stops_and_goes_on(
    config, tmp_path / "halves", whole, stop_at=60, end=120
  )


@pytest.mark.slow
def test_same_seed_same_losses_other_seed_others(run_config, stopped, tmp_path):
  losses = {}
  for name, seed in (("a", 0), ("b", 1)):
    run_config.seed = seed
    train.train_and_evaluate(run_config, tmp_path / name, stop_at=2)
    losses[name] = metrics(tmp_path / name)[2]["loss"]
  assert metrics(stopped)[2]["loss"] == losses["a"] != losses["b"]


def test_a_run_leaves_its_log_its_results_and_its_report(finished):
  rows = metrics(finished)
  assert set(rows) == {1, 2, 4, 6}
  for name in (
    "learning_rate",
    "weight_decay",
    "momentum",
    "grad_norm",
    "feature_std",
    "effective_rank",
    "mean_cosine",
    "prediction_norm",
    "target_norm",
  ):
    assert np.isfinite(rows[1][name]), name
  assert rows[6]["images_per_second"] > 0
  assert 0.1 < rows[6]["host_memory_gib"] < 16
  table = json.loads((finished / "evaluations.json").read_text())
  seen = {(r["protocol"], r["features"], r["encoder"]) for r in table}
  assert seen == {
    (p, f, e)
    for p in ("linear", "knn")
    for f, e in [
      ("last", "trained"),
      ("last4", "trained"),
      ("last", "random"),
      ("last4", "random"),
      ("pixels", "pixels"),
    ]
  }
  assert all(r["n_train"] == 24 and r["n_test"] == 10 for r in table)
  page = (finished / "report.html").read_text()
  assert "count" in page and "<svg" in page
  record = json.loads((finished / "run.json").read_text())
  assert record["steps"] == 6 and record["parameters"]["encoder"] > 0
  assert 0 <= record["masks"]["target_padding"] < 1
  assert list((finished / "tensorboard").iterdir())
  # The score of step 4 is kept as the best; the newest two beside it.
  assert sorted(
    int(p.name)
    for p in (finished / "checkpoints").iterdir()
    if p.name.isdigit()
  ) == [4, 6]


def evaluate_flags(**flags):
  defaults = dict(
    workdir=None, step=None, only="", report_only=False, weights=None,
    config=None, data="", overrides=[], label="label", train="train",
    test="test", protocols="knn", format="text", out="evaluations.jsonl",
  )  # fmt: skip
  return types.SimpleNamespace(**defaults | flags)


def test_evaluate_command_reads_a_finished_run(finished, tmp_path):
  tmp_path = shutil.copytree(finished, tmp_path / "run")
  before = json.loads((tmp_path / "evaluations.json").read_text())
  flags = dict(workdir=str(tmp_path), only="count")
  evaluate.main(evaluate_flags(**flags))
  after = json.loads((tmp_path / "evaluations.json").read_text())
  strip = lambda rows: [{**r, "seconds": 0} for r in rows]
  assert strip(before) == strip(after)
  flags["only"] = "size"
  with pytest.raises(ValueError, match="known: count"):
    evaluate.main(evaluate_flags(**flags))
  flags |= dict(only="", step=5)
  with pytest.raises(ValueError, match="no checkpoint of step 5.*there are"):
    evaluate.main(evaluate_flags(**flags))


@pytest.mark.slow
def test_evaluate_takes_other_evaluations_and_other_devices(
  finished, tmp_path, capsys
):
  workdir = shutil.copytree(finished, tmp_path / "run")
  path = workdir / "config.json"
  stored = json.loads(path.read_text())
  stored["mesh"] = {"data": 2, "fsdp": 2}  # as on four devices
  path.write_text(json.dumps(stored))
  overrides = ["--config.evaluations.near=distance", "--config.batch_size=8"]
  overrides += ["--config.evaluations.count="]
  flags = evaluate_flags(workdir=str(workdir), overrides=overrides)
  assert evaluate.main(flags) == 0
  rows = json.loads((workdir / "evaluations.json").read_text())
  assert {row["evaluation"] for row in rows} == {"near"}
  assert rows[0]["n_test"] == 10
  said = capsys.readouterr().err
  assert "mesh.data=2, mesh.fsdp=2 does not fit 1 devices" in said
  flags.overrides = ["--config.mesh.data=3"]
  with pytest.raises(ValueError, match="mesh.data=3, mesh.fsdp=2 does not fit"):
    evaluate.main(flags)
  flags.overrides = ["--config.encoder.width=56"]
  with pytest.raises(ValueError, match="encoder.width is a part of the run"):
    evaluate.main(flags)


def test_reading_a_run_warns_of_nothing(finished, run_config, caplog):
  pretrained.load(finished)
  final_params(run_config, finished)
  # asyncio tells of reads that other tests damaged, whenever it collects them.
  said = [x for x in caplog.records if x.name != "asyncio"]
  assert [x.getMessage() for x in said if x.levelname != "INFO"] == []


def test_weights_stand_side_by_side(finished, run_config, tmp_path, capsys):
  other = tmp_path / "other"
  other.symlink_to(finished)  # nothing to copy while something is cleared
  out = tmp_path / "rows.jsonl"
  run_config.evaluations.count = config_lib.evaluation(
    "count", protocols=("knn",)
  )
  flags = evaluate_flags(
    weights=[str(finished), str(other)],
    config=run_config,
    out=str(out),
    format="markdown",
  )
  assert evaluate.main(flags) == 0
  rows = [json.loads(line) for line in out.read_text().splitlines()]
  assert [(r["encoder"], r["features"]) for r in rows] == [
    ("finished", "last"), ("finished", "last4"), ("other", "last"),
    ("other", "last4"), ("random", "last"), ("random", "last4"),
    ("pixels", "pixels"),
  ]  # fmt: skip
  # One of ten images: two neighbours may be as near to within rounding.
  assert rows[0]["top1"] == pytest.approx(rows[2]["top1"], abs=10.1)
  printed = capsys.readouterr().out.splitlines()
  header, _, line, *_ = [text for text in printed if text.startswith("|")]
  assert header.split(" | ")[3:] == ["finished", "other", "random", "pixels |"]
  for row in rows[0], rows[2]:
    assert f"{row['top1']:.1f}" in line


@pytest.mark.parametrize(
  "flags, message",
  [
    ({}, "give --workdir of a run, or --weights"),
    ({"workdir": "x", "weights": ["y"]}, "give --workdir of a run, or"),
    ({"weights": ["FINISHED"]}, "--weights needs --config FILE, or --data"),
    ({"weights": ["no.npz"], "data": "scenes:"}, "no.npz"),
    ({"workdir": "nowhere"}, "holds no run"),
    ({"workdir": "FINISHED", "data": "scenes:"}, "has its own config"),
    (
      {"weights": ["FINISHED"], "data": "folder:/nowhere"},
      "no folder /nowhere",
    ),
  ],
)
def test_what_evaluate_cannot_do_is_one_line(finished, flags, message):
  flags = {
    key: [x.replace("FINISHED", str(finished)) for x in value]
    if isinstance(value, list)
    else value.replace("FINISHED", str(finished))
    for key, value in flags.items()
  }
  with pytest.raises((ValueError, OSError), match=message) as error:
    evaluate.main(evaluate_flags(**flags))
  assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_signal_in_the_final_evaluation_ends_it(
  finished, run_config, tmp_path, monkeypatch, capsys
):
  workdir = shutil.copytree(finished, tmp_path / "run")
  for name in ("evaluations.json", "report.html"):
    (workdir / name).unlink()
  run_config.evaluations.count = config_lib.evaluation("count")
  run_config.evaluate_every = "4 steps"
  encode = encoders.pooled

  def interrupted(*arguments):
    """Encoders that a signal meets at their second batch."""
    images = []

    def counted(of):
      def count(batch):
        images.append(len(batch))
        if len(images) == 2:
          signal.raise_signal(signal.SIGTERM)
        assert len(images) < 9, "goes on after the signal"
        return of(batch)

      return count

    return {name: counted(of) for name, of in encode(*arguments).items()}

  monkeypatch.setattr(encoders, "pooled", interrupted)
  assert train.train_and_evaluate(run_config, workdir) == 75
  said = capsys.readouterr().err
  assert "training is done and step 6 saved" in said
  assert not (workdir / "evaluations.json").exists()
  monkeypatch.undo()
  assert train.train_and_evaluate(run_config, workdir) == 0
  said = capsys.readouterr().err  # no terminal: lines
  assert "features of test: 10/10 images" in said and "probe count: " in said
  kept = json.loads((workdir / "evaluations.json").read_text())
  before = json.loads((finished / "evaluations.json").read_text())
  strip = lambda rows: [{**r, "seconds": 0} for r in rows]
  assert strip(kept) == strip(before)


def test_the_newest_checkpoint_damaged_falls_back(run_config, stopped, caplog):
  expected = final_params(run_config, stopped, 2)
  for path in (stopped / "checkpoints" / "4").rglob("*"):
    if path.is_file() and path.stat().st_size > 200:
      path.write_bytes(b"\0" * 50)
  restored = final_params(run_config, stopped)
  assert int(restored.step) == 2
  assert "checkpoint 4" in caplog.text
  np.testing.assert_array_equal(
    jax.tree.leaves(restored)[-1], jax.tree.leaves(expected)[-1]
  )


def test_a_half_written_checkpoint_is_ignored(run_config, stopped):
  half = stopped / "checkpoints" / "6.orbax-checkpoint-tmp"
  half.mkdir()
  (half / "part").write_text("x")
  code = train.train_and_evaluate(run_config, stopped, stop_at=5)
  assert code == command.EXIT_PREEMPTED
  assert not half.exists()
  half.mkdir()
  with checkpoints.Checkpoints(half.parent, run_config.checkpoint):
    # At once: removed in a thread, it could go while the next save removes it.
    assert not half.exists()


@pytest.fixture
def small_disk(tmp_path):
  """A disk of 24 MB that can be filled and emptied."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting a disk of its own needs root")

  class Disk:
    path = disk

    def fill(self):
      with (disk / "ballast").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
          while file.write(bytes(1 << 16)):
            pass

    def empty(self):
      (disk / "ballast").unlink()

  yield Disk
  subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_does_not_stop_training(
  run_config, small_disk, monkeypatch, caplog, capfd
):
  disk, workdir = small_disk(), small_disk.path / "run"
  run_config.log_every = "1 steps"
  write = log.Log.write

  def write_and_fill(self, step, row):
    # Full from step 1 to step 3: checkpoint 2 is due in between.
    if step == 1:
      disk.fill()
    write(self, step, row)
    if step == 3:
      disk.empty()

  monkeypatch.setattr(log.Log, "write", write_and_fill)
  code = train.train_and_evaluate(run_config, workdir, stop_at=5)
  assert code == command.EXIT_PREEMPTED
  assert "checkpoint 2 could not be saved" in caplog.text
  assert "training goes on" in caplog.text
  assert "the log cannot be written" in capfd.readouterr().err
  folders = sorted(p.name for p in (workdir / "checkpoints").iterdir())
  assert folders == ["4", "5"]  # nothing is left of 2
  assert sorted(metrics(workdir)) == [1, 2, 3, 4, 5]


def test_a_last_checkpoint_that_cannot_be_saved_is_an_error(
  run_config, small_disk, monkeypatch
):
  disk, workdir = small_disk(), small_disk.path / "run"
  finish = checkpoints.Checkpoints.finish

  def fill_and_finish(self, *arguments):
    self.wait()
    disk.fill()
    finish(self, *arguments)

  monkeypatch.setattr(checkpoints.Checkpoints, "finish", fill_and_finish)
  with pytest.raises(ValueError, match="step 3 could not be saved.*from.*2"):
    train.train_and_evaluate(run_config, workdir, stop_at=3)


def mount(folder, options):
  """A file system of its own, until the test ends."""
  command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
  if subprocess.run(command, capture_output=True).returncode:
    pytest.skip("mounting needs root")


@pytest.mark.parametrize("options", ["ro", "size=4k", "nr_inodes=1"])
def test_a_folder_that_takes_no_checkpoint_is_named_at_once(
  run_config, tmp_path, options
):
  folder = tmp_path / "checkpoints"
  folder.mkdir()
  mount(folder, options)
  try:
    if options == "size=4k":
      (folder / "ballast").write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="no checkpoints can be saved in .*;"):
      checkpoints.Checkpoints(folder, run_config.checkpoint)
  finally:
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_file_in_the_place_of_checkpoints_is_named(run_config, tmp_path):
  (tmp_path / "checkpoints").write_text("")
  with pytest.raises(ValueError, match="no checkpoints can be saved in"):
    checkpoints.Checkpoints(tmp_path / "checkpoints", run_config.checkpoint)


@pytest.mark.slow
def test_a_trace_of_the_steps_that_the_config_names(run_config, tmp_path):
  run_config.profile.start, run_config.profile.steps = 1, 2
  train.train_and_evaluate(run_config, tmp_path, stop_at=4)
  traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
  assert len(traces) == 1
  data = jax.profiler.ProfileData.from_file(str(traces[0]))
  ends = [-1]  # of the calls of the step; one holds another of its name
  for plane in data.planes:
    for line in plane.lines:
      for event in sorted(line.events, key=lambda event: event.start_ns):
        if event.name == "PjitFunction(step)" and event.start_ns > ends[-1]:
          ends.append(event.start_ns + event.duration_ns)
  assert len(ends) == 1 + 2


@pytest.mark.slow
def test_utilisation_is_of_a_known_peak_and_left_out_on_a_cpu(
  run_config, stopped, tmp_path, monkeypatch
):
  row = metrics(stopped)[2]
  assert row["images_per_second_per_chip"] == row["images_per_second"]
  assert "model_flops_utilisation" not in row
  chip = chips.Chip("test", ".*", 1e9, "")
  monkeypatch.setattr(chips, "find", lambda device: chip)
  train.train_and_evaluate(run_config, tmp_path, stop_at=2)
  row = metrics(tmp_path)[2]
  objective = ijepa.IJEPA.from_config(run_config)
  assert row["model_flops_utilisation"] == pytest.approx(
    objective.flops() * row["images_per_second"] / 1e9
  )


def test_a_run_may_start_from_the_weights_of_another(
  run_config, stopped, tmp_path
):
  trained = final_params(run_config, stopped)
  run_config.seed = 5
  run_config.init_from = str(stopped)
  run_config.init_which = "all"
  run_config.optimizer.lr_start = run_config.optimizer.lr = 0.0
  run_config.optimizer.lr_end = 0.0
  train.train_and_evaluate(run_config, tmp_path / "second", stop_at=1)
  started = final_params(run_config, tmp_path / "second")
  for a, b in zip(
    jax.tree.leaves(trained.params), jax.tree.leaves(started.params)
  ):
    np.testing.assert_array_equal(a, b)


def test_a_loss_that_is_not_finite_stops_the_run(run_config, tmp_path):
  run_config.optimizer.lr_start = run_config.optimizer.lr = 1e30
  with pytest.raises(FloatingPointError, match="loss of step"):
    train.train_and_evaluate(run_config, tmp_path)
  assert not (tmp_path / "report.html").exists()


def test_a_workdir_of_another_config_is_refused(run_config, stopped):
  run_config.log_every = "1 steps"  # may differ
  train.train_and_evaluate(run_config, stopped, stop_at=5)
  run_config.encoder.mlp_ratio = 2.0
  with pytest.raises(ValueError, match="encoder.mlp_ratio=3.0 there, 2.0 here"):
    train.train_and_evaluate(run_config, stopped)


def test_a_run_goes_on_with_corrected_settings_where_they_are_accepted(
  run_config, stopped, capfd
):
  run_config.data.crop_scale = (0.5, 0.75)
  with pytest.raises(ValueError, match="crop_scale=.*--accept_changes"):
    train.train_and_evaluate(run_config, stopped, stop_at=5)
  assert "crop_scale" not in capfd.readouterr().err
  code = train.train_and_evaluate(
    run_config, stopped, stop_at=5, accept_changes=True
  )
  assert code == command.EXIT_PREEMPTED
  said = capfd.readouterr().err
  assert "goes on from step 4 with data.crop_scale=[0.3, 1.0] there" in said
  assert "[0.5, 0.75] here" in said
  stored = config_lib.read(stopped / "config.json")
  assert stored.data.crop_scale == (0.5, 0.75)  # from now on it is the run's
  assert train.train_and_evaluate(run_config, stopped, stop_at=5)


def test_a_key_that_an_older_version_lacked_may_keep_its_default(
  config, tmp_path
):
  claim = workdir_lib.describe(config)
  old = json.loads(json.dumps(claim))
  del old["optimizer"]["mu_dtype"]
  (tmp_path / "config.json").write_text(json.dumps(old))
  workdir_lib.check(claim, tmp_path)
  claim["optimizer"]["mu_dtype"] = "bfloat16"
  with pytest.raises(ValueError, match="mu_dtype='float32' there"):
    workdir_lib.check(claim, tmp_path)


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("data.source", "web", "known: tfds, folder, scenes, mixture"),
    ("encoder.patch_size", 7, "nearest patch sizes"),
    ("masks.min_keep", 500, "min_keep"),
    ("masks.name", "releasd", "released"),
    ("batch_size", 0, "from 1 to"),
    ("accumulate_steps", 3, "not a multiple"),
    ("compute.dtype", "float16", "known: float32, bfloat16"),
    ("total", "soon", "a number and a unit"),
    ("data.mean", (0.5,), "one a channel"),
    ("sharding", ((".*", "cut"),), "known: split, replicate"),
    ("sharding", (("(", "split"),), "not a regular expression"),
    ("sharding", (".*", "split"), r"0. is '..'; it needs .a regular exp"),
    ("sharding", (("bias", "split"),), 'no rule of config.sharding matches "'),
    ("encoder.width", 30, "multiple of 4"),
  ],
)
def test_misuse_is_named_and_leaves_nothing(
  run_config, tmp_path, key, value, message
):
  workdir = tmp_path / "run"
  node = run_config
  *parents, leaf = key.split(".")
  for parent in parents:
    node = node[parent]
  node[leaf] = value
  with pytest.raises(ValueError, match=message):
    train.train_and_evaluate(run_config, workdir)
  assert not workdir.exists()


@pytest.mark.parametrize(
  "change, message",
  [(dict(label="colour"), "colour"), (dict(test="validation"), "validation")],
)
def test_an_evaluation_without_its_data_is_named_before_training(
  run_config, tmp_path, change, message
):
  settings = config_lib.evaluation("count")
  settings.update(change)
  run_config.evaluations.count = settings
  with pytest.raises(ValueError, match=message):
    train.train_and_evaluate(run_config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_an_empty_folder_is_named_and_leaves_nothing(run_config, tmp_path):
  (tmp_path / "images").mkdir()
  run_config.data.source = "folder"
  run_config.data.name = str(tmp_path / "images")
  with pytest.raises(ValueError, match="no image"):
    train.train_and_evaluate(run_config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_its_own_code(scenes_dir, tmp_path):
  overrides = {
    "total": "100000 steps",
    "optimizer.warmup": "2 steps",
    "log_every": "1 steps",
    "checkpoint.every": "0 steps",
    "batch_size": 8,
    "data.num_scenes": "(24, 10)",
    "data.image_size": 40,
    "data.data_dir": scenes_dir,
    "encoder.depth": 4,
    "encoder.width": 32,
    "predictor.depth": 1,
    "masks.min_keep": 2,
  }
  process = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "jepa_jax.train",
      "--config",
      "experiments/quickstart.py",
      "--workdir",
      str(tmp_path),
      *(f"--config.{k}={v}" for k, v in overrides.items()),
    ],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  while "step 3 of" not in process.stdout.readline():
    assert process.poll() is None, process.stderr.read()
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == command.EXIT_PREEMPTED, errors
  assert "stopped and saved at step" in errors
  with checkpoints.Checkpoints(tmp_path / "checkpoints") as saved:
    assert saved.steps()[-1] >= 3


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
  path = tmp_path / "run.json"
  log.write_whole(path, "first")

  def kill(*arguments):
    raise KeyboardInterrupt

  for what in ("fsync", "replace"):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
      patch.setattr(os if what == "fsync" else type(path), what, kill)
      log.write_whole(path, "second")
    assert path.read_text() == "first"
  log.write_whole(path, "ä")
  assert path.read_bytes() == "ä".encode()
  assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_every_signal_to_end_stops_after_the_step(name):
  number = getattr(signal, name)
  before = signal.signal(number, signal.SIG_DFL)  # a shell may ignore it
  try:
    with distributed.Stopper() as stopper:
      assert not stopper.check(1)
      signal.raise_signal(number)
      assert stopper.check(2)
  finally:
    signal.signal(number, before)


def test_a_signal_that_is_ignored_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
  try:
    with distributed.Stopper() as stopper:
      signal.raise_signal(signal.SIGHUP)
      assert not stopper.check(1)
  finally:
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
  "text, steps",
  [
    ("1 epochs", 1),  # 36 images, a quarter of a batch
    ("10 epochs", 2),
    ("7 steps", 7),
    ("1000 examples", 7),
    ("1 examples", 1),
    ("0 epochs", 0),
  ],
)
def test_what_is_longer_than_nothing_is_at_least_a_step(text, steps):
  duration = durations.Duration.parse(text, "total")
  assert duration.steps(batch_size=136, num_examples=36) == steps


def test_a_warmup_may_be_a_share_of_the_total(config):
  config.total, config.optimizer.warmup = "37 steps", "10 %"
  assert config_lib.steps(config, "optimizer.warmup") == 3
  config.total = "10 %"
  with pytest.raises(ValueError, match='total is "10 %"; it needs a number'):
    config_lib.steps(config, "total")


def run_command(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "jepa_jax.train", *arguments],
    capture_output=True,
    text=True,
    timeout=120,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--config.encodr.width=3"], 'unknown config key "encodr.width"; nearest'),
    (["--config.batch_size=many"], "it needs a whole number, from 1 to"),
    (["--workdri=x"], "nearest: --workdir"),
  ],
)
def test_the_command_line_answers_in_one_line(tmp_path, arguments, message):
  done = run_command(
    "--config",
    "experiments/quickstart.py",
    "--workdir",
    str(tmp_path / "x"),
    *arguments,
  )
  assert done.returncode == command.EXIT_BAD_INPUT
  assert message in done.stderr
  assert len(done.stderr.strip().splitlines()) == 1
  assert not (tmp_path / "x").exists()


def row_of(workdir, start, step, value, close=True):
  rows = log.Log(workdir, start=start, total=9, quiet=True)
  rows.write(step, {"loss": value})
  if close:
    rows.__exit__()
  return rows


def test_a_row_is_on_disk_once_it_is_written(tmp_path):
  held = row_of(tmp_path, 0, 3, 0.5, close=False)  # until the process is gone
  assert points(tmp_path) == [(3, "loss")]
  assert metrics(tmp_path) == {3: {"step": 3, "loss": 0.5}}
  held.__exit__()


def test_what_a_killed_process_wrote_later_is_no_point(tmp_path):
  for start, step in ((0, 2), (0, 4), (2, 4), (4, 5)):
    row_of(tmp_path, start, step, 0.5)
    folder = tmp_path / "tensorboard"
    for path in folder.glob("events*"):  # each process has its own
      path.rename(folder / f"{start}{step}")
  assert points(tmp_path) == [(4, "loss"), (5, "loss")]


@pytest.mark.parametrize(
  "last, kept",
  [
    ('{"step": 4, "lo', ""),
    ("\0\0\0", ""),
    ('{"step": 4, "loss": 1.0}', '{"step": 4, "loss": 1.0}\n'),
    ("", ""),
  ],
)
def test_a_torn_line_of_metrics_is_dropped_aloud(tmp_path, capsys, last, kept):
  path, whole = tmp_path / "metrics.jsonl", '{"step": 2, "loss": 2.0}\n'
  path.write_text(whole + last)
  row_of(tmp_path, 4, 6, 0.25)
  row = '{"step": 6, "loss": 0.25}\n'
  assert path.read_text() == whole + kept + row
  said = capsys.readouterr().err
  assert ("cut short, and is dropped" in said) == (last > kept)


def test_an_evaluation_is_not_repeated_in_the_log(tmp_path):
  for start in (6, 9, 9):
    row_of(tmp_path, start, 9, 0.5)
  assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("damage", ["", "[", "\0" * 40], ids=len)
def test_a_damaged_config_is_taken_from_a_checkpoint(
  run_config, stopped, capsys, damage
):
  path = stopped / "config.json"
  whole = path.read_text()
  path.write_text(damage)
  claim = workdir_lib.describe(run_config)
  workdir_lib.check(claim, stopped)
  assert "is damaged: taken from a checkpoint" in capsys.readouterr().err
  assert path.read_text() == whole
  path.write_text(damage)
  claim["encoder"]["mlp_ratio"] = 2.0
  with pytest.raises(ValueError, match="another config"):
    workdir_lib.check(claim, stopped)
  path.write_text(damage)
  shutil.rmtree(stopped / "checkpoints")
  with pytest.raises(ValueError, match="cannot be read; remove it or use"):
    workdir_lib.check(claim, stopped)
