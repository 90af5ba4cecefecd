"""What a workdir holds, changed at random, and names that mean harm.

JEPA_FUZZ_SECONDS=600 makes each target go on for as long.
"""

import itertools
import json
import time

import conftest
import hypothesis
from hypothesis import strategies as st
import pytest
from test_hostile_weights import SECONDS, changed_bytes, changed_settings

from jepa_jax import config as config_lib
from jepa_jax.evaluation import comparison, curves, report
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
