"""Position embeddings: computed, stored, or fitted to another image size."""

import dataclasses

from absl import logging
import numpy as np

from jepa_jax import models
from jepa_jax.convert import table
from jepa_jax.convert.weights import Weights

# Rounding to half precision moves the sine-cosine embeddings by at most this.
HALF_PRECISION = 5e-3


def with_positions(weights: Weights, name: str) -> table.Params:
  """A network's parameters with its position embeddings, stored or computed."""
  params = weights.networks[name]
  if "positions" in params:
    return params
  positions = models.sincos_positions(weights.grid, weights.width(name))
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
    if not error <= HALF_PRECISION:
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
