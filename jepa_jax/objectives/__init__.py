"""What is predicted from what: one small module a method.

A method is a subclass of `Objective`: it declares networks, batch, targets and
loss. Sharding, order of work, moving averages, checkpoints, schedules, logging,
planning and evaluation are the trainer's, and the same for all.
"""

import importlib
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from jepa_jax import keys as keys_lib
from jepa_jax import models

# Name -> "module:Class". A full "my_package.module:Name" works as well.
OBJECTIVES = {
  "ijepa": "jepa_jax.objectives.ijepa:IJEPA",
  "pixel_ijepa": "jepa_jax.objectives.pixel_ijepa:PixelIJEPA",
  "supervised": "jepa_jax.objectives.supervised:Supervised",
  "mae": "jepa_jax.objectives.mae:MAE",
  "data2vec": "jepa_jax.objectives.data2vec:Data2Vec",
  "cae": "jepa_jax.objectives.cae:CAE",
  "ibot": "jepa_jax.objectives.ibot:IBOT",
  "lejepa": "jepa_jax.objectives.lejepa:LeJEPA",
  "decoder": "jepa_jax.objectives.decoder:Decoder",
}

Params = dict[str, Any]  # network -> tree of its parameters
Batch = dict[str, jax.Array]


class Loss(NamedTuple):
  """What an objective says of a batch.

  The loss is total / weight: apart, so that microbatches with unequal numbers
  of targets add up to the very gradient of the whole batch.

  Attributes:
    total: scalar, sum of the errors.
    weight: scalar, number of terms in it; independent of the parameters.
    metrics: name -> scalar mean over the batch.
    features: [B, D] pooled features, watched for collapse; None for none.
    buffers: the next value of the state without gradient, or None where it
      stays. Of several microbatches the mean is taken.
  """

  total: jax.Array
  weight: jax.Array
  metrics: dict[str, jax.Array]
  features: jax.Array | None = None
  buffers: Any = None


class Objective:
  """The contract between a method and everything else.

  A subclass is a frozen dataclass. What has a default here may be left out.

  Attributes:
    networks: name -> Flax module. One named "encoder", a models.Encoder, is
      what `evaluate` and `load` use; without one there is nothing to evaluate.
      One named "predictor", a models.Predictor, is what `predict` uses.
    frozen: names of networks that are neither optimised nor averaged.
    whole_batch: whether the loss is a statistic of the batch, so that
      microbatches (config.accumulate_steps) are refused.
    keys: settings of the method's own, config.method.NAME each; see
      jepa_jax.keys. config.defaults(objective) has their defaults.
  """

  networks: dict[str, Any]
  frozen: tuple[str, ...] = ()
  whole_batch: ClassVar[bool] = False
  keys: ClassVar[dict[str, keys_lib.Key]] = {}

  @classmethod
  def from_config(
    cls, config: ml_collections.ConfigDict, kernels: Any = None
  ) -> "Objective":
    """Builds the networks that a config describes: no files, no data.

    Args:
      config: see jepa_jax.config.
      kernels: models.Kernels, how the networks compute; the trainer's are for
        its mesh. None for the plain ones.
    """
    raise NotImplementedError(f"{cls.__name__}.from_config")

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Arrays of a batch, by the names of data.pipeline.PROVIDERS."""
    raise NotImplementedError(f"{type(self).__name__}.batch_spec")

  def init(self, rng: jax.Array) -> Params:
    """Random parameters of all networks, the frozen ones too."""
    raise NotImplementedError(f"{type(self).__name__}.init")

  def averaged(self, params: Params) -> Params:
    """The part that an exponential moving average follows."""
    del params
    return {}

  def buffers(self) -> Any:
    """First value of the state without gradient, such as a centre."""
    return {}

  def learning_rate_scale(self, params: Params) -> Any:
    """Tree of factors that broadcast against params, or None for 1."""
    del params
    return None

  def targets(self, target_params: Params, batch: Batch, buffers: Any) -> Any:
    """What is to be predicted; the trainer stops its gradient.

    Args:
      target_params: moving averages and frozen networks.
      batch: as batch_spec says.
      buffers: see above.

    Returns:
      A tree of arrays [B, ...].
    """
    del target_params, batch, buffers
    return {}

  def loss(
    self,
    params: Params,
    targets: Any,
    batch: Batch,
    rng: jax.Array,
    buffers: Any,
  ) -> Loss:
    """The error on a batch.

    Args:
      params: networks that are optimised.
      targets: see above.
      batch: as batch_spec says.
      rng: key of this step.
      buffers: see above.
    """
    raise NotImplementedError(f"{type(self).__name__}.loss")

  def logits(self, params: Params, features: Any) -> Any:
    """Scores of classes [B, K] by averaged features [B, D] of the encoder.

    Args:
      params: of the network "head", as it is evaluated.
      features: float32, of the last layer.

    Returns:
      None where the method classifies nothing.
    """
    del params, features
    return None

  def facts(self) -> dict[str, Any]:
    """What a run says of itself: name -> dataclass with a readable str."""
    return {}

  def flops(self) -> int | None:
    """Least operations of a train step an image; None where not known.

    A multiplication and an addition are two. The backward pass takes two
    products for each of the forward pass, what is computed again is not
    counted. See models.flops.
    """
    return None


def compute(
  config: ml_collections.ConfigDict, kernels: models.Kernels | None = None
) -> dict[str, Any]:
  """How networks compute: arguments of models.Encoder and models.Predictor."""
  return dict(
    dtype=jnp.dtype(config.compute.dtype),
    scan=config.compute.scan,
    remat=config.compute.remat,
    remat_every=config.compute.remat_every,
    kernels=kernels or models.Kernels(),
  )


def image_shape(config: ml_collections.ConfigDict) -> tuple[int, int, int]:
  """(H, W, C) of an image after cropping."""
  sides = models.height_and_width(config.data.image_size)
  return *sides, config.data.channels


def load(name: str) -> type[Objective]:
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
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ValueError(
      f'objective "{name}" cannot be imported: {error}'
    ) from error
  if not (isinstance(found, type) and issubclass(found, Objective)):
    raise ValueError(f'objective "{name}" is no subclass of Objective.')
  own = set().union(*(vars(c) for c in found.mro() if c is not Objective))
  needed = ("from_config", "batch_spec", "init", "loss")
  if missing := [method for method in needed if method not in own]:
    raise ValueError(f'objective "{name}" lacks {", ".join(missing)}.')
  return found
