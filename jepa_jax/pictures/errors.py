"""How well each place is predicted, against how far it is from the context."""

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_jax import masks as masks_lib
from jepa_jax import models
from jepa_jax.evaluation import figures
from jepa_jax.objectives import ijepa
from jepa_jax.pictures import layout, patches

if TYPE_CHECKING:
  from matplotlib import figure as figure_lib

SHOWN = 6  # images


@dataclasses.dataclass(frozen=True)
class Errors:
  """Errors of predicted patches; 1 is that of the mean of all features.

  Attributes:
    predicted: [n, h, w], by the predictor; NaN where nothing was predicted.
    place: [n, h, w], by the mean of the other images at the same place.
    copied: [n, h, w], by the features of the nearest patch of the context.
    distance: [n, h, w], to that patch, in patches; 0 within the context.
    context: bool [n, h, w].
    targets: bool [n, M, h, w].
  """

  predicted: np.ndarray
  place: np.ndarray
  copied: np.ndarray
  distance: np.ndarray
  context: np.ndarray
  targets: np.ndarray


def errors(
  model: Any, images: np.ndarray, settings: Any = None, seed: int = 0
) -> Errors:
  """Predicts the targets of each image from its context.

  Args:
    model: jepa_jax.Pretrained, with target encoder, context encoder and
      predictor.
    images: uint8 [n, H, W, C], n of 2 or more.
    settings: config.masks; None for the defaults.
    seed: of the masks.

  Returns:
    Squared errors of the normalised features, averaged over the features.

  Raises:
    ValueError: fewer images, or networks that do not predict features.
  """
  width = model.module.width
  predicts = model.predictor is not None and "target" in model.networks
  if not predicts or model.predictor.output_width != width:
    raise ValueError(
      "these networks predict no features of a target encoder; give a run of "
      "ijepa, or weights with all three networks."
    )
  if len(images) < 2:
    raise ValueError(f"got {len(images)} image; errors need 2 or more.")
  grid = models.patch_grid(*images.shape[1:3], model.module.patch_size)
  n, count = len(images), grid[0] * grid[1]
  drawn = masks_lib.sample(
    settings, grid, seed=seed, step=np.arange(n), epoch=0, index=np.arange(n),
    xp=np,
  )  # fmt: skip
  features = patches.features(model, images, "target").reshape(n, count, -1)
  truth = np.asarray(ijepa.normalize_targets(features))
  ids, valid = drawn["target_ids"], drawn["target_valid"]
  found = np.asarray(
    model.predict(
      images, drawn["context_ids"], ids, drawn["context_valid"], valid
    )
  )[:, 0]  # [n, M, T, D], of the first context
  total, times = np.zeros((n, count)), np.zeros((n, count))
  each = np.arange(n)[:, None, None]
  wrong = np.square(found - truth[each, ids]).mean(axis=-1)
  np.add.at(total, (each, ids), np.where(valid, wrong, 0))
  np.add.at(times, (each, ids), valid)  # a patch may be in several blocks
  context = figures.covered(
    drawn["context_ids"][:, 0], drawn["context_valid"][:, 0], grid
  )
  distance, nearest = _nearest(context)
  copied = np.take_along_axis(truth, nearest[..., None], axis=1)
  others = (truth.sum(axis=0) - truth) / (n - 1)
  unit = np.square(truth - truth.mean(axis=(0, 1))).mean()
  known = times > 0
  as_map = lambda x: np.where(known, x / unit, np.nan).reshape(n, *grid)
  square = lambda x: np.square(x - truth).mean(axis=-1)
  return Errors(
    predicted=as_map(total / np.maximum(times, 1)),
    place=as_map(square(others)),
    copied=as_map(square(copied)),
    distance=distance.reshape(n, *grid),
    context=context,
    targets=figures.covered(ids, valid, grid),
  )


def draw(images: np.ndarray, found: Errors) -> "figure_lib.Figure":
  """Errors on the first images, and their means over the distance.

  Args:
    images: uint8 [n, H, W, C], those of `errors`.
    found: what it returned.
  """
  rows = [[], [], []]
  for i in range(min(SHOWN, len(images))):
    seen, blocks = figures.mask_pictures(
      images[i], found.context[i], found.targets[i]
    )
    colours = layout.heat(found.predicted[i], 0, 1.5, "viridis")
    alpha = np.where(np.isnan(found.predicted[i]), 0, 255).astype(np.uint8)
    rows[0].append(layout.photo(blocks))
    rows[1].append(layout.photo(seen))
    rows[2].append(
      layout.Panel(np.concatenate([colours, alpha[..., None]], axis=-1))
    )
  figure = layout.sheet(
    rows,
    title="How well is each block predicted?",
    notes="From the context alone the network predicts the features of the "
    "blocks. Error 0: exact. 1: no better than the mean of all features. The "
    "chart has the means over all images, by how far the nearest patch that "
    "was seen is.",
    labels=["image, and the blocks to predict", "seen", "error of each patch"],
    scale=("error, of the features' variance", 0, 1.5, "viridis"),
    chart=2.6,
  )
  axes = layout.foot(figure, 2.6)
  known = ~np.isnan(found.predicted)
  steps = np.round(found.distance[known]).astype(int)
  distances = [d for d in np.unique(steps) if (steps == d).sum() >= 5]
  lines = {
    "predicted": (found.predicted, "c0"),
    "mean of other images at the same place": (found.place, "c1"),
    "copy of the nearest patch that is seen": (found.copied, "c3"),
  }
  for words, (values, colour) in lines.items():
    values = [values[known][steps == d] for d in distances]
    means = np.array([x.mean() for x in values])
    spread = np.array([x.std() / len(x) ** 0.5 for x in values])
    colour = figures.PALETTE[colour][0]
    axes.plot(distances, means, "o-", color=colour, label=words, markersize=4)
    axes.fill_between(
      distances, means - spread, means + spread, color=colour, alpha=0.2, lw=0
    )
  axes.set_xticks(distances)
  faint = figures.PALETTE["faint"][0]
  axes.set_xlabel("distance to the context, patches", size=9, color=faint)
  axes.set_ylabel("error", size=9, color=faint)
  axes.set_ylim(0)
  axes.legend(
    frameon=False, fontsize=9, ncols=3, loc="lower left", bbox_to_anchor=(0, 1)
  )
  return figure


def _nearest(context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """[n, N] distance to the nearest patch of a context, and which it is."""
  from scipy import ndimage

  distances, places = [], []
  for seen in context:
    distance, (rows, columns) = ndimage.distance_transform_edt(
      ~seen, return_indices=True
    )
    distances.append(distance.ravel())
    places.append((rows * seen.shape[1] + columns).ravel())
  return np.stack(distances), np.stack(places)
