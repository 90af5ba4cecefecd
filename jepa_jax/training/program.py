"""The program: a config and a mesh, made into pure functions.

Training, planning, benchmarks, evaluation and tests all call `build`; none of
them needs files, data or TensorFlow for it.
"""

from collections.abc import Callable
import dataclasses
import math
import os
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from jepa_jax import config as config_lib
from jepa_jax import objectives
from jepa_jax.models.kernels import cpu
from jepa_jax.training import optimizer, sharding


class TrainState(flax.struct.PyTreeNode):
  """Everything that a step changes, and all that a checkpoint holds.

  Attributes:
    step: int32 scalar, steps done.
    params: network -> parameters that are optimised, float32.
    target_params: the moving average of a part of params, float32.
    opt_state: of the optimizer.
    frozen: network -> parameters that never change.
    buffers: the objective's state without gradient.
  """

  step: jax.Array
  params: Any
  target_params: Any
  opt_state: optax.OptState
  frozen: Any = flax.struct.field(default_factory=dict)
  buffers: Any = flax.struct.field(default_factory=dict)

  def network(self, name: str) -> Any:
    """Parameters of a network as it is evaluated: averaged, if it is."""
    for networks in (self.target_params, self.params, self.frozen):
      if name in networks:
        return networks[name]
    raise ValueError(f'the state has no network "{name}".')


@dataclasses.dataclass(frozen=True)
class Program:
  """Pure functions of one experiment on one mesh.

  Attributes:
    config: what it was built from.
    mesh: where it runs.
    objective: see jepa_jax.objectives.
    schedules: learning rate, weight decay and momentum of every step.
    total_steps: of the whole run.
    batch_spec: name -> shape, type and sharding of a global batch.
    state_spec: the same for the state.
    init: seed -> TrainState, laid out on the mesh.
    step: (state, batch) -> (state, metrics, features); state is donated.
      Metrics are float32 scalars; features [B, D], or None where the objective
      has none, are for collapse metrics.
  """

  config: ml_collections.FrozenConfigDict
  mesh: Mesh
  objective: objectives.Objective
  schedules: optimizer.Schedules
  total_steps: int
  batch_spec: dict[str, jax.ShapeDtypeStruct]
  state_spec: TrainState
  init: Callable[[int], TrainState]
  step: Callable[..., tuple[TrainState, dict[str, jax.Array], jax.Array]]


def build(config: ml_collections.ConfigDict, mesh: Mesh) -> Program:
  """Makes the program of a config on a mesh.

  Args:
    config: see jepa_jax.config; epochs need data.num_examples.
    mesh: see sharding.make_mesh.

  Returns:
    The Program. Nothing is compiled yet.

  Raises:
    ValueError: the config is wrong, or the mesh does not divide the batch.
  """
  config_lib.check(config)
  config = ml_collections.FrozenConfigDict(config)
  _check_mesh(config, mesh)
  objective = objectives.load(config.objective).from_config(
    config, sharding.make_kernels(config.compute, mesh)
  )
  if objective.whole_batch and config.accumulate_steps > 1:
    raise ValueError(
      f"accumulate_steps is {config.accumulate_steps} and the loss of "
      f'objective "{config.objective}" is a statistic of the whole batch; make '
      "it 1, and save memory by compute.remat."
    )
  schedules = optimizer.make_schedules(config)
  tx = optimizer.make_optimizer(
    config, schedules, objective.learning_rate_scale
  )

  def init(rng: jax.Array) -> TrainState:
    networks = objective.init(rng)
    frozen = {name: networks.pop(name) for name in objective.frozen}
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=networks,
      # A copy: the step is given both to overwrite.
      target_params=jax.tree.map(jnp.copy, objective.averaged(networks)),
      opt_state=tx.init(networks),
      frozen=frozen,
      buffers=objective.buffers(),
    )

  state_shapes = jax.eval_shape(init, jax.random.key(0))
  params, opt_state = state_shapes.params, state_shapes.opt_state
  jax.eval_shape(tx.update, params, opt_state, params)  # finds what is wrong
  shardings = sharding.state_shardings(state_shapes, mesh, config.sharding)
  replicated = sharding.replicated(mesh)
  split = sharding.batch_sharding(mesh)
  jit_init = jax.jit(init, out_shardings=shardings)
  step = jax.jit(
    _make_step(config, objective, schedules, tx, shardings, mesh),
    in_shardings=(shardings, split),
    out_shardings=(shardings, replicated, split),
    donate_argnums=0,
  )
  with_sharding = lambda s, place: jax.ShapeDtypeStruct(
    s.shape, s.dtype, sharding=place
  )
  return Program(
    config=config,
    mesh=mesh,
    objective=objective,
    schedules=schedules,
    total_steps=len(schedules.lr),
    batch_spec={
      name: with_sharding(s, split)
      for name, s in objective.batch_spec(config.batch_size).items()
    },
    state_spec=jax.tree.map(with_sharding, state_shapes, shardings),
    init=lambda seed: jit_init(jax.random.key(seed)),
    step=step,
  )


def _check_mesh(config: Any, mesh: Mesh) -> None:
  """Raises a ValueError where these devices cannot do what config says."""
  slices = config.accumulate_steps
  if config.batch_size // slices % mesh.size:
    raise ValueError(
      f"batch_size {config.batch_size} in {slices} microbatches "
      f"is not a multiple of {mesh.size} devices; nearest batch sizes: "
      f"{_nearest_multiples(config.batch_size, mesh.size * slices)}."
    )
  platform = mesh.devices.flat[0].platform
  if config.compute.attention == "cudnn" and platform not in ("gpu", "cuda"):
    raise ValueError(
      f'compute.attention is "cudnn" on a {platform}; it needs an NVIDIA GPU: '
      'make it "xla".'
    )


def _make_gradients(
  config: ml_collections.FrozenConfigDict,
  objective: objectives.Objective,
  shardings: TrainState,
  mesh: Mesh,
) -> Callable[..., Any]:
  """(state, batch, rng) -> gradients of Loss.total, and the Loss."""

  def gradients(params, target_params, batch, rng, buffers):
    """Gradients and Loss of a microbatch."""
    targets = jax.lax.stop_gradient(
      objective.targets(target_params, batch, buffers)
    )
    if mesh.devices.flat[0].platform == "cpu":
      batch = cpu.after(batch, targets)

    def total(params):
      loss = objective.loss(params, targets, batch, rng, buffers)
      return loss.total, loss

    grads, loss = jax.grad(total, has_aux=True)(params)
    # Scattered as they are made, in the type that they are made in.
    return jax.lax.with_sharding_constraint(grads, shardings.params), loss

  def accumulated(state, batch, rng):
    """The same of a batch, microbatch by microbatch."""
    params, averaged, frozen = (
      sharding.compute_params(tree, places, config.compute.dtype, mesh)
      for tree, places in (
        (state.params, shardings.params),
        (state.target_params, shardings.target_params),
        (state.frozen, shardings.frozen),
      )
    )
    networks = frozen | averaged
    slices = config.accumulate_steps
    if slices == 1:
      return gradients(params, networks, batch, rng, state.buffers)

    def add(grads, xs):
      part, rng = xs
      new, loss = gradients(params, networks, part, rng, state.buffers)
      return jax.tree.map(jnp.add, grads, new), loss

    grads, losses = jax.lax.scan(
      add,
      jax.tree.map(jnp.zeros_like, state.params),
      (_cut(batch, slices), jax.random.split(rng, slices)),
    )
    return grads, _join(losses)

  return accumulated


def _make_step(
  config: ml_collections.FrozenConfigDict,
  objective: objectives.Objective,
  schedules: optimizer.Schedules,
  tx: optax.GradientTransformation,
  shardings: TrainState,
  mesh: Mesh,
) -> Callable[..., Any]:
  """The train step as a plain function, before jit."""

  gradients = _make_gradients(config, objective, shardings, mesh)

  def step(state, batch):
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    grads, loss = gradients(state, batch, rng)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
    # Of sums over the batch, so that on a CPU no array of squares is written.
    norms = {"grad_norm": optax.tree.norm(grads)} | {
      f"grad_norm/{name}": optax.tree.norm(part) for name, part in grads.items()
    }
    grads = jax.tree.map(lambda g: g / loss.weight, grads)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    momentum = optimizer.lookup(schedules.momentum, state.step)
    target_params = jax.tree.map(
      lambda target, new: momentum * target + (1.0 - momentum) * new,
      state.target_params,
      objective.averaged(params),
    )
    metrics = {
      "loss": loss.total / loss.weight,
      "learning_rate": optimizer.lookup(schedules.lr, state.step),
      "weight_decay": optimizer.lookup(schedules.weight_decay, state.step),
      **({"momentum": momentum} if target_params else {}),
      **{name: norm / loss.weight for name, norm in norms.items()},
      **loss.metrics,
    }
    new_state = state.replace(
      step=state.step + 1,
      params=params,
      target_params=target_params,
      opt_state=opt_state,
      buffers=state.buffers if loss.buffers is None else loss.buffers,
    )
    return new_state, metrics, loss.features

  return step


def _cut(batch: dict[str, jax.Array], count: int) -> dict[str, jax.Array]:
  """[B, ...] -> [microbatches, images of one, ...] of every array.

  Every device keeps its own images: they are cut inside its share.
  """
  cut = lambda x: jnp.moveaxis(
    x.reshape(x.shape[0] // count, count, *x.shape[1:]), 1, 0
  )
  return jax.tree.map(cut, batch)


def _join(losses: objectives.Loss) -> objectives.Loss:
  """The loss of a batch from those of its microbatches, stacked in front."""
  mean = lambda tree: jax.tree.map(lambda x: x.mean(axis=0), tree)
  return objectives.Loss(
    total=losses.total.sum(),
    weight=losses.weight.sum(),
    metrics=mean(losses.metrics),
    features=jax.tree.map(
      lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, x.shape[-1]), losses.features
    ),
    buffers=mean(losses.buffers),
  )


def check_memory(program: Program) -> None:
  """Finds out from shapes alone whether a device can hold the state.

  Raises:
    ValueError: state and batch are larger than a device's memory.
  """
  device = program.mesh.local_devices[0]  # others' cannot be asked
  stats = device.memory_stats() or {}
  memory = stats.get("bytes_limit", 0)
  if device.platform == "cpu" and hasattr(os, "sysconf"):
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory //= jax.local_device_count()
  needed = sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves((program.state_spec, program.batch_spec))
  )
  if memory and needed > memory:
    raise ValueError(
      f"state and batch are {needed / 2**30:,.1f} GiB a device, and a "
      f"{device.device_kind} has {memory / 2**30:,.1f}; make encoder, "
      "predictor or batch_size smaller, or split them by mesh.fsdp."
    )


def _nearest_multiples(batch_size: int, unit: int) -> str:
  below = batch_size // unit * unit
  return ", ".join(str(n) for n in (below, below + unit) if n)
