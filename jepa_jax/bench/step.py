"""Speed of the train step on whatever devices there are."""

import os
import resource
import statistics
import time
from typing import Any

import numpy as np

from jepa_jax import bench

_EPOCH = 1_281_167  # images, where a config counts epochs of unknown size


def measure(
  config: Any, *, rounds: int = 5, steps: int = 4, profile: str = ""
) -> list[bench.Row]:
  """Speed of the train step of a config, on all devices.

  Args:
    config: see jepa_jax.config.
    rounds: how often to time; between rounds the devices' peak is measured.
    steps: timed a round, without waiting for each.
    profile: folder for a trace of `steps` more steps; "" for none.

  Returns:
    One row. "model_flops_per_step" is what Objective.flops says the step needs
    at least; "utilisation" its share of the peak, that is of the best speed of
    square matrix products in the config's type on the same devices.
  """
  import jax

  from jepa_jax.training import program as program_lib
  from jepa_jax.training import sharding

  config = with_epoch(config)
  program = program_lib.build(config, sharding.make_mesh(config.mesh))
  state = program.init(config.seed)
  batch = synthetic_batch(program.batch_spec)
  began = time.perf_counter()
  compiled = program.step.lower(state, batch).compile()
  compile_seconds = time.perf_counter() - began

  def run(state: Any) -> Any:
    for _ in range(steps):
      state, metrics, _ = compiled(state, batch)
    return jax.block_until_ready((state, metrics))[0]

  peak = _MatrixPeak(program.mesh, config.compute.dtype)
  state = run(state)  # warm
  seconds, faults = [], 0
  for _ in range(rounds):
    peak.measure()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    began = time.perf_counter()
    state = run(state)
    seconds.append((time.perf_counter() - began) / steps)
    faults += resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
  if profile:
    with jax.profiler.trace(profile):
      state = run(state)
  median = statistics.median(seconds)
  needed = program.objective.flops()
  needed = needed and needed * config.batch_size
  device = program.mesh.devices.flat[0]
  row = {
    "device": device.device_kind,
    "devices": program.mesh.size,
    "dtype": config.compute.dtype,
    "batch_size": config.batch_size,
    "compile_seconds": compile_seconds,
    "step_seconds": median,
    "step_seconds_min": min(seconds),
    "step_seconds_max": max(seconds),
    "images_per_second": config.batch_size / median,
    "images_per_second_per_device": (
      config.batch_size / median / program.mesh.size
    ),
    "minor_faults_per_step": faults / (rounds * steps),
    "model_flops_per_step": needed,
    "peak_flops_per_second": peak.best(),
    "utilisation": needed and needed / median / peak.best(),
    "steps": rounds * steps,
  }
  if device.platform == "cpu" and hasattr(os, "sched_getaffinity"):
    row["cores"] = len(os.sched_getaffinity(0))
  return [row]


def with_epoch(config: Any) -> Any:
  """A copy of a config that knows some size of an epoch."""
  from jepa_jax import config as config_lib

  config = config.copy_and_resolve_references()
  if config_lib.needs_num_examples(config):
    with config.unlocked():
      config.data.num_examples = _EPOCH  # sets the schedules' length alone
  return config


def host_batch(spec: dict[str, Any]) -> dict[str, np.ndarray]:
  """This process's share of a batch of Program.batch_spec.

  Bytes are random, floats normal, validities true; integers count along the
  last axis, so that they are legal patch ids.
  """
  import jax

  rng = np.random.default_rng(0)

  def values(s: Any) -> np.ndarray:
    if s.dtype == np.uint8:
      return rng.integers(0, 256, s.shape, np.uint8)
    if s.dtype == np.bool_:
      return np.ones(s.shape, bool)
    if np.issubdtype(s.dtype, np.integer):
      last = s.shape[-1] if len(s.shape) > 1 else 1
      count = np.arange(last, dtype=s.dtype)
      return np.broadcast_to(count, s.shape)
    return rng.normal(size=s.shape).astype(s.dtype)

  share = lambda s: jax.ShapeDtypeStruct(
    (s.shape[0] // jax.process_count(), *s.shape[1:]), s.dtype
  )
  return {name: values(share(s)) for name, s in spec.items()}


def synthetic_batch(spec: dict[str, Any]) -> dict[str, Any]:
  """As host_batch, laid out on the devices."""
  import jax

  return {
    name: jax.make_array_from_process_local_data(
      spec[name].sharding, values, spec[name].shape
    )
    for name, values in host_batch(spec).items()
  }


class _MatrixPeak:
  """The best speed of matrix products, one on every device at once."""

  def __init__(self, mesh: Any, dtype: str):
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    on_cpu = mesh.devices.flat[0].platform == "cpu"
    sizes = (768, 1536) if on_cpu else (4096, 8192)
    chain = 2 if on_cpu else 16  # hides the dispatch
    # Rows split, columns whole: a plain product a device, and no traffic.
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    whole = NamedSharding(mesh, PartitionSpec())
    self._turns = []
    self._seconds: list[list[float]] = []
    for size in sizes:

      @jax.jit
      def products(x, y):
        for _ in range(chain):
          x = x @ y
        return x

      # Random: GPUs clock higher on constants. Scaled, so that nothing grows.
      host = np.random.default_rng(0).normal(size=(size, size))
      host = (host / np.sqrt(size)).astype(jnp.dtype(dtype))
      x = jax.device_put(np.tile(host, (mesh.size, 1)), rows)
      y = jax.device_put(host, whole)
      jax.block_until_ready(products(x, y))
      work = 2 * size**3 * chain * mesh.size
      self._turns.append((work, products, x, y))
      self._seconds.append([])

  def measure(self) -> None:
    """Adds a round."""
    import jax

    for seconds, (_, products, x, y) in zip(self._seconds, self._turns):
      began = time.perf_counter()
      jax.block_until_ready(products(x, y))
      seconds.append(time.perf_counter() - began)

  def best(self) -> float:
    """Operations a second: of the best size, the median round."""
    return max(
      work / statistics.median(seconds)
      for seconds, (work, *_) in zip(self._seconds, self._turns)
    )
