"""Starts training from weights instead of from random numbers."""

from collections.abc import Mapping
import os
from typing import Any

from absl import logging
import jax
import numpy as np

from jepa_jax import models
from jepa_jax.convert import formats, positions, table
from jepa_jax.convert import weights as weights_lib
from jepa_jax.training import program as program_lib


def warm_start(
  state: program_lib.TrainState,
  path: str | os.PathLike[str],
  *,
  which: str | None = None,
  strict: bool = True,
  networks: Mapping[str, Any] | None = None,
) -> program_lib.TrainState:
  """Puts weights in the place of a state's random ones.

  Args:
    state: fresh; its optimizer and step stay as they are.
    path: see jepa_jax.load.
    which: "target" or "context" puts that encoder wherever the state has one:
      trained, averaged or frozen; None takes the encoder that is evaluated.
      "all" puts the context encoder, the target encoder and the predictor in
      their own places.
    strict: False leaves what the weights lack, or have in another shape, as it
      is, and says so in the log.
    networks: the objective's; weights with another number of attention heads,
      which shapes do not show, then do not fit.

  Returns:
    The state with those parameters, laid out as before.

  Raises:
    ValueError: the weights cannot be read, or in strict mode a network is
      missing or has missing, extra or misshapen parameters: all are listed.
  """
  parts, problems = _fill(state, path, which, strict, networks)
  for problem in problems:
    logging.warning("warm start leaves as it was: %s", problem)
  put = lambda new, old: (
    # A copy: the train step overwrites its state.
    old if new is old else jax.device_put(np.array(new), old.sharding)
  )
  old_parts = {part: dict(getattr(state, part)) for part in parts}
  return state.replace(**jax.tree.map(put, parts, old_parts))


def check(
  state_spec: program_lib.TrainState,
  path: str | os.PathLike[str],
  *,
  which: str | None = None,
  strict: bool = True,
  networks: Mapping[str, Any] | None = None,
) -> None:
  """Raises what `warm_start` would, from shapes alone: see there."""
  _fill(state_spec, path, which, strict, networks)


def _fill(
  state: program_lib.TrainState,
  path: str | os.PathLike[str],
  which: str | None,
  strict: bool,
  networks: Mapping[str, Any] | None,
) -> tuple[dict[str, Any], list[str]]:
  """Parts of a state with the weights' leaves, and what does not fit."""
  weights = formats.read(path, which)
  if which is None:
    (which,) = weights.networks
  parts = {
    part: dict(getattr(state, part))
    for part in ("params", "target_params", "frozen")
  }
  problems = []
  for part, present in parts.items():
    for name, old in present.items():
      if (source := _source(part, name, which)) is None:
        continue
      if source not in weights.networks:
        problems.append(f'{path} has no "{source}" network')
        continue
      different = _other_heads(weights, source, (networks or {}).get(name))
      if not different:
        new = _without_fixed(weights, source)
        parts[part][name], different = _replace(old, new)
      if different:
        problems.append(f"{source}: {different}")
  if problems and strict:
    raise ValueError(
      f"{path} does not fit the configured networks: {'; '.join(problems)}. "
      "Change the config, or load the rest with init_strict=False."
    )
  return parts, problems


def _other_heads(weights: weights_lib.Weights, name: str, network: Any) -> str:
  """What is wrong with the heads of weights for a network; "" for nothing."""
  needed = getattr(network, "num_heads", None)
  has = (weights.predictor if name == "predictor" else weights.encoder)[
    "num_heads"
  ]
  if needed in (None, has):
    return ""
  return f"its attention has {has} heads, and the network's {needed}"


def _source(part: str, name: str, which: str) -> str | None:
  """The network of the weights for one of the state; None: it stays."""
  if name == "context_encoder":  # beside a frozen target encoder
    return "context" if which == "all" else None
  if name == "encoder":
    if which != "all":
      return which
    return "context" if part == "params" else "target"
  return "predictor" if (name, which) == ("predictor", "all") else None


def _without_fixed(weights: weights_lib.Weights, name: str) -> Any:
  """Parameters, without positions that are all but the computed ones."""
  params = dict(weights.networks[name])
  if "positions" in params:
    fixed = models.sincos_positions(weights.grid, weights.encoder["width"])
    if np.abs(params["positions"] - fixed).max() <= positions.HALF_PRECISION:
      del params["positions"]
  return params


def _replace(old: Any, new: Any) -> tuple[Any, str]:
  """Puts new leaves where they fit; returns the tree and what did not."""
  flat = weights_lib.flatten("", new)
  needed = weights_lib.flatten("", old)
  shapes = lambda tree: {k[1:]: tuple(x.shape) for k, x in tree.items()}
  leaves = [
    flat[key] if key in flat and flat[key].shape == leaf.shape else leaf
    for key, leaf in needed.items()
  ]
  different = table.missing_and_extra(shapes(flat), shapes(needed))
  return jax.tree.unflatten(jax.tree.structure(old), leaves), different
