"""Evaluates a checkpoint of a run and writes the run's report.

    python -m jepa_jax.evaluate --workdir DIR [--step N] [--only NAME,...]

The config is the run's own. The encoder evaluated is the target encoder, its
patches averaged, beside the same architecture with random parameters and the
raw pixels, under the same probes.
"""

import argparse
import sys

from jepa_jax import command, paths
from jepa_jax.training import distributed


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  import jax

  from jepa_jax import config as config_lib
  from jepa_jax.evaluation import run as evaluation
  from jepa_jax.training import checkpoints as checkpoints_lib
  from jepa_jax.training import compile_cache, sharding
  from jepa_jax.training import program as program_lib

  workdir = paths.local(arguments.workdir, "--workdir")
  path = workdir / "config.json"
  if not path.exists():
    raise ValueError(f"{workdir} holds no run: there is no {path}.")
  if arguments.report_only:
    from jepa_jax.evaluation import report as report_lib

    print(f"report: {report_lib.write(workdir)}")
    return 0
  with distributed.first_process_first("data"):
    config = evaluation.resolve(config_lib.read(path))
    evaluation.check(config)
    evaluation.check_data(config)
  compile_cache.use(config.compute.cache)
  program = program_lib.build(config, sharding.make_mesh(config.mesh))
  with checkpoints_lib.Checkpoints(workdir / "checkpoints") as checkpoints:
    state = checkpoints.restore(program.state_spec, arguments.step)
  if state is None:
    raise ValueError(f"{workdir} holds no checkpoint yet.")
  names = arguments.only.split(",") if arguments.only else None
  if not jax.process_index():
    print(f"evaluating step {int(state.step)}", file=sys.stderr)
  rows = evaluation.evaluate(program, state, names)
  evaluation.report(program, state, rows, workdir)
  distributed.barrier("evaluated")
  return 0


if __name__ == "__main__":
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  flags.add_argument("--workdir", required=True, help="folder of the run")
  distributed.add_flags(flags)
  flags.add_argument(
    "--step", type=int, help="step of the checkpoint; the newest by default"
  )
  flags.add_argument(
    "--only",
    default="",
    help="names of evaluations, with commas; all by default",
  )
  flags.add_argument(
    "--report_only",
    action="store_true",
    help="evaluate nothing, write the page from what is there",
  )
  command.run(main, flags, tune_allocator=True)
