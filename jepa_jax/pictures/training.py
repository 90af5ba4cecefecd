"""Training as pictures: curves of several runs, and features as a film."""

from collections.abc import Mapping, Sequence
import math
from typing import TYPE_CHECKING

import numpy as np

from jepa_jax import paths, pretrained
from jepa_jax.evaluation import components, curves, figures
from jepa_jax.pictures import layout, patches
from jepa_jax.training import checkpoints

if TYPE_CHECKING:
  from matplotlib import figure as figure_lib

COLUMNS = 3  # charts side by side
FILM = 6  # images of a film
# Of curves.CHARTS, what does not tell runs apart by what they learn.
_LEFT_OUT = {"Speed"}


def read(workdirs: Sequence[str]) -> dict[str, curves.Metrics]:
  """The metrics of runs, by the shortest names that tell them apart.

  Raises:
    ValueError: no run there, or one that has logged nothing yet.
  """
  found = {}
  folders = [paths.local(w, "the run").resolve() for w in workdirs]
  for folder, name in zip(folders, _names(folders)):
    path = folder / "metrics.jsonl"
    if not path.is_file():
      raise ValueError(
        f"{folder} holds no metrics of a run: there is no {path.name}."
      )
    metrics, _ = curves.read(path.read_bytes())
    if not metrics:
      raise ValueError(f"{path} holds no metrics yet.")
    found[name] = metrics
  return found


def draw_runs(metrics: Mapping[str, curves.Metrics]) -> "figure_lib.Figure":
  """Curves of several runs on one page, a colour a run.

  Args:
    metrics: by the run's name, as `read` returns them.
  """
  from matplotlib import figure as figure_lib

  charts = _charts(metrics)
  ink, faint = figures.PALETTE["ink"][0], figures.PALETTE["faint"][0]
  rows = math.ceil(len(charts) / COLUMNS)
  head = 0.85 + 0.2 * math.ceil(len(metrics) / 4)
  height = head + 2.35 * rows
  figure = figure_lib.Figure(figsize=(11, height), facecolor="white")
  title = "Runs side by side" if len(metrics) > 1 else "A run"
  figure.text(
    0.02, 1 - 0.16 / height, title, size=13, weight="bold", color=ink, va="top",
  )  # fmt: skip
  grid = figure.add_gridspec(
    rows, COLUMNS, left=0.055, right=0.985, top=1 - head / height,
    bottom=0.5 / height, hspace=0.55, wspace=0.2,
  )  # fmt: skip
  colours = {}
  for number, (title, metric) in enumerate(charts):
    axes = figure.add_subplot(grid[number // COLUMNS, number % COLUMNS])
    absent = (np.zeros(1), np.array([np.nan]))  # keeps a run's colour
    series = [(n, *of.get(metric, absent)) for n, of in metrics.items()]
    figures.draw_series(axes, series)
    axes.set_title(title, loc="left", size=10.5, color=ink, parse_math=False)
    axes.tick_params(labelsize=9)
    axes.xaxis.label.set(size=9, color=faint)
  for i, name in enumerate(metrics):
    colours[name] = figures.PALETTE[f"c{i % figures.COLOURS}"][0]
  from matplotlib import lines

  handles = [lines.Line2D([], [], color=c, lw=2.2) for c in colours.values()]
  legend = figure.legend(
    handles, list(colours), loc="upper left", ncols=4, frameon=False,
    bbox_to_anchor=(0.012, 1 - 0.42 / height), fontsize=10,
  )  # fmt: skip
  for text in legend.get_texts():
    text.set_parse_math(False)
  return figure


def film(
  workdir: str, images: np.ndarray, *, fine: int = 1
) -> list[np.ndarray]:
  """Features of fixed images as colours, a frame a checkpoint of a run.

  The colours are those of the last checkpoint's principal components, so that
  one sees how the features come to be what they are.

  Args:
    workdir: of the run.
    images: uint8 [n, H, W, C].
    fine: see patches.features.

  Returns:
    Frames, uint8 [H', W', 3] each.

  Raises:
    ValueError: fewer than two checkpoints.
  """
  folder = paths.local(workdir, "--workdir")
  steps = checkpoints.steps(folder / "checkpoints")
  if len(steps) < 2:
    raise ValueError(
      f"{folder} holds {len(steps)} checkpoints; a film needs two or more: "
      "train with --config.checkpoint.keep=100."
    )
  found = {}
  for step in steps:
    model = pretrained.load(folder, step=step)
    found[step] = patches.features(model, images, None, fine)
  basis = components.Basis.fit(found[steps[-1]])
  frames = []
  for step, vectors in found.items():
    rows = [
      [layout.photo(image) for image in images],
      [layout.Panel(x) for x in basis.colours(vectors)],
    ]
    figure = layout.sheet(
      rows,
      title=f"Step {step:,} of {steps[-1]:,}",
      notes="Features as colours: the principal components of the last step.",
      labels=["image", "features"],
    )
    frames.append(layout.pixels(figure))
  return frames


def _names(folders):
  """The last parts of paths, as many as tell them apart."""
  most = max(len(f.parts) for f in folders)
  for count in range(1, most + 1):
    names = ["/".join(f.parts[-count:]) for f in folders]
    if len(set(names)) == len(set(folders)):
      return names
  return [str(f) for f in folders]


def _charts(metrics) -> list[tuple[str, str]]:
  """(title, metric) of what at least one run has logged."""
  every = dict.fromkeys(name for of in metrics.values() for name in of)
  charts = [
    (title, name)
    for section, titles in curves.CHARTS.items()
    if section not in _LEFT_OUT
    for title, names in titles.items()
    for name in names
    if name in every
  ]
  known = {name for _, name in charts}
  for name in every:
    points = max(len(of[name][0]) for of in metrics.values() if name in of)
    if name.startswith("eval/") and name not in known and points > 1:
      charts.append((name.removeprefix("eval/").replace("/", ", "), name))
  return charts
