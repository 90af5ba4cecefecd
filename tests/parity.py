"""Compares a few train steps with numbers of the released PyTorch code.

    python tests/parity.py tests/data/ijepa_reference_step.npz

The file says how the model is shaped ("meta_json"), what it starts from and
what came out; the project's own train step, optimizer and moving average run
from there. Prints the error of every quantity, relative to its norm, and
exits with 1 if one is past its bound.
"""

import argparse
import json
import re
import sys
from typing import Any, NamedTuple

from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from jepa_jax import config as config_lib
from jepa_jax import models
from jepa_jax.convert import table as table_lib
from jepa_jax.objectives import ijepa
from jepa_jax.training import program as program_lib
from jepa_jax.training import sharding

TABLES = {
  "encoder": table_lib.RELEASED_ENCODER,
  "target_encoder": table_lib.RELEASED_ENCODER,
  "predictor": table_lib.RELEASED_PREDICTOR,
}


SCALARS = ("loss", "lr", "weight_decay", "momentum")


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
  c.encoder.mlp_ratio = float(meta["mlp_ratio"])
  # The released predictor's ratio is fixed, whatever the encoder's.
  c.predictor.mlp_ratio = float(meta.get("predictor_mlp_ratio", 4))
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


def compute(reference: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Runs the steps of a file with this project's code.

  Args:
    reference: the file's arrays; inputs and settings alone are read.

  Returns:
    Name as in the file -> our value, of everything that came out.

  Raises:
    ValueError: parameters of other shapes than the settings give.
  """
  meta = json.loads(str(reference["meta_json"]))
  program = program_lib.build(
    config_of(meta),
    sharding.make_mesh(config_lib.defaults().mesh, jax.devices()[:1]),
  )
  state = _start(program, reference, meta)
  ours = _forward(program, state, reference)
  for name in SCALARS[1:]:
    ours[name] = getattr(program.schedules, name)[: meta["steps"]]
  losses = []
  compiled = {}  # released masks change their sizes from step to step
  for step in range(meta["steps"]):
    batch = _batch(reference, step)
    sizes = tuple(x.shape for x in batch.values())
    if sizes not in compiled:
      compiled[sizes] = program.step.lower(state, batch).compile()
    state, metrics, _ = compiled[sizes](state, batch)
    losses.append(float(metrics["loss"]))
    if step == 0:
      # Adam's first moment after one step is (1 - b1) times the gradient.
      moment = optax.tree_utils.tree_get(state.opt_state, "mu")
      scale = 1.0 / (1.0 - meta["adam"]["b1"])
      grads = jax.tree.map(lambda x: np.asarray(x) * scale, moment)
      ours |= _released(grads, "step0/grad", meta)
  ours["loss"] = np.array(losses)
  ends = {**state.params, "target_encoder": state.target_params["encoder"]}
  return ours | _released(ends, "final", meta)


def judge(
  ours: dict[str, np.ndarray], reference: dict[str, np.ndarray]
) -> list[Comparison]:
  """Holds every quantity of a file against ours.

  Raises:
    ValueError: one side has a quantity that the other lacks.
  """
  given = re.compile("init/|meta_json|.*(pos_embed|masks_.*|images_nchw)$")
  theirs = {key for key in reference if not given.match(key)}
  if theirs != set(ours):
    raise ValueError(
      f"not on both sides: {', '.join(sorted(theirs ^ set(ours)))}."
    )
  results = []
  for name in sorted(ours):
    if name in SCALARS:
      bound = 1e-5 if name == "loss" else 1e-7
      pairs = zip(ours[name], reference[name], strict=True)
      results += [
        _compare(f"{name} of step {i}", *pair, bound)
        for i, pair in enumerate(pairs)
      ]
    else:
      bound = 2e-5 if name.startswith("final/") else 1e-5
      results.append(_compare(name, ours[name], reference[name], bound))
  return results


def compare(path: str) -> list[Comparison]:
  """Runs the steps of a file and judges them; see compute and judge."""
  with np.load(path) as archive:
    reference = {key: archive[key] for key in archive.files}
  return judge(compute(reference), reference)


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
  # Copies: the step overwrites what it is given.
  place = lambda new, old: jax.device_put(jnp.array(new), old.sharding)
  return state.replace(
    params=jax.tree.map(place, params, state.params),
    target_params=jax.tree.map(
      place, {"encoder": params["encoder"]}, state.target_params
    ),
  )


def _batch(reference: dict[str, np.ndarray], step: int) -> dict[str, Any]:
  at = f"step{step}"
  return {
    "image": reference[f"{at}/images_nchw"].transpose(0, 2, 3, 1),
    "context_ids": reference[f"{at}/masks_context"].astype(np.int32),
    "target_ids": reference[f"{at}/masks_target"].astype(np.int32),
  }


def _forward(
  program: program_lib.Program,
  state: program_lib.TrainState,
  reference: dict[str, np.ndarray],
) -> dict[str, np.ndarray]:
  """What the networks return inside of the objective's own loss."""

  def forward(params, target_params, batch):
    seen = []

    def record(call, args, kwargs, context):
      output = call(*args, **kwargs)
      if isinstance(context.module, (models.Encoder, models.Predictor)) and (
        context.method_name == "__call__"
      ):
        seen.append(output)
      return output

    objective = program.objective
    with nn.intercept_methods(record):
      rng = jax.random.key(0)
      targets = objective.targets(target_params, batch, {})
      objective.loss(params, targets, batch, rng, {})
    # The loss wants the patches of the targets alone.
    whole = {"params": target_params["encoder"]}, batch["image"]
    return objective.encoder.apply(*whole), *seen

  target, wanted, context, prediction = jax.jit(forward)(
    state.params, state.target_params, _batch(reference, 0)
  )
  shape = prediction.shape  # [B, S, M, T, D]
  targets = ijepa.normalize_targets(wanted)  # [B, M, T, D]
  targets = jnp.broadcast_to(targets[:, None], shape)
  pairs = lambda x: x.transpose(2, 1, 0, 3, 4).reshape(-1, *shape[3:])
  ours = {
    "target_encoder_output": target,
    "context_encoder_output": context.swapaxes(0, 1).reshape(
      -1, *context.shape[2:]
    ),
    "predictor_output": pairs(prediction),
    "targets": pairs(targets),
  }
  return {f"step0/{name}": np.asarray(x) for name, x in ours.items()}


def _released(
  networks: dict[str, Any], prefix: str, meta: dict[str, Any]
) -> dict[str, np.ndarray]:
  """Trees of networks, under the released names."""
  arrays = {}
  for name, tree in networks.items():
    table = tuple(row for row in TABLES[name] if row.path != "positions")
    tree = jax.tree.map(np.asarray, tree)
    for key, array in table_lib.to_foreign(tree, table, meta["patch"]):
      arrays[f"{prefix}/{name}/{key}"] = array
  return arrays


def _params(
  reference: dict[str, np.ndarray],
  prefix: str,
  name: str,
  meta: dict[str, Any],
) -> dict[str, Any]:
  start = f"{prefix}/{name}/"
  source = {
    k.removeprefix(start): lambda v=v: v
    for k, v in reference.items()
    if k.startswith(start)
  }
  depth = meta["predictor_depth" if name == "predictor" else "depth"]
  return table_lib.from_foreign(source, TABLES[name], depth)


def _without_positions(params: dict[str, Any]) -> dict[str, Any]:
  """Drops fixed position embeddings, once they are seen to be ours."""
  positions = params.pop("positions", None)
  if positions is not None:
    side = round(len(positions) ** 0.5)
    ours = models.sincos_positions((side, side), positions.shape[-1])
    if not np.allclose(positions, ours, atol=1e-6):
      raise ValueError("position embeddings are not the sine-cosine ones.")
  return params


def _compare(name: str, ours: Any, theirs: Any, bound: float) -> Comparison:
  ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
  if ours.shape != theirs.shape:
    raise ValueError(f"{name} has shape {ours.shape}, not {theirs.shape}.")
  norm = np.linalg.norm(theirs) or 1.0
  return Comparison(name, float(np.linalg.norm(ours - theirs) / norm), bound)


def report(results: list[Comparison]) -> str:
  """A line a quantity."""
  return "\n".join(
    f"{'ok  ' if r.ok else 'FAIL'} {r.error:.2e} (bound {r.bound:.0e}) {r.name}"
    for r in results
  )


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("file", help="reference numbers, .npz")
  parser.add_argument(
    "--optimize",
    action="store_true",
    help="compile as for training, which takes longer",
  )
  arguments = parser.parse_args()
  if not arguments.optimize:
    import conftest  # noqa: F401  sets XLA_FLAGS before JAX's first use
  results = compare(arguments.file)
  print(report(results))
  bad = [r for r in results if not r.ok]
  print(f"{len(results)} quantities, {len(bad)} past their bound")
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
