"""Networks off the device, and what is needed to build them again."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from jepa_jax import models, objectives
from jepa_jax.convert import table

ENCODERS = ("target", "context")
# ImageNet's, which the released weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_ENCODER_KEYS = (
    "width", "depth", "num_heads", "patch_size", "mlp_ratio", "norm_epsilon",
    "position_grid",
)  # fmt: skip
_PREDICTOR_KEYS = ("width", "depth", "num_heads", "mlp_ratio", "output_width")


@dataclasses.dataclass(frozen=True)
class Weights:
  """Parameters of some of the networks, as NumPy arrays.

  Attributes:
    networks: of "target", "context" and "predictor", those there are: nested
      float32 parameters of models.Encoder or models.Predictor.
    encoder: arguments of models.Encoder that the shapes depend on.
    predictor: the same of models.Predictor, or None where there is none;
      output_width may be left out where it is the encoder's width.
    image_size: (H, W) of training, pixels.
    channels: of the images.
    mean: of the images a channel, on a scale of 0 to 1.
    std: of the images a channel.
  """

  networks: dict[str, table.Params]
  encoder: dict[str, Any]
  predictor: dict[str, Any] | None = None
  image_size: tuple[int, int] = (224, 224)
  channels: int = 3
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD

  @property
  def grid(self) -> tuple[int, int]:
    """(h, w) in patches."""
    return models.patch_grid(*self.image_size, self.encoder["patch_size"])

  @property
  def output_width(self) -> int:
    """Width of the predictor's outputs."""
    return self.predictor.get("output_width", self.encoder["width"])

  def module(self, name: str, **kwargs: Any) -> Any:
    """Builds the network of a name; kwargs such as dtype and scan."""
    if name == "predictor":
      settings = {**self.predictor, "output_width": self.output_width}
      return models.Predictor(**settings, **kwargs)
    return models.Encoder(**self.encoder, **kwargs)

  def only(self, which: str) -> "Weights":
    """These weights with one encoder alone, or with "all" there is.

    Raises:
      ValueError: there is no such encoder.
    """
    if which == "all":
      return self
    if which not in self.networks:
      raise ValueError(
        f'there is no "{which}" encoder; there are: {", ".join(self.networks)}.'
      )
    return dataclasses.replace(
      self, networks={which: self.networks[which]}, predictor=None
    )

  def describe(self) -> str:
    """The settings as JSON, read back by `from_description`."""
    settings = dataclasses.asdict(dataclasses.replace(self, networks={}))
    settings["networks"] = list(self.networks)
    return json.dumps(settings, sort_keys=True)

  def problems(self) -> str:
    """What is missing, extra or misshapen; "" for nothing."""
    needed = {}
    for name in self.networks:
      needed |= flatten(name, abstract(self, name))
    given = {}
    for name, tree in self.networks.items():
      given |= flatten(name, tree)
    return table.missing_and_extra(
      {key: x.shape for key, x in given.items()},
      {key: x.shape for key, x in needed.items()},
    )


def flatten(prefix: str, tree: Any) -> dict[str, Any]:
  """{"prefix/norm/scale": leaf, ...}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": x
    for path, x in leaves
  }


def from_description(text: str) -> Weights:
  """Weights without networks from what `describe` returned.

  Raises:
    ValueError: the text is something else.
  """
  try:
    settings = json.loads(text)
    settings.pop("networks")
    for key in ("image_size", "mean", "std"):
      settings[key] = tuple(settings[key])
    grid = settings["encoder"]["position_grid"]
    settings["encoder"]["position_grid"] = tuple(grid) if grid else None
    return Weights(networks={}, **settings)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(f"its settings cannot be read ({error!r})") from None


def from_config(config: Any) -> Weights:
  """Weights without networks, of the objective that a config describes.

  Args:
    config: see jepa_jax.config.

  Raises:
    ValueError: the objective cannot be imported, or has no models.Encoder.
  """
  objective = objectives.load(config.objective).from_config(config)
  encoder = objective.networks.get("encoder")
  if not isinstance(encoder, models.Encoder):
    raise ValueError(
      f'the objective "{config.objective}" has no network "encoder", a '
      "models.Encoder, and so nothing to load."
    )
  predictor = objective.networks.get("predictor")
  pick = lambda module, keys: {key: getattr(module, key) for key in keys}
  return Weights(
    networks={},
    encoder=pick(encoder, _ENCODER_KEYS),
    predictor=pick(predictor, _PREDICTOR_KEYS)
    if isinstance(predictor, models.Predictor)
    else None,
    image_size=models.height_and_width(config.data.image_size),
    channels=config.data.channels,
    mean=tuple(config.data.mean),
    std=tuple(config.data.std),
  )


def abstract(weights: Weights, name: str) -> table.Params:
  """The tree that a network needs, of jax.ShapeDtypeStruct."""
  module = weights.module(name)
  rng = jax.random.key(0)
  if name == "predictor":
    ids = jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)
    context = jax.ShapeDtypeStruct(
      (1, 1, 1, weights.encoder["width"]), jnp.float32
    )
    init = lambda *args: module.init(rng, *args, weights.grid)
    return jax.eval_shape(init, context, ids, ids)["params"]
  grid = weights.encoder["position_grid"] or (1, 1)
  side = weights.encoder["patch_size"]
  images = jax.ShapeDtypeStruct(
    (1, grid[0] * side, grid[1] * side, weights.channels), jnp.float32
  )
  return jax.eval_shape(lambda x: module.init(rng, x), images)["params"]
