"""Sheets of pictures with words beside them, and how they become files.

Nothing here touches pyplot, so no backend is chosen.
"""

from collections.abc import Sequence
import dataclasses
import io
import os
import pathlib
import textwrap
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from jepa_jax import paths
from jepa_jax.evaluation import figures
from jepa_jax.training import log

if TYPE_CHECKING:
  from matplotlib import axes as axes_lib
  from matplotlib import figure as figure_lib

DPI = 110  # of a picture that is written
GAP = 0.07  # between panels, inches
GROUP = 0.22  # more between groups of columns, inches
LINE = 0.19  # a line of text, inches


@dataclasses.dataclass(frozen=True)
class Panel:
  """One picture of a sheet.

  Attributes:
    pixels: uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4].
    caption: below it.
    smooth: whether pixels are blended where it is enlarged, as of a photo;
      else they stay squares.
    box: (left, top, width, height) of a frame, as shares of the sides; or
      None.
    right: whether what it shows is right: a green edge or a red one; None:
      neither.
  """

  pixels: np.ndarray
  caption: str = ""
  smooth: bool = False
  box: tuple[float, float, float, float] | None = None
  right: bool | None = None


def photo(pixels: np.ndarray, caption: str = "", **settings) -> Panel:
  """An image as a panel."""
  return Panel(pixels, caption, smooth=True, **settings)


def heat(
  values: np.ndarray, low: float, high: float, colours: str = "inferno"
) -> np.ndarray:
  """Values as colours of a matplotlib map: [...] -> uint8 [..., 3]."""
  import matplotlib

  shares = (values - low) / (high - low if high > low else 1)
  rgba = matplotlib.colormaps[colours](np.clip(shares, 0, 1), bytes=True)
  return rgba[..., :3]


def sheet(
  rows: Sequence[Sequence[Panel]],
  *,
  title: str,
  notes: str = "",
  columns: Sequence[tuple[str, int]] = (),
  labels: Sequence[str] = (),
  scale: tuple[str, float, float, str] | None = None,
  side: float = 1.15,
  chart: float = 0,
) -> "figure_lib.Figure":
  """Panels in rows, under a title that says what one sees.

  Args:
    rows: of equal length; what is None stays empty.
    title: one line.
    notes: below the title: how to read it.
    columns: (heading, how many columns it is above), from the left.
    labels: words before each row.
    scale: (words, low, high, name of the colours) of a bar at the foot; see
      `heat`.
    side: of a panel, inches.
    chart: inches of height that are left free at the foot, for `foot`.
  """
  from matplotlib import figure as figure_lib

  ink, faint = figures.PALETTE["ink"][0], figures.PALETTE["faint"][0]
  count = max(map(len, rows))
  shapes = [p.pixels.shape[:2] for row in rows for p in row if p is not None]
  tall = side * max(h / w for h, w in shapes)
  left = 0.15 + (1.35 if labels else 0)
  spans = [span for _, span in columns]
  apart = GROUP if max(spans, default=1) > 1 else 0  # between groups
  starts = np.cumsum([0, *(x * (side + GAP) + apart for x in spans)])
  places = [left + j * (side + GAP) for j in range(count)]
  for first in np.cumsum(spans, dtype=int):
    places[first:] = [x + apart for x in places[first:]]
  width = max(places[-1] + side + 0.15, 5.2)
  note_lines = textwrap.wrap(notes, int((width - 0.3) * 14.5))
  head = 0.16 + 0.3 + LINE * len(note_lines) + 0.08
  caption = any(p is not None and p.caption for row in rows for p in row)
  most = max(
    [p.caption.count("\n") + 1 for row in rows for p in row if p is not None]
  )
  step = tall + GAP + caption * LINE * most
  top = head + (0.28 if columns else 0)
  foot = 0.12 + (0.62 if scale else 0) + chart
  height = top + step * len(rows) + foot
  figure = figure_lib.Figure(figsize=(width, height), facecolor="white")
  at = lambda x, y, w, h: (
    x / width,
    1 - (y + h) / height,
    w / width,
    h / height,
  )  # noqa: E501
  write = lambda x, y, text, **style: figure.text(
    x / width, 1 - y / height, text, parse_math=False, **style
  )
  write(0.15, 0.16, title, size=13, weight="bold", color=ink, va="top")
  text = "\n".join(note_lines)
  write(0.15, 0.46, text, size=9.5, color=faint, va="top", linespacing=1.25)
  for (words, span), x in zip(columns, left + starts):
    middle = x + (span * (side + GAP) - GAP) / 2
    write(middle, top - 0.06, words, size=10, color=ink, ha="center")
  for i, row in enumerate(rows):
    y = top + i * step
    if labels:
      lines = labels[i].splitlines()
      label = "\n".join(textwrap.fill(line, 18) for line in lines)
      write(0.15, y + tall / 2, label, size=9.5, color=ink, va="center")
    for j, panel in enumerate(row):
      if panel is not None:
        axes = figure.add_axes(at(places[j], y, side, tall))
        _draw_panel(axes, panel)
  if scale:
    bar = figure.add_axes(at(left, height - chart - 0.52, 2.4, 0.12))
    _draw_scale(bar, *scale)
  return figure


def foot(
  figure: "figure_lib.Figure", height: float, left: float = 0.75
) -> "axes_lib.Axes":
  """Axes in what `sheet` left free at the foot, `height` inches."""
  width, whole = figure.get_size_inches()
  axes = figure.add_axes(
    (
      left / width,
      0.5 / whole,
      (width - left - 0.3) / width,
      (height - 0.95) / whole,
    )  # noqa: E501
  )
  plain(axes)
  return axes


def plain(axes: "axes_lib.Axes") -> None:
  """The style of charts: no frame, faint lines, small numbers."""
  faint, rule = figures.PALETTE["faint"][0], figures.PALETTE["rule"][0]
  axes.spines[:].set_visible(False)
  axes.grid(axis="y", color=rule, linewidth=1)
  axes.set_axisbelow(True)
  axes.tick_params(left=False, bottom=False, labelsize=9, labelcolor=faint)


def pixels(figure: "figure_lib.Figure") -> np.ndarray:
  """A figure as uint8 [H, W, 3]."""
  from matplotlib.backends import backend_agg

  figure.set_dpi(DPI)
  canvas = backend_agg.FigureCanvasAgg(figure)
  canvas.draw()
  return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def gif(frames: Sequence[np.ndarray], seconds: float = 0.4) -> bytes:
  """A film of uint8 [H, W, 3] that repeats; its last frame stays longer."""
  images = [
    Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)
    for frame in frames
  ]
  durations = [round(1000 * seconds)] * len(images)
  durations[-1] *= 5
  file = io.BytesIO()
  images[0].save(
    file, "GIF", save_all=True, append_images=images[1:], duration=durations,
    loop=0, disposal=1,
  )  # fmt: skip
  return file.getvalue()


def check_path(path: pathlib.Path, film: bool) -> str:
  """Pillow's name of the format of a path.

  Raises:
    ValueError: a figure or a film is not written so, or not there.
  """
  kinds = {".gif": "GIF"} if film else {".png": "PNG", ".webp": "WEBP"}
  if path.suffix.lower() not in kinds:
    raise ValueError(
      f'{path} ends in "{path.suffix}"; this picture is written as '
      f"{' or '.join(kinds)}."
    )
  paths.check_writable(path)
  return kinds[path.suffix.lower()]


def write(
  drawn: "figure_lib.Figure | Sequence[np.ndarray]",
  path: str | os.PathLike[str],
) -> None:
  """Writes a figure as PNG or WebP, or frames as a GIF, whole or not at all.

  Raises:
    ValueError: see check_path.
  """
  kind = check_path(pathlib.Path(path), isinstance(drawn, Sequence))
  log.write_whole(path, encoded(drawn, kind))


def encoded(
  drawn: "figure_lib.Figure | Sequence[np.ndarray]", kind: str = "PNG"
) -> bytes:
  """A picture as a file: of a figure by Pillow's name, of frames a GIF."""
  if isinstance(drawn, Sequence):
    return gif(drawn)
  file = io.BytesIO()
  Image.fromarray(pixels(drawn)).save(file, kind, optimize=True, quality=85)
  return file.getvalue()


def _draw_panel(axes: "axes_lib.Axes", panel: Panel) -> None:
  from matplotlib import patches

  shown = panel.pixels
  if shown.ndim == 3 and shown.shape[-1] not in (3, 4):
    shown = shown[..., 0]
  axes.imshow(
    shown, cmap="gray", vmin=0, vmax=255, aspect="auto",
    interpolation="antialiased" if panel.smooth else "nearest",
    extent=(0, 1, 1, 0),
  )  # fmt: skip
  axes.set_axis_off()
  if panel.box:
    x, y, w, h = panel.box
    for colour, wide in (("white", 3.4), ("#e0115f", 1.8)):
      frame = patches.Rectangle(
        (x, y), w, h, fill=False, edgecolor=colour, linewidth=wide
      )
      axes.add_patch(frame)
  if panel.right is not None:
    colour = figures.PALETTE["good" if panel.right else "bad"][0]
    edge = patches.Rectangle(
      (0, 0), 1, 1, fill=False, edgecolor=colour, linewidth=3, clip_on=False
    )
    axes.add_patch(edge)
  if panel.caption:
    axes.text(
      0.5, 1.03, panel.caption, transform=axes.transData, ha="center",
      va="top", size=8.5, color=figures.PALETTE["faint"][0], parse_math=False,
    )  # fmt: skip


def _draw_scale(axes, words, low, high, colours):
  values = heat(np.linspace(0, 1, 256)[None], 0, 1, colours)
  axes.imshow(values, aspect="auto", extent=(low, high, 0, 1))
  axes.set_yticks([])
  axes.spines[:].set_visible(False)
  faint = figures.PALETTE["faint"][0]
  axes.tick_params(labelsize=8.5, labelcolor=faint, length=0, pad=2)
  axes.set_xticks([low, (low + high) / 2, high])
  axes.xaxis.set_major_formatter(lambda value, _: figures.number(value))
  axes.set_title(words, size=9, color=faint, loc="left", pad=3)
