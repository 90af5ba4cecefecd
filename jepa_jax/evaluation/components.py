"""Principal components of features, as colours: what the eye can compare."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Basis:
  """Three principal components of features, and how they become colours.

  Attributes:
    mean: [D].
    axes: [D, 3], each with its largest loading positive.
    low: [3], of a component that is drawn black.
    high: [3], of one that is drawn at full strength.
    shares: [3], of the variance.
  """

  mean: np.ndarray
  axes: np.ndarray
  low: np.ndarray
  high: np.ndarray
  shares: np.ndarray

  @classmethod
  def fit(cls, vectors: np.ndarray) -> "Basis":
    """The components of features [..., D] of all images together.

    The range of a colour is a component's 2nd to 98th percentile.

    Raises:
      ValueError: there are none, or one is not finite.
    """
    flat = vectors.reshape(-1, vectors.shape[-1]).astype(np.float64)
    if not flat.size or not np.isfinite(flat).all():
      raise ValueError(
        f"PCA got features of shape {vectors.shape}; it needs at least one "
        "vector, and all of them finite."
      )
    mean = flat.mean(axis=0)
    flat = flat - mean
    variances, axes = np.linalg.eigh(flat.T @ flat)
    lacking = max(0, 3 - len(variances))  # D below 3
    axes = np.pad(axes[:, ::-1][:, :3], ((0, 0), (0, lacking)))
    variances = np.pad(variances[::-1][:3].clip(0), (0, lacking))
    largest = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[largest, range(3)] < 0, -1, 1)
    low, high = np.percentile(flat @ axes, [2, 98], axis=0)
    total = np.square(flat).sum() or 1.0
    return cls(mean, axes, low, high, variances / total)

  def components(self, vectors: np.ndarray) -> np.ndarray:
    """[..., D] -> [..., 3]."""
    return (vectors - self.mean) @ self.axes

  def colours(self, vectors: np.ndarray) -> np.ndarray:
    """[..., D] -> uint8 [..., 3], red, green and blue."""
    width = np.where(self.high > self.low, self.high - self.low, 1)
    values = (self.components(vectors) - self.low) / width
    return np.round(255 * values.clip(0, 1)).astype(np.uint8)
