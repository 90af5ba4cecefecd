"""The mesh, and where each array of the state lies on it."""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import ml_collections

# Axes that split the batch; "fsdp" splits parameters too.
BATCH_AXES = ("data", "fsdp")

# (pattern of the parameter's path, rule), first match wins. "split" cuts the
# largest axis that the fsdp axis divides, layers last; "replicate" copies.
RULES = (
  (r"(bias|scale|mask_token|count|step)$", "replicate"),
  (r".*", "split"),
)


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
  return jax.make_mesh(
    tuple(sizes.values()),
    tuple(sizes),
    devices=devices,
    axis_types=(jax.sharding.AxisType.Auto,) * len(sizes),
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Leading axis split over all batch axes."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def state_shardings(state: Any, mesh: Mesh) -> Any:
  """A sharding for every leaf of a state, by RULES.

  Args:
    state: tree of arrays or shapes.
    mesh: as of make_mesh.

  Returns:
    Tree of NamedSharding.
  """

  def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    rule = next(rule for pattern, rule in RULES if re.search(pattern, name))
    spec: list[str | None] = [None] * leaf.ndim
    parts = mesh.shape["fsdp"]
    if rule == "split" and parts > 1:
      fits = [
        axis
        for axis in range(1 if "blocks" in name else 0, leaf.ndim)
        if leaf.shape[axis] % parts == 0
      ]
      if fits:
        spec[max(fits, key=lambda axis: leaf.shape[axis])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))

  return jax.tree_util.tree_map_with_path(place, state)
