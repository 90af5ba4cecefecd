"""The mesh, and where each array of the state lies on it."""

from collections.abc import Callable
import dataclasses
import functools
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ml_collections

from jepa_jax import models
from jepa_jax.models.kernels import cpu, gpu, tpu, xla

# Axes that split the batch; "fsdp" splits parameters too.
BATCH_AXES = ("data", "fsdp")


def make_mesh(
  axes: ml_collections.ConfigDict, devices: list[Any] | None = None
) -> Mesh:
  """A named mesh over all devices.

  Args:
    axes: axis -> size; one may be -1 and takes what is left.
    devices: what to lay out; None for all there are.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = {name: int(axes[name]) for name in BATCH_AXES}
  fixed = math.prod(size for size in sizes.values() if size != -1)
  free = [name for name, size in sizes.items() if size == -1]
  if len(free) == 1 and len(devices) % fixed == 0:
    sizes[free[0]] = len(devices) // fixed
  if math.prod(sizes.values()) != len(devices):
    asked = ", ".join(f"mesh.{name}={axes[name]}" for name in BATCH_AXES)
    raise ValueError(
      f"{asked} does not fit {len(devices)} devices; make the product "
      f"{len(devices)}, or one of them -1."
    )
  shape, names = tuple(sizes.values()), tuple(sizes)
  types = (jax.sharding.AxisType.Auto,) * len(sizes)
  try:
    return jax.make_mesh(shape, names, types, devices=devices)
  except NotImplementedError:
    # An axis that no axes of the slice's torus make up, as 8 on a 4x4x4.
    placed = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
    return Mesh(placed, names, axis_types=types)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis split over all batch axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def make_kernels(
  compute: ml_collections.ConfigDict, mesh: Mesh
) -> models.Kernels:
  """How networks compute on a mesh.

  Weights are gathered kernel by kernel, before their use and once more for the
  backward pass; activations stay split by image, and each device's attention
  sees its own images alone. Left alone, the partitioner may split activations
  like the weights that they meet, and copy whole batches to every device. A
  mesh of one device needs none of it.

  Args:
    compute: config.compute.
    mesh: see make_mesh.

  Returns:
    The same object for equal arguments.
  """
  return _make_kernels(compute.attention, mesh)


@functools.cache
def _make_kernels(attention: str, mesh: Mesh) -> models.Kernels:
  platform = mesh.devices.flat[0].platform
  kernels = cpu.KERNELS if platform == "cpu" else xla.KERNELS
  anywhere = kernels.attention
  if attention == "cudnn":
    kernels = dataclasses.replace(kernels, attention=gpu.attention)
  if attention == "pallas" and platform == "tpu":
    kernels = dataclasses.replace(kernels, attention=tpu.attention)
  if mesh.size == 1:
    return kernels
  dense, attention_of = kernels.dense, kernels.attention
  split = batch_sharding(mesh)
  if attention != "cudnn":  # which the partitioner knows how to split
    attention_of = jax.shard_map(
      attention_of,
      mesh=mesh,
      in_specs=split.spec,
      out_specs=split.spec,
      check_vma=False,  # kernels do not say over which axes they vary
    )
  # The one image that a network is initialised with is not split.
  fits = lambda x: x.shape[0] % mesh.size == 0

  # A gathered kernel that is kept for the backward pass would fill the memory
  # that splitting it saved: it is gathered once more.
  @jax.checkpoint
  def dense_of_gathered(x, kernel, bias):
    return dense(x, gather(mesh)(kernel), bias)

  return dataclasses.replace(
    kernels,
    dense=dense if mesh.shape["fsdp"] == 1 else dense_of_gathered,
    attention=lambda qkv, valid, query: (
      attention_of if fits(qkv) else anywhere
    )(qkv, valid, query),
    constrain=lambda x: (
      jax.lax.with_sharding_constraint(x, split) if fits(x) else x
    ),
  )


def gather(mesh: Mesh) -> Callable[[Any], Any]:
  """A function that copies split arrays of a tree to every device.

  Its backward pass says nothing of the gradient's place, so that a gradient
  goes straight to where it is wanted: scattered while it is added up.
  """
  copy = lambda x: jax.lax.with_sharding_constraint(x, replicated(mesh))
  gathered = jax.custom_vjp(copy)
  gathered.defvjp(lambda x: (copy(x), None), lambda _, gradient: (gradient,))
  return lambda tree: jax.tree.map(gathered, tree)


def compute_params(params: Any, shardings: Any, dtype: Any, mesh: Mesh) -> Any:
  """Parameters as the networks get them.

  Kernels come in the type of the computation, cast where they lie, so that
  half the bytes travel. Blocks stay split until they are used; the few others
  are gathered.

  Args:
    params: float32, laid out by shardings.
    shardings: tree like params.
    dtype: of the computation.
    mesh: of the shardings.
  """
  if mesh.size == 1:
    return params

  def place(path: tuple[Any, ...], leaf: jax.Array, sharding: Any) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("kernel"):
      leaf = jax.lax.with_sharding_constraint(leaf.astype(dtype), sharding)
    return leaf if "blocks" in name else gather(mesh)(leaf)

  return jax.tree_util.tree_map_with_path(place, params, shardings)


def state_shardings(
  state: Any, mesh: Mesh, rules: tuple[tuple[str, str], ...]
) -> Any:
  """A sharding for every leaf of a state.

  Args:
    state: tree of arrays or shapes.
    mesh: as of make_mesh.
    rules: config.sharding; the first whose pattern is found in a leaf's path
      holds. "split" cuts the rows of a matrix over the axis fsdp, or its
      columns where that divides those alone: a TPU gathers columns slowly
      unless each share is a multiple of 128. "replicate" copies.

  Returns:
    Tree of NamedSharding.
  """

  def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    rule = next(
      (rule for pattern, rule in rules if re.search(pattern, name)), None
    )
    if rule is None:
      raise ValueError(
        f'no rule of config.sharding matches "{name}"; end them with '
        '(".*", "split") or (".*", "replicate").'
      )
    spec: list[str | None] = [None] * leaf.ndim
    parts = mesh.shape["fsdp"]
    if rule == "split" and parts > 1:
      axes = range("blocks" in name, leaf.ndim)[-2:]
      fits = [axis for axis in axes if leaf.shape[axis] % parts == 0]
      if fits:
        spec[fits[0]] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(place, state)
