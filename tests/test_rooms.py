"""The arrows between the rooms, and what importing each of them loads."""

import ast
import subprocess
import sys

import conftest
import pytest

PACKAGE = conftest.ROOT / "jepa_jax"

# Room -> rooms of this package that its modules may import.
MAY_IMPORT = {
  "render": {"render"},
  "models": {"models"},
  "masks": {"masks"},
  "objectives": {"models", "masks", "objectives"},
  "data": {"render", "models", "masks", "data"},
  "training": {"models", "masks", "objectives", "training", "config"},
  "planning": {"models", "objectives", "planning", "training", "config"},
  "evaluation": {
    "models",
    "masks",
    "objectives",
    "data",
    "training",
    "planning",
    "evaluation",
    "config",
  },
}


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_arrows_point_one_way(room):
  for path in (PACKAGE / room).rglob("*.py"):
    for name in imports(path):
      parts = name.split(".")
      if parts[0] == "jepa_jax" and len(parts) > 1:
        assert parts[1] in MAY_IMPORT[room], f"{path} imports {name}"


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
