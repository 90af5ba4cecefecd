"""The program: a config and a mesh, made into pure functions.

Training, planning, benchmarks, evaluation and tests all call `build`; none of
them needs files, data or TensorFlow for it.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from jepa_jax import config as config_lib
from jepa_jax import objectives
from jepa_jax.training import optimizer, sharding


class TrainState(flax.struct.PyTreeNode):
  """Everything that a step changes, and all that a checkpoint holds.

  Attributes:
    step: int32 scalar, steps done.
    params: network -> parameters, float32.
    target_params: the moving average of the tracked part of params, float32.
    opt_state: of the optimizer.
  """

  step: jax.Array
  params: Any
  target_params: Any
  opt_state: optax.OptState


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
      Metrics are float32 scalars; features [B, D] are for collapse metrics.
  """

  config: ml_collections.FrozenConfigDict
  mesh: Mesh
  objective: Any
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
  slices = config.accumulate_steps * config.compute.parts
  if config.batch_size // slices % mesh.size:
    raise ValueError(
      f"batch_size {config.batch_size} in {slices} slices "
      f"is not a multiple of {mesh.size} devices; nearest batch sizes: "
      f"{_nearest_multiples(config.batch_size, mesh.size * slices)}."
    )
  platform = mesh.devices.flat[0].platform
  if config.compute.attention == "cudnn" and platform not in ("gpu", "cuda"):
    raise ValueError(
      f'compute.attention is "cudnn" on a {platform}; it needs an NVIDIA GPU: '
      'make it "own" or "xla".'
    )
  objective = objectives.load(config.objective).from_config(config)
  schedules = optimizer.make_schedules(config)
  tx = optimizer.make_optimizer(config, schedules)

  def init(rng: jax.Array) -> TrainState:
    params = objective.init(rng)
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      # A copy: the step is given both to overwrite.
      target_params=jax.tree.map(jnp.copy, objective.tracked(params)),
      opt_state=tx.init(params),
    )

  state_shapes = jax.eval_shape(init, jax.random.key(0))
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


def _make_step(
  config: ml_collections.FrozenConfigDict,
  objective: Any,
  schedules: optimizer.Schedules,
  tx: optax.GradientTransformation,
  shardings: TrainState,
  mesh: Mesh,
) -> Callable[..., Any]:
  """The train step as a plain function, before jit."""

  def total_and_rest(params, target_params, batch, rng):
    with sharding.network_layout(mesh):
      loss = objective.loss(params, target_params, batch, rng)
    return loss.total, loss

  def part_gradients(params, target_params, batch, rng):
    grad = jax.grad(total_and_rest, has_aux=True)
    grads, loss = grad(params, target_params, batch, rng)
    # Scattered as they are made, in the type that they are made in.
    return jax.lax.with_sharding_constraint(grads, shardings.params), loss

  def gradients(params, target_params, batch, rng):
    parts = config.compute.parts
    if parts == 1:
      return part_gradients(params, target_params, batch, rng)
    # Not a loop: XLA's CPU works on whatever is ready.
    cut = (_cut(batch, parts), jax.random.split(rng, parts))
    done = [
      part_gradients(
        params, target_params, *jax.tree.map(lambda x, i=i: x[i], cut)
      )
      for i in range(parts)
    ]
    grads, losses = zip(*done)
    add = lambda *grads: sum(g.astype(jnp.float32) for g in grads)
    stack = lambda *losses: jnp.stack(losses)
    return jax.tree.map(add, *grads), _join(jax.tree.map(stack, *losses))

  def accumulated_gradients(state, batch, rng):
    slices = config.accumulate_steps
    params, target_params = (
      sharding.compute_params(tree, places, config.compute.dtype, mesh)
      for tree, places in (
        (state.params, shardings.params),
        (state.target_params, shardings.target_params),
      )
    )
    if slices == 1:
      return gradients(params, target_params, batch, rng)

    def add(grads, xs):
      part, rng = xs
      new, loss = gradients(params, target_params, part, rng)
      return jax.tree.map(jnp.add, grads, new), loss

    grads, losses = jax.lax.scan(
      add,
      jax.tree.map(jnp.zeros_like, state.params),
      (_cut(batch, slices), jax.random.split(rng, slices)),
    )
    return grads, _join(losses)

  def step(state, batch):
    rng = jax.random.fold_in(jax.random.key(config.seed), state.step)
    grads, loss = accumulated_gradients(state, batch, rng)
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
      objective.tracked(params),
    )
    metrics = {
      "loss": loss.total / loss.weight,
      "learning_rate": optimizer.lookup(schedules.lr, state.step),
      "weight_decay": optimizer.lookup(schedules.weight_decay, state.step),
      "momentum": momentum,
      **{name: norm / loss.weight for name, norm in norms.items()},
      **loss.metrics,
    }
    new_state = TrainState(
      step=state.step + 1,
      params=params,
      target_params=target_params,
      opt_state=opt_state,
    )
    return new_state, metrics, loss.features

  return step


def _cut(batch: dict[str, jax.Array], slices: int) -> dict[str, jax.Array]:
  """[B, ...] -> [slices, B / slices, ...] of every array.

  Every device keeps its own images: slices are cut inside its share.
  """
  cut = lambda x: jnp.moveaxis(
    x.reshape(x.shape[0] // slices, slices, *x.shape[1:]), 1, 0
  )
  return jax.tree.map(cut, batch)


def _join(losses: objectives.Loss) -> objectives.Loss:
  """The loss of a batch from those of its slices, stacked in front."""
  return objectives.Loss(
    total=losses.total.sum(),
    weight=losses.weight.sum(),
    metrics=jax.tree.map(lambda x: x.mean(axis=0), losses.metrics),
    features=jnp.moveaxis(losses.features, 0, 1).reshape(
      -1, losses.features.shape[-1]
    ),
  )


def _nearest_multiples(batch_size: int, unit: int) -> str:
  below = batch_size // unit * unit
  return ", ".join(str(n) for n in (below, below + unit) if n)
