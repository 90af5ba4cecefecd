"""Notebooks are what their sources say, and run from a wheel alone."""

import json
import os
import subprocess
import sys
import venv

import conftest
import pytest

COLAB = conftest.EXPERIMENTS / "colab"
SOURCES = sorted(COLAB.glob("[0-9]*.py"))
MOST = 2**20  # bytes of a notebook, so that the repository's page shows it


def cells_of_source(text):
  """(kind, text) of a source in jupytext's percent format."""
  for part in text.split("# %%")[1:]:
    head, _, body = part.partition("\n")
    if head.strip() == "[markdown]":
      lines = body.strip().splitlines()
      assert all(line.startswith("#") for line in lines), lines
      yield "markdown", "\n".join(line[2:] for line in lines)
    else:
      yield "code", body.strip()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_a_notebook_is_its_source_run_without_errors(source):
  path = source.with_suffix(".ipynb")
  notebook = json.loads(path.read_text())
  found = [(c["cell_type"], "".join(c["source"])) for c in notebook["cells"]]
  assert found == list(cells_of_source(source.read_text()))
  assert path.stat().st_size <= MOST
  first, install, *rest = notebook["cells"]
  assert f"colab/{path.name})" in "".join(first["source"])
  assert "JEPA_JAX_SOURCE" in "".join(install["source"])
  code = [cell for cell in rest if cell["cell_type"] == "code"]
  assert any("assert" in line for cell in code for line in cell["source"])
  for cell in code:
    assert cell["execution_count"], cell["source"]
    assert all(o["output_type"] != "error" for o in cell["outputs"])
    shown = json.dumps(cell["outputs"])
    assert '"stderr"' not in shown and "/home/" not in shown


@pytest.mark.notebooks
def test_all_notebooks_run_from_a_wheel_in_a_fresh_environment(tmp_path):
  wheels = tmp_path / "wheels"
  pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps"]
  subprocess.run([*pip, "-w", wheels, conftest.ROOT], check=True)
  (wheel,) = wheels.glob("*.whl")
  folder = tmp_path / "venv"
  venv.create(folder, with_pip=True)
  python = str(folder / "bin/python")
  pins = ["-c", conftest.ROOT / "requirements.txt"]
  install = [python, "-m", "pip", "install", "-q", *pins]
  subprocess.run([*install, f"{wheel}[notebooks]"], check=True)
  # Away from the sources, which would be imported in the wheel's place.
  subprocess.run(
    [python, COLAB / "make.py", "--check"],
    cwd=tmp_path,
    env={
      **{k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
      "JEPA_JAX_SOURCE": str(wheel),
      "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    },
    check=True,
  )
