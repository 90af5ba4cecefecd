"""A decoder's run, and the file that one is handed on in."""

import json
import pathlib

from flax import traverse_util
import jax
import ml_collections
import numpy as np
import safetensors
import safetensors.numpy

from jepa_jax import config as config_lib
from jepa_jax import objectives
from jepa_jax.objectives import decoder as decoder_lib
from jepa_jax.training import checkpoints, log, program, sharding


def load(
  workdir: pathlib.Path, step: int | None = None
) -> tuple[decoder_lib.Decoder, program.TrainState, ml_collections.ConfigDict]:
  """A decoder from its run, or from what `save` wrote.

  Args:
    workdir: of the run, or the file.
    step: of the checkpoint; None for the newest.

  Returns:
    The objective, its TrainState (of a file: without an optimizer) and
    config.masks.

  Raises:
    ValueError: not of a decoder, damaged, or no such checkpoint.
  """
  if workdir.is_file():
    return _load_file(workdir)
  config = config_lib.read(workdir / "config.json")
  _check(config, workdir)
  from jepa_jax.evaluation import run as evaluation  # imports TensorFlow

  config = evaluation.resolve(config)
  with config.unlocked():
    config.mesh.update(data=-1, fsdp=1)
  made = program.build(config, sharding.make_mesh(config.mesh))
  with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
    state = saved.restore(made.state_spec, step)
  if state is None:
    raise ValueError(f"{workdir} holds no checkpoint yet.")
  return made.objective, state, config.masks


def _check(config, path):
  if not hasattr(objectives.load(config.objective), "samples"):
    raise ValueError(
      f'{path} is of objective "{config.objective}", which draws no images; '
      "train a decoder of its networks first: experiments/decoder.py."
    )


def save(
  workdir: pathlib.Path, path: pathlib.Path, step: int | None = None
) -> None:
  """Writes a run's decoder as one file, *.safetensors, in half precision.

  Args:
    workdir: of the run.
    path: of the file, for `load`.
    step: of the checkpoint; None for the newest.

  Raises:
    ValueError: see `load`.
  """
  _, state, _ = load(workdir, step)
  config = config_lib.read(workdir / "config.json")
  config.init_from = ""  # a path of this machine
  arrays = traverse_util.flatten_dict(_parts(state), sep="/")
  arrays = {
    name: np.asarray(x, np.float32 if "buffers/" in name else np.float16)
    for name, x in arrays.items()
  }
  text = json.dumps(config.to_dict())
  log.write_whole(path, safetensors.numpy.save(arrays, {"config": text}))


def _parts(state):
  """What draws: the U-Net as it is evaluated, and what it is given."""
  return {
    "unet": state.network("unet"),
    "frozen": state.frozen,
    "buffers": state.buffers,
  }


def _load_file(path):
  try:
    with safetensors.safe_open(path, "numpy") as file:
      text = (file.metadata() or {}).get("config", "")
      arrays = {name: file.get_tensor(name) for name in file.keys()}
  except (OSError, safetensors.SafetensorError) as error:
    raise ValueError(f"{path} is no .safetensors file: {error}.") from None
  config = config_lib.parse(text, path)
  _check(config, path)
  objective = objectives.load(config.objective).from_config(config)
  networks = jax.eval_shape(objective.init, jax.random.key(0))
  state = program.TrainState(
    step=0,
    params={},
    opt_state=(),
    target_params={"unet": networks["unet"]},
    frozen={name: networks[name] for name in objective.frozen},
    buffers=jax.eval_shape(objective.buffers),
  )
  needed = traverse_util.flatten_dict(_parts(state), sep="/")
  if {k: x.shape for k, x in arrays.items()} != {
    k: x.shape for k, x in needed.items()
  }:
    raise ValueError(f"{path} holds other arrays than its config describes.")
  arrays = {k: x.astype(np.float32) for k, x in arrays.items()}
  found = traverse_util.unflatten_dict(arrays, sep="/")
  state = state.replace(
    target_params={"unet": found["unet"]},
    frozen=found["frozen"],
    buffers=found["buffers"],
  )
  return objective, state, config.masks
