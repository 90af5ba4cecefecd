"""Features of whole data sets: what every probe and k-NN starts from.

Axes: n images of the data set, B batch, H W pixels, C channels, D features.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jepa_jax.evaluation import progress as progress_lib

SMALL = 28  # images up to this size enter the pixel baseline as they are
STATISTICS_CHUNK = 2**22  # numbers
REDUCED = 16  # larger ones are reduced to at most this size
OF_PATCHES = " patches"  # end of the name of an encoder that does not average


def extract(
  encoders: Mapping[str, Callable[[np.ndarray], Any]],
  dataset: Iterable[Mapping[str, Any]],
  *,
  total: int,
  gather: Callable[[Any], np.ndarray] = np.asarray,
  description: str = "features",
  progress: bool = True,
  check: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, np.ndarray]]:
  """Encodes every valid image of a data set, in order, by several encoders.

  An image is read and decoded once for all of them. While the device encodes
  one batch, the host reads the next. The features are held once on the host.

  Args:
    encoders: name -> uint8 [B, H, W, C] -> [B, D], any float type; [B, N, D]
      where the name ends with OF_PATCHES. For the reported numbers: the target
      encoder's patches, averaged. All batches have one shape, so a jitted
      encoder compiles once.
    dataset: batches {"image": uint8 [B, H, W, C], "labels": {name: [B, ...]},
      "valid": bool [B]} as arrays, or a tf.data.Dataset of them. Rows that are
      not valid (padding of the last batch) are dropped; no "valid" keeps all.
    total: images in the data set, at least those that are valid.
    gather: the rows of all processes from those of this one, or from a global
      array; called alike by all of them. B counts this process's rows.
    description: what the progress bar says.
    progress: whether it is shown how far it is.
    check: called after each batch; may raise to end it all.

  Returns:
    {"features": {encoder: float32 [n, D], or float16 [n, N, D]}, "labels":
    {name: [n, ...]}} on the host.

  Raises:
    ValueError: the data set is empty, an encoder returns anything but [B, D],
      or a feature is not finite.
  """
  if hasattr(dataset, "as_numpy_iterator"):
    dataset = dataset.as_numpy_iterator()
  rows = _Rows(total)
  pending = None
  bar = progress_lib.bar(
    total=total, desc=description, unit=" images", show=progress
  )

  def collect(encoded, batch):
    count = len(batch["image"])
    valid = np.asarray(gather(batch.get("valid", np.ones(count, bool))), bool)
    bar.update(
      rows.add(
        {name: _floats(gather(x)) for name, x in encoded.items()},
        {name: gather(x) for name, x in batch.get("labels", {}).items()},
        valid,
      )
    )

  with bar:
    for batch in dataset:
      # The encoders return before the device is done.
      encoded = {name: of(batch["image"]) for name, of in encoders.items()}
      if pending is not None:
        collect(*pending)
      pending = encoded, batch
      check()
    if pending is not None:
      collect(*pending)
  return rows.finish(description)


class _Rows:
  """Features and labels of the images so far, in arrays for all of them."""

  def __init__(self, total):
    self._total = total
    self._count = 0
    self._bad = np.zeros(total, bool)
    self._arrays = {"features": {}, "labels": {}}

  def add(self, features, labels, valid):
    """Adds a batch; returns how many of its images are valid."""
    for name, encoded in features.items():
      rank = 3 if name.endswith(OF_PATCHES) else 2
      if encoded.ndim != rank or len(encoded) != len(valid):
        raise ValueError(
          f"encode returned shape {encoded.shape} for {len(valid)} images; it "
          f"needs [{len(valid)}, features]: average over the patches."
        )
    end = self._count + int(valid.sum())
    if end > self._total:
      raise ValueError(
        f"there are more images than the {self._total} expected."
      )
    for kind, values in (("features", features), ("labels", labels)):
      for name, value in values.items():
        if name not in self._arrays[kind]:
          shape = (self._total, *value.shape[1:])
          self._arrays[kind][name] = np.empty(shape, value.dtype)
        self._arrays[kind][name][self._count : end] = value[valid]
    for encoded in features.values():
      finite = np.isfinite(encoded[valid]).reshape(valid.sum(), -1).all(axis=1)
      self._bad[self._count : end] |= ~finite
    added, self._count = end - self._count, end
    return added

  def finish(self, description):
    """The arrays; ValueError where there is no image, or a NaN."""
    if not self._count:
      raise ValueError(
        f"no valid image to extract {description} from; the data set needs at "
        "least one: check its split and path."
      )
    if bad := int(self._bad.sum()):
      raise ValueError(
        f"features of {bad} of {self._count} images are not finite; "
        "the encoder's weights have diverged: use an earlier checkpoint."
      )
    return {
      kind: {name: value[: self._count] for name, value in arrays.items()}
      for kind, arrays in self._arrays.items()
    }


def _floats(encoded):
  """Features as they are kept: those of patches in half the room."""
  encoded = np.asarray(encoded)
  return encoded.astype(np.float32 if encoded.ndim == 2 else np.float16)


def raw_pixels(images: np.ndarray) -> np.ndarray:
  """Pixels as features: the baseline that any encoder should beat. An `encode`.

  Rule: images of at most 28 x 28 enter in full; of larger ones, each side
  longer than 16 is reduced to 16 by averaging over equal areas.

  Args:
    images: [B, H, W, C] on the scale 0..255.

  Returns:
    float32 [B, h * w * C] on the scale 0..1, rows first, then columns.
  """
  pixels = np.asarray(images, np.float32) / 255
  height, width = pixels.shape[1:3]
  if max(height, width) > SMALL:
    rows = area_weights(height, min(height, REDUCED))  # [h, H]
    columns = area_weights(width, min(width, REDUCED))  # [w, W]
    pixels = np.einsum("hH,bHWc,wW->bhwc", rows, pixels, columns, optimize=True)
  return pixels.reshape(len(pixels), -1)


def area_weights(size: int, reduced: int) -> np.ndarray:
  """float32 [reduced, size]: the share of each pixel in each larger pixel."""
  edges = np.arange(reduced + 1) * (size / reduced)
  pixels = np.arange(size)
  overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(
    edges[:-1, None], pixels
  )
  return (np.clip(overlap, 0, 1) * (reduced / size)).astype(np.float32)


def statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean and standard deviation of each feature, for standardising.

  Args:
    features: float32 [n, D].

  Returns:
    Both float32 [D]; the deviation is 1 where a feature is constant.
  """
  count, width = features.shape
  rows = max(1, STATISTICS_CHUNK // width)  # or float64 would be two copies
  chunks = [slice(i, i + rows) for i in range(0, count, rows)]
  mean = sum(features[c].sum(axis=0, dtype=np.float64) for c in chunks) / count
  squares = sum(np.square(features[c] - mean).sum(axis=0) for c in chunks)
  scale = np.sqrt(squares / count)
  scale = np.where(scale <= 1e-6 * np.max(scale, initial=0), 1, scale)
  return mean.astype(np.float32), scale.astype(np.float32)
