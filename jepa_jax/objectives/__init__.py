"""What is predicted from what: one small module a method.

An objective is a class with

  from_config(config)    -> the objective; pure, no files, no data
  batch_spec(batch_size) -> {name: jax.ShapeDtypeStruct}, what a step consumes
  init(rng)              -> params, {network: parameters}
  tracked(params)        -> the part that the moving average follows, {} if none
  loss(params, target_params, batch, rng) -> Loss
  encoder                -> the models.Encoder that evaluations read

Everything else (sharding, checkpoints, schedules, logging, planning) is the
trainer's, and the same for all.
"""

import importlib
from typing import Any, NamedTuple

import jax

# Name -> "module:Class". A full "my_package.module:Name" works as well.
OBJECTIVES = {"ijepa": "jepa_jax.objectives.ijepa:IJEPA"}


class Loss(NamedTuple):
  """What an objective says of a batch.

  The loss is total / weight: apart, so that slices of a batch with unequal
  numbers of targets add up to the very gradient of the whole.

  Attributes:
    total: scalar, sum of the errors.
    weight: scalar, number of terms in it; independent of the parameters.
    metrics: name -> scalar mean over the batch.
    features: [B, D] pooled features, watched for collapse.
  """

  total: jax.Array
  weight: jax.Array
  metrics: dict[str, jax.Array]
  features: jax.Array


def load(name: str) -> Any:
  """Finds an objective's class by name.

  Raises:
    ValueError: unknown name, with the known ones.
  """
  path = OBJECTIVES.get(name, name)
  if ":" not in path:
    raise ValueError(
      f'unknown objective "{name}"; known: {", ".join(OBJECTIVES)} '
      '(or "my_package.module:Name").'
    )
  module, _, attribute = path.partition(":")
  try:
    return getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f'objective "{name}" cannot be imported: {error}'
    ) from error
