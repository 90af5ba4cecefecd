"""Several runs side by side: a table with means and deviations, and a page.

A run is a folder with evaluations.json; a cell is what runs share that differ
in their seed alone.
"""

from collections.abc import Mapping, Sequence
import dataclasses
from importlib import resources
import json
import pathlib
from typing import Any

import numpy as np

from jepa_jax.evaluation import figures, verdict

# Letters below a chart: side by side, and of a name that is aslant.
ROOM, LONGEST = 60, 24

Column = tuple[str, str, str]  # evaluation, protocol and features
Point = tuple[float, float, float]  # operations, seconds and score


@dataclasses.dataclass(frozen=True)
class Cell:
  """Runs that differ in their seed alone.

  Attributes:
    name: what sets the cell apart, for readers.
    scores: (evaluation, protocol, features) -> the score of each run, in the
      row's unit.
  """

  name: str
  scores: Mapping[Column, Sequence[float]]


def cell(name: str, workdirs: Sequence[pathlib.Path]) -> Cell:
  """Reads the trained encoders' scores of a cell's finished runs.

  Raises:
    ValueError: an evaluations.json that cannot be read.
  """
  scores: dict[Column, list[float]] = {}
  for workdir in workdirs:
    path = workdir / "evaluations.json"
    if not path.exists():
      continue  # the experiment evaluates nothing
    try:
      rows = json.loads(path.read_text())
      for row in filter(verdict.compares, rows):
        if row["encoder"] == "trained":
          key = (row["evaluation"], row["protocol"], row["features"])
          score = float(row[row.get("score", "top1")])
          scores.setdefault(key, []).append(score)
    except (
      *(AttributeError, KeyError, OSError, TypeError, ValueError),
      *(OverflowError, RecursionError),
    ) as error:
      raise ValueError(f"{path} cannot be read: {error}.") from None
  return Cell(name, scores)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
  """Mean, and standard deviation of a sample; None of a single value."""
  deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
  return float(np.mean(values)), deviation


def columns(cells: Sequence[Cell]) -> list[Column]:
  """All that some cell has a score of, in order of appearance."""
  return list(dict.fromkeys(key for c in cells for key in c.scores))


def _text(values: Sequence[float]) -> str:
  if not values:
    return "-"
  mean, deviation = mean_and_deviation(values)
  digits = 1 if abs(mean) >= 10 else 3
  text = f"{mean:.{digits}f}"
  return text if deviation is None else f"{text} ± {deviation:.{digits}f}"


def table(cells: Sequence[Cell]) -> list[list[str]]:
  """Head and a line a cell: name, runs, and mean ± deviation a column."""
  keys = columns(cells)
  lines = [["", "runs", *(" ".join(key) for key in keys)]]
  for c in cells:
    runs = max(map(len, c.scores.values()), default=0)
    scores = (_text(c.scores.get(key, ())) for key in keys)
    lines.append([c.name, str(runs), *scores])
  return lines


def as_text(lines: Sequence[Sequence[str]]) -> str:
  """A table for a terminal, its columns aligned."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  return "\n".join(
    "  ".join(
      text.rjust(width) if i else text.ljust(width)
      for i, (text, width) in enumerate(zip(line, widths))
    ).rstrip()
    for line in lines
  )


def numbered(cells: Sequence[Cell]) -> bool:
  """Whether names are too long for a chart, which then has their numbers."""
  return max((len(c.name) for c in cells), default=0) > LONGEST


def chart(cells: Sequence[Cell], evaluation: str, protocol: str) -> Any:
  """A matplotlib figure: a dot a run, and the means of the cells as a line.

  Cells that are `numbered` are no series: their means are dashes.
  """
  from matplotlib import figure as figure_lib

  ink, faint, rule = (
    figures.PALETTE[name][0] for name in ("ink", "faint", "rule")
  )
  figure = figure_lib.Figure(figsize=(6.4, 2.6), layout="constrained")
  axes = figure.add_subplot()
  axes.spines[:].set_visible(False)
  axes.grid(axis="y", color=rule, linewidth=1)
  axes.tick_params(left=False, bottom=False, labelsize=10, labelcolor=faint)
  shown = [key for key in columns(cells) if key[:2] == (evaluation, protocol)]
  counted = numbered(cells)
  for i, key in enumerate(shown):
    colour = figures.PALETTE[f"c{i % figures.COLOURS}"][0]
    scored = [
      (x, c.scores[key]) for x, c in enumerate(cells) if key in c.scores
    ]
    means = [np.mean(values) for _, values in scored]
    style = {"marker": "_", "ms": 18, "mew": 2, "ls": ""} if counted else {}
    places = [x for x, _ in scored]
    axes.plot(places, means, color=colour, label=key[2], **style)
    for x, values in scored:
      axes.plot([x] * len(values), values, "o", color=colour, markersize=4)
  names = [str(x + 1) if counted else c.name for x, c in enumerate(cells)]
  axes.set_xticks(range(len(cells)), names, color=ink)
  if sum(map(len, names)) > ROOM:
    axes.tick_params(axis="x", labelrotation=30)
  axes.legend(frameon=False, fontsize=10, labelcolor=ink)
  return figure


def compute_charts(
  ways: Mapping[str, Sequence[Mapping[str, Sequence[Point]]]],
) -> list[tuple[str, Any]]:
  """Scores against operations and against seconds: (caption, svg) of each.

  Args:
    ways: method -> of each of its runs, metric -> points on the way.
  """
  from matplotlib import figure as figure_lib

  ink, faint, rule = (
    figures.PALETTE[name][0] for name in ("ink", "faint", "rule")
  )
  charts = []
  metrics = dict.fromkeys(
    m for runs in ways.values() for run in runs for m in run
  )
  axes_of = (("operations of training", 0), ("seconds of training", 1))
  for metric in metrics:
    for words, axis in axes_of:
      height = 3.0 + 0.2 * -(-len(ways) // 2)  # of names below the chart
      figure = figure_lib.Figure(figsize=(6.4, height), layout="constrained")
      axes = figure.add_subplot()
      axes.spines[:].set_visible(False)
      axes.grid(color=rule, linewidth=1)
      axes.tick_params(left=False, bottom=False, labelsize=10, labelcolor=faint)
      axes.xaxis.set_major_formatter(lambda value, _: figures.number(value))
      axes.set_xlabel(words, fontsize=10, color=faint)
      for i, (name, runs) in enumerate(ways.items()):
        colour = figures.PALETTE[f"c{i % figures.COLOURS}"][0]
        style = "o-" if i < figures.COLOURS else "s--"
        found = np.asarray([run[metric] for run in runs if metric in run])
        if not found.size:
          continue
        for x, y in zip(found[..., axis], found[..., 2]):
          axes.plot(x, y, "o", color=colour, markersize=3, alpha=0.5)
        mean = found.mean(axis=0)  # [points, 3]
        axes.plot(mean[:, axis], mean[:, 2], style, color=colour, label=name)
      figure.legend(
        loc="outside lower center", ncols=2, frameon=False, fontsize=9,
        labelcolor=ink,
      )  # fmt: skip
      label = f"{metric}, against {words}"
      charts.append((label, figures.svg(figure, f"way-{len(charts)}", label)))
  return charts


def page(
  title: str,
  command: str,
  cells: Sequence[Cell],
  lines: Sequence[Sequence[str]] = (),
  charts: Sequence[tuple[str, Any]] = (),
) -> str:
  """One self-contained HTML page: the table, and a chart a protocol.

  Args:
    title: heading.
    command: what made it, shown as text.
    cells: in the order of the table.
    lines: of the table, if not those of `table`; the cells in their order.
    charts: (caption, svg) before those of the protocols.
  """
  import jinja2

  charts = list(charts)
  pairs = dict.fromkeys(key[:2] for key in columns(cells))
  for i, (evaluation, protocol) in enumerate(pairs):
    label = f"{evaluation}, {protocol}"
    drawn = chart(cells, evaluation, protocol)
    charts.append((label, figures.svg(drawn, f"chart-{i}", label)))
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )  # fmt: skip
  template = resources.files(__package__).joinpath("comparison.html.j2")
  return environment.from_string(template.read_text(encoding="utf-8")).render(
    title=title,
    command=command,
    palette=figures.PALETTE,
    lines=lines or table(cells),
    numbered=numbered(cells),
    charts=charts,
  )
