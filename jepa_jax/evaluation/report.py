"""One self-contained HTML page about a run: did it learn, and how did it go?

The page needs no network and no other file. It is made from what lies in the
workdir; every part is optional, and the page says which is missing:

    config.json       the configuration
    run.json          device, versions, seconds, images_per_second, command, ...
    metrics.jsonl     one JSON object a line: "step" and any scalars
    evaluations.json  rows of the evaluations, see verdict.py
    pictures.npz      masks_image [n, H, W, C], masks_context [n, h, w],
                      masks_targets [n, M, h, w]; features_image [n, H, W, C],
                      features and features_random [n, h, w, D]
    gallery/STEP      pictures, NAME.webp, drawn by jepa_jax.visualize; the
                      newest step's are shown

Words and style are in report.html.j2; here are the facts that it shows.
"""

import base64
from importlib import resources
import io
import json
import math
import os
import zipfile
import zlib

from etils import epath
import numpy as np

from jepa_jax import config as config_lib
from jepa_jax import paths
from jepa_jax.evaluation import collapse, components, curves, figures
from jepa_jax.evaluation import verdict as verdict_lib
from jepa_jax.training import log

SHOWN = 8  # pictures of each kind, at most
GALLERY = "gallery"


def write(workdir: str | os.PathLike[str]) -> epath.Path:
  """Writes report.html into the workdir of a run, finished or not.

  Args:
    workdir: directory, local or a bucket's.

  Returns:
    The page's path.

  Raises:
    ValueError: workdir is not a directory.
  """
  import jinja2

  workdir = epath.Path(workdir)
  if not workdir.is_dir():
    raise ValueError(
      f"no directory {workdir} to report on; pass the --workdir of a run."
    )
  config, config_problem = _read(workdir / "config.json", _json(dict))
  run, run_problem = _read(workdir / "run.json", _json(dict))
  rows, rows_problem = _read(workdir / "evaluations.json", _json(list))
  pictures, pictures_problem = _read(workdir / "pictures.npz", _arrays)
  metrics, metrics_problem = _read(workdir / "metrics.jsonl", curves.read)
  metrics, notes = metrics or ({}, [])
  rows = [row for row in rows or [] if isinstance(row, dict)]
  if not rows_problem and not rows:
    rows_problem = "evaluations.json holds no rows"
  if not metrics_problem and not metrics:
    notes.append("metrics.jsonl holds no metrics yet.")
  others = [row for row in rows if not verdict_lib.compares(row)]
  environment = jinja2.Environment(
    autoescape=True, trim_blocks=True, lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
  )  # fmt: skip
  environment.filters["text"] = _text
  template = resources.files(__package__).joinpath("report.html.j2")
  page = environment.from_string(template.read_text(encoding="utf-8")).render(
    name=paths.printable(workdir.name),
    palette=figures.PALETTE,
    verdict=verdict_lib.verdict(rows),
    alarm=_alarm(config or {}, metrics),
    facts=_facts(run or {}, metrics),
    probes=verdict_lib.table(rows),
    classes=verdict_lib.per_class(rows),
    spectra=_spectra(rows),
    others=others,
    other_keys=list(dict.fromkeys(key for row in others for key in row)),
    evaluations_problem=rows_problem,
    curves=curves.draw(metrics),
    curves_notes=notes,
    curves_problem=metrics_problem or curves.not_recorded(metrics),
    masks=_masks(pictures, pictures_problem),
    features=_features(pictures, pictures_problem),
    gallery=_gallery(workdir / GALLERY),
    config=config,
    config_problem=config_problem,
    run=run,
    run_problem=run_problem,
  )
  path = workdir / "report.html"
  log.write_whole(path, page)
  return path


def _alarm(config, metrics):
  """What the last metrics give cause for, or ""."""
  last = {key: values[-1] for key, (_, values) in metrics.items()}
  limits = config.get("collapse") or config_lib.defaults().collapse.to_dict()
  try:
    alarm = collapse.collapse_warning(last, limits)
  except (ValueError, TypeError, AttributeError) as error:
    alarm = f"config.json is damaged: collapse: {error}"
  if "loss" in last and not math.isfinite(last["loss"]):
    alarm = f"The last loss is {last['loss']}: the run has diverged. {alarm}"
  return alarm


def _facts(run, metrics):
  """The main facts by name, as text."""
  steps = [at[-1] for at, _ in metrics.values()]
  speed = run.get("images_per_second")
  if not _is_number(speed) and "images_per_second" in metrics:
    speed = float(metrics["images_per_second"][1][-1])
  parameters = run.get("parameters")
  if isinstance(parameters, dict):  # by network
    parameters = sum(x for x in parameters.values() if _is_number(x))
  devices, device = run.get("devices"), _text(run.get("device", ""))
  if device and _is_number(devices) and devices > 1:
    device = f"{devices} × {device}"
  facts = {
    "steps": f"{max(steps):,}" if steps else "",
    "last loss": figures.number(metrics["loss"][1][-1])
    if "loss" in metrics
    else "",
    "time": _duration(run.get("seconds")),
    "images/s": figures.number(speed) if _is_number(speed) else "",
    "parameters": figures.number(parameters) if _is_number(parameters) else "",
    "device": device,
    "started": _text(run.get("started", "")),
  }
  return {name: words for name, words in facts.items() if words}


def _masks(pictures, problem):
  """Strips of pictures, None for an objective that has no masks."""
  names = ("masks_image", "masks_context", "masks_targets")
  if not problem and not any(name in pictures for name in names):
    return None
  problem = problem or _lacking(pictures, names)
  if problem:
    return {"problem": problem}
  images, contexts, targets = (pictures[name][:SHOWN] for name in names)
  if not (images.ndim == targets.ndim == 4 and contexts.ndim == 3):
    return {"problem": "The mask arrays of pictures.npz have unexpected shapes"}
  strips = []
  for image, context, blocks in zip(images, contexts, targets, strict=False):
    context, blocks = context.astype(bool), blocks.astype(bool)
    seen, predicted = figures.mask_pictures(image, context, blocks)
    sizes = ", ".join(str(int(block.sum())) for block in blocks)
    visible = f"context: {int(context.sum())} of {context.size} patches"
    strips.append(
      [
        _picture(image, "image"),
        _picture(seen, visible),
        _picture(predicted, f"targets: {sizes} patches"),
      ]
    )
  return {"problem": "", "strips": strips}


def _features(pictures, problem):
  """Strips of patch features of held-out images, coloured by PCA."""
  if not problem and not {"features_image", "features"} & set(pictures):
    return None
  problem = problem or _lacking(pictures, ("features_image", "features"))
  if problem:
    return {"problem": problem}
  images = pictures["features_image"][:SHOWN]
  if images.ndim != 4:
    shape = "features_image in pictures.npz has an unexpected shape"
    return {"problem": shape}
  columns, notes = [(images, "image", False)], []
  for name, words in (("features", "trained"), ("features_random", "random")):
    if name not in pictures:
      notes.append(f"{name} is missing, so there is no comparison")
      continue
    try:
      vectors = pictures[name][:SHOWN]
      basis = components.Basis.fit(vectors)
    except ValueError as error:
      notes.append(f"{name}: {error}")
      continue
    columns.append((basis.colours(vectors), words, True))
    if name == "features":
      columns.append((basis.colours(vectors), "its patches", False))
    percents = " + ".join(f"{100 * share:.0f}" for share in basis.shares)
    notes.append(f"{words}: {percents} % of the variance shown")
  strips = [
    [
      _picture(pixels[i], words, smooth=smooth)
      for pixels, words, smooth in columns
      if i < len(pixels)
    ]
    for i in range(len(images))
  ]
  return {"problem": "", "strips": strips, "notes": notes}


def _gallery(folder):
  """The newest step's pictures, by name; None where there are none."""
  found: dict[int, dict[str, str]] = {}
  for path in sorted(folder.glob("*/*.webp")):
    if path.parent.name.isdecimal():
      data, problem = _read(path, base64.b64encode)
      uri = "" if problem else f"data:image/webp;base64,{data.decode()}"
      found.setdefault(int(path.parent.name), {})[path.stem] = uri
  return {"step": max(found), "pictures": found[max(found)]} if found else None


def _spectra(rows):
  """Charts of the eigenvalues of features, by rank."""
  charts = []
  for i, part in enumerate(verdict_lib.spectra(rows)):
    series = [
      (name, np.arange(1, len(x) + 1), np.log10(x)) for name, x in part["lines"]
    ]
    figure = figures.line_chart(series)
    figure.axes[0].set_xlabel("rank", fontsize=11, labelpad=2)
    title = f"{part['evaluation']} {part['features']}: spectrum"
    names = [name for name, _ in part["lines"]]
    charts.append(
      {
        "title": title,
        "names": names,
        "svg": figures.svg(figure, f"spectrum{i}", title),
      }
    )
  return charts


def _picture(pixels, caption, *, smooth=False):
  """An image of the page: small ones stay squares unless `smooth`."""
  smooth = smooth or max(pixels.shape[:2]) >= 100
  return {
    "uri": figures.png_uri(pixels),
    "caption": caption,
    "scaling": "smooth" if smooth else "squares",
  }


def _duration(seconds):
  if not _is_number(seconds) or not math.isfinite(seconds):
    return ""
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours:,} h {minutes} min"
  return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _is_number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value):
  if isinstance(value, str):
    return paths.printable(value)
  return json.dumps(value, default=str)


def _lacking(pictures, names):
  absent = [name for name in names if name not in pictures]
  return f"pictures.npz lacks {', '.join(absent)}" if absent else ""


def _read(path, parse):
  """(value, "") or (None, what is wrong with the file)."""
  try:
    data = path.read_bytes()
  except FileNotFoundError:
    return None, f"There is no {path.name} in the workdir"
  except OSError as error:
    return None, f"{path.name} cannot be read: {error}"
  try:
    return parse(data), ""
  except (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    RecursionError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    return None, f"{path.name} is damaged: {error}"


def _json(kind):
  def parse(data):
    value = json.loads(data)
    if not isinstance(value, kind):
      raise ValueError(f"a {type(value).__name__}, not a {kind.__name__}")
    return value

  return parse


def _arrays(data):
  with np.load(io.BytesIO(data), allow_pickle=False) as archive:
    return {name: archive[name] for name in archive.files}
