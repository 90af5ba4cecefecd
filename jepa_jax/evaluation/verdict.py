"""The trained encoder against its baselines, from rows of evaluations.

A row is a dict: evaluation; protocol, and its title; score (the name of the
number that judges), unit and higher_is_better; features; encoder ("trained",
"random" or "pixels"); that number; and any others, of which standard_error,
n_train and n_test are read.
"""

from collections.abc import Mapping, Sequence
import math
from typing import Any

Row = Mapping[str, Any]
_TEXTS = ("evaluation", "protocol", "title", "score", "unit", "features")
_NUMBERS = (
  "standard_error",
  "n_train",
  "n_test",
  "classes",
  "majority",
  "top5",
)


def verdict(rows: Sequence[Row]) -> str:
  """One sentence: the trained encoder against its two baselines.

  Judges by the first protocol of each evaluation; of several features ("last",
  "last4") each encoder's best counts. A difference below two standard errors of
  the test sample is no difference.

  Args:
    rows: see above; others are ignored.

  Returns:
    Plain text.
  """
  clauses, helped, unhelped, behind_pixels = [], [], [], []
  for name, scored in _first_protocols(rows).items():
    trained = scored["trained"]
    differences = []
    for encoder, words in (
      ("random", "the random encoder"),
      ("pixels", "pixels"),
    ):
      if encoder not in scored:
        continue
      text, sign = _difference(trained, scored[encoder])
      differences.append(f"{text} over {words}")
      if encoder == "random":
        (helped if sign > 0 else unhelped).append(name)
      elif sign <= 0:
        behind_pixels.append(name)
    key, unit = trained["score"], trained["unit"]
    value = _number(trained) + (f" {unit}" if unit else "")
    if unit != "%":
      value = f"{key} {value}"
    if not trained["higher_is_better"]:
      differences.append("lower is better")
    clauses.append(
      f"{trained['title']} on {name} {value} ({', '.join(differences)})"
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


def table(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Lines of a table, as text: a protocol and its features each.

  Where a protocol has several features a line "best" follows, with each
  encoder's best of them, which the verdict compares.

  Args:
    rows: see above; others are ignored.

  Returns:
    Dicts with evaluation, facts (classes, chance and images), title, features,
    score (what it is); scores, of trained, random and pixels, with text and
    error; over, the difference to random and to pixels, with text and verdict
    ("good", "bad", "faint" where it is below two standard errors); top5 and
    train, the trained encoder's. None where there is no such row, "" where it
    says nothing of it.
  """
  tables = {}  # by evaluation and protocol: rows by features and encoder
  for row in filter(compares, rows):
    features = "" if row["encoder"] == "pixels" else row.get("features")
    key = (row.get("evaluation"), row.get("protocol"))
    row = _judged(row)
    tables.setdefault(key, {})[features, row["encoder"]] = row
  lines = []
  for (evaluation, _), table in tables.items():
    kinds = dict.fromkeys(f for f, encoder in table if encoder != "pixels")
    scored = [
      (
        features or "",
        {
          "trained": table.get((features, "trained")),
          "random": table.get((features, "random")),
          "pixels": table.get(("", "pixels")),
        },
      )
      for features in kinds or {"": None}
    ]
    if len(scored) > 1:
      scored.append(("best", _best(table.values())))
    lines += [_line(evaluation, *x) for x in scored]
  return lines


def _best(rows):
  """{encoder: its best row, or None}."""
  best = dict.fromkeys(("trained", "random", "pixels"))
  for row in rows:
    rival = best[row["encoder"]]
    if rival is None or _gain(row, rival) > 0:
      best[row["encoder"]] = row
  return best


def _line(evaluation, features, scored):
  some = next(row for row in scored.values() if row)
  trained = scored["trained"] or {}
  train = next(
    (trained[k] for k in trained if k.startswith("train_")), None
  )  # fmt: skip
  return {
    "evaluation": evaluation,
    "facts": _facts(some),
    "title": some["title"],
    "features": features,
    "score": _score_words(some),
    "scores": [_cell(row) for row in scored.values()],
    "over": [
      _over(scored["trained"], scored[name]) for name in ("random", "pixels")
    ],
    "top5": _format(trained["top5"], "%") if "top5" in trained else "",
    "train": _format(train, some["unit"]) if _is_number(train) else "",
  }


def _facts(row):
  """What is true of an evaluation whatever the encoder, in words."""
  facts = []
  if _is_number(row.get("classes")):
    facts.append(f"{row['classes']:,} classes")
  for key, words in (
    ("majority", "the commonest class always"),
    ("chance", "scores that say nothing"),
  ):
    if _is_number(row.get(key)):
      facts.append(f"chance {_format(row[key], '%')} % ({words})")
  counts = [row.get(key) for key in ("n_train", "n_test")]
  if all(map(_is_number, counts)):
    facts.append("learns from {:,} images, scored on {:,}".format(*counts))
  if row.get("unseen"):
    facts.append(f"{row['unseen']:,} of a class that training lacks")
  if row.get("skipped"):
    facts.append(f"{row['skipped']:,} unreadable left out")
  return "; ".join(facts)


def per_class(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """How good the trained encoder is at each class, beside the random one.

  By the first protocol of each evaluation that tells, and of several features
  those with the trained encoder's best score.

  Args:
    rows: see above; others are ignored.

  Returns:
    Dicts with evaluation, title, features, what (is measured) and classes:
    dicts with name, trained, and random (None where there is none), in percent;
    and confusion, of the trained encoder: None, or names of columns and rows,
    [name, [(count, share of the row)]].
  """
  found = {}  # by evaluation: its protocol, and rows by features and encoder
  for row in map(_judged, filter(compares, rows)):
    if isinstance(row.get("per_class"), Mapping):
      key, protocol = row.get("evaluation"), row.get("protocol")
      first, table = found.setdefault(key, (protocol, {}))
      if first == protocol:
        table[row.get("features"), row["encoder"]] = row
  result = []
  for evaluation, (_, table) in found.items():
    trained = _best(table.values())["trained"]
    if trained is None:
      continue
    features = trained.get("features")
    random = table.get((features, "random"), {}).get("per_class", {})
    random = random if isinstance(random, Mapping) else {}
    result.append(
      {
        "evaluation": evaluation,
        "title": trained["title"],
        "features": features or "",
        "what": "average precision of each class"
        if trained["score"] == "mAP"
        else "test images of each class that are right",
        "confusion": _confusion(trained.get("confusion")),
        "classes": [
          {
            "name": name,
            "trained": value,
            "random": random[name] if _is_finite(random.get(name)) else None,
          }
          for name, value in trained["per_class"].items()
          if _is_finite(value)
        ],
      }
    )
  return result


def spectra(rows: Sequence[Row]) -> list[dict[str, Any]]:
  """Spectra of features: dicts with evaluation, features and lines.

  Args:
    rows: see above; those without a "spectrum" are ignored.

  Returns:
    lines is [(encoder, shares of the eigenvalues)], as far as they are above 0.
  """
  found = {}
  for row in filter(compares, rows):
    shares = row.get("spectrum")
    if not isinstance(shares, list) or not all(map(_is_finite, shares)):
      continue
    if len(shares := [x for x in shares if x > 0]) > 1:
      key = row.get("evaluation") or "", row.get("features") or ""
      found.setdefault(key, []).append((row["encoder"], shares))
  return [
    {"evaluation": key[0], "features": key[1], "lines": lines}
    for key, lines in found.items()
  ]


def _confusion(counts):
  """Columns and rows of {label: {what it is taken for: images}}, or None."""
  if not isinstance(counts, Mapping) or not all(
    isinstance(row, Mapping)
    and all(_is_number(x) and 0 <= x < 1e15 for x in row.values())
    for row in counts.values()
  ):
    return None
  columns = list(
    dict.fromkeys([*counts, *(x for r in counts.values() for x in r)])
  )
  rows = []
  for label, row in counts.items():
    total = max(sum(row.values()), 1)
    rows.append(
      [label, [(row.get(x, 0), row.get(x, 0) / total) for x in columns]]
    )
  return {"columns": columns, "rows": rows}


def compares(row: Row) -> bool:
  """Whether a row is a finite score of a known encoder, and all of it sound."""
  texts = [row.get(key) for key in _TEXTS]
  numbers = [row.get(key) for key in _NUMBERS]
  return (
    all(x is None or isinstance(x, str) for x in texts)
    and all(x is None or _is_finite(x) for x in numbers)
    and row.get("encoder") in ("trained", "random", "pixels")
    and _is_finite(row.get(row.get("score", "top1")))
  )


def _is_finite(value):
  # Not math.isfinite, which an int of 400 digits is too large for.
  return _is_number(value) and abs(value) <= 1e300


def _judged(row):
  """A row with all that tells how to read it.

  Rows of versions before 0.2 say nothing of their score: it was top1.
  """
  defaults = {"score": "top1", "unit": "%", "higher_is_better": True}
  row = defaults | {"title": str(row.get("protocol"))} | row
  count = row.get("n_test")
  if "standard_error" not in row and row["unit"] == "%" and _is_number(count):
    share = min(max(row[row["score"]] / 100, 0), 1)
    row["standard_error"] = 100 * math.sqrt(share * (1 - share) / max(count, 1))
  return row


def _first_protocols(rows):
  """{evaluation: {encoder: best row}} by its first protocol with a baseline."""
  best = {}
  for row in map(_judged, filter(compares, rows)):
    name, encoder = str(row.get("evaluation")), row["encoder"]
    rival = best.setdefault(name, {}).setdefault(row.get("protocol"), {})
    if encoder not in rival or _gain(row, rival[encoder]) > 0:
      rival[encoder] = row
  return {
    name: next(iter(protocols))
    for name, all_protocols in best.items()
    if (
      protocols := [
        scored
        for scored in all_protocols.values()
        if "trained" in scored and len(scored) > 1
      ]
    )
  }


def _gain(row, baseline):
  """How much better a row's score is than a baseline's."""
  gain = row[row["score"]] - baseline[row["score"]]
  return gain if row["higher_is_better"] else -gain


def _difference(row, baseline):
  """Text, and 1 or -1 for better or worse; 0 below two standard errors."""
  key, gain = row["score"], _gain(row, baseline)
  errors = [x.get("standard_error") or 0 for x in (row, baseline)]
  sign = 0 if abs(gain) <= 2 * math.hypot(*errors) else math.copysign(1, gain)
  return _format(row[key] - baseline[key], row["unit"], "+"), sign


def _over(row, baseline):
  if row is None or baseline is None:
    return None
  text, sign = _difference(row, baseline)
  return {"text": text, "verdict": {1: "good", 0: "faint", -1: "bad"}[sign]}


def _cell(row):
  if row is None:
    return None
  error = row.get("standard_error")
  error = _format(error, row["unit"]) if error else ""
  return {"text": _number(row), "error": error}


def _score_words(row):
  words = {"top1": "top-1"}.get(row["score"], row["score"])
  words = f"{words} {row['unit']}".strip()
  return words if row["higher_is_better"] else f"{words}, lower is better"


def _number(row):
  return _format(row[row["score"]], row["unit"])


def _format(value, unit, sign=""):
  digits = 1 if unit == "%" else 3
  return f"{value:{sign}.{digits}f}".replace("-", "−")


def _is_number(value):
  return isinstance(value, int | float) and not isinstance(value, bool)
