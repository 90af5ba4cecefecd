"""What do frozen features know? One file a protocol, one row each.

A protocol is a function (train, test, *, seed) -> dict of metrics and a row
that says how to read them, see protocol.Protocol. To add one, write a file
like ridge.py and add its row to PROTOCOLS; a row that lives elsewhere is named
"my_package.module:ROW" in the evaluations of a config.

A number from a probe means little alone: `table` runs the same probe on a
trained encoder, on the same architecture with random parameters, and on raw
pixels.
"""

from collections.abc import Callable, Mapping, Sequence
import difflib
import importlib
import time
from typing import Any

from jepa_jax.evaluation import progress as progress_lib
from jepa_jax.evaluation.protocols import (
  attentive,
  dense,
  head,
  health,
  knn,
  knn_grid,
  lidar,
  linear,
  linear_grid,
  low_shot,
  multilabel,
  protocol,
  retrieval,
  ridge,
  robustness,
)

PATCHES = "patches"  # the kind of features of protocols that take them
PROTOCOLS: dict[str, protocol.Protocol] = {
  row.name: row
  for row in (
    linear.ROW,
    knn.ROW,
    ridge.ROW,
    multilabel.ROW,
    knn_grid.ROW,
    health.ROW,
    lidar.ROW,
    retrieval.ROW,
    robustness.ROW,
    *linear_grid.ROWS,
    attentive.ROW,
    head.ROW,
    *dense.ROWS,
    *low_shot.ROWS,
  )  # fmt: skip
}


def find(name: str, what: str = "protocol") -> protocol.Protocol:
  """The row of a protocol.

  Args:
    name: a key of PROTOCOLS, or "my_package.module:ROW".
    what: what the name stands for, in messages.

  Raises:
    ValueError: unknown, with the known ones, or no row there.
  """
  if name in PROTOCOLS:
    return PROTOCOLS[name]
  module, colon, attribute = name.partition(":")
  if not colon:
    near = difflib.get_close_matches(name, PROTOCOLS, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else "."
    raise ValueError(
      f'unknown {what} "{name}"; known: {", ".join(PROTOCOLS)} '
      f'(or "my_package.module:ROW"){hint}'
    )
  try:
    row = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ValueError(f'{what} "{name}" cannot be imported: {error}') from error
  if not isinstance(row, protocol.Protocol) or row.label not in protocol.KINDS:
    raise ValueError(
      f'{what} "{name}" is {row!r}; it needs a Protocol whose kind of label is '
      f"one of: {', '.join(protocol.KINDS)}."
    )
  return row


def table(
  evaluation: str,
  encoders: Mapping[
    tuple[str, str], tuple[protocol.Examples, protocol.Examples]
  ],
  rows: Sequence[protocol.Protocol],
  *,
  names: Sequence[str] | None = None,
  seed: int = 0,
  progress: bool = True,
  check: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
  """The same protocols on the features of several encoders.

  Args:
    evaluation: what the labels are, e.g. "count"; goes into every row.
    encoders: {(encoder, features): (train, test)}, where encoder is "trained",
      "random" or "pixels" and features is "last", "last4", "pixels" or PATCHES.
    rows: the protocols.
    names: of the classes, by label, where they have any.
    seed: passed to each protocol.
    progress: whether it is shown how far it is.
    check: called before each probe; may raise to end it all.

  Returns:
    Plain Python values, ready for JSON, a dict for each protocol and encoder:
    evaluation; protocol, title, score, unit and higher_is_better of the row;
    features, encoder, seconds; and the protocol's metrics.

  Raises:
    ValueError: what the protocol raises, with the names of evaluation and
      encoder in front.
  """
  result = []
  jobs = [
    (row, *key)
    for row in rows
    for key in encoders
    if row.patches == (key[1] == PATCHES)
    and (not row.logits or "logits" in encoders[key][1])
  ]
  bar = progress_lib.bar(
    jobs, desc=f"probe {evaluation}", unit=" fits", show=progress
  )
  for row, encoder, features in bar:
    train, test = encoders[encoder, features]
    check()
    bar.set_postfix_str(f"{row.name} {encoder} {features}", refresh=False)
    started = time.perf_counter()
    try:
      metrics = row.run(
        *(_fitted(side, row.label) for side in (train, test)), seed=seed
      )
    except ValueError as error:
      raise ValueError(
        f"{evaluation}, {row.name} on {encoder} {features}: {error}"
      ) from error
    metrics = _checked(f"{evaluation}, {row.name}", row.score, metrics, names)
    result.append(
      {
        "evaluation": evaluation,
        "protocol": row.name,
        "title": row.title,
        "score": row.score,
        "unit": row.unit,
        "higher_is_better": row.higher_is_better,
        "features": "pixels" if encoder == "pixels" else features,
        "encoder": encoder,
        **metrics,
        "seconds": round(time.perf_counter() - started, 2),
      }
    )
  return result


def _checked(title, score, metrics, names):
  """A protocol's metrics, classes by their names."""
  if score not in metrics:
    raise ValueError(
      f"{title}: its metrics lack its score {score!r}; "
      f"they are: {', '.join(metrics)}."
    )
  if names is None:
    return metrics
  named = lambda x: {
    str(names[int(label)]): value for label, value in x.items()
  }
  metrics = dict(metrics)
  if "per_class" in metrics:
    metrics["per_class"] = named(metrics["per_class"])
  if "confusion" in metrics:
    rows = named(metrics["confusion"])
    metrics["confusion"] = {label: named(x) for label, x in rows.items()}
  return metrics


def _fitted(examples, kind):
  """Examples with labels as that kind of protocol takes them."""
  if kind == "none" or "labels" not in examples:
    return {k: v for k, v in examples.items() if k != "labels"}
  return {**examples, "labels": protocol.fit(examples["labels"], kind)}
