"""Training features where probes compute with them: on the devices.

Features stand on the host once. Nothing here copies all of them there: they are
standardised and sent a chunk at a time.

Axes: n training images, B others, D features, S devices.
"""

from collections.abc import Iterator
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from jepa_jax.evaluation import features as features_lib

CHUNK = 2**22  # numbers that are standardised at a time
SHARE = 1 / 3  # of a device's memory, up to which one of them holds all


class Bank:
  """Standardised training features, on one device or split over all.

  Args:
    features: [n, D] on the host, the same in all processes.
    unit: whether rows are scaled to length 1.

  Attributes:
    rows: float32 [n', D], n' >= n: rows of zeros follow. Split over all devices
      where one cannot hold them beside what a probe computes.
    count: n.
    shards: S.
  """

  def __init__(self, features: np.ndarray, *, unit: bool = False):
    self.count, self.width = features.shape
    self._unit = unit
    self._mean, self._scale = features_lib.statistics(features)
    devices = _devices(self.count * self.width * 4)
    self.shards = len(devices)
    share = math.ceil(self.count / self.shards)  # rows of a device
    size = math.ceil(share / math.ceil(share * self.width / CHUNK))
    share = math.ceil(share / size) * size  # whole chunks
    mesh = jax.sharding.Mesh(np.asarray(devices), ("images",))
    self._split = NamedSharding(mesh, PartitionSpec("images"))
    self._everywhere = NamedSharding(mesh, PartitionSpec())
    shape = (share * self.shards, self.width)
    parts = []
    for device, index in self._split.addressable_devices_indices_map(
      shape
    ).items():
      start = index[0].start or 0
      parts.append(self._fill(features, start, share, size, device))
    self.rows = jax.make_array_from_single_device_arrays(
      shape, self._split, parts
    )

  def _fill(self, features, start, share, size, device):
    """Rows [share, D] from `start` on, on a device."""
    part = jnp.zeros((share, self.width), device=device)
    for at in range(0, share, size):
      chunk = self.standardise(features[start + at : start + at + size])
      chunk = np.pad(chunk, ((0, size - len(chunk)), (0, 0)))
      part = _write(part, jax.device_put(chunk, device), at)
    return part

  def standardise(self, features: np.ndarray) -> np.ndarray:
    """Other features [B, D] as these are."""
    values = (features - self._mean) / self._scale
    return unit_rows(values) if self._unit else values

  def chunks(self, features: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Other features as these are, so many rows at a time."""
    for start in range(0, len(features), size):
      yield self.standardise(features[start : start + size])

  def place(self, values: np.ndarray) -> jax.Array:
    """Values [n, ...] beside the rows: [n', ...], followed by zeros."""
    padding = [(0, len(self.rows) - self.count)] + [(0, 0)] * (values.ndim - 1)
    return jax.device_put(np.pad(values, padding), self._split)

  def host(self, values: jax.Array) -> np.ndarray:
    """What was computed, on the host of each process."""
    if not values.is_fully_addressable:
      values = jax.device_put(values, self._everywhere)
    return np.asarray(values)


def unit_rows(features: np.ndarray) -> np.ndarray:
  """Rows of length 1, float32; those of zeros stay."""
  norms = np.linalg.norm(features, axis=1, keepdims=True)
  return np.asarray(features / np.where(norms == 0, 1, norms), np.float32)


def _devices(size: int) -> list[Any]:
  """The devices that hold so many bytes: one, or all of the run."""
  # The limit, not what is free: all processes have to find the same.
  device = jax.local_devices()[0]
  limit = (device.memory_stats() or {}).get("bytes_limit", math.inf)
  return [device] if size <= SHARE * limit else jax.devices()


@functools.partial(jax.jit, donate_argnums=0)
def _write(part, chunk, at):
  return jax.lax.dynamic_update_slice_in_dim(part, chunk, at, 0)
