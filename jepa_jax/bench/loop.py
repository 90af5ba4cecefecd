"""What the train loop costs beside its steps."""

from collections.abc import Callable
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from jepa_jax import bench
from jepa_jax.bench import step as step_lib


def measure(config: Any, *, rounds: int = 5, steps: int = 0) -> list[bench.Row]:
  """Speed of the train loop and of its bare steps, in turns.

  The loop is the command's own: it takes batches from a thread that puts them
  on the devices, collects metrics, writes a row every `log_every` and looks for
  signals. The data are one batch on the host, over and over, so that they are
  not the limit. The bare step gets one batch that lies on the devices already.

  Args:
    config: see jepa_jax.config.
    rounds: how often to time each.
    steps: timed a round; 0 for as many as a row of the log takes.

  Returns:
    One row. "loop_share" is the loop's images a second over the bare step's;
    "loop_share_of_cpu" is the same of CPU time, for machines that are not
    quiet.
  """
  import jax

  from jepa_jax import config as config_lib
  from jepa_jax.evaluation import collapse
  from jepa_jax.training import distributed, feed, log, sharding
  from jepa_jax.training import loop as loop_lib
  from jepa_jax.training import program as program_lib

  config = step_lib.with_epoch(config)
  steps = steps or max(1, config_lib.steps(config, "log_every"))
  program = program_lib.build(config, sharding.make_mesh(config.mesh))
  host = step_lib.host_batch(program.batch_spec)
  on_device = step_lib.synthetic_batch(program.batch_spec)

  with (
    tempfile.TemporaryDirectory() as folder,
    distributed.Stopper() as stopper,
    log.Log(
      pathlib.Path(folder), start=0, total=program.total_steps, quiet=True
    ) as rows,
    feed.Feed(_forever(host), program.batch_spec, config.data.prefetch) as fed,
  ):
    loop = loop_lib.Loop(
      program,
      program.init(config.seed),
      fed,
      rows,
      stopper,
      0,
      watch=collapse.collapse_metrics,
    )

    def bare() -> None:
      for _ in range(steps):
        loop.state, metrics, _ = program.step(loop.state, on_device)
      jax.block_until_ready((loop.state, metrics))

    def whole() -> None:
      loop.meter.pause()
      loop.advance(loop.step + steps)
      jax.block_until_ready(loop.state)

    seconds, cpu_seconds = _both_times({"bare": bare, "loop": whole}, rounds)
    if stopper.stopped:
      raise ValueError("stopped by a signal; nothing was measured.")
  row = {
    "device": program.mesh.devices.flat[0].device_kind,
    "devices": program.mesh.size,
    "batch_size": config.batch_size,
    "steps": rounds * steps,
    "rows_written": rounds * steps // config_lib.steps(config, "log_every"),
  }
  for name in ("bare", "loop"):
    row[f"{name}_step_seconds"] = seconds[name] / steps
    row[f"{name}_cpu_seconds_per_step"] = cpu_seconds[name] / steps
    row[f"{name}_images_per_second"] = config.batch_size * steps / seconds[name]
  row["loop_share"] = seconds["bare"] / seconds["loop"]
  row["loop_share_of_cpu"] = cpu_seconds["bare"] / cpu_seconds["loop"]
  return [row]


def _both_times(
  work: dict[str, Callable[[], None]], rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
  """Median seconds, and of CPU time, of each work, done in turns."""
  cpu: dict[str, list[float]] = {name: [] for name in work}

  def timed(name: str) -> float:
    began, cpu_began = time.perf_counter(), time.process_time()
    work[name]()
    cpu[name].append(time.process_time() - cpu_began)
    return time.perf_counter() - began

  seconds = bench.in_turns({n: lambda n=n: timed(n) for n in work}, rounds)
  # The first of each is in_turns' untimed one.
  return seconds, {name: float(np.median(x[1:])) for name, x in cpu.items()}


def _forever(batch: dict[str, Any]) -> Any:
  while True:
    yield batch
