"""Arrays in, HTML out: line charts, mask pictures, PCA-coloured features.

Everything is inline SVG or a PNG in a data URI, so that a page made of it needs
no other file. Colours are CSS classes (c0, c1, ...), which lets the page follow
light and dark mode; only pictures carry pixels.

Axes: n images, H W pixels, C channels, h w grid of patches, M target blocks, D
features.
"""

import base64
from collections.abc import Sequence
import html
import math
import struct
import zlib

import numpy as np

WIDTH, HEIGHT = 360, 190  # of a chart, in SVG units; text is 11 units high
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 22  # margins, for ticks
POINTS = 500  # more than this in a line are thinned, keeping the extremes
COLOURS = 6  # CSS classes c0 ... c5

Series = tuple[str, np.ndarray, np.ndarray]  # name, steps [n], values [n]


def line_chart(title: str, series: Sequence[Series]) -> str:
  """A chart over steps as <figure>, with the last values in its heading.

  A noisy line is drawn pale under its running mean. Outliers that would flatten
  the rest are cut off, values that are not finite left out; the caption counts
  both.

  Args:
    title: heading, plain text.
    series: (name, steps, values) of each line; steps ascend.

  Returns:
    HTML.
  """
  finite = [values[np.isfinite(values)] for _, _, values in series]
  known = np.concatenate(finite)
  notes = []
  missing = sum(len(values) for _, _, values in series) - len(known)
  if missing:
    first = min(
      steps[~np.isfinite(values)][0]
      for _, steps, values in series
      if not np.isfinite(values).all()
    )
    notes.append(f"{missing} not finite, the first at step {first:g}")
  if len(known):
    low, high = _limits(known)
    outside = int(np.sum((known < low) | (known > high)))
    if outside:
      notes.append(f"{outside} off the scale, farthest {number(_far(known))}")
    drawing = _axes_and_lines(title, series, low, high)
  else:
    drawing = '<p class="missing">No finite value.</p>'
  legend = "".join(
    f'<span class="key c{i % COLOURS}">{html.escape(name)} '
    f"<b>{_last(values)}</b></span>"
    for i, (name, _, values) in enumerate(series)
  )
  if len(series) == 1:
    legend = f"<b>{_last(series[0][2])}</b>"
  note = f'<p class="note">{"; ".join(notes)}.</p>' if notes else ""
  return (
    f'<figure class="chart"><figcaption>{html.escape(title)}'
    f"<span>{legend}</span></figcaption>{drawing}{note}</figure>"
  )


def number(value: float) -> str:
  """A number for a person: 3 to 4 digits, with k, M, G or T where large."""
  if not math.isfinite(value):
    return {"inf": "∞", "-inf": "−∞"}.get(str(value), "NaN")
  unit = ""
  if abs(value) >= 1e4:
    power = min(int(math.log10(abs(value))) // 3, 4)
    value, unit = value / 1000**power, " kMGT"[power]
  digits = f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
  return digits.replace("e-0", "e-").replace("-", "−") + unit


def png_uri(pixels: np.ndarray) -> str:
  """A data URI of uint8 [H, W] or [H, W, C]; C of 1 is grey, 3 is RGB."""
  pixels = np.asarray(pixels, np.uint8)
  pixels = pixels[..., None] if pixels.ndim == 2 else pixels
  pixels = pixels[..., : 3 if pixels.shape[-1] >= 3 else 1]
  height, width, channels = pixels.shape
  rows = pixels.reshape(height, width * channels)
  rows = np.pad(rows, ((0, 0), (1, 0)))  # each row starts with its filter, 0

  def chunk(kind, data):
    checksum = zlib.crc32(kind + data)
    return (
      struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    )

  colour = 2 if channels == 3 else 0
  header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
  data = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", zlib.compress(rows.tobytes(), 9))
    + chunk(b"IEND", b"")
  )
  return "data:image/png;base64," + base64.b64encode(data).decode()


def picture(pixels: np.ndarray, caption: str, *, smooth: bool = False) -> str:
  """uint8 [H, W, C] as <figure>; small ones are enlarged by the browser.

  With `smooth` it interpolates between the pixels, else they stay squares.
  """
  style = "smooth" if smooth else _scaling(pixels)
  words = html.escape(caption)
  return (
    f'<figure><img class="{style}" src="{png_uri(pixels)}" alt="{words}">'
    f"<figcaption>{words}</figcaption></figure>"
  )


def mask_pictures(
  image: np.ndarray, context: np.ndarray, targets: np.ndarray, *, name: str
) -> str:
  """An image, what the context encoder sees, and the target blocks in colour.

  Args:
    image: uint8 [H, W, C].
    context: bool [h, w], the patches of the context.
    targets: bool [M, h, w], the patches of each target block.
    name: an identifier, unique in the page (letters, digits, dashes).

  Returns:
    HTML: three <figure>.
  """
  h, w = context.shape
  uri = f'<image id="{name}" href="{png_uri(image)}" width="{w}" height="{h}"'
  again = f'<use href="#{name}"/>'
  style = f'preserveAspectRatio="none" class="{_scaling(image)}"'
  hidden = (
    f'<path class="hidden" d="{_cells(~context)}"/>'
    f'<path class="edge frame" d="{_outline(context)}"/>'
  )
  blocks = "".join(
    f'<g class="c{i % COLOURS}"><path class="block" d="{_cells(block)}"/>'
    f'<path class="edge" d="{_outline(block)}"/></g>'
    for i, block in enumerate(targets)
  )
  sizes = ", ".join(str(int(block.sum())) for block in targets)
  return "".join(
    f'<figure><svg viewBox="0 0 {w} {h}" role="img" '
    f'aria-label="{caption}">{content}</svg>'
    f"<figcaption>{caption}</figcaption></figure>"
    for content, caption in (
      (f"{uri} {style}/>", "image"),
      (again + hidden, f"context: {int(context.sum())} of {h * w} patches"),
      (again + blocks, f"targets: {sizes} patches"),
    )
  )


def pca_colours(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Patch features as colours: their first three principal components.

  The components are those of all patches of all images together, so that equal
  colours mean similar features across images. Each is scaled from its 2nd to
  its 98th percentile; its sign makes the largest loading positive.

  Args:
    features: [n, h, w, D], finite.

  Returns:
    uint8 [n, h, w, 3] and the three shares of the variance, float64 [3].

  Raises:
    ValueError: features is not [n, h, w, D], empty or not finite.
  """
  if features.ndim != 4 or not features.size:
    raise ValueError(
      f"PCA got features of shape {features.shape}; it needs [images, rows, "
      "columns, features]."
    )
  flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
  if not np.isfinite(flat).all():
    raise ValueError("PCA got features that are not finite.")
  flat = flat - flat.mean(axis=0)
  variances, axes = np.linalg.eigh(flat.T @ flat)
  variances, axes = np.maximum(variances[::-1][:3], 0), axes[:, ::-1][:, :3]
  signs = np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
  components = flat @ (axes * signs)
  low, high = np.percentile(components, [2, 98], axis=0)
  colours = (components - low) / np.where(high > low, high - low, 1)
  lacking = 3 - axes.shape[1]  # D below 3
  colours = np.pad(np.clip(colours, 0, 1), ((0, 0), (0, lacking)))
  total = np.square(flat).sum()
  shares = np.pad(variances, (0, lacking)) / (total if total > 0 else 1)
  colours = np.round(255 * colours).astype(np.uint8)
  return colours.reshape(*features.shape[:3], 3), shares


def _scaling(pixels):
  """The CSS class of an image: squares where the page will enlarge it."""
  return "squares" if max(np.shape(pixels)[:2]) < 100 else "smooth"


def _axes_and_lines(title, series, low, high):
  """The <svg> of a chart whose values go from `low` to `high`."""
  steps = np.concatenate([steps for _, steps, _ in series])
  first, last = float(steps.min()), float(steps.max())
  last = last if last > first else first + 1
  across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

  def x(step):
    return (step - first) / (last - first) * across

  def y(value):
    return (high - value) / (high - low) * up

  parts = []
  for tick in _ticks(low, high, 4):
    at = TOP + y(tick)
    parts.append(
      f'<path class="grid" d="M{LEFT} {at:.1f}h{across}"/><text '
      f'x="{LEFT - 5}" y="{at + 3.5:.1f}" class="end">{number(tick)}</text>'
    )
  for tick in _ticks(first, last, 5):
    at = LEFT + x(tick)
    anchor = "end" if at > WIDTH - 24 else "middle"
    parts.append(
      f'<text x="{min(at, WIDTH):.1f}" y="{HEIGHT - 6}" '
      f'class="{anchor}">{number(tick)}</text>'
    )
  parts.append(  # an inner <svg> cuts off what lies outside
    f'<svg x="{LEFT}" y="{TOP}" width="{across}" height="{up}">'
  )
  for i, (_, steps, values) in enumerate(series):
    lines = [("line", steps, values)]
    smooth = _running_mean(values)
    if smooth is not None:
      lines = [("line pale", steps, values), ("line", steps, smooth)]
    for style, at, value in lines:
      path, dots = _path(*_thin(at, value), x, y)
      parts.append(f'<g class="c{i % COLOURS}"><path class="{style}" ')
      parts.append(f'd="{path}"/>{dots}</g>')
  label = html.escape(f"{title}, steps {first:g} to {last:g}")
  return (
    f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
    + "".join(parts)
    + "</svg></svg>"
  )


def _limits(values):
  """The chart's range: all values, unless few outliers would rule it."""
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


def _far(values):
  """The value farthest from the median."""
  return values[np.abs(values - np.median(values)).argmax()]


def _last(values):
  return number(float(values[-1]))


def _ticks(low, high, count):
  """About `count` round numbers (1, 2 or 5 times a power of ten) between."""
  rough = (high - low) / count
  power = 10.0 ** math.floor(math.log10(rough))
  step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
  start, stop = math.ceil(low / step), math.floor(high / step)
  return [round(i * step, 12) for i in range(start, stop + 1)]


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


def _path(steps, values, x, y):
  """Path data, broken where values are not finite; lone points as dots."""
  path, dots, run = [], [], []
  for step, value in [*zip(steps, values, strict=True), (0, math.nan)]:
    if math.isfinite(value):
      run.append(f"{x(step):.1f} {y(value):.1f}")
      continue
    if len(run) == 1:
      cx, cy = run[0].split()
      dots.append(f'<circle cx="{cx}" cy="{cy}" r="3"/>')
    elif run:
      path.append("M" + "L".join(run))
    run = []
  return "".join(path), "".join(dots)


def _cells(mask):
  """Path data of the true cells of bool [h, w], one unit each."""
  return "".join(f"M{j} {i}h1v1h-1z" for i, j in np.argwhere(mask))


def _outline(mask):
  """Path data of the edges between true and false cells of bool [h, w]."""
  padded = np.pad(mask, 1).astype(np.int8)
  across = np.argwhere(np.diff(padded, axis=0)[:, 1:-1])
  down = np.argwhere(np.diff(padded, axis=1)[1:-1])
  return "".join(
    [f"M{j} {i}h1" for i, j in across] + [f"M{j} {i}v1" for i, j in down]
  )
