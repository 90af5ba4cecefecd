"""Whole runs of every objective but I-JEPA, whose runs test_train has.

What the trainer, evaluations, report and `load` promise holds for objectives
that they do not know, one of them outside of the package.
"""

import functools
import json
import os
import subprocess
import sys

from conftest import build
import jax
import numpy as np
import pytest
from test_program import OUTSIDE, config_of
from test_train import final_params, metrics

import jepa_jax
from jepa_jax import command, objectives, train
from jepa_jax import config as config_lib
from jepa_jax.data import pipeline

# Whole runs are dear, and an objective from outside of the package, whose
# targets are not averaged, shows most of what could fall.
OTHERS = [
  OUTSIDE,
  *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in sorted(set(objectives.OBJECTIVES) - {"ijepa"})
  ),
]


def run_config(name, scenes_dir):
  config = config_of(name)
  config.total = "6 steps"
  config.data.data_dir = scenes_dir
  config.data.label = "count"
  config.encoder.depth = 2
  config.evaluations.count = config_lib.evaluation("count")
  config.evaluations.count.update(features=("last",), protocols=("knn",))
  return config


@pytest.fixture(scope="module", params=OTHERS)
def run(request, tmp_path_factory, scenes_dir):
  """A run that was stopped in the middle and started again."""
  config = run_config(request.param, scenes_dir)
  workdir = tmp_path_factory.mktemp("runs") / "run"
  code = train.train_and_evaluate(config, workdir, stop_at=3)
  assert code == command.EXIT_PREEMPTED
  assert train.train_and_evaluate(config, workdir) == 0
  return config, workdir


def test_a_resumed_run_ends_in_the_bits_of_the_bare_loop(run):
  config, workdir = run
  program = build(config)
  state = program.init(config.seed)
  data = pipeline.train_dataset(config, program.batch_spec)
  for batch in data.take(6).as_numpy_iterator():
    state, _, _ = program.step(state, batch)
  saved = final_params(config, workdir)
  assert int(saved.step) == 6
  assert jax.tree.structure(state) == jax.tree.structure(saved)
  for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(saved)):
    np.testing.assert_array_equal(x, y)


def test_it_is_evaluated_and_reported(run):
  config, workdir = run
  table = json.loads((workdir / "evaluations.json").read_text())
  encoders = {row["encoder"] for row in table}
  assert encoders == {"trained", "random", "pixels"}
  row, state = metrics(workdir)[6], final_params(config, workdir)
  norms = {f"grad_norm/{name}" for name in state.params}
  assert norms and {"loss", "effective_rank", *norms} <= row.keys()
  averages = bool(state.target_params)
  assert ("momentum" in row) == averages
  page = (workdir / "report.html").read_text()
  assert "count" in page and "<svg" in page
  assert ("Momentum" in page) == averages


def test_it_loads(run):
  config, workdir = run
  model = jepa_jax.load(workdir)
  images = np.random.default_rng(0).integers(
    0, 256, (3, 40, 40, 3), dtype=np.uint8
  )
  state = final_params(config, workdir)
  expected = model.module.apply(
    {"params": state.network("encoder")}, model.preprocessing(images)
  ).mean(axis=1)
  np.testing.assert_allclose(model.encode(images), expected, atol=1e-4)


SCRIPT = """
import json, sys
sys.path.insert(0, "tests")
import jax
import test_program
from jepa_jax.training import program as program_lib, sharding

results = {}
for name in sys.argv[1:]:
  losses = []
  for data, fsdp in ((1, 1), (2, 2)):
    config = test_program.config_of(name)
    config.encoder.depth = 2
    if name == "ijepa":  # what is of the whole batch
      config.method.update(target_norm="position", variance=1.0, sigreg=0.1)
    config.mesh.data, config.mesh.fsdp = data, fsdp
    mesh = sharding.make_mesh(config.mesh, jax.devices()[: data * fsdp])
    program = program_lib.build(config, mesh)
    state = program.init(0)
    for step in range(3):
      batch = test_program.make_batch(program, step)
      batch = {
        k: jax.device_put(v, program.batch_spec[k].sharding)
        for k, v in batch.items()
      }
      state, metrics, _ = program.step(state, batch)
      losses.append(float(metrics["loss"]))
  split = [
    x.sharding.shard_shape(x.shape) != x.shape
    for x in jax.tree.leaves(state.frozen) if x.ndim > 2 and 1 not in x.shape
  ]
  results[name] = losses, all(split)
print(json.dumps(results))
"""


@functools.cache
def on_meshes(names):
  """Name -> losses on one device and then on four, whether frozen is split."""
  flags = os.environ.get("XLA_FLAGS", "")
  flags += " --xla_force_host_platform_device_count=4"
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, *names],
    capture_output=True,
    text=True,
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
  "name", [*OTHERS, pytest.param("ijepa", marks=pytest.mark.slow)]
)
def test_a_mesh_changes_nothing_but_the_rounding(name):
  inside = tuple(sorted(objectives.OBJECTIVES))
  names = inside if name in inside else (name,)
  losses, frozen_is_split = on_meshes(names)[name]
  np.testing.assert_allclose(losses[:3], losses[3:], rtol=1e-5)
  assert frozen_is_split


def test_names_without_a_provider_are_refused(config, scenes_dir):
  config.data.data_dir = scenes_dir
  spec = jax.ShapeDtypeStruct
  image = spec((4, 40, 40, 3), np.uint8)
  with pytest.raises(ValueError, match='"speech".* there are: image, views'):
    pipeline.train_dataset(config, {"speech": image})
  with pytest.raises(ValueError, match=r"uint8 \(40, 40, 1\).*\(40, 40, 3\)"):
    pipeline.train_dataset(config, {"image": spec((4, 40, 40, 1), np.uint8)})
  with pytest.raises(ValueError, match="data.label is empty"):
    pipeline.train_dataset(config, {"label": spec((4,), np.int32)})
  config.data.label = "count"
  config.method.classes = 7
  with pytest.raises(ValueError, match="has 8 classes and method.classes is 7"):
    pipeline.train_dataset(config, {"label": spec((4,), np.int32)})


def test_a_batch_holds_what_is_declared_and_labels_go_with_images(
  config, scenes_dir
):
  data = config.data
  data.data_dir, data.label = scenes_dir, "count"
  data.crop_scale = data.crop_ratio = (1.0, 1.0)  # whole images
  spec = {"label": jax.ShapeDtypeStruct((4,), np.int16)}
  spec["image"] = jax.ShapeDtypeStruct((4, 40, 40, 3), np.uint8)
  everything = pipeline.evaluation_dataset(
    data, batch_size=24, labels=["count"]
  )
  (whole,) = everything.as_numpy_iterator()
  labels = {
    image.tobytes(): label
    for image, label in zip(whole["image"], whole["labels"]["count"])
  }
  assert len(labels) == 24 and len({*labels.values()}) > 2
  dataset = pipeline.train_dataset(config, spec)
  for batch in dataset.take(6).as_numpy_iterator():
    assert [*batch] == ["label", "image"] and batch["label"].dtype == np.int16
    found = [labels[image.tobytes()] for image in batch["image"]]
    assert found == batch["label"].tolist()
