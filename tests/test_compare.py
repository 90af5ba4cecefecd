"""Comparisons: as many steps as the budget allows, and what comes of them.

Runs are stood in for by a script that writes what a run leaves behind.
"""

import json
import pathlib
import subprocess
import sys
import types

from conftest import build
import pytest

from jepa_jax import command, compare, runs

FILE = """
from conftest import small_config
from jepa_jax import config

def get_config(variant):
  c = small_config()
  c.objective = "ijepa" if variant == "deep" else variant
  config.fill_method(c)
  c.encoder.depth = 6 if variant == "deep" else 4
  if variant == "mae":
    c.masks.num_targets = 1
  c.evaluations.count = config.evaluation("count")
  return c
"""

# MAE is twice as fast as the other.
STAND_IN = """
import json, pathlib, sys
folder, steps, every = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:4])
folder.mkdir(exist_ok=True)
with open(folder / "starts", "a") as file:
  file.write("x")
if (folder.parent / "fail").exists() and "mae" in folder.name:
  sys.exit("no luck")
speed = 4.0 * (2 if "mae" in folder.name else 1)  # images a second, in fours
(folder / "run.json").write_text(json.dumps({"images_per_second": speed}))
score = 10.0 + folder.name.endswith("1")
row = dict(evaluation="count", protocol="linear", features="last", unit="%",
           encoder="trained", score="top1", top1=score)
(folder / "evaluations.json").write_text(json.dumps([row]))
with open(folder / "metrics.jsonl", "w") as file:
  for step in sorted({*range(every, steps, every or steps), steps}):
    line = {"step": step, "eval/count/linear last": step / steps * 10}
    file.write(json.dumps(line) + "\\n")
(folder / "report.html").write_text("done")
"""


@pytest.fixture
def files(tmp_path):
  path = tmp_path / "methods.py"
  path.write_text(FILE)
  return [f"{path}:{name}" for name in ("ijepa", "mae")]


@pytest.fixture
def stand_in(monkeypatch):
  def of(run, config):
    flags = dict(
      x.removeprefix("--config.").split("=", 1) for x in run.overrides
    )
    steps, every = (
      flags.get(key, "0 steps").partition(" ")[0]
      for key in ("total", "evaluate_every")
    )
    return [sys.executable, "-c", STAND_IN, str(run.folder), steps, every]

  monkeypatch.setattr(runs.Run, "command", of)


def arguments(configs, workdir, **changes):
  values = dict(
    configs=configs,
    overrides=[],
    budget="",
    minutes=0.0,
    points=2,
    seeds=2,
    workdir=str(workdir),
  )
  return types.SimpleNamespace(**values | changes)


def test_a_budget_of_operations_gives_each_its_steps(
  files, stand_in, tmp_path, capsys
):
  found = compare.methods(files, [])
  ijepa, mae = (method.flops for method in found)
  for file, method in zip(files, found):
    config = command.load_config(file, [])
    of_an_image = build(config).objective.flops()
    assert method.flops == config.batch_size * of_an_image  # a step's
  assert ijepa != mae
  workdir = tmp_path / "out"
  flags = arguments(files, workdir, budget=f"{100.2 * ijepa}FLOPs")
  (tmp_path / "out").mkdir()
  (workdir / "compare.json").write_text("{}")
  with pytest.raises(ValueError, match="is of another compare"):
    compare.main(flags)
  (workdir / "compare.json").unlink()
  assert compare.main(flags) == 0
  rows = [
    json.loads(line)
    for line in (workdir / "results.jsonl").read_text().splitlines()
  ]
  assert len(rows) == 4
  for row in rows:
    way = row["points"]["count/linear last"]
    name = row["method"]
    step = mae if name.endswith("mae") else ijepa
    steps = round(100.2 * ijepa / step)
    assert [x / step for x, _, _ in way] == [-(-steps // 2), steps]
    # Four images a step, four or eight a second.
    seconds = steps / (2 if name.endswith("mae") else 1)
    assert way[-1][1:] == [seconds, 10.0]
  page = (workdir / "compare.html").read_text()
  assert "10.5 ± 0.7" in page and "seconds of training" in page
  assert page.count("<svg") == 3
  out = capsys.readouterr().out
  assert f"{ijepa / 1e9:.4g}" in out


def test_a_budget_of_time_asks_pilots_and_goes_on_after_a_failure(
  files, stand_in, tmp_path
):
  workdir = tmp_path / "out"
  flags = arguments(files, workdir, minutes=1.0, seeds=1)
  workdir.mkdir()
  (workdir / "compare.json").write_text(
    json.dumps(
      dict(configs=files, budget="", minutes=1.0, points=2, overrides=[])
    )
  )
  (workdir / "fail").write_text("")
  assert compare.main(flags) == 1
  (workdir / "fail").unlink()
  assert compare.main(flags) == 0
  starts = {
    path.parent.name: len(path.read_text()) for path in workdir.rglob("starts")
  }
  assert starts == {
    "methods:ijepa": 1,
    "methods:mae": 1,
    "methods:ijepa,seed0": 1,
    "methods:mae,seed0": 2,
  }
  rows = (workdir / "results.jsonl").read_text().splitlines()
  last = {
    row["method"]: row["points"]["count/linear last"][-1][1]
    for row in map(json.loads, rows)
  }
  assert last == {"methods:ijepa": 60.0, "methods:mae": 60.0}


@pytest.mark.parametrize(
  "changes, message",
  [
    ({}, "--budget or --minutes"),
    ({"budget": "1e15", "minutes": 3.0}, "--budget or --minutes"),
    ({"budget": "-3"}, 'budget is "-3"; it needs operations'),
    ({"budget": "much"}, "it needs operations: 3e15FLOPs"),
    ({"budget": "1e3"}, "the budget is 0 steps of methods:ijepa"),
    ({"budget": "1e12", "configs": ("ijepa", "ijepa")}, "an experiment twice"),
    ({"budget": "1e12", "configs": ("ijepa", "deep")}, "encoder.depth is 6 in"),
    (
      {"budget": "1e12", "overrides": ["--config.evaluations="]},
      "has no evaluations",
    ),
    (
      {
        "budget": "1e12",
        "configs": ("outside_objective:Outside",),
      },
      "does not state its operations",
    ),
  ],
)
def test_what_cannot_be_compared_is_refused(changes, message, files, tmp_path):
  names = changes.pop("configs", None)
  changes = dict(changes)
  configs = files
  if names:
    path = pathlib.Path(files[0].rpartition(":")[0])
    configs = [f"{path}:{name}" for name in names]
  with pytest.raises(ValueError, match=message):
    compare.main(arguments(configs, tmp_path / "out", **changes))
  assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_lacks():
  done = subprocess.run(
    [sys.executable, "-m", "jepa_jax.compare", "--workdir", "x"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2 and "--configs" in done.stderr
