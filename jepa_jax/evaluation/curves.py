"""The metrics of a run as charts: which there are, what they are called.

Known ones have a title and a section; any other has its own name, in words.
"""

import json
import math
from typing import Any

import numpy as np

from jepa_jax.evaluation import figures

CHARTS = {  # section: charts by title, and the metrics in each
  "Learning": {
    "Loss": ("loss",),
    "Gradient norm": ("grad_norm",),
    "Gradient norm, by part": (),  # grad_norm/...
    "Norms": (),  # ..._norm
  },
  "Collapse": {
    "Effective rank of the features": ("effective_rank",),
    "Standard deviation of the features": ("feature_std",),
    "Mean cosine between images": ("mean_cosine",),
  },
  "Schedules": {
    "Learning rate": ("learning_rate",),
    "Weight decay": ("weight_decay",),
    "Momentum of the moving average": ("momentum",),
  },
  "Speed": {
    "Images a second": ("images_per_second", "images_per_second_per_chip"),
    "Seconds a step": ("step_seconds", "data_wait_seconds"),
    "Memory of the host, GiB": ("host_memory_gib",),
    "Share of the devices' peak FLOPs": ("model_flops_utilisation",),
  },
}
# Not missed where nothing is averaged, or no peak is known.
OPTIONAL = {
  "momentum",
  "model_flops_utilisation",
  "images_per_second_per_chip",
  "host_memory_gib",
}
NOTES = {  # section: what a reader may stumble over
  "Learning": "The targets come from the network itself. So a loss that rises "
  "after its first fall can be healthy: features that tell images apart are "
  "harder to predict than those of a young network. Judge by the evaluations, "
  "and by the curves of collapse.",
  "Collapse": "Of the features of a batch, averaged over patches. All of them "
  "near their limits at once would be a collapse: every image looks the same.",
}

_LINES = {
  "images_per_second": "all devices",
  "images_per_second_per_chip": "a device",
}

Metrics = dict[str, tuple[np.ndarray, np.ndarray]]  # name: (steps, values)


def read(text: bytes) -> tuple[Metrics, list[str]]:
  """Reads metrics.jsonl: where a resumed run repeats a step, the last wins.

  Args:
    text: one JSON object a line. Values that are not numbers are ignored, null
      is NaN; broken lines (a killed run leaves half a line) are skipped.

  Returns:
    {name: (steps [n], ascending, and values float64 [n])}, and sentences about
    what was skipped.
  """
  table: dict[str, dict[int, float]] = {}
  broken = []
  lines = text.decode("utf-8", errors="replace").splitlines()
  for index, line in enumerate(lines):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      step = int(row.pop("step"))
    except (
      *(ValueError, KeyError, TypeError, AttributeError),
      *(OverflowError, RecursionError),
    ):
      broken.append(index)
      continue
    for name, value in row.items():
      value = math.nan if value is None else value
      if isinstance(value, int | float) and not isinstance(value, bool):
        table.setdefault(name, {})[step] = float(value)
  notes = []
  if broken and broken[-1] == len(lines) - 1:
    broken.pop()
    notes.append("The last line of metrics.jsonl is cut off and was skipped.")
  if broken:
    notes.append(
      f"{len(broken)} lines of metrics.jsonl are not JSON objects with a step "
      f"and were skipped, the first in line {broken[0] + 1}."
    )
  metrics = {
    name: (
      np.array(sorted(points)),
      np.array([points[s] for s in sorted(points)]),
    )
    for name, points in table.items()
  }
  return metrics, notes


def draw(metrics: Metrics) -> dict[str, dict[str, Any]]:
  """All metrics as charts, by section: the known ones, then the others.

  Returns:
    {section: {"note": words, "charts": [what report.html.j2 shows]}}.
  """
  metrics = dict(metrics)
  speed = metrics.get("images_per_second")
  chip = metrics.get("images_per_second_per_chip")
  if speed and chip and np.array_equal(speed[1], chip[1], equal_nan=True):
    del metrics["images_per_second_per_chip"]  # one device
  sections = {title: dict(charts) for title, charts in CHARTS.items()}
  known = {
    name: title
    for charts in CHARTS.values()
    for title, names in charts.items()
    for name in names
  }
  for name in sorted(set(metrics) - set(known)):
    group, _, _ = name.rpartition("/")
    if name.startswith("eval/"):
      if len(metrics[name][0]) < 2:
        continue  # the table of probes says it already
      section = "Evaluations during training"
      title = group.removeprefix("eval").strip("/") or "evaluation"
    elif group:
      title = f"{known.get(group) or _words(group)}, by part"
      section = "Learning" if title in CHARTS["Learning"] else "Other"
    elif name.endswith("_norm"):
      section, title = "Learning", "Norms"
    else:
      section, title = "Other", _words(name)
    charts = sections.setdefault(section, {})
    charts[title] = (*charts.get(title, ()), name)
  notes = dict(NOTES)
  if "momentum" not in metrics:  # nothing is averaged: no targets of its own
    del notes["Learning"]
  drawn = {}
  for section, charts in sections.items():
    for title, names in charts.items():
      series = [(_line_name(n), *metrics[n]) for n in names if n in metrics]
      if series:
        part = drawn.setdefault(
          section, {"note": notes.get(section, ""), "charts": []}
        )
        number = sum(len(x["charts"]) for x in drawn.values())
        part["charts"].append(_chart(title, series, number))
  return drawn


def _chart(title, series, number):
  steps = np.concatenate([steps for _, steps, _ in series])
  label = f"{title}, steps {steps.min():g} to {steps.max():g}"
  return {
    "title": title,
    "lines": [
      {
        "name": name if len(series) > 1 else "",
        "colour": i % figures.COLOURS,
        "last": figures.number(values[-1]),
      }
      for i, (name, _, values) in enumerate(series)
    ],
    "notes": figures.notes(series),
    "svg": figures.svg(figures.line_chart(series), f"chart-{number}", label),
  }


def _words(metric):
  name = metric.replace("_", " ")
  return name[:1].upper() + name[1:]


def _line_name(metric):
  """What a line is called where a chart has several."""
  if metric in _LINES:
    return _LINES[metric]
  name = metric.rpartition("/")[2]
  for ending in ("_norm", "_seconds"):
    name = name.removesuffix(ending)
  return name.replace("_", " ")


def not_recorded(metrics: Metrics) -> str:
  """Which of the known metrics are missing, or ""."""
  known = {n for c in CHARTS.values() for names in c.values() for n in names}
  absent = sorted(known - OPTIONAL - set(metrics))
  return "Not recorded: " + ", ".join(absent) if metrics and absent else ""
