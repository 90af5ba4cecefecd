"""The arrows between the rooms, and what importing each of them loads."""

import ast
import graphlib
import os
import subprocess
import sys

import conftest
import pytest

PACKAGE = conftest.ROOT / "jepa_jax"

# From the top down: a room imports what stands below it, and itself.
ORDER = (
  "commands",
  *("runs", "command", "launch", "allocator"),  # what commands share
  "pictures",
  *("pretrained", "convert"),
  "evaluation",
  "planning",
  "training",
  *("config", "known_keys"),
  *("data", "render"),
  "objectives",
  "masks",
  "models",
  *("config_table", "durations", "keys"),
  "paths",
)
# Below them, and yet not for them: commands hand such things in.
NEVER = {"data": {"config", "training", "planning"}}


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(path):
  """The room of a file; what can be started is a command."""
  inside = path.relative_to(PACKAGE)
  if inside.parts[0] == "bench" or 'if __name__ == "__main__"' in (
    path.read_text()
  ):
    return "commands"
  return inside.parts[0].removesuffix(".py")


def modules():
  """Dotted name -> file of the whole package."""
  named = {}
  for path in PACKAGE.rglob("*.py"):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    named[".".join(parts).removesuffix(".__init__")] = path
  return named


def edges():
  """File -> files of the package that it imports."""
  known = modules()
  for name, path in known.items():
    for target in imports(path):
      # Of "from a import b", b is a module or something in it.
      target = target if target in known else target.rpartition(".")[0]
      if target in known and target != name and target != "jepa_jax":
        yield path, known[target]


def test_every_room_has_its_place():
  rooms = {room_of(p) for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE}
  rooms |= {room_of(p) for p in PACKAGE.glob("*.py")} - {"__init__"}
  assert rooms == set(ORDER)


def test_arrows_point_down():
  level = {room: number for number, room in enumerate(ORDER)}
  wrong = []
  for path, target in edges():
    above, below = room_of(path), room_of(target)
    if above == below == "commands":
      fine = path.parent == target.parent != PACKAGE
    else:
      fine = level[above] <= level[below]
      fine = fine and above not in NEVER.get(below, ())
    if not fine:
      wrong.append(f"{path} imports {target}")
  assert not wrong


def test_no_file_imports_itself_in_the_end():
  graph = {}
  for path, target in edges():
    graph.setdefault(path, set()).add(target)
  order = graphlib.TopologicalSorter(graph)
  order.prepare()  # names a circle


@pytest.mark.parametrize(
  "room", ["models", "masks", "objectives", "training", "planning"]
)
def test_only_data_imports_tensorflow(room):
  for path in (PACKAGE / room).rglob("*.py"):
    for name in imports(path):
      assert name.split(".")[0] not in ("tensorflow", "torch"), path


def test_models_import_jax_and_flax_alone():
  allowed = {"jax", "flax", "numpy", "jepa_jax"} | set(sys.stdlib_module_names)
  for path in (PACKAGE / "models").rglob("*.py"):
    assert {name.split(".")[0] for name in imports(path)} <= allowed


def loaded_by(statement):
  code = f"import sys; {statement}; print(*sys.modules)"
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, check=True
  )
  return set(done.stdout.split())


@pytest.mark.parametrize(
  "module", ["jepa_jax", "jepa_jax.models", "jepa_jax.training.program"]
)
def test_import_loads_neither_tensorflow_nor_torch(module):
  loaded = loaded_by(f"import {module}")
  assert not loaded & {"tensorflow", "torch"}


def test_notes_of_tensorflow_are_held_back_and_all_else_is_not(capfd):
  from jepa_jax import data

  with pytest.raises(ImportError), data._without_notes():
    os.write(2, b"WARNING: All log messages before absl::Init\nI0000 00:00 x\n")
    os.write(2, b"W0000 00:00 a warning\n")
    raise ImportError
  os.write(2, b"after\n")
  assert capfd.readouterr().err == "W0000 00:00 a warning\nafter\n"


def test_tensorflow_sees_no_accelerator():
  done = subprocess.run(
    [
      sys.executable,
      "-c",
      "import jepa_jax.data, tensorflow as tf; "
      "print({d.device_type for d in tf.config.get_visible_devices()})",
    ],
    capture_output=True,
    text=True,
    check=True,
  )
  assert done.stdout.strip() == "{'CPU'}"


def test_files_and_functions_stay_short():
  for path in PACKAGE.rglob("*.py"):
    text = path.read_text()
    assert text.count("\n") <= 400, path
    for node in ast.walk(ast.parse(text)):
      if isinstance(node, ast.FunctionDef):
        assert node.end_lineno - node.lineno < 80, f"{path}: {node.name}"
