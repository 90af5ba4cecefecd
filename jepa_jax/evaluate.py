"""Evaluates a checkpoint of a run and writes the run's report.

    python -m jepa_jax.evaluate --workdir DIR [--step N] [--only NAME,...]

The config is the run's own. The encoder evaluated is the target encoder, its
patches averaged, beside the same architecture with random parameters and the
raw pixels, under the same probes.
"""

import argparse
import json
import pathlib
import sys
from typing import Any

from jepa_jax import command
from jepa_jax.training import distributed


def evaluate(
  program: Any, state: Any, names: list[str] | None = None
) -> list[dict[str, Any]]:
  """Runs the evaluations of a config.

  With several processes, each reads and encodes its share, and all of them fit
  the same probes on the same features.

  Args:
    program: training.program.Program.
    state: its TrainState.
    names: which of config.evaluations; None for all.

  Returns:
    A row for every evaluation, protocol, features and encoder; see
    evaluation.probes.probe_table.

  Raises:
    ValueError: an unknown name, or data that cannot be had.
  """
  import functools

  import jax
  import ml_collections
  import numpy as np

  from jepa_jax import config as config_lib
  from jepa_jax.data import pipeline
  from jepa_jax.evaluation import features as features_lib
  from jepa_jax.evaluation import probes
  from jepa_jax.training import sharding

  config = ml_collections.ConfigDict(program.config)
  names = list(config.evaluations) if names is None else names
  for name in names:
    config_lib.choose("evaluation", name, list(config.evaluations))
  batch_size = _batch_size(program)
  extracted: dict[str, Any] = {}  # evaluations of one data set share features
  gather = functools.partial(
    distributed.gather, sharding=sharding.batch_sharding(program.mesh)
  )
  progress = sys.stderr.isatty() and not jax.process_index()

  def read(settings, split, encoder, encode):
    data = config_lib.evaluation_data(config, settings)
    dataset = pipeline.evaluation_dataset(
      data,
      batch_size=batch_size,
      split=split,
      label=settings.label,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    key = json.dumps([data.to_dict(), split])
    if (key, encoder) not in extracted:
      part = features_lib.extract(
        encode,
        dataset,
        gather=gather,
        total=pipeline.num_examples(data, split),
        description=f"{encoder} features of {split}",
        progress=progress,
      )
      extracted[key, encoder] = part["features"]
      extracted[key, settings.label] = part["labels"]
    if (key, settings.label) not in extracted:
      extracted[key, settings.label] = np.concatenate(
        [
          gather(batch["label"])[gather(batch["valid"])]
          for batch in dataset.as_numpy_iterator()
        ]
      )
    return extracted[key, encoder], extracted[key, settings.label]

  rows = []
  width = program.objective.networks["encoder"].width
  for name in names:
    settings = config.evaluations[name]
    sets = {}
    for encoder, encode in _encoders(program, state, settings).items():
      parts = [
        read(settings, split, encoder, encode)
        for split in (settings.train, settings.test)
      ]
      layers = ("pixels",) if encoder == "pixels" else settings.features
      for kind in layers:
        # The last layer's features are the last columns of the last four.
        columns = slice(-width if kind == "last" else None, None)
        sets[encoder, kind] = tuple(
          {"features": features[:, columns], "labels": labels}
          for features, labels in parts
        )
    rows += probes.probe_table(
      name,
      sets,
      protocols=settings.protocols,
      seed=config.seed,
      progress=progress,
    )
  return rows


def resolve(config: Any) -> Any:
  """A copy of a config that knows the size of its data set."""
  from jepa_jax import config as config_lib
  from jepa_jax.data import pipeline

  config = config.copy_and_resolve_references()
  if config_lib.needs_num_examples(config):
    with config.unlocked():
      config.data.num_examples = pipeline.num_examples(config.data)
  return config


def check_data(config: Any) -> None:
  """Raises ValueError if data or labels of an evaluation cannot be had."""
  from jepa_jax import config as config_lib
  from jepa_jax.data import pipeline

  for settings in config.evaluations.values():
    for split in (settings.train, settings.test):
      pipeline.evaluation_dataset(
        config_lib.evaluation_data(config, settings),
        batch_size=1,
        split=split,
        label=settings.label,
      )


def scores(rows: list[dict[str, Any]]) -> dict[str, float]:
  """Rows as metrics of the log: "eval/<name>/<protocol> <features>"."""
  return {
    f"eval/{row['evaluation']}/{row['protocol']} {row['features']}": row["top1"]
    for row in rows
    if row["encoder"] == "trained"
  }


def best(rows: list[dict[str, Any]], config: Any) -> float | None:
  """The score that keeps the best checkpoint, None without evaluations."""
  from jepa_jax import config as config_lib

  named = {
    f"{row['evaluation']}/{row['protocol']}/{row['features']}": row["top1"]
    for row in rows
    if row["encoder"] == "trained"
  }
  if not named:
    return None
  wanted = config.checkpoint.best_metric or next(iter(named))
  config_lib.choose("checkpoint.best_metric", wanted, named)
  return named[wanted]


def report(
  program: Any, state: Any, rows: list[dict[str, Any]], workdir: pathlib.Path
) -> pathlib.Path | None:
  """Writes the results, the pictures and the page; returns the page's path."""
  import jax
  import numpy as np

  from jepa_jax.evaluation import report as report_lib

  arrays = pictures(program, state)
  if jax.process_index():
    return None
  (workdir / "evaluations.json").write_text(json.dumps(rows, indent=2) + "\n")
  np.savez_compressed(workdir / "pictures.npz", **arrays)
  path = report_lib.write(workdir)
  for row in rows:
    print(
      f"{row['evaluation']} {row['protocol']} {row['features']} of "
      f"{row['encoder']}: {row['top1']:.1f}"
    )
  print(f"report: {path}")
  return path


def pictures(program: Any, state: Any, count: int = 8) -> dict[str, Any]:
  """What the report draws: masks, and patch features of held-out images.

  Args:
    program: training.program.Program.
    state: its TrainState.
    count: images a picture.

  Returns:
    Arrays by the names of evaluation.report.
  """
  import functools

  import jax
  import ml_collections
  import numpy as np

  from jepa_jax import config as config_lib
  from jepa_jax import models
  from jepa_jax.data import pipeline
  from jepa_jax.training import sharding

  config = ml_collections.ConfigDict(program.config)
  size = config.data.image_size
  h, w = models.patch_grid(size, size, config.encoder.patch_size)

  def cover(ids, valid):
    grid = np.zeros((*ids.shape[:-1], h * w + 1), bool)
    np.put_along_axis(grid, np.where(valid, ids, h * w), True, axis=-1)
    return grid[..., :-1].reshape(*ids.shape[:-1], h, w)

  arrays = {}
  if "context_ids" in program.batch_spec:
    dataset = pipeline.train_dataset(config, program.batch_spec)
    batch = next(dataset.as_numpy_iterator())
    batch = {name: value[:count] for name, value in batch.items()}
    context = cover(batch["context_ids"], batch["context_valid"])
    arrays["masks_image"] = batch["image"]
    arrays["masks_context"] = context.any(axis=1)
    arrays["masks_targets"] = cover(batch["target_ids"], batch["target_valid"])
  held_out = next(iter(config.evaluations.values()), None)
  data = config_lib.evaluation_data(config, held_out)
  split = held_out.test if held_out else config.data.split
  batch = next(
    pipeline.evaluation_dataset(
      data, batch_size=count, split=split
    ).as_numpy_iterator()
  )
  images = batch["image"][batch["valid"]]
  arrays["features_image"] = images

  @functools.partial(jax.jit, out_shardings=sharding.replicated(program.mesh))
  def patches(params, images):
    images = models.normalize_images(images, config.data.mean, config.data.std)
    x = _encoder(program).apply({"params": params}, images)
    return x.reshape(len(images), h, w, -1).astype("float32")

  trained = state.network("encoder")
  arrays["features"] = np.asarray(patches(trained, images))
  random = program.init(config.seed).network("encoder")
  arrays["features_random"] = np.asarray(patches(random, images))
  return arrays


def _encoder(program: Any) -> Any:
  """The encoder, with attention that any batch on any mesh can have."""
  encoder = program.objective.networks["encoder"]
  return (
    encoder.clone(attention="own") if encoder.attention == "pallas" else encoder
  )


def _batch_size(program: Any) -> int:
  size = program.mesh.size
  return max(1, min(256, program.config.batch_size) // size) * size


def _encoders(program: Any, state: Any, settings: Any) -> dict[str, Any]:
  """Name -> function from uint8 images to features [B, D]."""
  import jax

  from jepa_jax import models
  from jepa_jax.evaluation import features as features_lib
  from jepa_jax.training import sharding

  data = program.config.data
  layers = 4 if "last4" in settings.features else 1
  split = sharding.batch_sharding(program.mesh)

  @jax.jit
  def pooled(params, images):
    images = models.normalize_images(images, data.mean, data.std)
    x = _encoder(program).apply({"params": params}, images, layers=layers)
    return x.astype("float32").mean(axis=1)

  def encode_with(params):
    put = jax.make_array_from_process_local_data
    return lambda images: pooled(params, put(split, images))

  encoders = {"trained": encode_with(state.network("encoder"))}
  if "random" in settings.baselines:
    random = program.init(program.config.seed)
    encoders["random"] = encode_with(random.network("encoder"))
  if "pixels" in settings.baselines:
    encoders["pixels"] = features_lib.raw_pixels
  return encoders


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  import jax

  from jepa_jax import config as config_lib
  from jepa_jax.training import checkpoints as checkpoints_lib
  from jepa_jax.training import program as program_lib
  from jepa_jax.training import sharding

  workdir = pathlib.Path(arguments.workdir)
  path = workdir / "config.json"
  if not path.exists():
    raise ValueError(f"{workdir} holds no run: there is no {path}.")
  if arguments.report_only:
    from jepa_jax.evaluation import report as report_lib

    print(f"report: {report_lib.write(workdir)}")
    return 0
  with distributed.first_process_first("data"):
    config = resolve(config_lib.read(path))
    check_data(config)
  program = program_lib.build(config, sharding.make_mesh(config.mesh))
  with checkpoints_lib.Checkpoints(workdir / "checkpoints") as checkpoints:
    state = checkpoints.restore(program.state_spec, arguments.step)
  if state is None:
    raise ValueError(f"{workdir} holds no checkpoint yet.")
  names = arguments.only.split(",") if arguments.only else None
  if not jax.process_index():
    print(f"evaluating step {int(state.step)}", file=sys.stderr)
  rows = evaluate(program, state, names)
  report(program, state, rows, workdir)
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
