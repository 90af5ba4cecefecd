"""Damaged checkpoints: what is restored is what was saved, or nothing."""

import argparse
import json
import random
import shutil
import subprocess

import conftest
import jax
import numpy as np
import pytest

from jepa_jax import checkpoints as checkpoints_command
from jepa_jax.convert import formats
from jepa_jax.training import checkpoints
from jepa_jax.training import workdir as workdir_lib

SAVED = (2, 4)  # steps; damage is done to the newest


def empty(path, generator):
  path.write_bytes(b"")


def cut(path, generator):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def delete(path, generator):
  path.unlink()


def zero(path, generator):
  path.write_bytes(bytes(path.stat().st_size))


def flip(path, generator):
  data = bytearray(path.read_bytes())
  data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
  path.write_bytes(data)


def overwrite(path, generator):
  data = bytearray(path.read_bytes())
  start = generator.randrange(len(data))
  data[start : start + 40] = generator.randbytes(len(data[start : start + 40]))
  path.write_bytes(data)


def lengthen(path, generator):
  path.write_bytes(path.read_bytes() + generator.randbytes(100))


def replace(path, generator):
  """By what a file of about the same place in another checkpoint holds."""
  older = path.parents[len(path.parts) - path.parts.index("checkpoints") - 2]
  others = [p for p in (older / str(SAVED[0])).rglob("*") if p.is_file()]
  others.sort(key=lambda p: abs(p.stat().st_size - path.stat().st_size))
  path.write_bytes(others[0].read_bytes())


KINDS = (empty, cut, delete, zero, flip, overwrite, lengthen, replace)


@pytest.fixture(scope="module")
def states():
  """Step -> a state; in no two of them is an array the same."""
  config = conftest.small_config()
  program = conftest.build(config)
  state = program.init(0)
  fill = lambda step: jax.tree.map(
    lambda x: jax.device_put(
      np.random.default_rng(step).standard_normal(x.shape), x.sharding
    ).astype(x.dtype),
    state,
  ).replace(step=state.step + step)
  return program.state_spec, {step: fill(step) for step in SAVED}


@pytest.fixture(scope="module")
def _saved(tmp_path_factory, states):
  folder = tmp_path_factory.mktemp("damage") / "checkpoints"
  with checkpoints.Checkpoints(
    folder, conftest.small_config().checkpoint
  ) as saved:
    for state in states[1].values():
      saved.finish(state)
  return folder


@pytest.fixture
def folder(_saved, tmp_path):
  return shutil.copytree(_saved, tmp_path / "checkpoints")


def assert_right_or_nothing(folder, states, caplog, newest=SAVED[-1]):
  """Restores; returns the step. A wrong bit fails."""
  spec, expected = states
  caplog.clear()
  with checkpoints.Checkpoints(folder) as saved:
    state = saved.restore(spec)
  step = int(state.step)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(expected[step])):
    np.testing.assert_array_equal(a, b)
  if step != newest:
    assert f"checkpoint {newest} of" in caplog.text
  return step


def files(folder):
  newest = folder / str(SAVED[-1])
  return sorted(p.relative_to(folder) for p in newest.rglob("*") if p.is_file())


def largest(folder):
  return max(files(folder), key=lambda p: (folder / p).stat().st_size)


def damage_and_restore(folder, whole, states, caplog, kind, paths):
  """Does it to one file after the other; the steps that were restored."""
  steps = []
  for number, path in enumerate(paths):
    kind(folder / path, random.Random(f"{kind.__name__} {number}"))
    steps.append(assert_right_or_nothing(folder, states, caplog))
    shutil.copy(whole / path, folder / path)
  return steps


def test_a_flipped_bit_in_the_largest_file_is_found(
  folder, _saved, states, caplog
):
  paths = 4 * [largest(folder)]
  steps = damage_and_restore(folder, _saved, states, caplog, flip, paths)
  # About one byte in two hundred is of an index that was written anew further
  # on, which nothing reads: a bit of it may flip and the step still be whole.
  assert steps.count(SAVED[0]) >= 3


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_damage_restores_a_wrong_bit(folder, _saved, states, caplog, kind):
  paths = random.Random(kind.__name__).sample(files(folder), 4)
  damage_and_restore(folder, _saved, states, caplog, kind, paths)


@pytest.mark.attack
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_no_damage_to_any_file_restores_a_wrong_bit(
  folder, _saved, states, caplog, kind
):
  paths = 3 * files(folder)
  steps = damage_and_restore(folder, _saved, states, caplog, kind, paths)
  print(kind.__name__, len(steps), "damages,", steps.count(SAVED[0]), "found")


def test_a_step_of_another_name_is_found(folder, states, caplog):
  (folder / "4").rename(folder / "6")
  assert assert_right_or_nothing(folder, states, caplog, newest=6) == SAVED[0]


def test_nothing_whole_is_an_error(folder, states):
  for step in SAVED:
    files_of = [p for p in (folder / str(step)).rglob("*") if p.is_file()]
    zero(max(files_of, key=lambda p: p.stat().st_size), None)
  with pytest.raises(ValueError, match="none of the checkpoints 4, 2"):
    with checkpoints.Checkpoints(folder) as saved:
      saved.restore(states[0])


def test_a_checkpoint_without_digests_is_restored_and_says_so(
  folder, states, caplog
):
  shutil.rmtree(folder / "4" / "record")
  assert assert_right_or_nothing(folder, states, caplog) == SAVED[-1]
  assert "checkpoint 4 was saved by a version without digests" in caplog.text


def test_load_and_convert_take_no_damaged_weights(
  folder, _saved, tmp_path, caplog
):
  claim = workdir_lib.describe(conftest.small_config())
  (tmp_path / "config.json").write_text(json.dumps(claim))
  encoder = lambda: formats.read(tmp_path, None).networks["target"]
  newest = encoder()
  for path in files(folder):
    if path.parent.name == "d":  # what lies where differs from save to save
      data = bytearray((folder / path).read_bytes())
      for place in range(500, len(data), 1000):
        data[place] ^= 16
      (folder / path).write_bytes(data)
  older = encoder()
  assert "step 4:" in caplog.text and "trying the one before" in caplog.text
  for a, b in zip(jax.tree.leaves(newest), jax.tree.leaves(older)):
    assert np.any(a != b)
  with pytest.raises(ValueError, match="step 4: "):
    formats.read(folder / "4", "all")


def test_the_command_lists_and_verifies(folder, capsys, monkeypatch):
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # restored after the test
  flags = lambda action: argparse.Namespace(action=action, folder=str(folder))
  assert checkpoints_command.main(flags("list")) == 0
  assert checkpoints_command.main(flags("verify")) == 0
  assert capsys.readouterr().out.count("step 4: ") == 2
  flip(folder / largest(folder), random.Random(0))
  assert checkpoints_command.main(flags("verify")) == 1
  lines = capsys.readouterr().out.splitlines()
  assert "step 2: whole, 125 arrays" in lines[0]
  assert "step 4: DAMAGED" in lines[1] and len(lines) == 2
  shutil.rmtree(folder / "2"), shutil.rmtree(folder / "4")
  with pytest.raises(ValueError, match="no checkpoints in"):
    checkpoints_command.main(flags("verify"))


def test_a_full_disk_is_one_line_a_checkpoint(tmp_path, states, caplog, capfd):
  mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("mounting a disk of its own needs root")
  settings = conftest.small_config().checkpoint
  try:
    with checkpoints.Checkpoints(tmp_path / "run", settings) as saved:
      (tmp_path / "ballast").write_bytes(bytes(4 * 2**20 - 150_000))
      for state in states[1].values():
        saved.save(state)
        saved.wait()
      (tmp_path / "ballast").unlink()
      saved.finish(states[1][4])
      assert saved.steps() == [4]
  finally:
    subprocess.run(["umount", "-l", tmp_path], check=True)
  # Not asyncio's: reads that other tests damaged are told of when they are
  # collected, whenever that is.
  records = [r for r in caplog.records if r.name != "asyncio"]
  errors = [r for r in records if r.levelname == "ERROR"]
  said = [r.getMessage().partition(" could")[0] for r in errors]
  assert said == ["checkpoint 2", "checkpoint 4"]
  assert not any(r.exc_info for r in records)
  texts = "\n".join(r.getMessage() for r in records)
  assert "Traceback" not in texts + capfd.readouterr().err
