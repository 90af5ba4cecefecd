"""Configuration: every key with its unit, durations, and the check.

An experiment is a file with `get_config(variant)` that starts from
`defaults()` and changes what it wants to. The command line overrides any key:

    python -m jepa_jax.train --config F:variant --config.batch_size=256
"""

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import ml_collections
from ml_collections import config_dict

from jepa_jax import config_table, durations, keys, known_keys

choose = keys.choose
_MOST_STEPS = 10**7  # of a run: its schedules are tables, 12 bytes a step


_MOST_PARAMETERS = 10**12  # of a network: a state of 16 TB
# Keys that the config.json of every version's runs has.
_OLDEST = ("batch_size", "data.image_size", "encoder.width", "encoder.depth")


def defaults(objective: str = "") -> ml_collections.ConfigDict:
  """Every key there is: ViT-H/14 as released, on ImageNet-1k.

  Durations are strings of a number and a unit: "300 epochs", "5000 steps",
  "1e9 examples"; but for the total also "10 %", of the total.

  Args:
    objective: name of the one to train, whose own keys are under `method`; ""
      for the default.

  Raises:
    ValueError: no such objective.
  """
  config = _build(config_table.KEYS)
  config.method = ml_collections.ConfigDict()
  config.evaluations = ml_collections.ConfigDict()
  config.objective = objective or config.objective
  fill_method(config)
  return config


def fill_method(config: ml_collections.ConfigDict) -> None:
  """Gives `method` the keys of the objective, and takes all others away.

  Those that it has already keep their values.

  Raises:
    ValueError: no such objective.
  """
  old = flatten(config.get("method", {}))
  table = {
    name: dataclasses.replace(key, default=old.get(name, key.default))
    for name, key in known_keys.of_objective(config.objective).items()
  }
  config.method = _build(table)


def _build(table: dict[str, keys.Key]) -> ml_collections.ConfigDict:
  """The defaults of a table, whose dotted names are nested."""
  config = ml_collections.ConfigDict()
  for name, key in table.items():
    *parents, leaf = name.split(".")
    node = config
    for parent in parents:
      if parent not in node:
        node[parent] = ml_collections.ConfigDict()
      node = node[parent]
    sides = isinstance(key.kind, keys.Sides)  # of one type or the other
    node[leaf] = (
      config_dict.FieldReference(key.default, field_type=object)
      if sides
      else key.default
    )
  return config


def evaluation(
  label: str,
  *,
  train: str = "train",
  test: str = "test",
  protocols: Sequence[str] = ("linear", "knn"),
  **data: Any,
) -> ml_collections.ConfigDict:
  """Settings of one evaluation: a probe on frozen features.

  Args:
    label: a feature of the data set; of scenes "count", "distance" (classes)
      or "nearest" (a number); "label" of a folder of folders.
    train: split that the probe learns from.
    test: split that it is scored on; shares no image with train.
    protocols: rows of evaluation.protocols, or "my_package.module:ROW".
    **data: what differs from config.data, such as name and source.

  Returns:
    A ConfigDict for config.evaluations.
  """
  c = _build(config_table.EVALUATION)
  c.update(label=label, train=train, test=test, protocols=tuple(protocols))
  c.data = ml_collections.ConfigDict(data)
  return c


def evaluation_data(
  config: ml_collections.ConfigDict,
  settings: ml_collections.ConfigDict | None,
) -> ml_collections.ConfigDict:
  """config.data with what an evaluation changes of it."""
  # A mere copy would write through references, such as folder.py's.
  data = ml_collections.ConfigDict(config.data).copy_and_resolve_references()
  if settings is not None:
    data.update(settings.data)
  return data


def read(path: pathlib.Path) -> ml_collections.ConfigDict:
  """Loads the config.json of a run; see `parse`."""
  return parse(path.read_bytes(), path)


def parse(text: str | bytes, path: Any) -> ml_collections.ConfigDict:
  """A run's config from JSON; keys that it lacks have their defaults.

  Args:
    text: of config.json.
    path: whose it is, for errors.

  Raises:
    ValueError: it is no such text, or a value is out of its range.
  """

  def restore(value: Any) -> Any:
    if isinstance(value, dict):
      return ml_collections.ConfigDict(
        {k: restore(v) for k, v in value.items()}
      )
    return tuple(map(restore, value)) if isinstance(value, list) else value

  try:
    stored = json.loads(text)
    lacking = [key for key in _OLDEST if key not in flatten(stored)]
    if lacking:
      raise ValueError(f"it lacks {', '.join(lacking[:3])}, which runs have")
    # An older version had other names, and lacks keys that are newer.
    compute = stored.get("compute", {})
    if compute.get("attention") == "own":
      compute["attention"] = "xla"
    compute.pop("parts", None)  # changed no result
    data = stored.get("data", {})
    if data.get("source") == "folder" and "label" not in data:
      data["split"] = "all"  # a folder had no splits
    config = defaults()
    config.method = ml_collections.ConfigDict()  # perhaps another's
    with config.ignore_type():
      config.update(restore(stored))
      for name, settings in config.evaluations.items():
        config.evaluations[name] = evaluation("label")
        config.evaluations[name].update(settings)
    known = dict(config_table.KEYS)
    with contextlib.suppress(ValueError):  # not to be imported here: as it is
      fill_method(config)
      known = known_keys.of_config(config)
    _check_table(config, known)
    for part in ("encoder.", "predictor."):  # arguments of their modules
      for name in flatten(config):
        if name.startswith(part) and name not in known:
          raise keys.unknown("config key", name, list(known))
  except (AttributeError, RecursionError, TypeError, ValueError) as error:
    why = " ".join(str(error).split())  # a ConfigDict's text has lines
    raise ValueError(f"{path} cannot be read: {why}") from None
  return config


def steps(config: ml_collections.ConfigDict, key: str) -> int:
  """Steps of the duration under a dotted key, such as "optimizer.warmup".

  Raises:
    ValueError: it cannot be read, or counts epochs of an unknown size.
  """
  value = _value(config, key)
  duration = durations.Duration.parse(value, key)
  if duration.unit == "%":
    if key == "total":  # of itself
      raise durations.Duration.refusal(value, key)
    return math.floor(duration.amount / 100 * steps(config, "total"))
  if duration.unit == "epochs" and not config.data.num_examples:
    raise ValueError(
      f'{key} is "{value}" but data.num_examples is 0; give the images an '
      "epoch, or a duration in steps."
    )
  return duration.steps(config.batch_size, config.data.num_examples)


def lengths(config: ml_collections.ConfigDict) -> tuple[int, int]:
  """Steps of the whole training, and of its warm-up.

  Raises:
    ValueError: there is nothing to train, only a warm-up, or no end to it.
  """
  total, warmup = steps(config, "total"), steps(config, "optimizer.warmup")
  if total < 1:
    raise ValueError(
      f'total "{config.total}" is {total} steps of {config.batch_size} '
      "images; make it at least one."
    )
  if total > _MOST_STEPS:
    raise ValueError(
      f'total "{config.total}" is {total:,} steps of {config.batch_size} '
      f"images; the schedules have a value a step, and {_MOST_STEPS:,} are "
      "the most."
    )
  if warmup >= total:
    raise ValueError(
      f'optimizer.warmup "{config.optimizer.warmup}" is {warmup} steps and '
      f'total "{config.total}" is {total}; make the warm-up shorter.'
    )
  return total, warmup


def needs_num_examples(config: ml_collections.ConfigDict) -> bool:
  """Whether a duration counts epochs of a size that is not known yet."""
  texts = [
    _value(config, key)
    for key, entry in config_table.KEYS.items()
    if isinstance(entry.kind, durations.Span)
  ]
  return not config.data.num_examples and any("epoch" in t for t in texts)


def _value(config: ml_collections.ConfigDict, key: str) -> Any:
  """Of a dotted key, such as "optimizer.warmup"."""
  return functools.reduce(lambda node, part: node[part], key.split("."), config)


def check(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong before a device is touched.

  Raises:
    ValueError: one line that says what it got and what it needs.
  """
  _check_table(config, known_keys.of_config(config))
  for relation in _RELATIONS:
    relation(config)


def _check_table(
  config: ml_collections.ConfigDict, known: dict[str, keys.Key]
) -> None:
  leaves = flatten(config)
  for name, key in known.items():
    if name in leaves:
      key.kind.check(name, leaves[name])
    elif ".data." not in name:  # of an evaluation, which says what differs
      raise ValueError(
        f'the config of objective "{config.objective}" has no {name}; start '
        "from config.defaults(OBJECTIVE), or see config.fill_method."
      )


def check_names(config: ml_collections.ConfigDict) -> None:
  """Raises a ValueError for a key that does not exist."""
  known = known_keys.of_config(config)
  # Of an experiment that starts from `defaults()` and names its objective then.
  left = {f"method.{name}" for name in config_table.IJEPA}
  for name in flatten(config):
    if name not in known and name not in left:
      raise keys.unknown("config key", name, list(known))


def _check_attention(config: ml_collections.ConfigDict) -> None:
  if config.compute.attention == "cudnn" and config.compute.dtype == "float32":
    raise ValueError(
      'compute.attention is "cudnn", which computes in 16 bits, and '
      'compute.dtype "float32"; make it "bfloat16", or the attention "xla".'
    )


def _check_channels(config: ml_collections.ConfigDict) -> None:
  data = config.data
  for name in ("mean", "std"):
    if len(data[name]) != data.channels:
      raise ValueError(
        f"data.{name} has {len(data[name])} values for {data.channels} "
        "channels; give one a channel."
      )
  for name in ("color_jitter", "grayscale"):
    if data[name] and data.channels not in (1, 3):
      raise ValueError(
        f"data.{name} {data[name]} is for images in grey or colour "
        f"and data.channels is {data.channels}; set it to 0."
      )


def _check_batch(config: ml_collections.ConfigDict) -> None:
  sizes = (config.batch_size, config.accumulate_steps)
  if sizes[0] % sizes[1]:
    raise ValueError(
      "batch_size {} is not a multiple of accumulate_steps {}; change one of "
      "them.".format(*sizes)
    )


def _check_heads(config: ml_collections.ConfigDict) -> None:
  for name, network in (
    ("encoder", config.encoder),
    ("predictor", config.predictor),
  ):
    if network.width % network.num_heads or network.width % 4:
      raise ValueError(
        f"{name}.width {network.width} needs to be a multiple of 4 and of "
        f"its {network.num_heads} heads."
      )


def check_patches(config: ml_collections.ConfigDict) -> None:
  """Refuses images of more patches than masks can be drawn for."""
  size, patch_size = config.data.image_size, config.encoder.patch_size
  height, width = size if isinstance(size, (list, tuple)) else (size, size)
  count = (height // patch_size) * (width // patch_size)
  if count > config_table.MOST_PATCHES:
    raise ValueError(
      f"data.image_size {size} has {count:,} patches of encoder.patch_size "
      f"{patch_size}; the most are {config_table.MOST_PATCHES:,}: make the "
      "image smaller or the patches larger."
    )


def check_parameters(config: ml_collections.ConfigDict) -> None:
  """Refuses networks that no machine holds."""
  for name, network in (
    ("encoder", config.encoder),
    ("predictor", config.predictor),
  ):
    block = (4 + 2 * network.mlp_ratio) * network.width**2
    if (count := network.depth * block) > _MOST_PARAMETERS:
      raise ValueError(
        f"{name}.width {network.width} and {name}.depth {network.depth} are "
        f"{count:.1e} parameters; the most are {_MOST_PARAMETERS:.0e}."
      )


def _check_lengths(config: ml_collections.ConfigDict) -> None:
  if not needs_num_examples(config):
    lengths(config)


def check_name(data: Any) -> None:
  """Raises a ValueError where config.data needs a name and has none."""
  if data.source != "scenes" and not data.name:
    raise ValueError(
      f'data.name is "" and data.source "{data.source}"; name the data set, or '
      "the folder."
    )


_RELATIONS = (
  lambda config: check_name(config.data),
  _check_attention,
  _check_channels,
  _check_batch,
  _check_heads,
  check_patches,
  check_parameters,
  _check_lengths,
)


def flatten(
  config: ml_collections.ConfigDict | dict[str, Any], prefix: str = ""
) -> dict[str, Any]:
  """Dotted key -> value of every leaf."""
  leaves: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, (ml_collections.ConfigDict, dict)):
      leaves.update(flatten(value, f"{prefix}{key}."))
    else:
      leaves[prefix + key] = value
  return leaves
