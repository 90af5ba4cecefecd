"""That the benchmarks run and count right; nothing here is timed."""

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
import pytest
import speed

from jepa_jax import bench, command
from jepa_jax import config as config_lib
from jepa_jax.bench import __main__ as bench_main
from jepa_jax.bench import data, loop, masks, pil, step
from jepa_jax.models import flops
from jepa_jax.objectives import ijepa


@pytest.fixture
def one_core():
  """The machine is shared: the benchmarks of data get one core of it."""
  before = os.sched_getaffinity(0)
  yield bench_main.use_cores(1)
  os.sched_setaffinity(0, before)


def positive(rows, *names):
  return all(np.isfinite(row[n]) and row[n] > 0 for row in rows for n in names)


@pytest.mark.slow
def test_the_command_prints_json_of_masks_on_one_core():
  flags = "masks --json --rounds 1 --batches 2 --batch_size 3"
  flags += " --grid 12x9 --sampler corrected rasterized"
  done = subprocess.run(
    [sys.executable, "-m", "jepa_jax.bench", *flags.split()],
    capture_output=True,
    text=True,
    check=True,
  )
  rows = json.loads(done.stdout)
  names = ("sampler", "grid", "cores", "batch_size", "num_targets", "rounds")
  assert [[row[n] for n in names] for row in rows] == [
    ["corrected", "12x9", 1, 3, 4, 1],
    ["rasterized", "12x9", 1, 3, 3, 1],
  ]
  assert positive(rows, "images_per_second")


def test_a_wrong_sampler_is_named_with_the_known_ones():
  with pytest.raises(ValueError, match="corected.*corrected"):
    masks.measure(["corected"], [(8, 8)])


@pytest.mark.slow
def test_data_compares_the_pipeline_with_pil(one_core):
  rows = data.measure(
    None, cores=one_core, images=5, batch_size=3, rounds=1, batches=2
  )
  readers = ["pipeline", "decode", "pil", "pil_uint8"]
  assert [row["reader"] for row in rows] == readers
  assert positive(rows, "images_per_second", "images_per_second_per_core")
  assert positive(rows, "times_pil", "times_pil_uint8")
  assert rows[0]["decode_share"] > 0
  assert {row["cores"] for row in rows} == {1}
  assert rows[2]["times_pil"] == rows[3]["times_pil_uint8"] == 1


def test_the_usual_chain_normalises_what_it_read(tmp_path):
  files = data.write_jpegs(tmp_path, 2)
  defaults = config_lib.defaults().data
  settings = {
    "crop_scale": (1.0, 1.0),
    "crop_ratio": (4 / 3, 4 / 3),  # the whole image
    "mean": defaults.mean,
    "std": defaults.std,
  }
  memory = np.zeros((1, 2, 3, 24, 24), np.float32)
  pil._start_worker(memory, memory.shape, settings)
  pil._read_batch((0, files, 0, True))
  tensors = memory[0].copy()
  pil._read_batch((0, files, 0, False))
  pixels = memory.view(np.uint8).reshape(-1)[: tensors.size]
  pixels = pixels.reshape(2, 24, 24, 3)
  wanted = (pixels / 255 - defaults.mean) / defaults.std
  np.testing.assert_allclose(tensors.transpose(0, 2, 3, 1), wanted, atol=1e-5)
  whole = np.asarray(Image.open(files[1]).resize((24, 24), 2))
  np.testing.assert_array_equal(pixels[1], whole)


def test_data_times_the_pipeline_of_a_config(config, scenes_dir, one_core):
  config.data.data_dir = scenes_dir
  rows = data.measure(config.lock(), cores=one_core, rounds=1, batches=2)
  assert [row["reader"] for row in rows] == ["pipeline"]
  assert rows[0]["batch_size"] == 4 and rows[0]["image_size"] == 40
  assert config.data.threads == 0


def test_resume_reads_the_batch_of_its_step(monkeypatch):
  monkeypatch.setattr(data, "SHARDS", 3)
  rows = data.resume(batch_size=2, records=2051, step=5000)
  assert [row["step"] for row in rows] == [5000, 5000, 0]
  assert {row["records"] for row in rows} == {2051}
  assert positive(rows, "first_batch_seconds")


def test_listing_finds_every_file():
  rows = data.listing(42, folders=3)
  assert [(row["start"], row["files"]) for row in rows] == [
    ("first", 42),
    ("again", 42),
  ]
  assert positive(rows, "seconds")


@pytest.mark.parametrize("size", [(500, 375), (31, 400), (400, 31)])
def test_crops_of_the_comparison_lie_inside(size):
  rng = np.random.default_rng(0)
  crops = [
    pil.random_crop(rng, *size, (0.3, 1.0), (3 / 4, 4 / 3)) for _ in range(200)
  ]
  left, top, width, height = np.transpose(crops)
  assert min(left.min(), top.min(), width.min() - 1, height.min() - 1) >= 0
  assert (left + width).max() <= size[0] and (top + height).max() <= size[1]
  assert 0.7 < (width / height).min() and (width / height).max() < 1.4


def test_generated_jpegs_compress_like_photographs(tmp_path):
  files = data.write_jpegs(tmp_path, 3)
  sizes = [pathlib.Path(file).stat().st_size for file in files]
  assert 30_000 < min(sizes) and max(sizes) < 150_000


def test_step_gives_the_row_and_a_trace(config, tmp_path):
  config.encoder.depth, config.predictor.depth = 2, 1
  config.total, config.data.num_examples = "3 epochs", 0
  (row,) = step.measure(
    config.lock(), rounds=1, steps=1, profile=str(tmp_path / "trace")
  )
  needed = (
    *("compile_seconds", "step_seconds", "images_per_second", "devices"),
    *("model_flops_per_step", "peak_flops_per_second", "utilisation"),
  )
  assert positive([row], *needed)
  assert row["minor_faults_per_step"] >= 0
  assert row["utilisation"] == pytest.approx(
    row["model_flops_per_step"]
    / row["step_seconds"]
    / row["peak_flops_per_second"]
  )
  assert list((tmp_path / "trace").rglob("*.xplane.pb"))
  json.dumps(row)


def test_loop_is_timed_beside_its_bare_steps(config):
  config.encoder.depth, config.predictor.depth = 2, 1
  (row,) = loop.measure(config.lock(), rounds=1)
  assert row["steps"] == 2 and row["rows_written"] == 1
  assert row["loop_share"] == pytest.approx(
    row["loop_images_per_second"] / row["bare_images_per_second"]
  )
  assert positive([row], "loop_share", "loop_share_of_cpu")
  json.dumps(row)


def test_synthetic_batches_hold_legal_ids(config):
  objective = ijepa.IJEPA.from_config(config)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  spec = {
    name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device)
    for name, s in objective.batch_spec(3).items()
  }
  spec["label"] = jax.ShapeDtypeStruct((3,), jnp.int32, sharding=device)
  batch = step.synthetic_batch(spec)
  for name, s in spec.items():
    assert batch[name].shape == s.shape and batch[name].dtype == s.dtype
  assert batch["target_ids"].max() < 25 and batch["label"].max() == 0
  assert batch["image"].std() > 1 and batch["context_valid"].all()


def test_flops_of_vit_h_are_the_published_count():
  objective = ijepa.IJEPA.from_config(config_lib.defaults())
  shapes = dataclasses.replace(
    objective.shapes, context_patches=68, target_patches=42
  )
  objective = dataclasses.replace(objective, shapes=shapes)
  # Published with every patch's output, where four blocks of 42 are wanted.
  target = functools.partial(flops.encoder, objective.encoder, 256, 3)
  assert target() - target(168) == pytest.approx(0.34 * target() / 32, rel=0.2)
  assert objective.flops() + target() - target(168) == pytest.approx(
    649e9, rel=1e-3
  )


@pytest.mark.parametrize(
  "flags, message",
  [
    ("data --cores 999", "--cores is 999"),
    ("masks --rounds 0", "--rounds is 0"),
    ("masks --samplr corrected", "--sampler"),
    ("step --config nowhere.py", "nowhere.py"),
  ],
)
def test_wrong_flags_end_in_one_line(monkeypatch, capsys, flags, message):
  monkeypatch.setattr(sys, "argv", ["bench", *flags.split()])
  before = os.sched_getaffinity(0)
  with pytest.raises(SystemExit) as exit_:
    command.run(bench_main.main, bench_main.parser(flags.split()[0]))
  os.sched_setaffinity(0, before)
  assert exit_.value.code == command.EXIT_BAD_INPUT
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_tables_hold_every_value():
  rows = [{"a": 1.23456, "b": "x"}, {"a": 54321.0, "c": None}]
  lines = bench_main.show(rows).split("\n")
  assert [line.split() for line in lines] == [
    ["a", "b", "c"],
    ["1.235", "x"],
    ["54,321"],
  ]
  assert bench_main.show(rows[:1]).split() == ["a", "1.235", "b", "x"]


def test_turns_alternate_and_give_medians():
  calls = []

  def turn(name, values):
    values = iter(values)

    def call():
      calls.append(name)
      return next(values)

    return call

  turns = {"a": turn("a", [9, 1, 5, 2]), "b": turn("b", [0, 7, 7, 8])}
  assert bench.in_turns(turns, 3) == {"a": 2, "b": 7}
  assert "".join(calls) == "baabbaab"


@pytest.mark.parametrize(
  ("faulty", "counted", "ran"), [((), 3, 3), (range(3), 3, 6), (range(6), 0, 6)]
)
def test_the_comparison_runs_rounds_with_page_faults_again(
  faulty, counted, ran, monkeypatch, capsys
):
  order = []

  class Side:
    value, turns = 1.0, 0

    def __init__(self, name, settings):
      self.ours = name.startswith("jax")

    def run(self, count):
      order.append(self.ours)
      faults = 30.0 if self.ours and self.turns in faulty else 0.0
      self.turns += 1
      return {"seconds": 1.0 + faults, "minor_faults": faults}

  monkeypatch.setattr(speed, "Side", Side)
  monkeypatch.setattr(speed.importlib.metadata, "version", lambda name: "1")
  flags = ["step", "--pause=0", "--rounds=3"]
  assert speed.main(speed.parse_flags().parse_args(flags)) == 0
  report = json.loads(capsys.readouterr().out)
  assert (report["counted"], len(report["rounds"])) == (counted, ran)
  assert order == ([True, False, False, True] * ran)[: 2 * ran]
  assert report["ratio"] == (1.0 if counted else pytest.approx(1 / 31))
