"""Compares a few train steps with numbers of the released PyTorch code.

    python tests/parity.py FILE.npz

The file says how the model is shaped ("meta_json"), what it starts from and
what came out; the project's own train step, optimizer and moving average run
from there. Prints the error of every quantity, relative to its norm, and
exits with 1 if one is past its bound.
"""

import argparse
import json
import sys
from typing import Any, NamedTuple

import flax.linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from jepa_jax import config as config_lib
from jepa_jax import convert
from jepa_jax import models
from jepa_jax.objectives import ijepa
from jepa_jax.training import program as program_lib
from jepa_jax.training import sharding

TABLES = {
    "encoder": convert.RELEASED_ENCODER,
    "target_encoder": convert.RELEASED_ENCODER,
    "predictor": convert.RELEASED_PREDICTOR,
}


class Comparison(NamedTuple):
  """One quantity: its relative error, and how large that may be."""

  name: str
  error: float
  bound: float

  @property
  def ok(self) -> bool:
    return self.error <= self.bound  # False for NaN


def config_of(meta: dict[str, Any]) -> ml_collections.ConfigDict:
  """The config of a file's settings."""
  c = config_lib.defaults()
  per_epoch = meta["iterations_per_epoch"]
  c.batch_size = meta["batch"]
  c.total = f"{int(meta['epochs'] * per_epoch)} steps"
  c.optimizer.warmup = f"{int(meta['warmup_epochs'] * per_epoch)} steps"
  c.optimizer.lr_start = meta["start_lr"]
  c.optimizer.lr = meta["lr"]
  c.optimizer.lr_end = meta["final_lr"]
  c.optimizer.weight_decay_start = meta["weight_decay"]
  c.optimizer.weight_decay_end = meta["final_weight_decay"]
  c.optimizer.update(meta["adam"])
  c.momentum = tuple(meta["ema"])
  c.data.image_size = meta["img"]
  c.encoder.patch_size = meta["patch"]
  for network, prefix in ((c.encoder, ""), (c.predictor, "predictor_")):
    network.width = meta[f"{prefix}dim"]
    network.depth = meta[f"{prefix}depth"]
    network.num_heads = meta[f"{prefix}heads"]
    network.mlp_ratio = float(meta["mlp_ratio"])
  c.compute.dtype = "float32"
  c.compute.scan = False
  # The masks are the file's; the sampler, which the step does not run, has to
  # accept the grid.
  c.masks.num_contexts = meta["num_context_masks"]
  c.masks.num_targets = meta["num_target_masks"]
  c.masks.min_keep = 1
  c.masks.allow_overlap = True
  c.masks.context_patches = 1
  return c


def compare(path: str) -> list[Comparison]:
  """Runs the steps of a file.

  Args:
    path: .npz with the keys that the reference's README lists.

  Returns:
    Every quantity's error.

  Raises:
    ValueError: parameters of other shapes than the settings give.
  """
  with np.load(path) as archive:
    reference = {key: archive[key] for key in archive.files}
  meta = json.loads(str(reference["meta_json"]))
  program = program_lib.build(
      config_of(meta),
      sharding.make_mesh(config_lib.defaults().mesh, jax.devices()[:1]),
  )
  state = _start(program, reference, meta)
  results = _compare_forward(program, state, reference)
  for step in range(meta["steps"]):
    state, metrics, _ = program.step(state, _batch(reference, step))
    results.append(
        _scalar(f"loss of step {step}", metrics["loss"],
                reference["loss"][step], 1e-5)
    )
    for name in ("lr", "weight_decay", "momentum"):
      table = getattr(program.schedules, name)
      results.append(
          _scalar(f"{name} of step {step}", table[step],
                  reference[name][step], 1e-7)
      )
    if step == 0:
      # Adam's first moment after one step is (1 - b1) times the gradient.
      moment = optax.tree_utils.tree_get(state.opt_state, "mu")
      scale = 1.0 / (1.0 - meta["adam"]["b1"])
      for name in ("encoder", "predictor"):
        grads = jax.tree.map(lambda x: np.asarray(x) * scale, moment[name])
        results += _compare_trees(
            "step0/grad", name, grads, reference, meta, 1e-5
        )
  for name, params in (
      ("encoder", state.params["encoder"]),
      ("predictor", state.params["predictor"]),
      ("target_encoder", state.target_params["encoder"]),
  ):
    results += _compare_trees("final", name, params, reference, meta, 2e-5)
  return results


def _start(
    program: program_lib.Program,
    reference: dict[str, np.ndarray],
    meta: dict[str, Any],
) -> program_lib.TrainState:
  """The state before step 0, with the file's parameters."""
  state = program.init(0)
  params = {
      name: _without_positions(_params(reference, "init", name, meta))
      for name in ("encoder", "predictor")
  }
  given, needed = (
      {
          name: leaf.shape
          for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()
      }
      for tree in (params, state.params)
  )
  if given != needed:
    wrong = sorted(set(given.items()) ^ set(needed.items()))
    raise ValueError(f"parameters do not have the shapes of meta_json: {wrong}")
  return state.replace(
      params=jax.tree.map(jnp.array, params),
      target_params={"encoder": jax.tree.map(jnp.array, params["encoder"])},
  )


def _batch(reference: dict[str, np.ndarray], step: int) -> dict[str, Any]:
  at = f"step{step}"
  return {
      "image": reference[f"{at}/images_nchw"].transpose(0, 2, 3, 1),
      "context_ids": reference[f"{at}/masks_context"].astype(np.int32),
      "target_ids": reference[f"{at}/masks_target"].astype(np.int32),
  }


def _compare_forward(
    program: program_lib.Program,
    state: program_lib.TrainState,
    reference: dict[str, np.ndarray],
) -> list[Comparison]:
  """Compares what the networks return inside of the objective's own loss."""

  def forward(params, target_params, batch):
    seen = []

    def record(call, args, kwargs, context):
      output = call(*args, **kwargs)
      if isinstance(context.module, (models.Encoder, models.Predictor)) and (
          context.method_name == "__call__"
      ):
        seen.append(output)
      return output

    with nn.intercept_methods(record):
      program.objective.loss(params, target_params, batch, jax.random.key(0))
    return seen

  batch = _batch(reference, 0)
  target, context, prediction = jax.jit(forward)(
      state.params, state.target_params, batch
  )
  targets = models.gather_patches(
      ijepa.normalize_targets(target), batch["target_ids"]
  )  # [B, M, T, D]
  shape = prediction.shape  # [B, S, M, T, D]
  targets = jnp.broadcast_to(targets[:, None], shape)
  pairs = lambda x: np.asarray(x).transpose(2, 1, 0, 3, 4).reshape(-1, *shape[3:])
  ours = {
      "target_encoder_output": target,
      "context_encoder_output": np.asarray(context).swapaxes(0, 1).reshape(
          -1, *context.shape[2:]
      ),
      "predictor_output": pairs(prediction),
      "targets": pairs(targets),
  }
  return [
      _array(f"step0/{name}", value, reference[f"step0/{name}"], 1e-5)
      for name, value in ours.items()
  ]


def _compare_trees(
    prefix: str,
    name: str,
    ours: Any,
    reference: dict[str, np.ndarray],
    meta: dict[str, Any],
    bound: float,
) -> list[Comparison]:
  """Compares parameters, one foreign key after the other."""
  start = f"{prefix}/{name}/"
  theirs = {k.removeprefix(start) for k in reference if k.startswith(start)}
  fixed = {row.foreign for row in TABLES[name] if row.path == "positions"}
  table = tuple(row for row in TABLES[name] if row.path != "positions")
  mine = dict(
      convert.to_foreign(jax.tree.map(np.asarray, ours), table, meta["patch"])
  )
  if set(mine) != theirs - fixed:
    raise ValueError(f"{start}: {sorted(set(mine) ^ (theirs - fixed))}")
  return [
      _array(start + key, mine[key], reference[start + key], bound)
      for key in sorted(mine)
  ]


def _params(
    reference: dict[str, np.ndarray],
    prefix: str,
    name: str,
    meta: dict[str, Any],
) -> dict[str, Any]:
  start = f"{prefix}/{name}/"
  source = {
      k.removeprefix(start): v
      for k, v in reference.items()
      if k.startswith(start)
  }
  depth = meta["predictor_depth" if name == "predictor" else "depth"]
  return convert.from_foreign(source, TABLES[name], depth)


def _without_positions(params: dict[str, Any]) -> dict[str, Any]:
  """Drops fixed position embeddings, once they are seen to be ours."""
  positions = params.pop("positions", None)
  if positions is not None:
    side = round(len(positions) ** 0.5)
    ours = models.sincos_positions((side, side), positions.shape[-1])
    if not np.allclose(positions, ours, atol=1e-6):
      raise ValueError("position embeddings are not the sine-cosine ones.")
  return params


def _array(name: str, ours: Any, theirs: Any, bound: float) -> Comparison:
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  if ours.shape != theirs.shape:
    raise ValueError(f"{name} has shape {ours.shape}, not {theirs.shape}.")
  norm = np.linalg.norm(theirs) or 1.0
  return Comparison(name, float(np.linalg.norm(ours - theirs) / norm), bound)


def _scalar(name: str, ours: Any, theirs: float, bound: float) -> Comparison:
  return _array(name, float(ours), float(theirs), bound)


def report(results: list[Comparison]) -> str:
  """A line a quantity."""
  return "\n".join(
      f"{'ok  ' if r.ok else 'FAIL'} {r.error:.2e} (bound {r.bound:.0e}) {r.name}"
      for r in results
  )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("file", help="reference numbers, .npz")
  results = compare(parser.parse_args().file)
  print(report(results))
  bad = [r for r in results if not r.ok]
  print(f"{len(results)} quantities, {len(bad)} past their bound")
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
