"""What images become before a probe sees them: the encoders compared.

"trained" is the target encoder, its patches averaged; "random" the same
architecture with random parameters; "pixels" the image itself.
"""

from collections.abc import Callable, Collection
import functools
from typing import Any

import jax
import ml_collections
import numpy as np

from jepa_jax import models
from jepa_jax.evaluation import features
from jepa_jax.training import sharding

BASELINES = ("random", "pixels")
LAYERS = {"last": 1, "last4": 4}  # features -> layers, one after another


def columns(kind: str, width: int) -> slice:
  """Where features of that kind are in those of the most layers.

  Args:
    kind: a key of LAYERS, or "pixels".
    width: of the encoder.
  """
  # The last layer's features are the last columns of the last four.
  return slice(-width * LAYERS[kind] if kind in LAYERS else None, None)


def pooled(
  program: Any,
  state: Any,
  baselines: Collection[str],
  layers: int,
  with_patches: bool = False,
) -> dict[str, Callable[[Any], Any]]:
  """Functions from a process's uint8 images to features [B, D].

  Args:
    program: training.program.Program.
    state: its TrainState.
    baselines: which of BASELINES stand beside the trained encoder.
    layers: how many of the last ones; their features follow one another.
    with_patches: whether each encoder is there twice, see of_patches.

  Returns:
    Name of the encoder -> function, "trained" first.
  """
  data = program.config.data
  split = sharding.batch_sharding(program.mesh)
  network = program.objective.networks["encoder"]

  @functools.partial(jax.jit, static_argnums=2)
  def encode(params, images, pool):
    images = models.normalize_images(images, data.mean, data.std)
    if not pool:
      return network.apply({"params": params}, images).astype("float16")
    x = network.apply({"params": params}, images, layers=layers)
    return x.astype("float32").mean(axis=1)

  def encode_with(params, pool):
    put = jax.make_array_from_process_local_data
    return lambda images: encode(params, put(split, images), pool)

  networks = {"trained": state.network("encoder")}
  if "random" in baselines:
    networks["random"] = random_params(program)
  found = {name: encode_with(x, True) for name, x in networks.items()}
  if with_patches:
    found |= {
      of_patches(name): encode_with(x, False) for name, x in networks.items()
    }
  if "pixels" in baselines:
    found |= pixels(network.patch_size, with_patches)
  return found


def of_patches(name: str) -> str:
  """What the encoder that gives [B, N, D] of the last layer is called."""
  return name + features.OF_PATCHES


def pixels(patch_size: int, with_patches: bool) -> dict[str, Callable]:
  """The baseline of raw pixels, and that of each patch's."""
  found = {"pixels": features.raw_pixels}
  if with_patches:
    found[of_patches("pixels")] = lambda images: models.patchify(
      np.float16(images / 255), patch_size
    )
  return found


def patches(
  program: Any, state: Any, images: Any, grid: tuple[int, int]
) -> dict[str, Any]:
  """Features of the patches, by the trained encoder and a random one.

  Args:
    program: training.program.Program.
    state: its TrainState.
    images: uint8 [B, H, W, C], the same in all processes.
    grid: patches, rows and columns.

  Returns:
    {"trained", "random": float32 [B, h, w, D]}.
  """
  data = program.config.data
  network = program.objective.networks["encoder"]

  def encode(params, images):
    images = models.normalize_images(images, data.mean, data.std)
    x = network.apply({"params": params}, images)
    return x.reshape(len(images), *grid, -1).astype("float32")

  encode = jax.jit(encode, out_shardings=sharding.replicated(program.mesh))
  return {
    "trained": jax.device_get(encode(state.network("encoder"), images)),
    "random": jax.device_get(encode(random_params(program), images)),
  }


def random_params(program: Any) -> Any:
  """Parameters of the encoder before training."""
  return program.init(program.config.seed).network("encoder")


def batch_size(config: ml_collections.ConfigDict, mesh: Any) -> int:
  """Images that are encoded at a time: a multiple of the devices."""
  return max(1, min(256, config.batch_size) // mesh.size) * mesh.size


def check(config: ml_collections.ConfigDict, networks: Any) -> None:
  """Raises ValueError where there is no encoder to evaluate.

  Args:
    config: reads objective.
    networks: those of the objective.
  """
  if "encoder" not in networks:
    raise ValueError(
      f'objective "{config.objective}" has no network "encoder" to evaluate; '
      f"its networks are: {', '.join(networks)}. Drop config.evaluations."
    )
