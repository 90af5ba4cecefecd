"""The cache of compiled programs: where it is, and that it changes no bit."""

import os
import pathlib
import subprocess
import sys

import conftest
import pytest

from jepa_jax.training import compile_cache

# argv: a folder. A step three times: without the cache, filling it, from it.
COMPARE = """
import pathlib, sys
import jax, numpy as np
import conftest
from jepa_jax.training import compile_cache, program, sharding

config = conftest.small_config()
config.encoder.depth = config.predictor.depth = 1
mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])

def step():
  jax.clear_caches()
  built = program.build(config, mesh)
  batch = {}
  for name, spec in built.batch_spec.items():
    size = np.prod(spec.shape, dtype=int)
    batch[name] = (np.arange(size).reshape(spec.shape) % 5).astype(spec.dtype)
  state, metrics, _ = built.step(built.init(0), batch)
  return [np.asarray(x).tobytes() for x in jax.tree.leaves((state, metrics))]

without = step()
folder = compile_cache.use(sys.argv[1])
filling = step()
entries = sorted(p.name for p in folder.iterdir())
assert any(name.startswith("jit_step") for name in entries), entries
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
again = step()
assert "/jax/compilation_cache/cache_hits" in hits
assert without == filling == again
print("the same bits")
"""


def environment(**changes):
  kept = {k: v for k, v in os.environ.items() if "CACHE" not in k}
  path = os.pathsep.join((str(conftest.ROOT), str(conftest.ROOT / "tests")))
  return kept | {"PYTHONPATH": path} | changes


@pytest.mark.slow
def test_no_bit_depends_on_it(tmp_path):
  code = "import os, conftest\nos.environ.pop('JAX_COMPILATION_CACHE_DIR')\n"
  code += "import jax\njax.config.update('jax_compilation_cache_dir', None)\n"
  done = subprocess.run(
    [sys.executable, "-c", code + COMPARE, tmp_path],
    capture_output=True,
    text=True,
    env=environment(),
  )
  assert done.stdout == "the same bits\n", done.stderr[-2000:]
  assert "machine type" not in done.stderr.lower()  # nor does XLA complain


@pytest.fixture
def updates(monkeypatch):
  """What JAX would have been told, in a process with an empty environment."""
  seen = {}
  monkeypatch.setattr(compile_cache.jax.config, "update", seen.__setitem__)
  for name in ("JAX_COMPILATION_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
    monkeypatch.delenv(name, raising=False)
  return seen


def test_its_place_is_the_users(updates, monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  folder = compile_cache.use("auto")
  assert folder.parent == tmp_path / ".cache/jepa_jax/compiled"
  assert updates["jax_compilation_cache_dir"] == str(folder)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
  assert compile_cache.use("auto").parent == tmp_path / "x/jepa_jax/compiled"
  assert compile_cache.use("~/mine") == tmp_path / "mine"


def test_it_may_be_off(updates, monkeypatch, tmp_path):
  assert compile_cache.use("") is None
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  assert compile_cache.use("auto") is None
  assert not updates


def no_home():
  raise RuntimeError("Could not determine home directory.")


def test_without_a_home_it_is_off(updates, monkeypatch):
  monkeypatch.setattr(pathlib.Path, "home", no_home)
  assert compile_cache.use("auto") is None
  assert not updates


@pytest.mark.parametrize(
  "place", ["/proc/nowhere", "/dev/null/x", "~nobody9/x"]
)
def test_what_cannot_be_written_is_off(updates, place):
  assert compile_cache.use(place) is None
  assert not updates
