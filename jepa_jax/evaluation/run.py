"""Evaluates the encoder of a run: checks, features, probes, scores, report.

With several processes, each reads and encodes its share, and all of them fit
the same probes on the same features.
"""

from collections.abc import Sequence
import functools
import io
import json
import pathlib
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from jepa_jax import config as config_lib
from jepa_jax import objectives
from jepa_jax.data import labels, pipeline, sources
from jepa_jax.evaluation import encoders, features, protocols
from jepa_jax.evaluation import pictures as pictures_lib
from jepa_jax.evaluation import report as report_lib
from jepa_jax.evaluation.protocols import protocol as protocol_lib
from jepa_jax.training import distributed, log, sharding

Rows = list[dict[str, Any]]  # of evaluations.json, see protocols.table


def check(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong with the evaluations of a config, without any data.

  Raises:
    ValueError: one line that says what it got and what it needs.
  """
  scored = []
  for name, settings in config.evaluations.items():
    for protocol in settings.protocols:
      row = protocols.find(protocol, f"protocol of evaluation {name}")
      scored += [f"{name}/{row.name}/{kind}" for kind in settings.features]
    for kind in settings.features:
      config_lib.choose(
        f"features of evaluation {name}", kind, tuple(encoders.LAYERS)
      )
      if encoders.LAYERS[kind] > config.encoder.depth:
        raise ValueError(
          f"evaluation {name} asks for the last four layers of an encoder of "
          f'{config.encoder.depth}; leave "{kind}" out of its features.'
        )
    for baseline in settings.baselines:
      config_lib.choose(
        f"baseline of evaluation {name}", baseline, encoders.BASELINES
      )
  if scored and config.checkpoint.best_metric:
    config_lib.choose(
      "checkpoint.best_metric", config.checkpoint.best_metric, scored
    )
  if config.evaluations:
    objective = objectives.load(config.objective).from_config(config)
    encoders.check(config, objective.networks)


def check_data(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong with the data and labels of the evaluations.

  Prints for each evaluation which images it learns from and is scored on.

  Raises:
    ValueError: they cannot be had, a label does not fit a protocol, or the two
      sides of a probe share images.
  """
  for name, settings in config.evaluations.items():
    data = config_lib.evaluation_data(config, settings)
    splits = (settings.train, settings.test)
    for split in splits:
      try:
        dataset = pipeline.evaluation_dataset(
          data, batch_size=1, split=split, labels=_labels(settings)
        )
      except ValueError as error:
        raise ValueError(
          f"evaluation {name}: {error}. To do without it, give "
          f"--config.evaluations.{name}="
        ) from error
      for spec in dataset.element_spec["labels"].values():
        _check_label(name, settings, spec)
    train, test = (sources.open_source(data, split) for split in splits)
    if count := sources.shared(train, test):
      raise ValueError(
        f'evaluation {name} learns from "{splits[0]}" and is scored on '
        f'"{splits[1]}" of {_data_name(data)}, which share {count} images; '
        'give it splits apart, such as "train[:90%]" and "train[90%:]".'
      )
    if not jax.process_index():
      print(
        f"evaluation {name}: learns from {len(train):,} images "
        f"({splits[0]}), is scored on {len(test):,} others ({splits[1]}) of "
        f"{_data_name(data)}",
        file=sys.stderr,
      )


def _check_label(name, settings, spec):
  """Raises ValueError where a protocol does not take labels [1, ...]."""
  dtype, rank = spec.dtype.as_numpy_dtype, spec.shape.rank - 1
  rows = [protocols.find(x) for x in settings.protocols]
  for row in rows:
    if not row.takes(dtype, rank):
      fit = [
        x.name for x in protocols.PROTOCOLS.values() if x.takes(dtype, rank)
      ]
      raise ValueError(
        f'evaluation {name}: label "{settings.label}" is {spec.dtype.name} of '
        f"shape {tuple(spec.shape[1:])} an image, and protocol {row.name} "
        f"takes {protocol_lib.KINDS[row.label]}; take another label or "
        f"protocols that it fits ({', '.join(fit) or 'none here'})."
      )


def _labels(settings):
  """Names of the labels to read: none where all protocols do without."""
  kinds = {protocols.find(x).label for x in settings.protocols}
  return (settings.label,) if kinds - {"none"} else ()


def _data_name(data):
  return f"{data.source} {data.name}" if data.source != "scenes" else "scenes"


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy of a config that knows the size of its data set."""
  config = config.copy_and_resolve_references()
  if config_lib.needs_num_examples(config):
    with config.unlocked():
      config.data.num_examples = pipeline.num_examples(config.data)
  return config


def evaluate(
  program: Any, state: Any, names: Sequence[str] | None = None
) -> Rows:
  """Runs the evaluations of a config.

  Args:
    program: training.program.Program.
    state: its TrainState.
    names: which of config.evaluations; None for all.

  Returns:
    A row for every evaluation, protocol, features and encoder; see
    protocols.table.

  Raises:
    ValueError: an unknown name, or data that cannot be had.
  """
  config = ml_collections.ConfigDict(program.config)
  names = list(config.evaluations) if names is None else list(names)
  groups: dict[str, dict[str, Any]] = {}  # evaluations by their data
  for name in names:
    config_lib.choose("evaluation", name, list(config.evaluations))
    settings = config.evaluations[name]
    data = config_lib.evaluation_data(config, settings)
    key = json.dumps(data.to_dict(), sort_keys=True)
    groups.setdefault(key, {})[name] = settings
  if not names:
    return []
  chosen = [config.evaluations[name] for name in names]
  encode = encoders.pooled(
    program,
    state,
    {baseline for x in chosen for baseline in x.baselines},
    max((encoders.LAYERS[k] for x in chosen for k in x.features), default=1),
  )
  tables: dict[str, Rows] = {}
  for members in groups.values():
    tables |= _evaluate_one_data_set(program, encode, members)
  return [row for name in names for row in tables[name]]


def _evaluate_one_data_set(program, encode, members):
  """Rows by evaluation; all members read the same data set."""
  config = ml_collections.ConfigDict(program.config)
  data = config_lib.evaluation_data(config, next(iter(members.values())))
  progress = sys.stderr.isatty() and not jax.process_index()
  splits: dict[str, set[str]] = {}  # and the labels that are read of each
  for settings in members.values():
    for split in (settings.train, settings.test):
      splits.setdefault(split, set()).update(_labels(settings))
  names = {
    label: labels.class_names(data, list(splits), label)
    for label in sorted(set().union(*splits.values()))
  }
  found = {}
  for split, wanted in splits.items():
    dataset = pipeline.evaluation_dataset(
      data,
      batch_size=encoders.batch_size(program),
      split=split,
      labels=sorted(wanted),
      names=names,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    found[split] = features.extract(
      encode,
      dataset,
      gather=functools.partial(
        distributed.gather, sharding=sharding.batch_sharding(program.mesh)
      ),
      total=pipeline.num_examples(data, split),
      description=f"features of {split}",
      progress=progress,
    )
  width = program.objective.networks["encoder"].width
  return {
    name: protocols.table(
      name,
      _examples(settings, found, width),
      [protocols.find(protocol) for protocol in settings.protocols],
      names=names.get(settings.label),
      seed=config.seed,
      progress=progress,
    )
    for name, settings in members.items()
  }


def _examples(settings, found, width):
  """{(encoder, kind of features): (train, test)} of an evaluation."""

  def side(split, encoder, kind):
    columns = encoders.columns(kind, width)
    side = {"features": found[split]["features"][encoder][:, columns]}
    if _labels(settings):
      side["labels"] = found[split]["labels"][settings.label]
    return side

  return {
    (encoder, kind): tuple(
      side(split, encoder, kind) for split in (settings.train, settings.test)
    )
    for encoder in ("trained", *settings.baselines)
    for kind in (("pixels",) if encoder == "pixels" else settings.features)
  }


def scores(rows: Rows) -> dict[str, float]:
  """Rows as metrics of the log: "eval/<name>/<protocol> <features>"."""
  return {
    f"eval/{row['evaluation']}/{row['protocol']} {row['features']}": row[
      row["score"]
    ]
    for row in rows
    if row["encoder"] == "trained"
  }


def best(rows: Rows, config: ml_collections.ConfigDict) -> float | None:
  """The score that keeps the best checkpoint, None without evaluations.

  Larger is better: a score of which less is better is negated.
  """
  named = {
    f"{row['evaluation']}/{row['protocol']}/{row['features']}": row
    for row in rows
    if row["encoder"] == "trained"
  }
  if not named:
    return None
  wanted = config.checkpoint.best_metric or next(iter(named))
  config_lib.choose("checkpoint.best_metric", wanted, named)
  row = named[wanted]
  return row[row["score"]] * (1 if row["higher_is_better"] else -1)


def report(
  program: Any, state: Any, rows: Rows, workdir: pathlib.Path
) -> pathlib.Path | None:
  """Writes the results, the pictures and the page; returns the page's path."""
  arrays = pictures_lib.pictures(program, state)
  if jax.process_index():
    return None
  text = json.dumps(rows, indent=2) + "\n"
  log.write_whole(workdir / "evaluations.json", text)
  packed = io.BytesIO()
  np.savez_compressed(packed, **arrays)
  log.write_whole(workdir / "pictures.npz", packed.getvalue())
  path = report_lib.write(workdir)
  for row in rows:
    print(
      f"{row['evaluation']} {row['protocol']} {row['features']} of "
      f"{row['encoder']}: {_score(row)}"
    )
  print(f"report: {path}")
  return path


def _score(row):
  digits = ".1f" if row["unit"] == "%" else ".3f"
  return f"{row[row['score']]:{digits}} {row['unit'] or row['score']}"
