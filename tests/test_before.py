"""A run of the version before restores, trains on alike and resumes.

tests/data/README.md says what data/before.zip holds.
"""

import hashlib
import json
import zipfile

import conftest
import jax
import numpy as np
import optax
import pytest

from jepa_jax import command, train
from jepa_jax import config as config_lib
from jepa_jax.training import checkpoints, sharding
from jepa_jax.training import program as program_lib


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("before") / "run"
  with zipfile.ZipFile(conftest.DATA / "before.zip") as archive:
    archive.extractall(folder)
  return folder


@pytest.fixture(scope="module")
def expected(workdir):
  return json.loads((workdir / "expected.json").read_text())


@pytest.fixture(scope="module")
def restored(workdir):
  config = config_lib.read(workdir / "config.json")
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
  program = program_lib.build(config, mesh)
  with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
    return program, saved.restore(program.state_spec)


def named(tree):
  """Path -> leaf."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def digest(x):
  return hashlib.sha256(np.ascontiguousarray(x).tobytes()).hexdigest()[:16]


def test_the_state_is_the_same_in_all_bits(restored, expected):
  _, state = restored
  assert int(state.step) == expected["step"] == 3
  moment = lambda name: optax.tree_utils.tree_get(state.opt_state, name)
  trees = {
    "params": state.params,
    "target_params": state.target_params,
    "mu": moment("mu"),
    "nu": moment("nu"),
  }
  for name, tree in trees.items():
    digests = {path: digest(leaf) for path, leaf in named(tree).items()}
    assert digests == expected["digests"][name], name


def test_the_next_step_is_the_same(restored, expected, workdir):
  program, state = restored
  batch = dict(np.load(workdir / "batch.npz"))
  state = jax.tree.map(lambda x: x.copy(), state)  # the step takes it
  state, metrics, _ = program.step(state, batch)
  for name, value in expected["metrics"].items():
    rtol = 1e-4 if "grad" in name else 1e-6
    np.testing.assert_allclose(metrics[name], value, rtol=rtol, err_msg=name)
  for network, norms in expected["norms"].items():
    ours = named(getattr(state, network))
    assert ours.keys() == norms.keys()
    for path, norm in norms.items():
      np.testing.assert_allclose(
        np.linalg.norm(ours[path]), norm, rtol=1e-5, err_msg=path
      )


def test_the_run_goes_on_to_the_same_end(
  workdir, restored, expected, tmp_path, scenes_dir
):
  experiment = tmp_path / "experiment.py"
  experiment.write_text(f"""
import pathlib
from jepa_jax import config as config_lib

def get_config():
  config = config_lib.read(pathlib.Path({str(workdir / "config.json")!r}))
  config.data.data_dir = {scenes_dir!r}
  return config
""")
  config = command.load_config(str(experiment))
  assert train.train_and_evaluate(config, workdir) == 0
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert [row["step"] for row in rows] == [4, 5, 5]
  for ours, before in zip(rows, expected["rows"], strict=True):
    for name, value in before.items():
      rtol = 1e-4 if "grad" in name else 1e-5
      np.testing.assert_allclose(ours[name], value, rtol=rtol, err_msg=name)
  assert (workdir / "report.html").exists()
