"""What the report draws of images: masks, and features of patches."""

from typing import Any

import ml_collections

from jepa_jax import config as config_lib
from jepa_jax import models
from jepa_jax.data import pipeline
from jepa_jax.evaluation import encoders, figures


def pictures(program: Any, state: Any, count: int = 8) -> dict[str, Any]:
  """Masks of training images, and patch features of held-out ones.

  Args:
    program: training.program.Program.
    state: its TrainState.
    count: images a picture.

  Returns:
    Arrays by the names of evaluation.report; those of masks and of features
    only where the objective has masks, and an encoder.
  """
  config = ml_collections.ConfigDict(program.config)
  grid = models.patch_grid(
    *models.height_and_width(config.data.image_size), config.encoder.patch_size
  )
  arrays = {}
  if "context_ids" in program.batch_spec:
    dataset = pipeline.train_dataset(config, program.batch_spec)
    batch = next(dataset.as_numpy_iterator())
    batch = {name: value[:count] for name, value in batch.items()}
    context = figures.covered(
      batch["context_ids"], batch["context_valid"], grid
    )
    arrays["masks_image"] = batch["image"]
    arrays["masks_context"] = context.any(axis=1)
    arrays["masks_targets"] = figures.covered(
      batch["target_ids"], batch["target_valid"], grid
    )
  if "encoder" in program.objective.networks:
    held_out = next(iter(config.evaluations.values()), None)
    dataset = pipeline.evaluation_dataset(
      config_lib.evaluation_data(config, held_out),
      batch_size=count,
      split=held_out.test if held_out else config.data.split,
    )
    batch = next(dataset.as_numpy_iterator())
    images = batch["image"][batch["valid"]]
    found = encoders.patches(program, state, images, grid)
    arrays["features_image"] = images
    arrays["features"] = found["trained"]
    arrays["features_random"] = found["random"]
  return arrays
