"""Figures of what an encoder sees: masks, features, similarity, attention.

Each takes images uint8 [n, H, W, C] and returns a matplotlib figure.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_jax import masks as masks_lib
from jepa_jax import models
from jepa_jax.evaluation import components, figures
from jepa_jax.pictures import layout, patches

if TYPE_CHECKING:
  from matplotlib import figure as figure_lib

# What each strategy does, for a reader who has not met it.
WORDS = {
  "released": "I-JEPA's blocks, as its released code draws them",
  "corrected": "I-JEPA's blocks, as its paper describes them",
  "block": "one block, from all that is around it",
  "random": "scattered patches",
  "rasterized": "three quarters, from the fourth",
  "union": "several blocks, predicted as one",
}
# A strategy of one number of targets alone.
_TARGETS = {"rasterized": 3, "block": 1}


def masks(
  images: np.ndarray,
  patch_size: int,
  settings: Any = None,
  *,
  names: tuple[str, ...] = tuple(masks_lib.SAMPLERS),
  seed: int = 0,
) -> "figure_lib.Figure":
  """What each masking strategy shows to the network and what it must predict.

  Args:
    images: uint8 [n, H, W, C].
    patch_size: pixels.
    settings: config.masks; its name is replaced. None for the defaults.
    names: strategies, a row each.
    seed: of the draws.

  Raises:
    ValueError: a strategy allows no mask on this grid.
  """
  grid = models.patch_grid(*images.shape[1:3], patch_size)
  rows, labels = [], []
  for name in names:
    whole = grid[0] * grid[1]  # nothing is cut to a batch's size
    chosen = {**(settings or {}), "name": name, "context_patches": whole}
    if name in _TARGETS:
      chosen["num_targets"] = _TARGETS[name]
    drawn = masks_lib.sample(
      chosen, grid, seed=seed, step=np.arange(len(images)), epoch=0,
      index=np.arange(len(images)), xp=np,
    )  # fmt: skip
    context = figures.covered(
      drawn["context_ids"], drawn["context_valid"], grid
    )
    targets = figures.covered(drawn["target_ids"], drawn["target_valid"], grid)
    row = []
    for image, seen, blocks in zip(images, context.any(axis=1), targets):
      visible, predicted = figures.mask_pictures(image, seen, blocks)
      row += [
        layout.photo(visible, f"{seen.sum()} of {seen.size} patches"),
        layout.photo(predicted, f"{blocks.any(axis=0).sum()} patches"),
      ]
    rows.append(row)
    labels.append(f"{name}\n{WORDS.get(name, '')}".strip())
  return layout.sheet(
    rows,
    title="Which part of an image predicts which",
    notes="Left of each pair: the context, all that the network sees of the "
    "image. Right: the targets in colour, whose features it predicts from "
    "that context. Training then cuts contexts to equal numbers of patches.",
    columns=[("context", 1), ("targets", 1)] * len(images),
    labels=labels,
    side=1.25,
  )


def pca(
  model: Any,
  images: np.ndarray,
  *,
  fine: int = 1,
  foreground: bool = False,
) -> "figure_lib.Figure":
  """Features as colours, of target encoder and context encoder.

  Args:
    model: jepa_jax.Pretrained.
    images: uint8 [n, H, W, C].
    fine: see patches.features.
    foreground: whether patches of the background are left black, and the
      colours are of the variance among the others alone.
  """
  first = model.which
  vectors = {first: patches.features(model, images, first, fine)}
  for name in ("target", "context"):
    if name in model.networks and name != first:
      vectors[name] = patches.features(model, images, name, fine)
  shown = np.ones(vectors[first].shape[:3], bool)
  if foreground:
    shown = patches.foreground(vectors[first])
  basis = components.Basis.fit(vectors[first][shown])
  rows = [[layout.photo(image) for image in images]]
  labels = ["image"]
  for name, found in vectors.items():
    colours = np.where(shown[..., None], basis.colours(found), 0)
    rows.append([layout.Panel(x) for x in colours])
    labels.append(f"{name} encoder")
  shares = " + ".join(f"{100 * share:.0f}" for share in basis.shares)
  kept = "of the foreground's patches" if foreground else "of all patches"
  return layout.sheet(
    rows,
    title="What the encoder says of each place, as colour",
    notes="Equal colours: similar features, across all images"
    f"{' and both encoders' * (len(vectors) > 1)}. Red, green and blue are the "
    "first three principal components "
    f"{kept} ({shares} % of the variance)."
    + (" Black: background." if foreground else ""),
    labels=labels,
  )


def similarity(
  model: Any,
  images: np.ndarray,
  *,
  at: tuple[float, float] = (0.5, 0.5),
  fine: int = 1,
) -> "figure_lib.Figure":
  """How similar all patches are to one patch, of each image in turn.

  Args:
    model: jepa_jax.Pretrained.
    images: uint8 [n, H, W, C]; the first four lend a patch each.
    at: (row, column) of the patch, as shares of the image's sides.
    fine: see patches.features.
  """
  vectors = patches.features(model, images, None, fine)
  height, width = vectors.shape[1:3]
  i, j = _place(at, (height, width))
  frame = _frame(model, images, (i // fine, j // fine))
  rows, labels = [], []
  rows.append([None, *(layout.photo(image) for image in images)])
  for k in range(min(4, len(images))):
    cosines = patches.similarity(vectors, vectors[k, i, j])
    cells = [layout.Panel(x) for x in layout.heat(cosines, -1, 1, "RdBu_r")]
    rows.append([layout.photo(images[k], box=frame), *cells])
  return layout.sheet(
    rows,
    title="Where else does it look like this patch?",
    notes="Each row: how similar every place of every image is to the framed "
    "patch on the left, for the encoder. Cosine of features, the mean of all "
    "patches taken off.",
    labels=labels,
    scale=("cosine: unlike to alike", -1, 1, "RdBu_r"),
  )


def attention(
  model: Any,
  images: np.ndarray,
  *,
  at: tuple[float, float] = (0.5, 0.5),
  layer: int = -1,
) -> "figure_lib.Figure":
  """What a patch attends to, by head.

  Args:
    model: jepa_jax.Pretrained.
    images: uint8 [n, H, W, C], a row each.
    at: as of similarity.
    layer: as of patches.attention.
  """
  weights = patches.attention(model, images, None, layer)
  grid = weights.shape[2:4]
  i, j = _place(at, grid)
  times = weights[:, :, i, j] * grid[0] * grid[1]  # 1 where it is even
  high = max(2.0, float(np.percentile(times, 99)))
  frame = _frame(model, images, (i, j))
  rows = [
    [
      layout.photo(image, box=frame),
      *(layout.Panel(layout.heat(head, 0, high)) for head in heads),
    ]
    for image, heads in zip(images, times)
  ]
  heads = times.shape[1]
  number = layer % model.module.depth + 1
  return layout.sheet(
    rows,
    title="Where the encoder looks from one patch",
    notes=f"Attention of the framed patch in block {number} of "
    f"{model.module.depth}, by head. 1: as if it looked everywhere alike.",
    columns=[("image", 1), *((f"head {h + 1}", 1) for h in range(heads))],
    scale=("attention, times an even one", 0, high, "inferno"),
  )


def _place(at, grid):
  """The patch at (row, column), shares of the sides."""
  for name, share in zip(("row", "column"), at):
    if not 0 <= share <= 1:
      raise ValueError(
        f"the {name} of the patch is {share:g}; it needs a share of the "
        "image's side, 0 to 1."
      )
  return tuple(min(int(x * side), side - 1) for x, side in zip(at, grid))


def _frame(model, images, patch):
  """(left, top, width, height) of a patch, as shares of the image's sides."""
  height, width = models.patch_grid(*images.shape[1:3], model.module.patch_size)
  return patch[1] / width, patch[0] / height, 1 / width, 1 / height
