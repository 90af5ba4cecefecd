"""Sweeps: which runs there are, and what becomes of those that end badly.

Runs are stood in for by a script that writes what a run leaves behind.
"""

import json
import pathlib
import re
import subprocess
import sys
import types

import conftest
import numpy as np
import pytest

from jepa_jax import command, config, sweep
from jepa_jax import runs as runs_lib
from jepa_jax.evaluation import comparison

FLAGS = ["--config", "experiments/quickstart.py", "--config.batch_size=8"]


@pytest.mark.parametrize(
  "text, values",
  [
    ("1,2", ["1", "2"]),
    ("(0.1, 0.2),(0.3, 0.4)", ["(0.1, 0.2)", "(0.3, 0.4)"]),
    ("'a,b', c", ["'a,b'", "c"]),
    ("10 steps", ["10 steps"]),
  ],
)
def test_commas_divide_values_but_not_in_brackets(text, values):
  assert sweep.split_values(text) == values


def test_every_combination_and_all_cells_before_the_second_seed(tmp_path):
  over = ["masks.num_targets=1,2", "momentum=(0.9, 1.0),(0.99, 1.0)"]
  runs = sweep.plan(over, 2, ["--config.batch_size=8"], tmp_path)
  assert [run.seed for run in runs] == [0] * 4 + [1] * 4
  assert len({run.folder for run in runs}) == 8
  assert runs[1].name == "num_targets=1 momentum=(0.99, 1.0)"
  assert runs[5].overrides == (
    "--config.batch_size=8",
    "--config.masks.num_targets=1",
    "--config.momentum=(0.99, 1.0)",
    "--config.seed=1",
  )
  for run in runs:
    assert run.folder.parent == tmp_path and "(" not in run.folder.name


def test_keys_joined_by_plus_change_together(tmp_path):
  over = ["masks.name+masks.target_scale=block+(0.6, 0.6),released+(0.1, 0.2)"]
  runs = sweep.plan([*over, "batch_size=8,1e+1"], 1, [], tmp_path)
  assert [tuple(run.cell.values()) for run in runs] == [
    ("block", "(0.6, 0.6)", "8"), ("block", "(0.6, 0.6)", "1e+1"),
    ("released", "(0.1, 0.2)", "8"), ("released", "(0.1, 0.2)", "1e+1"),
  ]  # fmt: skip
  assert runs[0].name == "name=block target_scale=(0.6, 0.6) batch_size=8"


@pytest.mark.parametrize(
  "over, overrides, message",
  [
    (["momentum+batch_size=1,2"], [], "needs a key and values, such as .*chan"),
    (["batch_size+batch_size=1+2"], [], "another flag too"),
    (["batch_size"], [], "needs a key and values"),
    (["batch_size=1,,2"], [], "needs a key and values"),
    (["batch_size=1,1"], [], "a value twice"),
    (["batch_size=1", "batch_size=2"], [], "another flag too"),
    (["batch_size=1"], ["--config.batch_size=2"], "another flag too"),
    (["seed=1,2"], [], "set by --seeds too"),
    ([], ["--config.seed=2"], "--seeds says"),
    (["total=1 a,1:a"], [], "signs that a folder cannot have"),
  ],
)
def test_what_is_set_twice_or_not_at_all_is_refused(
  over, overrides, message, tmp_path
):
  with pytest.raises(ValueError, match=message):
    sweep.plan(over, 1, overrides, tmp_path)


STAND_IN = """
import json, pathlib, sys
folder, fails = pathlib.Path(sys.argv[1]), sys.argv[2]
with open(folder / "starts", "a") as file:
  file.write("x")
if (folder / fails).exists() or folder.name.startswith(fails):
  sys.exit("no luck")
score = 10.0 * int(folder.name[0]) + int(folder.name[-1])
row = dict(evaluation="count", protocol="linear", features="last", unit="%",
           encoder="trained", score="top1", top1=score)
(folder / "evaluations.json").write_text(json.dumps([row]))
(folder / "report.html").write_text("done")
"""


@pytest.fixture
def stand_in(monkeypatch):
  state = types.SimpleNamespace(fails="none")
  command = lambda run, config: [
    *(sys.executable, "-c", STAND_IN, str(run.folder), state.fails)
  ]
  monkeypatch.setattr(runs_lib.Run, "command", command)
  return state


def arguments(workdir, **changes):
  values = dict(
    config_file="experiments/quickstart.py",
    overrides=["--config.batch_size=8"],
    over=["masks.num_targets=1,2,4"],
    seeds=2,
    workdir=str(workdir),
    print_commands=False,
  )
  return types.SimpleNamespace(**values | changes)


def starts(workdir):
  return {
    path.parent.name: len(path.read_text()) for path in workdir.glob("*/starts")
  }


def test_a_sweep_goes_on_where_it_stopped_and_may_grow(
  tmp_path, stand_in, capsys
):
  workdir = tmp_path / "sweep"
  stand_in.fails = "2"
  assert sweep.main(arguments(workdir)) == 1
  assert "2 of 6 runs failed" in capsys.readouterr().out
  stand_in.fails = "none"
  assert sweep.main(arguments(workdir)) == 0
  assert starts(workdir) == {
    "1,seed0": 1, "2,seed0": 2, "4,seed0": 1,
    "1,seed1": 1, "2,seed1": 2, "4,seed1": 1,
  }  # fmt: skip
  more = arguments(workdir, over=["masks.num_targets=1,2,3,4"], seeds=3)
  assert sweep.main(more) == 0
  assert sum(starts(workdir).values()) == 8 + 3 + 3
  lines = (workdir / "results.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert len(rows) == 12
  scores = {
    (row["masks.num_targets"], row["seed"]): row["evaluations"][0]["top1"]
    for row in rows
  }
  assert scores["3", 2] == 32
  page = (workdir / "sweep.html").read_text()
  assert "num_targets=3" in page and "31.0 ± 1.0" in page and "<svg" in page


def test_a_folder_of_something_else_is_refused(tmp_path, stand_in):
  workdir = tmp_path / "sweep"
  assert sweep.main(arguments(workdir, seeds=1)) == 0
  for changes in (
    {"overrides": []},
    {"over": ["batch_size=1,2"], "overrides": []},
  ):
    with pytest.raises(ValueError, match="another sweep"):
      sweep.main(arguments(workdir, **changes))
  other = tmp_path / "other"
  other.mkdir()
  (other / "thesis.tex").write_text("")
  with pytest.raises(ValueError, match="holds no sweep"):
    sweep.main(arguments(other))
  with pytest.raises(ValueError, match="is a file"):
    sweep.main(arguments(other / "thesis.tex"))
  assert [p.name for p in other.iterdir()] == ["thesis.tex"]


def test_wrong_values_end_before_a_folder_is_made(tmp_path):
  done = subprocess.run(
    [
      *(sys.executable, "-m", "jepa_jax.sweep", *FLAGS),
      *("--over", "batch=1,2", "--workdir", str(tmp_path / "sweep")),
    ],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and not (tmp_path / "sweep").exists()
  assert 'unknown config key "batch"; nearest: batch_size' in done.stderr


def test_commands_are_printed_for_other_schedulers(tmp_path, capsys):
  assert sweep.main(arguments(tmp_path / "s", print_commands=True)) == 0
  lines = capsys.readouterr().out.splitlines()
  assert len(lines) == 6 and not (tmp_path / "s").exists()
  for part in ("jepa_jax.train", "num_targets=4", "--config.seed=1"):
    assert part in lines[-1]


def test_means_and_deviations_are_those_of_numpy(tmp_path):
  paths = []
  for i, score in enumerate((1.0, 2.5, 7.0)):
    row = dict(encoder="trained", score="top1", unit="%", top1=score)
    row |= dict(evaluation="e", protocol="p", features="last")
    path = tmp_path / str(i)
    path.mkdir()
    (path / "evaluations.json").write_text(json.dumps([row]))
    paths.append(path)
  cell = comparison.cell("a", paths)
  mean, deviation = comparison.mean_and_deviation(cell.scores["e", "p", "last"])
  np.testing.assert_allclose(mean, 3.5)
  np.testing.assert_allclose(deviation, np.std([1, 2.5, 7], ddof=1))
  lines = comparison.table([cell, comparison.Cell("b", {})])
  assert lines[1] == ["a", "3", "3.500 ± 3.122"] and lines[2][2] == "-"
  (pathlib.Path(paths[0]) / "evaluations.json").write_text("{}x")
  with pytest.raises(ValueError, match="cannot be read"):
    comparison.cell("a", paths)


def test_names_that_are_too_long_for_a_chart_are_numbers_there():
  key = ("e", "p", "last")
  ticks = lambda axes: [x.get_text() for x in axes.get_xticklabels()]
  for name, shown, style in (("lr", ["lr0", "lr1"], "-"), (25 * "x", "12", "")):
    cells = [
      comparison.Cell(f"{name}{i}", {key: (1.0 + i, 2.0)}) for i in range(2)
    ]
    (axes,) = comparison.chart(cells, "e", "p").axes
    assert ticks(axes) == [*shown]
    assert axes.lines[0].get_linestyle() == (style or "None")
    page = comparison.page("t", "c", cells)
    for i in (1, 2):
      assert (f'<span class="note">{i}</span>' in page) == (not style)


def test_every_table_of_the_paper_is_a_sweep_that_starts(tmp_path):
  page = (conftest.ROOT / "docs/evaluation.md").read_text()
  rows = re.findall(r"^\| (\d+), [^|]*\| `([^`]*)` \|", page, re.MULTILINE)
  assert [int(number) for number, _ in rows] == [*range(7, 15)]
  for number, over in rows:
    size = "vitb16" if number in ("8", "9", "10") else "vitl16"
    path = f"{conftest.EXPERIMENTS}/ijepa_in1k.py:{size}"
    for run in sweep.plan([over], 1, [], tmp_path):
      changed = command.load_config(path, list(run.overrides))
      config.check(changed)
