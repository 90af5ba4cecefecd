"""Networks off the device, and what is needed to build them again."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jepa_jax import config_table, keys, models, objectives
from jepa_jax.convert import table

ENCODERS = ("target", "context")
# ImageNet's, which the released weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# What a settings file may hold at most; one of a model has a few kilobytes.
_MOST_BYTES = 2**24

_ENCODER_KEYS = (
    "width", "depth", "num_heads", "patch_size", "mlp_ratio", "norm_epsilon",
    "position_grid",
)  # fmt: skip
# Left out where there are none, as in I-JEPA.
_TOKEN_KEYS = ("class_token", "registers")
_PREDICTOR_KEYS = ("width", "depth", "num_heads", "mlp_ratio", "output_width")
_OPTIONAL = ("output_width", *_TOKEN_KEYS)
_IMAGE_KEYS = ("image_size", "channels", "mean", "std")
# What settings may be, beside those that are keys of a config.
_SIDES = keys.Group((keys.whole(1, 16_384),) * 2)
_KINDS = {
  "image_size": _SIDES,
  "encoder.position_grid": _SIDES,
  "encoder.norm_epsilon": keys.number(0.0, 1.0),
  "predictor.output_width": keys.whole(1, 2**20),
  "channels": config_table.KEYS["data.channels"].kind,
  "mean": config_table.KEYS["data.mean"].kind,
  "std": config_table.KEYS["data.std"].kind,
}


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

  def __post_init__(self):
    _KINDS["channels"].check("channels", self.channels)
    # Of another number of channels, such as grey, each gets the average.
    for key in ("mean", "std"):
      values = getattr(self, key)
      if len(values) != self.channels:
        average = sum(values) / len(values)
        object.__setattr__(self, key, (average,) * self.channels)

  @property
  def grid(self) -> tuple[int, int]:
    """(h, w) in patches."""
    return models.patch_grid(*self.image_size, self.encoder["patch_size"])

  def width(self, name: str) -> int:
    """Width of the network of a name."""
    return (self.predictor if name == "predictor" else self.encoder)["width"]

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
    given = {}
    for name, tree in self.networks.items():
      given |= flatten(name, tree)
    shapes = {key: x.shape for key, x in given.items()}
    return table.missing_and_extra(shapes, self.needed())

  def needed(self) -> dict[str, tuple[int, ...]]:
    """Path of each parameter of the networks -> its shape."""
    shapes = {}
    for name in self.networks:
      for key, x in flatten(name, abstract(self, name)).items():
        shapes[key] = x.shape
    return shapes


def read_json(path: pathlib.Path) -> Any:
  """What a settings file says; ValueError if it is too long to be one."""
  if (size := path.stat().st_size) > _MOST_BYTES:
    raise ValueError(
      f"{path.name} has {size} bytes; settings need fewer than {_MOST_BYTES}"
    )
  return json.loads(path.read_text())


def check_settings(weights: Weights) -> None:
  """Refuses settings that no network has, before anything is made of them.

  Raises:
    ValueError: one line that names the setting.
  """
  values = {name: getattr(weights, name) for name in _IMAGE_KEYS}
  for part, needed in (
    ("encoder", _ENCODER_KEYS + _TOKEN_KEYS),
    ("predictor", _PREDICTOR_KEYS),
  ):
    settings = getattr(weights, part)
    if settings is None and part == "predictor":
      continue
    if missing := [key for key in needed if key not in {*settings, *_OPTIONAL}]:
      raise ValueError(f"its {part} lacks {', '.join(missing)}")
    for key in settings:
      keys.choose(f"setting of its {part}", key, needed)
    values |= {f"{part}.{key}": value for key, value in settings.items()}
  for name, value in values.items():
    kind = _KINDS.get(name) or config_table.KEYS[name].kind
    if name != "encoder.position_grid" or value is not None:
      kind.check(name, value)
  patches, most = math.prod(weights.grid), config_table.MOST_PATCHES
  if patches > most:
    raise ValueError(f"its images have {patches} patches, more than {most}")
  grid = weights.encoder["position_grid"]
  if grid is not None and tuple(grid) != weights.grid:
    raise ValueError(f"position_grid is {grid}, and its images' {weights.grid}")


def flatten(prefix: str, tree: Any) -> dict[str, Any]:
  """{"prefix/norm/scale": leaf, ...}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {
    f"{prefix}/{jax.tree_util.keystr(path, simple=True, separator='/')}": x
    for path, x in leaves
  }


def from_description(text: str) -> Weights:
  """Weights from what `describe` returned, whose networks are still empty.

  Raises:
    ValueError: the text is something else, or describes no network.
  """
  try:
    settings = json.loads(text)
    names = [str(name) for name in settings.pop("networks")]
    for key in ("image_size", "mean", "std"):
      settings[key] = tuple(settings[key])
    grid = settings["encoder"]["position_grid"]
    settings["encoder"]["position_grid"] = tuple(grid) if grid else None
    found = Weights(networks={name: {} for name in names}, **settings)
    check_settings(found)
  except (
    *(ArithmeticError, AttributeError, KeyError, RecursionError),
    *(TypeError, ValueError),
  ) as error:
    raise ValueError(f"its settings cannot be read ({error!r})") from None
  for name in names:
    keys.choose("network", name, (*ENCODERS, "predictor"))
  return found


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
  tokens = pick(encoder, _TOKEN_KEYS)
  tokens = {key: value for key, value in tokens.items() if value}
  return Weights(
    networks={},
    encoder=pick(encoder, _ENCODER_KEYS) | tokens,
    predictor=pick(predictor, _PREDICTOR_KEYS)
    if isinstance(predictor, models.Predictor)
    else None,
    image_size=models.height_and_width(config.data.image_size),
    channels=config.data.channels,
    mean=tuple(config.data.mean),
    std=tuple(config.data.std),
  )


def abstract(weights: Weights, name: str) -> table.Params:
  """The tree that a network needs, of jax.ShapeDtypeStruct; nothing is made."""
  rng = jax.random.key(0)
  if name == "predictor":
    module = weights.module(name)
    ids = jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)
    context = jax.ShapeDtypeStruct(
      (1, 1, 1, weights.encoder["width"]), jnp.float32
    )
    init = lambda *args: module.init(rng, *args, (1, 1))
    return jax.eval_shape(init, context, ids, ids)["params"]
  # Stored positions would be computed, for their shape alone.
  module = weights.module(name).clone(position_grid=None)
  side, grid = module.patch_size, weights.encoder["position_grid"]
  images = jax.ShapeDtypeStruct((1, side, side, weights.channels), jnp.float32)
  params = jax.eval_shape(lambda x: module.init(rng, x), images)["params"]
  spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  if grid is not None:
    params = {**params, "positions": spec(math.prod(grid), module.width)}
  # Of objectives that hide patches from the encoder.
  if "mask_token" in weights.networks.get(name, {}):
    params = {**params, "mask_token": spec(1, 1, module.width)}
  return params
