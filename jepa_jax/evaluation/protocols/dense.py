"""Dense probes: what does the feature of each patch know of its place?

Axes: n training images, B test images, N patches of a grid h x w, D features.
"""

from typing import Any

import numpy as np

from jepa_jax.evaluation import features as features_lib
from jepa_jax.evaluation.protocols import accuracy, linear, protocol, ridge

MOST = 200_000  # patches of train that a classifier learns from


def depth(
  train: protocol.Examples, test: protocol.Examples, *, seed: int = 0
) -> dict[str, Any]:
  """Ridge regression of the mean of a map in each patch, such as its depth.

  Args:
    train: features [n, N, D]; labels [n, H, W] or [n, H, W, 1], numbers of the
      whole image; grid (h, w).
    test: the same.
    seed: of the patches held out, by which the strength is chosen.

  Returns:
    rmse, in the map's unit, and its standard_error over the test images;
    delta, the share of test patches where the larger of said / true and
    true / said is below 1.25, in percent; r2, baseline_rmse (of always saying
    the mean of train), strength; n_train, n_test, patches.

  Raises:
    ValueError: shapes disagree, or what ridge.ridge raises.

  Reference: Eigen et al. 2014, arXiv:1406.2283, for delta.
  """
  protocol.check_patches(train, test)
  sides = [_flat(side, _means(side)) for side in (train, test)]
  found, said = ridge.fit(*sides, seed=seed)
  true = np.asarray(sides[1]["labels"], np.float64)
  squares = ((said - true) ** 2).reshape(len(test["features"]), -1).mean(axis=1)
  spread = squares.std() / np.sqrt(len(squares))
  small = np.finfo(np.float64).tiny
  ratio = np.maximum(
    said / np.maximum(true, small), true / np.maximum(said, small)
  )
  return {
    "rmse": found["rmse"],
    "standard_error": float(spread / max(2 * found["rmse"], small)),
    "delta": 100 * float(np.mean((ratio < 1.25) & (said > 0))),
    **{key: found[key] for key in ("r2", "baseline_rmse", "strength")},
    "n_train": len(train["features"]),
    "n_test": len(test["features"]),
    "patches": train["features"].shape[1],
  }


def segmentation(
  train: protocol.Examples, test: protocol.Examples, *, seed: int = 0
) -> dict[str, Any]:
  """Logistic regression of the commonest class of the pixels of each patch.

  Args:
    train: features [n, N, D]; labels [n, H, W], classes of the whole image;
      grid (h, w). At most MOST patches, of whole images, are learned from.
    test: the same.
    seed: of the images learned from, and of the patches held out.

  Returns:
    miou, the mean over classes of the intersection over union of patches, in
    percent; per_class, {class: its own}; baseline, the miou of always saying
    the commonest class; standard_error of miou over the test images; top1 of
    patches; strength; n_train, n_test, patches.

  Raises:
    ValueError: shapes disagree, or what linear.linear_probe raises.
  """
  protocol.check_patches(train, test)
  count, patches = train["features"].shape[:2]
  chosen = np.random.default_rng(seed).permutation(count)
  chosen = np.sort(chosen[: max(MOST // patches, 1)])
  part = {
    **train,
    "features": train["features"][chosen],
    "labels": np.asarray(train["labels"])[chosen],
  }
  sides = [_flat(side, _commonest(side)) for side in (part, test)]
  found, classify = linear.fit(*sides, seed=seed)
  said = classify(sides[1]["features"])
  true = sides[1]["labels"]
  ious = intersections_over_unions(said, true)
  by_image = [x.reshape(-1, patches) for x in (said, true)]
  seen, counts = np.unique(sides[0]["labels"], return_counts=True)
  always = np.full_like(true, seen[counts.argmax()])
  baseline = intersections_over_unions(always, true)
  return {
    "miou": round(_percent(ious), 3),
    "per_class": {str(k): round(100 * v, 3) for k, v in ious.items()},
    "baseline": round(_percent(baseline), 3),
    "top1": found["top1"],
    "standard_error": accuracy.jackknife(
      lambda kept: _percent(
        intersections_over_unions(*(x[kept] for x in by_image))
      ),
      len(test["features"]),
    ),
    "strength": found["strength"],
    "n_train": len(chosen),
    "n_test": len(test["features"]),
    "patches": patches,
  }


def _percent(ious):
  return 100 * float(np.mean([*ious.values()]))


def intersections_over_unions(
  said: np.ndarray, true: np.ndarray
) -> dict[int, float]:
  """Of every class that is true somewhere; integers of one shape both."""
  return {
    int(k): float(
      np.sum((said == k) & (true == k)) / np.sum((said == k) | (true == k))
    )
    for k in np.unique(true)
  }


def _flat(side, labels):
  """Patches as if each were an image."""
  found = side["features"]
  return {
    "features": found.reshape(-1, found.shape[-1]).astype(np.float32),
    "labels": labels.reshape(-1),
  }


def _shares(side):
  """Weights [h, H] and [w, W] of pixels in patches, and the maps [n, H, W]."""
  maps = np.asarray(side["labels"])
  maps = maps[..., 0] if maps.ndim == 4 else maps
  if maps.ndim != 3:
    raise ValueError(
      f"maps have shape {maps.shape}; a dense probe needs [images, height, "
      "width]."
    )
  (height, width), (h, w) = maps.shape[1:], side["grid"]
  if height * w != width * h:
    raise ValueError(
      f"maps of {height} x {width} pixels do not lie on a grid of {h} x {w} "
      "patches of a cropped image; take images of the map's shape."
    )
  rows = features_lib.area_weights(height, h)
  return rows, features_lib.area_weights(width, w), maps


def _means(side):
  """Mean [n, h, w] of each patch of the maps."""
  rows, columns, maps = _shares(side)
  return np.einsum("hH,nHW,wW->nhw", rows, maps, columns, optimize=True)


def _commonest(side):
  """Class [n, h, w] of most pixels of each patch; of equals the smallest."""
  rows, columns, maps = _shares(side)
  classes = np.unique(maps)
  areas = [
    np.einsum("hH,nHW,wW->nhw", rows, maps == k, columns, optimize=True)
    for k in classes
  ]
  return classes[np.argmax(areas, axis=0)]


ROWS = (
  protocol.Protocol(
    name="depth",
    title="depth probe",
    run=depth,
    score="rmse",
    unit="",
    higher_is_better=False,
    label="dense",
    patches=True,
  ),
  protocol.Protocol(
    name="segmentation",
    title="segmentation probe",
    run=segmentation,
    score="miou",
    unit="%",
    higher_is_better=True,
    label="mask",
    patches=True,
  ),
)
