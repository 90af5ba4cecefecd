"""LiDAR: how many directions tell images apart more than views of one image.

Axes: n images, Q views of each, D features.
"""

from typing import Any

import numpy as np

from jepa_jax.evaluation.protocols import protocol

VIEWS = 10
SMALL = 1e-4  # added to the covariance within images
_EPSILON = 1e-7  # added to every share


def lidar(
  train: protocol.Examples, test: protocol.Examples, *, seed: int = 0
) -> dict[str, Any]:
  """The effective rank of linear discriminant analysis with images as classes.

  Args:
    train: not looked at.
    test: "variants", {"view 0", "view 1", ...: features [n, D]}.
    seed: unused; here so that all protocols are called alike.

  Returns:
    lidar (see `rank`); views, Q; width, D; n_test.

  Raises:
    ValueError: fewer than three images, or than two views.
  """
  del train, seed
  views = [x for name, x in test["variants"].items() if "view" in name]
  if len(views) < 2 or len(views[0]) < 3:
    raise ValueError(
      f"LiDAR got {len(views)} views of {len(test['features'])} images; it "
      "needs at least 2 of 3, and some 1,000 images for a sound figure."
    )
  return {
    "lidar": rank(np.stack(views, axis=1)),
    "views": len(views),
    "width": views[0].shape[1],
    "n_test": len(views[0]),
  }


def rank(features: np.ndarray, small: float = SMALL) -> float:
  """Exponential of the entropy of the eigenvalues' shares.

  They are those of W^(-1/2) B W^(-1/2), with B the covariance of the images'
  means and W the mean covariance of the views of an image plus `small` in its
  diagonal.

  Args:
    features: [n, Q, D].
    small: above 0.

  Returns:
    In [1, D], about 1 where one direction tells all images apart. 1 where all
    images have the same mean. At most n - 1, so compare at equal n.

  Reference: Thilak et al. 2023, section 3, arXiv:2312.04000.
    Differs: there the views are what the method trains on (for I-JEPA masked
    images); here random crops, mirrored or not, for any encoder. `small` is the
    default of the stable-pretraining library; others take 1e-6 to 1e-3.
  """
  features = np.asarray(features, np.float64)
  means = features.mean(axis=1)  # [n, D]
  centred = means - means.mean(axis=0)
  between = centred.T @ centred / len(means)
  within = (features - means[:, None]).reshape(-1, features.shape[2])
  within = within.T @ within / len(within)
  values, axes = np.linalg.eigh(within)
  root = axes / np.sqrt(np.maximum(values, 0) + small)  # of W^-1, [D, D]
  values = np.maximum(np.linalg.eigvalsh(root.T @ between @ root), 0)
  total = values.sum()
  if not total:
    return 1.0
  shares = values / total + _EPSILON
  return float(np.exp(-np.sum(shares * np.log(shares))))


ROW = protocol.Protocol(
  name="lidar",
  title="LiDAR without labels",
  run=lidar,
  score="lidar",
  unit="",
  higher_is_better=True,
  label="none",
  test_variants=tuple(f"view {i}" for i in range(VIEWS)),
)
