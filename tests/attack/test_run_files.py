"""What a workdir holds, changed at random, and names that mean harm.

JEPA_FUZZ_SECONDS=600 makes each target go on for as long.
"""

import io
import itertools
import json
import os
import time

import conftest
import hypothesis
from hypothesis import strategies as st
import markupsafe
import numpy as np
from PIL import Image
import pytest
from test_hostile_weights import SECONDS, changed_bytes, changed_settings

from jepa_jax import command
from jepa_jax import config as config_lib
from jepa_jax.data import folder
from jepa_jax.evaluation import comparison, curves, figures, report
from jepa_jax.training import log, workdir

RUN = {
  "command": "train",
  "started": "2026-01-02T03:04:05+00:00",
  "device": "cpu",
  "devices": 2,
  "seconds": 3.5,
  "images_per_second": 20.5,
  "parameters": {"encoder": 300, "predictor": 20},
  "masks": {"context": 13},
}
ROW = {
  **dict(evaluation="count", protocol="linear", title="linear probe"),
  **dict(score="top1", unit="%", higher_is_better=True, features="last"),
  **dict(encoder="trained", top1=61.5, standard_error=1.5, n_test=70),
  **dict(majority=20.0, classes=5, per_class={"1": 50.0, "2": 70.0}),
}
ROWS = [ROW, ROW | {"encoder": "random", "top1": 30.5}]
METRICS = "".join(
  json.dumps({"step": step, "loss": 1 / step, "a/b": step, "grad_norm": None})
  + "\n"
  for step in (3, 6, 9)
)


@st.composite
def changed_rows(draw):
  return json.dumps([json.loads(draw(changed_settings(row))) for row in ROWS])


def page(folder):
  """The page is written, whatever the file holds."""
  path = report.write(folder)
  assert path.read_text().rstrip().endswith("</html>")


def metrics_are_drawn(folder):
  """As the page does, without its figures, which take most of the time."""
  data = (folder / "metrics.jsonl").read_bytes()
  metrics, notes = curves.read(data)
  assert all(len(steps) == len(values) for steps, values in metrics.values())
  assert all(isinstance(note, str) for note in notes)
  last = log._mend(folder / "metrics.jsonl")
  rest = (folder / "metrics.jsonl").read_bytes()
  assert isinstance(last, str) and (not rest or rest.endswith(b"\n"))


def claim_is_compared(folder):
  claim = workdir.describe(conftest.small_config())
  workdir.check(claim, folder, accept=True)


TARGETS = {
  "metrics.jsonl": (
    st.one_of(
      changed_bytes(METRICS.encode()),
      changed_settings({"step": 3, "loss": 0.5, "a": {"b": 1}}),
    ),
    metrics_are_drawn,
  ),
  "metrics.jsonl, the page": (changed_bytes(METRICS.encode()), page),
  "run.json": (changed_settings(RUN), page),
  "evaluations.json": (changed_rows(), page),
  "evaluations.json, a sweep": (
    changed_rows(),
    lambda folder: comparison.page("x", "", [comparison.cell("a", [folder])]),
  ),
  "config.json": (
    changed_settings(conftest.small_config().to_dict()),
    lambda folder: config_lib.read(folder / "config.json"),
  ),
  "config.json, the page": (changed_settings({"collapse": {"a": 1}}), page),
  "config.json, a restart": (
    changed_settings(conftest.small_config().to_dict()),
    claim_is_compared,
  ),
  "data.json": (
    changed_settings({"images": 36, "names": "abc"}),
    lambda folder: workdir.check_data({"images": 36}, folder),
  ),
}


@pytest.mark.parametrize("name", TARGETS)
def test_changed_files_of_a_run_are_read_or_named_in_one_line(name, tmp_path):
  strategy, act = TARGETS[name]
  counts = {"read": 0, "named": 0}

  def target(change):
    change = change if isinstance(change, bytes) else change.encode()
    (tmp_path / name.partition(",")[0]).write_bytes(change)
    try:
      act(tmp_path)
      counts["read"] += 1
    except ValueError as error:
      assert "\n" not in str(error), error
      assert act is not page and act is not metrics_are_drawn, error
      counts["named"] += 1

  end = time.monotonic() + SECONDS
  slow = act is page
  for seed in itertools.count():
    run = hypothesis.settings(
      max_examples=100 if SECONDS else 3 if slow else 25,
      deadline=None,
      database=None,
      suppress_health_check=list(hypothesis.HealthCheck),
    )(hypothesis.seed(seed)(hypothesis.given(strategy)(target)))
    run()
    if time.monotonic() >= end:
      break
  print(f"{name}: {counts}")


@pytest.mark.parametrize("text", ["[" * 100_000, "9" * 5000, '{"a": ' * 9999])
def test_files_that_are_deep_or_long_end_nothing(text, tmp_path, capsys):
  for name in ("run.json", "evaluations.json", "metrics.jsonl", "config.json"):
    (tmp_path / name).write_text(text)
  page(tmp_path)
  (tmp_path / "data.json").write_text(text)
  assert workdir.check_data({"images": 3}, tmp_path) == []
  log._mend(tmp_path / "metrics.jsonl")


# ---------------------------------------------------------------------------
# Names of files, folders and classes.

NAMES = {
  "the terminal's commands": b"a\x1b[2J\x1b]0;x\x07",
  "two lines": b"a\nb",
  "a carriage return": b"a\rb",
  "bytes of no encoding": b"a\xff\xfe",
  "direction of text": "a\u202eb\u2066".encode(),
  "mathtext": rb"$\frac{x}_{$",
  "TeX": rb"\input{x}_%#&~^",
  "HTML": b'<img src=x onerror="alert(1)"><\x73cript>',
  "templates": b"{{ 7 * 6 }}{% for %}",
  "a long one": b"n" * 255,
  "a dash": b"--config",
  "spaces": b"  a  ",
  "a percent sign": b"%s%n{0}",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_escaped_and_figures_drawn(name, tmp_path, capsys):
  """Of a folder, its classes, a class's image, and a workdir."""
  bad = NAMES[name]
  root = os.path.join(os.fsencode(tmp_path), bad)
  file = io.BytesIO()
  Image.new("RGB", (5, 4)).save(file, "png")
  for part in (bad, b"other"):
    os.makedirs(os.path.join(root, part))
    for i in range(3):
      with open(os.path.join(root, part, b"%d.png" % i), "wb") as png:
        png.write(file.getvalue())
  ending = bad[: 255 - 4] + b".png"
  open(os.path.join(root, bad, ending), "wb").close()
  text = os.fsdecode(root)
  source = folder.FolderSource(text, "all")
  names = [source.name(i) for i in range(len(source))] + source.classes
  assert len(source.classes) == 2 and all(map(str.isprintable, names))
  with pytest.raises(ValueError) as error:
    folder.FolderSource(text, "nothing")
  assert command.fail(error.value) == 2
  said = capsys.readouterr().err
  assert said.count("\n") == 1 and said[:-1].isprintable()

  label = source.classes[0]
  rows = [row | {"per_class": {label: 50.0, "other": 70.0}} for row in ROWS]
  (tmp_path / "evaluations.json").write_text(json.dumps(rows))
  config = conftest.small_config()
  config.data.name = text
  (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
  rows = [{"step": i, f"eval/{label}/x": i, label: i} for i in range(3)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
  page(tmp_path)
  written = (tmp_path / "report.html").read_text(encoding="utf-8")
  assert "<img src=x" not in written and "\x1b" not in written
  assert markupsafe.escape(label) in written
  line = (label, np.asarray([1, 2]), np.asarray([3.0, 4.0]))
  figure = figures.line_chart([line, line], title=label)
  assert figures.svg(figure, label, label).startswith("<svg")


@pytest.mark.parametrize("part", ["encoder", "predictor"])
def test_a_networks_argument_that_is_none_is_named(part, tmp_path):
  config = conftest.small_config()
  with config.unlocked():
    config[part].widht = 3
  path = tmp_path / "config.json"
  path.write_text(json.dumps(config.to_dict()))
  with pytest.raises(ValueError, match=rf"{part}\.widht.*{part}\.width"):
    config_lib.read(path)
