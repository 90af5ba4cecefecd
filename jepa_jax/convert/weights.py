"""Networks off the device, and what is needed to build them again."""

import dataclasses
import json
from typing import Any

from absl import logging
import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import models
from jepa_jax.convert import table

ENCODERS = ("target", "context")
# ImageNet's, which the released weights were trained with.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_ENCODER_KEYS = (
    "width", "depth", "num_heads", "patch_size", "mlp_ratio", "norm_epsilon",
    "position_grid",
)  # fmt: skip
_PREDICTOR_KEYS = ("width", "depth", "num_heads", "mlp_ratio")
# Positions of half precision are this far from the sine-cosine ones.
_HALF_PRECISION = 5e-3


@dataclasses.dataclass(frozen=True)
class Weights:
  """Parameters of some of the networks, as NumPy arrays.

  Attributes:
    networks: of "target", "context" and "predictor", those there are: nested
      float32 parameters of models.Encoder or models.Predictor.
    encoder: arguments of models.Encoder that the shapes depend on.
    predictor: the same of models.Predictor, or None where there is none.
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

  def module(self, name: str, **kwargs: Any) -> Any:
    """Builds the network of a name; kwargs such as dtype and scan."""
    if name == "predictor":
      return models.Predictor(
        **self.predictor, output_width=self.encoder["width"], **kwargs
      )
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
  """Weights without networks, as a training config describes them.

  Args:
    config: see jepa_jax.config.
  """
  pick = lambda settings, keys: {k: settings[k] for k in keys if k in settings}
  data = config["data"]
  encoder = pick(config["encoder"], _ENCODER_KEYS)
  return Weights(
    networks={},
    encoder={"norm_epsilon": 1e-6, "position_grid": None, **encoder},
    predictor=pick(config["predictor"], _PREDICTOR_KEYS),
    image_size=(data["image_size"],) * 2,
    channels=data["channels"],
    mean=tuple(data["mean"]),
    std=tuple(data["std"]),
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


def with_positions(weights: Weights, name: str) -> table.Params:
  """A network's parameters with its position embeddings, as others want."""
  params = weights.networks[name]
  if "positions" in params:
    return params
  kind = weights.predictor if name == "predictor" else weights.encoder
  positions = models.sincos_positions(weights.grid, kind["width"])
  return {**params, "positions": positions}


def settle_positions(weights: Weights) -> Weights:
  """Drops position embeddings that are the sine-cosine ones anyway.

  Others stay as parameters of the encoder, which then has one grid.

  Raises:
    ValueError: the predictor has others, or the encoders differ.
  """
  networks, encoder = {}, dict(weights.encoder, position_grid=None)
  for name, params in weights.networks.items():
    networks[name] = dict(params)
    positions = params["positions"]
    fixed = models.sincos_positions(weights.grid, positions.shape[-1])
    if np.array_equal(positions, fixed):
      del networks[name]["positions"]
      continue
    if name != "predictor":
      encoder["position_grid"] = weights.grid
      continue
    error = float(np.abs(positions - fixed).max())
    if not error <= _HALF_PRECISION:
      raise ValueError(
        "the predictor's position embeddings are not the sine-cosine ones "
        f"(by up to {error:.2g}); such a predictor is not supported."
      )
    logging.warning(
      "the predictor's position embeddings are %.1g off the sine-cosine "
      "ones and are computed anew",
      error,
    )
    del networks[name]["positions"]
  if encoder["position_grid"] is not None:
    for name in set(networks) - {"predictor"}:
      networks[name]["positions"] = weights.networks[name]["positions"]
  return dataclasses.replace(weights, networks=networks, encoder=encoder)


def resize(
  weights: Weights,
  image_size: tuple[int, int],
  positions: str = "recompute",
) -> Weights:
  """Fits the position embeddings to another image size.

  Args:
    weights: what to fit.
    image_size: (H, W), pixels.
    positions: "recompute" (the default) makes the sine-cosine ones of the new
      grid, as training at that size would; "bicubic" interpolates those of
      the old grid, as is common for learned ones, and stores them.

  Returns:
    The same weights for images of that size.

  Raises:
    ValueError: the patch size does not divide it; unknown `positions`;
      "recompute" of embeddings that are not the sine-cosine ones; "bicubic"
      with a predictor, whose embeddings are always computed.
  """
  if positions not in ("recompute", "bicubic"):
    raise ValueError(
      f'unknown positions "{positions}"; known: recompute, bicubic.'
    )
  new = dataclasses.replace(weights, image_size=tuple(image_size))
  grid = new.grid  # ValueError where the patch size does not divide it
  if positions == "recompute":
    if weights.encoder["position_grid"] is not None:
      raise ValueError(
        "the stored position embeddings are not the sine-cosine ones; "
        'recomputing would lose them: ask for positions "bicubic".'
      )
    return new
  if "predictor" in weights.networks:
    raise ValueError(
      'positions "bicubic" is for an encoder alone; choose the target or '
      'the context encoder, or positions "recompute".'
    )
  networks = {}
  for name in weights.networks:
    params = with_positions(weights, name)
    stretched = bicubic(params["positions"], weights.grid, grid)
    networks[name] = {**params, "positions": stretched}
  encoder = {**weights.encoder, "position_grid": grid}
  return dataclasses.replace(new, networks=networks, encoder=encoder)


def bicubic(
  positions: np.ndarray, old: tuple[int, int], new: tuple[int, int]
) -> np.ndarray:
  """Interpolates position embeddings.

  Keys' cubic kernel with a = -0.75, half-pixel centres, edges repeated and no
  antialiasing: what PyTorch's "bicubic" does.

  Args:
    positions: [N, D], row-major over the old grid.
    old: (h, w).
    new: (h, w).

  Returns:
    [N', D] float32.

  Reference: Keys 1981, doi:10.1109/TASSP.1981.1163711.
  """
  grid = positions.astype(np.float64).reshape(*old, -1)
  rows, columns = (_cubic(i, o) for i, o in zip(old, new))
  out = np.einsum("ih,jw,hwd->ijd", rows, columns, grid, optimize=True)
  return out.reshape(-1, positions.shape[-1]).astype(np.float32)


def _cubic(size: int, new_size: int) -> np.ndarray:
  """[new_size, size], the share of each old point in each new one."""
  a = -0.75
  center = (np.arange(new_size) + 0.5) * size / new_size - 0.5
  matrix = np.zeros((new_size, size))
  for offset in (-1, 0, 1, 2):
    index = np.floor(center).astype(int) + offset
    d = np.abs(center - index)
    weight = np.where(
      d <= 1,
      ((a + 2) * d - (a + 3)) * d * d + 1,
      ((a * d - 5 * a) * d + 8 * a) * d - 4 * a,
    )
    np.add.at(
      matrix,
      (np.arange(new_size), np.clip(index, 0, size - 1)),
      weight,
    )
  return matrix
