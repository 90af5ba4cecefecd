"""Makes the notebooks of the .py files beside this one, and runs them.

    python experiments/colab/make.py [NAME ...]           writes NAME.ipynb
    python experiments/colab/make.py --check [NAME ...]   runs, writes nothing

Needs the extra "notebooks". What the notebooks install is JEPA_JAX_SOURCE, such
as a wheel; an error in a cell ends this with it.
"""

import argparse
import pathlib
import time

import jupytext
import nbclient
import nbformat

HERE = pathlib.Path(__file__).parent
SECONDS = 600  # of a cell


def sources() -> list[pathlib.Path]:
  """The sources, in order; their names begin with a number."""
  return sorted(HERE.glob("[0-9]*.py"))


def run(source: pathlib.Path) -> nbformat.NotebookNode:
  """The executed notebook of a source."""
  notebook = jupytext.read(source, fmt="py:percent")
  notebook.metadata = {
    "kernelspec": {
      "name": "python3", "display_name": "Python 3", "language": "python"
    },
    "language_info": {"name": "python"},
  }  # fmt: skip
  client = nbclient.NotebookClient(
    notebook, timeout=SECONDS, kernel_name="python3"
  )
  client.execute()
  for number, cell in enumerate(notebook.cells):
    cell.id = str(number)  # or each writing differs
    cell.metadata = {}
    if "outputs" in cell:  # progress and warnings go, results stay
      cell.outputs = [x for x in cell.outputs if x.get("name") != "stderr"]
  return notebook


def main() -> None:
  """The command."""
  flags = argparse.ArgumentParser(description=__doc__)
  flags.add_argument("name", nargs="*")
  flags.add_argument("--check", action="store_true")
  arguments = flags.parse_args()
  for source in sources():
    if arguments.name and source.stem not in arguments.name:
      continue
    start = time.time()
    notebook = run(source)
    print(f"{source.stem}: {time.time() - start:.0f} seconds", flush=True)
    if not arguments.check:
      nbformat.write(notebook, source.with_suffix(".ipynb"), version=4)


if __name__ == "__main__":
  main()
