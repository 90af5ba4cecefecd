"""Evaluates the encoder of a run: checks, features, probes, scores, report.

With several processes, each reads and encodes its share, and all of them fit
the same probes on the same features.
"""

from collections.abc import Callable, Mapping, Sequence
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
from jepa_jax import models, objectives, paths
from jepa_jax.data import labels, pipeline, sources
from jepa_jax.data import unreadable as unreadable_lib
from jepa_jax.evaluation import (
  encoders,
  features,
  label_checks,
  protocols,
  scores,
)
from jepa_jax.evaluation import pictures as pictures_lib
from jepa_jax.evaluation import report as report_lib
from jepa_jax.evaluation import variants as variants_lib
from jepa_jax.training import distributed, log, sharding

NAMED = 10  # unreadable images that are named, at most
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
      kinds = (protocols.PATCHES,) if row.patches else settings.features
      if row.logits:
        kinds = ("last",)
      scored += [f"{name}/{row.name}/{kind}" for kind in kinds]
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
  if best_metric := config.checkpoint.best_metric:
    config_lib.choose("checkpoint.best_metric", best_metric, scored or ["none"])
  if config.evaluations:
    objective = objectives.load(config.objective).from_config(config)
    encoders.check(config, objective.networks)
    if "head" not in objective.networks:
      for name, settings in config.evaluations.items():
        if any(protocols.find(x).logits for x in settings.protocols):
          raise ValueError(
            f"evaluation {name} asks for the accuracy of a head, and objective "
            f'"{config.objective}" has none; use linear.'
          )


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
    found = []
    for split in splits:
      try:
        found.append(sources.open_source(data, split))
        specs = [
          labels.spec(data, split, x) for x in label_checks.names(settings)
        ]
      except ValueError as error:
        raise ValueError(
          f"evaluation {name}: {error}. To do without it, give "
          f"--config.evaluations.{name}="
        ) from error
      for spec in specs:
        label_checks.check_type(name, settings, spec)
    train, test = found
    if count := sources.shared(train, test):
      raise ValueError(
        f'evaluation {name} learns from "{splits[0]}" and is scored on '
        f'"{splits[1]}" of {_data_name(data)}, which share {count} images; '
        'give it splits apart, such as "train[:90%]" and "train[90%:]".'
      )
    notes = label_checks.check_values(name, settings, data)
    if not jax.process_index():
      print(
        f"evaluation {name}: learns from {len(train):,} images "
        f"({splits[0]}), is scored on {len(test):,} others ({splits[1]}) of "
        f"{_data_name(data)}",
        *notes,
        sep="\n",
        file=sys.stderr,
      )


def _data_name(data):
  if data.source == "scenes":
    return "scenes"
  return f"{data.source} {paths.printable(data.name)}"


def resolve(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """A copy of a config that knows the size of its data set."""
  config = config.copy_and_resolve_references()
  if config_lib.needs_num_examples(config):
    with config.unlocked():
      config.data.num_examples = pipeline.num_examples(config.data)
  return config


def evaluate(
  program: Any,
  state: Any,
  names: Sequence[str] | None = None,
  *,
  check: Callable[[], None] = lambda: None,
) -> Rows:
  """Runs the evaluations of a config.

  Args:
    program: training.program.Program.
    state: its TrainState.
    names: which of config.evaluations; None for all.
    check: called between batches and between probes; may raise to end it all.

  Returns:
    A row for every evaluation, protocol, features and encoder; see
    protocols.table.

  Raises:
    ValueError: an unknown name, or data that cannot be had.
  """
  config = ml_collections.ConfigDict(program.config)
  names = list(config.evaluations) if names is None else list(names)
  for name in names:
    config_lib.choose("evaluation", name, list(config.evaluations))
  if not names:
    return []
  chosen = [config.evaluations[name] for name in names]
  encode = encoders.pooled(
    program,
    state,
    {baseline for x in chosen for baseline in x.baselines},
    most_layers(chosen),
    any(map(reads_patches, chosen)),
  )
  width = program.objective.networks["encoder"].width
  names_of = [x for x in encode if not x.endswith(features.OF_PATCHES)]
  widths = dict.fromkeys(names_of, width)
  logits = None
  if "head" in program.objective.networks:
    params = jax.device_get(state.network("head"))
    logits = functools.partial(program.objective.logits, params)
  return compare(
    config, program.mesh, encode, widths, names, logits=logits, check=check
  )


def reads_patches(settings: ml_collections.ConfigDict) -> bool:
  """Whether an evaluation has a protocol of patches' features."""
  return any(protocols.find(x).patches for x in settings.protocols)


def most_layers(chosen: Sequence[ml_collections.ConfigDict]) -> int:
  """The most layers that one of some evaluations reads."""
  return max(
    (encoders.LAYERS[k] for x in chosen for k in x.features), default=1
  )


def compare(
  config: ml_collections.ConfigDict,
  mesh: Any,
  encode: Mapping[str, Callable[[Any], Any]],
  widths: Mapping[str, int],
  names: Sequence[str],
  *,
  logits: Callable[[np.ndarray], Any] | None = None,
  check: Callable[[], None] = lambda: None,
) -> Rows:
  """The evaluations of a config on any encoders.

  Args:
    config: reads data, evaluations, batch_size and seed.
    mesh: over whose devices batches are spread.
    encode: name of an encoder -> function, see encoders.pooled. Names but
      encoders.BASELINES are in every evaluation, those where it says so.
    widths: features a layer, by the name of the encoder; of no patches'.
    names: which of config.evaluations.
    logits: of the encoder "trained", from its last layer's features; None
      where it has no head.
    check: called between batches and between probes; may raise to end it all.

  Returns:
    See evaluate.
  """
  groups: dict[str, dict[str, Any]] = {}  # evaluations by their data
  for name in names:
    settings = config.evaluations[name]
    data = config_lib.evaluation_data(config, settings)
    key = json.dumps(data.to_dict(), sort_keys=True)
    groups.setdefault(key, {})[name] = settings
  tables: dict[str, Rows] = {}
  for members in groups.values():
    tables |= _on_one_data_set(
      config, mesh, encode, widths, members, logits, check
    )
  return [row for name in names for row in tables[name]]


def _on_one_data_set(config, mesh, encode, widths, members, logits, check):
  """Rows by evaluation; all members read the same data set."""
  data = config_lib.evaluation_data(config, next(iter(members.values())))
  splits: dict[str, set[str]] = {}  # and the labels that are read of each
  changed: dict[str, set[str]] = {}  # and how its images are changed besides
  for settings in members.values():
    rows = [protocols.find(protocol) for protocol in settings.protocols]
    for split, kinds in (
      (settings.train, [row.train_variants for row in rows]),
      (settings.test, [row.test_variants for row in rows]),
    ):
      splits.setdefault(split, set()).update(label_checks.names(settings))
      changed.setdefault(split, set()).update(*kinds)
  names = {
    label: labels.class_names(data, list(splits), label)
    for label in sorted(set().union(*splits.values()))
  }
  found = {
    split: _features(
      *(config, mesh),
      variants_lib.encoders(encode, widths, changed[split]),
      *(data, split, wanted, names, check),
    )
    for split, wanted in splits.items()
  }
  tables = {
    name: protocols.table(
      name,
      _examples(config, settings, found, widths, logits),
      [protocols.find(protocol) for protocol in settings.protocols],
      names=names.get(settings.label),
      seed=config.seed,
      progress=not jax.process_index(),
      check=check,
    )
    for name, settings in members.items()
  }
  for name, settings in members.items():
    splits = (settings.train, settings.test)
    if skipped := sum(found[split]["skipped"] for split in splits):
      for row in tables[name]:
        row["skipped"] = skipped
  return tables


def _features(config, mesh, encode, data, split, wanted, names, check):
  """Features and labels of a split, and how many images it lacks."""
  unreadable = unreadable_lib.Unreadable(data.max_unreadable)
  total = pipeline.num_examples(data, split)
  found = features.extract(
    encode,
    pipeline.evaluation_dataset(
      data,
      batch_size=encoders.batch_size(config, mesh),
      split=split,
      labels=sorted(wanted),
      names=names,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      unreadable=unreadable,
    ),
    gather=functools.partial(
      distributed.gather, sharding=sharding.batch_sharding(mesh)
    ),
    total=total,
    description=f"features of {split}",
    progress=not jax.process_index(),
    check=check,
  )
  for line in unreadable.unsaid()[:NAMED]:
    print(line, file=sys.stderr)
  missing = total - len(next(iter(found["features"].values())))
  if missing and not jax.process_index():
    print(
      f"evaluations leave out {missing} of {total:,} images of {split}, which "
      "cannot be read",
      file=sys.stderr,
    )
  return {**found, "skipped": missing}


def _examples(config, settings, found, widths, logits=None):
  """{(encoder, kind of features): (train, test)} of an evaluation."""

  def side(split, encoder, kind):
    all_features = found[split]["features"]
    columns = encoders.columns(kind, widths[encoder])
    side = {"features": all_features[encoder][:, columns]}
    if kind == protocols.PATCHES:
      data = config_lib.evaluation_data(config, settings)
      size = models.height_and_width(data.image_size)
      side["features"] = all_features[encoders.of_patches(encoder)]
      side["grid"] = models.patch_grid(*size, config.encoder.patch_size)
    elif (encoder, kind) == ("trained", "last") and logits is not None:
      if (of_head := logits(side["features"])) is not None:
        side["logits"] = np.asarray(of_head)
    if kind not in ("pixels", protocols.PATCHES):
      side["width"] = widths[encoder]
    if kind != protocols.PATCHES:
      side["variants"] = variants_lib.of(encoder, all_features, columns)
    if label_checks.names(settings):
      side["labels"] = found[split]["labels"][settings.label]
    return side

  main = [name for name in widths if name not in encoders.BASELINES]
  more = (protocols.PATCHES,) if reads_patches(settings) else ()
  return {
    (encoder, kind): tuple(
      side(split, encoder, kind) for split in (settings.train, settings.test)
    )
    for encoder in (*main, *settings.baselines)
    for kind in (
      *(("pixels",) if encoder == "pixels" else settings.features),
      *more,
    )
  }


def report(
  program: Any, state: Any, rows: Rows, workdir: pathlib.Path
) -> pathlib.Path | None:
  """Writes the results, the pictures and the page; returns the page's path."""
  arrays = pictures_lib.pictures(program, state)
  if jax.process_index():
    return None
  rows, lists = scores.split_lists(rows)
  text = json.dumps(rows, indent=2) + "\n"
  log.write_whole(workdir / "evaluations.json", text)
  if lists:
    text = json.dumps(lists) + "\n"
    log.write_whole(workdir / "low_shot.json", text)
  packed = io.BytesIO()
  np.savez_compressed(packed, **arrays)
  log.write_whole(workdir / "pictures.npz", packed.getvalue())
  path = report_lib.write(workdir)
  for row in rows:
    print(
      f"{row['evaluation']} {row['protocol']} {row['features']} of "
      f"{row['encoder']}: {_score(row)}"
    )
  print(f"report: {paths.printable(str(path))}")
  return path


def _score(row):
  digits = ".1f" if row["unit"] == "%" else ".3f"
  return f"{row[row['score']]:{digits}} {row['unit'] or row['score']}"
