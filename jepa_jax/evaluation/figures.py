"""Charts as matplotlib figures, pictures as arrays, and both as HTML.

A figure is drawn in the light colours of PALETTE; `svg` makes them variables of
the page's style, so that an embedded chart follows light and dark mode. Nothing
here touches pyplot, so no backend is chosen; matplotlib is imported when the
first chart is drawn.

Axes: n images, H W pixels, C channels, h w grid of patches, M target blocks, D
features.
"""

import base64
from collections.abc import Sequence
import io
import math
import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import markupsafe
import numpy as np
from PIL import Image

if TYPE_CHECKING:
  from matplotlib import axes as axes_lib
  from matplotlib import figure as figure_lib

# Variable of the page's style -> its colour in light and in dark mode.
PALETTE = {
  "page": ("#ffffff", "#15171a"),
  "card": ("#f7f7f5", "#1d2024"),
  "ink": ("#1c1d1f", "#e8e9ea"),
  "faint": ("#6b6e73", "#9a9ea5"),
  "rule": ("#e2e2de", "#33373d"),
  "good": ("#1a7f4b", "#54c98a"),
  "bad": ("#c0392b", "#ff7b6b"),
  "c0": ("#2f6fd0", "#6ea3f5"),
  "c1": ("#d97706", "#f5a742"),
  "c2": ("#12916f", "#3cc9a0"),
  "c3": ("#c13584", "#f07cb8"),
  "c4": ("#7656c9", "#ab92f2"),
  "c5": ("#7a8a00", "#c3d13c"),
}
COLOURS = 6  # c0 ... c5, of lines and target blocks
WIDTH, HEIGHT = 360, 204  # of a chart, in points; text is 11 points high
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 8, 36  # margins, for ticks and "step"
POINTS = 500  # more than this in a line are thinned, keeping the extremes
ENLARGED = 256  # pixels; smaller images are enlarged before edges are drawn

Series = tuple[str, np.ndarray, np.ndarray]  # name, steps [n], values [n]


def line_chart(
  series: Sequence[Series], title: str = ""
) -> "figure_lib.Figure":
  """A chart of metrics over steps.

  A noisy line is drawn pale under its running mean. Values that are not finite
  break the line; outliers that would flatten the rest are cut off. `notes`
  counts both.

  Args:
    series: (name, steps, values) of each line; steps ascend.
    title: plain text; with it comes a legend of the names. Left out in a page,
      whose own text is the heading.
  """
  from matplotlib import figure as figure_lib

  top = TOP + 18 if title else TOP
  height = HEIGHT - TOP + top
  figure = figure_lib.Figure(figsize=(WIDTH / 72, height / 72))
  axes = figure.add_axes(
    (
      LEFT / WIDTH,
      BOTTOM / height,
      (WIDTH - LEFT - RIGHT) / WIDTH,
      (height - top - BOTTOM) / height,
    )
  )
  draw_series(axes, series)
  if title:
    ink = PALETTE["ink"][0]
    axes.set_title(title, loc="left", fontsize=12, color=ink, parse_math=False)
    if len(series) > 1:
      lines = [line for line in axes.lines if line.get_alpha() is None]
      for text in axes.legend(lines, [name for name, *_ in series]).get_texts():
        text.set_parse_math(False)
  return figure


def draw_series(axes: "axes_lib.Axes", series: Sequence[Series]) -> None:
  """Draws the lines of `line_chart` into axes, and styles these."""
  from matplotlib import ticker

  faint, rule = PALETTE["faint"][0], PALETTE["rule"][0]
  axes.spines[:].set_visible(False)
  axes.grid(axis="y", color=rule, linewidth=1)
  axes.tick_params(left=False, bottom=False, labelsize=11, labelcolor=faint)
  axes.set_xlabel("step", fontsize=11, color=faint, labelpad=2)
  for axis, bins in ((axes.xaxis, 5), (axes.yaxis, 4)):
    whole = axis is axes.xaxis
    axis.set_major_locator(
      ticker.MaxNLocator(bins, steps=[1, 2, 5, 10], integer=whole)
    )
    axis.set_major_formatter(lambda value, _: number(value))
  steps = np.concatenate([steps for _, steps, _ in series])
  axes.set_xlim(steps.min(), max(steps.max(), steps.min() + 1))
  low_high = _limits(series)
  if low_high is None:
    axes.set_yticks([])
    axes.text(
      0.5, 0.5, "No finite value", transform=axes.transAxes, color=faint,
      fontsize=11, ha="center",
    )  # fmt: skip
  else:
    axes.set_ylim(low_high)
    for i, (_, at, values) in enumerate(series):
      _draw_line(axes, at, values, PALETTE[f"c{i % COLOURS}"][0])


def notes(series: Sequence[Series]) -> list[str]:
  """What a chart of these lines does not show: NaN, infinities, outliers."""
  values = np.concatenate([values for _, _, values in series])
  steps = np.concatenate([steps for _, steps, _ in series])
  known = values[np.isfinite(values)]
  result = []
  if len(known) < len(values):
    first = steps[~np.isfinite(values)].min()
    missing = len(values) - len(known)
    result.append(f"{missing} not finite, the first at step {first:g}")
  if len(known):
    low, high = _limits(series)
    outside = int(np.sum((known < low) | (known > high)))
    if outside:
      farthest = known[np.abs(known - np.median(known)).argmax()]
      result.append(f"{outside} off the scale, farthest {number(farthest)}")
  return result


def number(value: float) -> str:
  """A number for a person: 3 to 4 digits, with k, M, G or T where large."""
  if not math.isfinite(value):
    return {"inf": "∞", "-inf": "−∞"}.get(str(float(value)), "NaN")
  unit = ""
  if abs(value) >= 1e4:
    power = min(int(math.log10(abs(value))) // 3, 4)
    value, unit = value / 1000**power, " kMGT"[power]
  digits = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
  return digits.replace("e-0", "e-").replace("-", "−") + unit


def svg(
  figure: "figure_lib.Figure", name: str, label: str
) -> markupsafe.Markup:
  """A figure as an <svg> element to embed in a page.

  Equal figures give equal bytes. What matplotlib writes for files of their own
  goes: its XML head, size, fonts and a style that would rule the whole page.
  Colours of PALETTE become var(--name, colour).

  Args:
    figure: any of matplotlib.
    name: unique in the page (letters, digits, dashes); its ids begin with it.
    label: what it shows, for those who cannot see it.
  """
  import matplotlib

  file = io.StringIO()
  with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
    facts = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=facts)
  root = ElementTree.fromstring(file.getvalue())
  root.attrib = {
    "viewBox": root.get("viewBox"), "role": "img", "aria-label": label
  }  # fmt: skip
  for element in list(root.iter()):
    element.tag = element.tag.rpartition("}")[2]
    element.text = (element.text or "").strip()
    element.tail = None
    for child in list(element):
      if child.tag.endswith(("}style", "}metadata")):
        element.remove(child)
    if element is not root:
      element.attrib = _attributes(element, name)
  return markupsafe.Markup(ElementTree.tostring(root, encoding="unicode"))


def png_uri(pixels: np.ndarray) -> str:
  """A PNG in a data URI; uint8 [H, W] or [H, W, C], C of 1, 3 or 4 (alpha)."""
  pixels = np.asarray(pixels, np.uint8)
  if pixels.ndim == 3 and pixels.shape[-1] not in (3, 4):
    pixels = pixels[..., 0]
  file = io.BytesIO()
  Image.fromarray(pixels).save(file, "PNG")
  data = base64.b64encode(file.getvalue()).decode()
  return f"data:image/png;base64,{data}"


def mask_pictures(
  image: np.ndarray, context: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """What the context encoder sees of an image, and the targets in colour.

  Args:
    image: uint8 [H, W, C], C of 1 or 3.
    context: bool [h, w], the patches of the context.
    targets: bool [M, h, w], the patches of each target block.

  Returns:
    The context, uint8 [H', W', 4], transparent where nothing is seen; and the
    targets, uint8 [H', W', 3]. H' and W' are H and W, or a multiple of them
    where the image is small.
  """
  from matplotlib import colors

  scale = max(1, ENLARGED // max(image.shape[:2]))
  image = image.repeat(scale, axis=0).repeat(scale, axis=1)
  image = np.broadcast_to(image, (*image.shape[:2], 3)).astype(np.float32)
  rgb = {
    name: 255 * np.array(colors.to_rgb(light), np.float32)
    for name, (light, _) in PALETTE.items()
  }
  seen, edge = _cover(context, image.shape[:2])
  alpha = np.where(seen, 255, 0)[..., None]
  visible = np.where(edge[..., None], rgb["faint"], image)
  blocks = image
  for i, target in enumerate(targets):
    inside, edge = _cover(target, image.shape[:2])
    colour = rgb[f"c{i % COLOURS}"]
    blocks = np.where(inside[..., None], (blocks + colour) / 2, blocks)
    blocks = np.where(edge[..., None], colour, blocks)
  return (
    np.concatenate([visible * (alpha > 0), alpha], axis=-1).astype(np.uint8),
    blocks.astype(np.uint8),
  )


def covered(
  ids: np.ndarray, valid: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
  """Bool [..., h, w]: the patches of ids [..., T] that are valid."""
  count = grid[0] * grid[1]
  cover = np.zeros((*ids.shape[:-1], count + 1), bool)
  np.put_along_axis(cover, np.where(valid, ids, count), True, axis=-1)
  return cover[..., :-1].reshape(*ids.shape[:-1], *grid)


def _draw_line(axes, steps, values, colour):
  """A line of a chart; points between gaps, which no line reaches, as dots."""
  values = np.where(np.isfinite(values), values, np.nan)
  style = {"color": colour, "linewidth": 1.8, "solid_joinstyle": "round"}
  smooth = _running_mean(values)
  if smooth is not None:
    pale = style | {"linewidth": 1, "alpha": 0.35}
    axes.plot(*_thin(steps, values), **pale)
    values = smooth
  axes.plot(*_thin(steps, values), **style)
  known = np.pad(np.isfinite(values), 1)
  lone = known[1:-1] & ~known[:-2] & ~known[2:]
  low, high = axes.get_ylim()
  lone &= (low <= values) & (values <= high)
  if lone.any():  # unclipped, as half of a dot on the edge is none
    dots = axes.scatter(steps[lone], values[lone], s=36, color=colour)
    dots.set(linewidth=0, clip_on=False)


def _limits(series):
  """Range of a chart: all values, unless few outliers would rule it."""
  values = np.concatenate([values for _, _, values in series])
  values = values[np.isfinite(values)]
  if not len(values):
    return None
  low, high = values.min(), values.max()
  if len(values) >= 20:
    inner = np.percentile(values, [2, 98])
    margin = max(0.3 * (inner[1] - inner[0]), 1e-12)
    if high - low > 4 * (inner[1] - inner[0] + 2 * margin):
      low, high = max(low, inner[0] - margin), min(high, inner[1] + margin)
  if high - low <= 1e-9 * max(abs(low), abs(high), 1e-12):
    margin = 0.1 * abs(high) or 1.0
  else:
    margin = 0.05 * (high - low)
  return float(low - margin), float(high + margin)


def _running_mean(values):
  """Mean over about 1/30 of the line where it is noisy, else None."""
  if len(values) < 60 or not np.isfinite(values).all():
    return None
  spread = np.subtract(*np.percentile(values, [98, 2]))
  if np.abs(np.diff(values)).mean() < 0.03 * spread:
    return None
  half = max(len(values) // 60, 2)
  sums = np.cumsum(np.concatenate([[0.0], values]))
  at = np.arange(len(values))
  low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
  return (sums[high] - sums[low]) / (high - low)


def _thin(steps, values):
  """At most POINTS points: of each stretch, its lowest and its highest."""
  if len(steps) <= POINTS:
    return steps, values
  kept = []
  for part in np.array_split(np.arange(len(steps)), POINTS // 2):
    part_values = values[part]
    if np.isnan(part_values).any():
      kept.extend(part)
    else:
      kept.extend({part[part_values.argmin()], part[part_values.argmax()]})
  kept = np.array(sorted(kept))
  return steps[kept], values[kept]


def _attributes(element, name):
  """Those of an SVG element that a page needs, short and without clashes."""
  result = {}
  for key, value in element.attrib.items():
    key = key.rpartition("}")[2]  # href, of XLink
    if key == "id" and element.tag in ("g", "figure"):
      continue  # nothing refers to a group
    if key == "id":
      value = f"{name}-{value}"
    elif key == "style":
      value = re.sub(r"font-family: [^;]*;? ?", "", value)
      for variable, (light, _) in PALETTE.items():
        value = value.replace(light, f"var(--{variable}, {light})")
    elif key in ("href", "clip-path"):
      value = value.replace("#", f"#{name}-")
    elif key in ("d", "x", "y"):
      value = re.sub(r"-?\d+\.\d+", lambda x: f"{float(x[0]):.1f}", value)
      value = " ".join(value.split())
    if not (key == "transform" and value.startswith("rotate(-0 ")):
      result[key] = value
  return result


def _cover(mask, shape):
  """Patches as pixels: bool [H, W] of `shape`, and those on their edge."""
  from scipy import ndimage

  (h, w), (height, width) = mask.shape, shape
  rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
  inside = mask[rows[:, None], columns]
  thick = max(1, max(shape) // 128)
  return inside, inside & ~ndimage.binary_erosion(
    inside, np.ones((3, 3)), iterations=thick
  )
