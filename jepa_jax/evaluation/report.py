"""One self-contained HTML page about a run: did it learn, and how did it go?

The page needs no network and no other file. It is made from what lies in the
workdir; every part is optional, and the page says which is missing:

    config.json       the configuration
    run.json          device, versions, seconds, images_per_second, command, ...
    metrics.jsonl     one JSON object a line: "step" and any scalars
    evaluations.json  rows of `probes.probe_table`
    pictures.npz      masks_image [n, H, W, C], masks_context [n, h, w],
                      masks_targets [n, M, h, w]; features_image [n, H, W, C],
                      features and features_random [n, h, w, D]
"""

from collections.abc import Mapping, Sequence
import html
import io
import json
import math
import os
import string
from typing import Any
import zipfile
import zlib

from etils import epath
import numpy as np

from jepa_jax.evaluation import collapse, figures, page

SHOWN = 8  # pictures of each kind, at most

CHARTS = {  # section: charts by title, and the metrics in each
  "Learning": {
    "Loss": ("loss",),
    "Gradient norm": ("grad_norm",),
    "Norms": ("prediction_norm", "target_norm"),
  },
  "Collapse": {
    "Effective rank of the features": ("effective_rank",),
    "Standard deviation of the features": ("feature_std",),
    "Mean cosine between images": ("mean_cosine",),
  },
  "Schedules": {
    "Learning rate": ("learning_rate",),
    "Weight decay": ("weight_decay",),
    "Momentum of the target encoder": ("momentum",),
  },
  "Speed": {
    "Images a second": ("images_per_second",),
    "Seconds a step": ("step_seconds", "data_wait_seconds"),
  },
}

LINES = {  # what a line is called where a chart has several
  "prediction_norm": "prediction",
  "target_norm": "target",
  "step_seconds": "step",
  "data_wait_seconds": "data wait",
}

Metrics = dict[str, tuple[np.ndarray, np.ndarray]]  # name: (steps, values)


def write(workdir: str | os.PathLike[str]) -> epath.Path:
  """Writes report.html into the workdir of a run, finished or not.

  Args:
    workdir: directory, local or a bucket's.

  Returns:
    The page's path.

  Raises:
    ValueError: workdir is not a directory.
  """
  workdir = epath.Path(workdir)
  if not workdir.is_dir():
    raise ValueError(
      f"no directory {workdir} to report on; pass the --workdir of a run."
    )
  config, config_problem = _read(workdir / "config.json", _json(dict))
  run, run_problem = _read(workdir / "run.json", _json(dict))
  rows, rows_problem = _read(workdir / "evaluations.json", _json(list))
  pictures, pictures_problem = _read(workdir / "pictures.npz", _arrays)
  metrics, metrics_problem = _read(workdir / "metrics.jsonl", read_metrics)
  metrics, notes = metrics or ({}, [])
  rows = [row for row in rows or [] if isinstance(row, dict)]
  body = [
    _header(workdir.name, run or {}, metrics, rows),
    _section("Evaluations", _evaluations(rows, rows_problem)),
    _section("Curves", _curves(metrics, notes, metrics_problem)),
    _section("Masks", _masks(pictures, pictures_problem)),
    _section("Features", _features(pictures, pictures_problem)),
    _section("Configuration", _tree_or_note(config, config_problem)),
    _section("The run", _tree_or_note(run, run_problem)),
  ]
  text = string.Template(page.PAGE).substitute(
    title=html.escape(workdir.name), style=page.STYLE, body="\n".join(body)
  )
  path = workdir / "report.html"
  path.write_text(text, encoding="utf-8")
  return path


def read_metrics(text: bytes) -> tuple[Metrics, list[str]]:
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
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
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


def verdict(rows: Sequence[Mapping[str, Any]]) -> str:
  """One sentence: the trained encoder against its two baselines.

  Judges by the linear probe, or by k-NN where there is none; of several
  features ("last", "last4") each encoder's best counts. A difference below two
  standard errors of the test sample is no difference.

  Args:
    rows: of `probes.probe_table`, with top1 in percent.

  Returns:
    Plain text.
  """
  clauses, helped, unhelped, behind_pixels = [], [], [], []
  names = dict.fromkeys(row.get("evaluation") for row in rows)
  for name in names:
    scored = _best(rows, name, "linear") or _best(rows, name, "knn")
    trained = scored.get("trained")
    if trained is None or len(scored) < 2:
      continue
    differences = []
    for encoder, words in (
      ("random", "the random encoder"),
      ("pixels", "pixels"),
    ):
      if encoder not in scored:
        continue
      difference, sign = _difference(trained, scored[encoder])
      differences.append(f"{_signed(difference)} over {words}")
      if encoder == "random":
        (helped if sign > 0 else unhelped).append(str(name))
      elif sign <= 0:
        behind_pixels.append(str(name))
    probe = "linear probe" if trained["protocol"] == "linear" else "k-NN"
    clauses.append(
      f"{probe} on {name} {trained['top1']:.1f} % ({', '.join(differences)})"
    )
  if not clauses:
    return "No probe with a baseline yet, so nothing is known of the features"
  if unhelped and not helped:
    lead = "Training did not help on " + " and ".join(unhelped)
  elif unhelped:
    lead = f"Training helped on {' and '.join(helped)}, not on " + " or ".join(
      unhelped
    )
  elif behind_pixels:
    lead = "Training helped, but raw pixels are not beaten on " + " and ".join(
      behind_pixels
    )
  else:
    lead = "The trained encoder beats its baselines"
  return f"{lead}: {'; '.join(clauses)}"


def _header(name, run, metrics, rows):
  """Verdict, an alarm where the metrics give cause, and the main facts."""
  last = {key: values[-1] for key, (_, values) in metrics.items()}
  alarm = collapse.collapse_warning(last)
  if "loss" in last and not math.isfinite(last["loss"]):
    alarm = f"The last loss is {last['loss']}: the run has diverged. " + alarm
  alarm = f'<p class="alarm">{html.escape(alarm)}</p>' if alarm else ""
  steps = max((steps[-1] for steps, _ in metrics.values()), default=None)
  speed = run.get("images_per_second", last.get("images_per_second"))
  devices = run.get("devices")
  device = str(run.get("device", "")) or None
  if device and isinstance(devices, int) and devices > 1:
    device = f"{devices} × {device}"
  facts = {
    "steps": None if steps is None else f"{steps:,}",
    "last loss": figures.number(last["loss"]) if "loss" in last else None,
    "time": _duration(run.get("seconds")),
    "images/s": figures.number(speed) if _is_number(speed) else None,
    "parameters": (
      figures.number(run["parameters"])
      if _is_number(run.get("parameters"))
      else None
    ),
    "device": device,
    "started": run.get("started"),
  }
  tiles = "".join(
    f"<div><dt>{key}</dt><dd>{html.escape(str(value))}</dd></div>"
    for key, value in facts.items()
    if value is not None
  )
  lead, _, numbers = html.escape(verdict(rows)).partition(":")
  sentence = f"<b>{lead}:</b>{numbers}." if numbers else f"<b>{lead}.</b>"
  return (
    f"<header><h1>{html.escape(name)}</h1>"
    f'<p class="verdict">{sentence}</p>{alarm}'
    f'<dl class="facts">{tiles}</dl></header>'
  )


def _evaluations(rows, problem):
  """The table of probes with both baselines; other rows as they are."""
  probes, others = {}, []
  for row in rows:
    known = row.get("encoder") in ("trained", "random", "pixels")
    if known and _is_number(row.get("top1")):
      features = row.get("features")
      features = "" if row["encoder"] == "pixels" else features
      key = (row.get("evaluation"), row.get("protocol"))
      probes.setdefault(key, {})[features, row["encoder"]] = row
    else:
      others.append(row)
  parts = [_missing(problem)] if problem else []
  if probes:
    parts.append(_probe_table(probes))
  if others:
    parts.append("<h3>Other measurements</h3>" + _plain_table(others))
  if not rows and not problem:
    parts.append(_missing("evaluations.json holds no rows"))
  return "".join(parts)


def _probe_table(probes):
  """A row for each evaluation, protocol and features; top-1 in percent."""
  lines, labels = [], {"linear": "linear probe", "knn": "k-NN"}
  for (evaluation, protocol), scores in probes.items():
    pixels = scores.get(("", "pixels"))
    kinds = dict.fromkeys(f for f, encoder in scores if encoder != "pixels")
    for features in kinds or {"": None}:
      trained = scores.get((features, "trained"))
      random = scores.get((features, "random"))
      some = trained or random or pixels
      counts = " / ".join(
        f"{some[key]:,}" for key in ("n_train", "n_test") if key in some
      )
      cells = [
        f"<th scope=row>{_text(evaluation)}</th>",
        f"<td>{_text(labels.get(protocol, protocol))} {_text(features or '')}",
        f'<td class="main">{_score(trained)}',
        f"<td>{_score(random)}",
        f"<td>{_score(pixels)}",
        f"<td>{_versus(trained, random)}",
        f"<td>{_versus(trained, pixels)}",
        f'<td class="faint">{counts}',
      ]
      lines.append("<tr>" + "".join(cells))
  return (
    '<div class="wide"><table class="probes"><thead><tr>'
    "<th>evaluation<th>protocol<th>trained<th>random<th>pixels"
    "<th>over random<th>over pixels<th>train / test images"
    f"</thead><tbody>{''.join(lines)}</tbody></table></div>"
    '<p class="note">Top-1 in percent ± one standard error of the test sample. '
    "<i>Random</i> is the same architecture before training, <i>pixels</i> the "
    "image itself. Differences below two standard errors are grey.</p>"
  )


def _plain_table(rows):
  """Rows of any keys as they are."""
  keys = list(dict.fromkeys(key for row in rows for key in row))
  head = "".join(f"<th>{_text(key)}" for key in keys)
  lines = "".join(
    "<tr>" + "".join(f"<td>{_text(row.get(key, ''))}" for key in keys)
    for row in rows
  )
  return (
    f'<div class="wide"><table><thead><tr>{head}</thead>'
    f"<tbody>{lines}</tbody></table></div>"
  )


def _curves(metrics, notes, problem):
  """All metrics as charts: the known ones by section, then the others."""
  if problem:
    return _missing(problem)
  if not metrics:
    notes = [*notes, "metrics.jsonl holds no metrics yet."]
  sections = {title: dict(charts) for title, charts in CHARTS.items()}
  known = {n for c in CHARTS.values() for names in c.values() for n in names}
  for name in sorted(set(metrics) - known):
    if name.startswith("eval/"):
      if len(metrics[name][0]) < 2:
        continue  # The table above says it already.
      group = name.removeprefix("eval/").rpartition("/")[0] or "evaluation"
      charts = sections.setdefault("Evaluations during training", {})
      charts[group] = (*charts.get(group, ()), name)
    else:
      sections.setdefault("Other", {})[name] = (name,)
  parts = [f'<p class="note">{html.escape(note)}</p>' for note in notes]
  absent = sorted(known - set(metrics))
  for section, charts in sections.items():
    drawn = ""
    for title, names in charts.items():
      series = [
        (LINES.get(n, n.rpartition("/")[2]), *metrics[n])
        for n in names
        if n in metrics
      ]
      drawn += figures.line_chart(title, series) if series else ""
    if drawn:
      parts.append(f'<h3>{section}</h3><div class="charts">{drawn}</div>')
  if absent and metrics:
    parts.append(_missing("Not recorded: " + ", ".join(absent)))
  return "".join(parts)


def _masks(pictures, problem):
  """What the context encoder sees, and what is to be predicted."""
  names = ("masks_image", "masks_context", "masks_targets")
  problem = problem or _lacking(pictures, names)
  if problem:
    return _missing(problem)
  images, contexts, targets = (pictures[name][:SHOWN] for name in names)
  if not (images.ndim == targets.ndim == 4 and contexts.ndim == 3):
    return _missing("The mask arrays of pictures.npz have unexpected shapes")
  strips = "".join(
    '<div class="strip">'
    + figures.mask_pictures(
      image, context.astype(bool), blocks.astype(bool), name=f"mask-{i}"
    )
    + "</div>"
    for i, (image, context, blocks) in enumerate(
      zip(images, contexts, targets, strict=False)
    )
  )
  return (
    "<p>From the context alone the predictor says what the target encoder says "
    f'of each coloured block.</p><div class="strips">{strips}</div>'
  )


def _features(pictures, problem):
  """Patch features of held-out images, coloured by PCA."""
  problem = problem or _lacking(pictures, ("features_image", "features"))
  if problem:
    return _missing(problem)
  images = pictures["features_image"][:SHOWN]
  if images.ndim != 4:
    return _missing("features_image in pictures.npz has an unexpected shape")
  columns, notes = [(images, "image", False)], []
  for name, words in (("features", "trained"), ("features_random", "random")):
    if name not in pictures:
      notes.append(f"{name} is missing, so there is no comparison")
      continue
    try:
      colours, shares = figures.pca_colours(pictures[name][:SHOWN])
    except ValueError as error:
      notes.append(f"{name}: {error}")
      continue
    columns.append((colours, words, True))
    if name == "features":
      columns.append((colours, "its patches", False))
    percents = " + ".join(f"{100 * share:.0f}" for share in shares)
    notes.append(f"{words}: {percents} % of the variance shown")
  strips = "".join(
    '<div class="strip">'
    + "".join(
      figures.picture(pixels[i], words, smooth=smooth)
      for pixels, words, smooth in columns
      if i < len(pixels)
    )
    + "</div>"
    for i in range(len(images))
  )
  return (
    "<p>Patch features of held-out images: their first three principal "
    "components over all the images shown, as red, green and blue. Like "
    f'colours are like features.</p><div class="strips">{strips}</div>'
    f'<p class="note">{html.escape("; ".join(notes))}.</p>'
  )


def _tree_or_note(values, problem):
  return _missing(problem) if problem else _tree(values)


def _tree(values):
  """A nested dict: leaves in a table, dicts folded beneath it."""
  leaves = "".join(
    f"<tr><th scope=row>{_text(key)}<td>{_text(value)}"
    for key, value in values.items()
    if not isinstance(value, dict)
  )
  folded = "".join(
    f"<details><summary>{_text(key)} <small>{len(value)}</small></summary>"
    f"{_tree(value)}</details>"
    for key, value in values.items()
    if isinstance(value, dict)
  )
  table = f'<table class="leaves"><tbody>{leaves}</tbody></table>'
  return (table if leaves else "") + folded or '<p class="missing">Empty.</p>'


def _best(rows, evaluation, protocol):
  """{encoder: its row of highest top1}."""
  best = {}
  for row in rows:
    if (row.get("evaluation"), row.get("protocol")) != (evaluation, protocol):
      continue
    encoder, score = row.get("encoder"), row.get("top1")
    if _is_number(score) and score > best.get(encoder, {"top1": -1})["top1"]:
      best[encoder] = row
  return best


def _error(row):
  """Standard error of a row's top1, in percent; 0 where n_test is missing."""
  share, count = row["top1"] / 100, row.get("n_test")
  if not _is_number(count) or count <= 0 or not 0 <= share <= 1:
    return 0.0
  return 100 * math.sqrt(share * (1 - share) / count)


def _difference(row, baseline):
  """Points, and its sign: 0 when below two standard errors."""
  difference = row["top1"] - baseline["top1"]
  if abs(difference) <= 2 * math.hypot(_error(row), _error(baseline)):
    return difference, 0
  return difference, 1 if difference > 0 else -1


def _score(row):
  if row is None:
    return '<span class="faint">–</span>'
  error = _error(row)
  spread = f' <small class="faint">±{error:.1f}</small>' if error else ""
  return f"{row['top1']:.1f}{spread}"


def _versus(row, baseline):
  if row is None or baseline is None:
    return '<span class="faint">–</span>'
  difference, sign = _difference(row, baseline)
  style = {1: "good", 0: "faint", -1: "bad"}[sign]
  return f'<span class="{style}">{_signed(difference)}</span>'


def _signed(value):
  return f"{value:+.1f}".replace("-", "−")


def _duration(seconds):
  if not _is_number(seconds) or not math.isfinite(seconds):
    return None
  minutes, rest = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours:,} h {minutes} min"
  return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _is_number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value):
  value = value if isinstance(value, str) else json.dumps(value, default=str)
  return html.escape(value)


def _section(title, content):
  return f"<section><h2>{title}</h2>{content}</section>"


def _missing(words):
  return f'<p class="missing">{html.escape(words)}.</p>'


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
