"""Shared parts of the tests: paths, a small config, quick compilation."""

import atexit
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

# The numbers that tests compare with are a CPU's, and of the processes that
# run tests at once one alone could open a TPU. Before JAX is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# What one test compiles is there for the others of the session, in whatever
# process: most of them want the same train step. The folder goes with the
# session, so that none finds what another version of XLA has left.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)

import jax
import pytest

from jepa_jax import config as config_lib

# These take minutes and come first, so that the processes end together.
LONGEST = ("test_train", "test_distributed", "test_program", "test_models")

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / "tests/data"
EXPERIMENTS = ROOT / "experiments"
# What makes XLA's CPU compiler quick.
_QUICK = (
  "--xla_backend_optimization_level=0",
  "--xla_cpu_use_fusion_emitters=false",
)


def compile_quickly() -> None:
  """Makes compilation quick, of this process and its children.

  Tests compile many small programs and run each a few times: XLA's optimizer
  would take far longer than it saves. XLA ends a process whose XLA_FLAGS hold
  a flag that it does not know, and flags come and go with its versions; so a
  process that may end is asked first. To be called before JAX's first use;
  nothing is done where XLA_FLAGS are set.
  """
  if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(filter(known_to_xla, _QUICK))


def known_to_xla(flag: str) -> bool:
  """Whether this version of XLA accepts a flag in XLA_FLAGS."""
  done = subprocess.run(
    [sys.executable, "-c", "import jax; jax.devices()"],
    env=os.environ | {"XLA_FLAGS": flag},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  return done.returncode == 0


compile_quickly()


def pytest_collection_modifyitems(items):
  rank = {name: place for place, name in enumerate(LONGEST)}
  items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def small_config():
  """A complete config whose sizes all differ: B=4, grid 5 x 5, D=28, P=24."""
  c = config_lib.defaults()
  c.batch_size = 4
  c.total = "6 steps"
  c.data.source = "scenes"
  c.data.num_scenes = (24, 10)
  c.data.num_examples = 24
  c.data.image_size = 40
  c.masks.min_keep = 2
  c.encoder.update(width=28, depth=5, num_heads=7, mlp_ratio=3.0)
  c.encoder.patch_size = 8
  c.predictor.update(width=24, depth=2, num_heads=3, mlp_ratio=2.0)
  c.optimizer.warmup = "2 steps"
  c.compute.dtype = "float32"
  c.compute.scan = False
  c.log_every = "2 steps"
  c.checkpoint.every = "2 steps"
  return c


_programs = {}


def build(config):
  """The program of a config on one device, one for all equal configs.

  Its step is compiled once then, whichever test comes first.
  """
  key = config.to_json_best_effort(sort_keys=True)
  if key not in _programs:
    from jepa_jax.training import program, sharding

    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    _programs[key] = program.build(config, mesh)
  return _programs[key]


@pytest.fixture
def config():
  return small_config()


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory):
  """A folder that keeps the rendered scenes of all tests."""
  return str(tmp_path_factory.mktemp("scenes"))
