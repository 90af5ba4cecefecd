"""Features of whole data sets: what every probe and k-NN starts from.

Axes: n images of the data set, B batch, H W pixels, C channels, D features.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tqdm

SMALL = 28  # images up to this size enter the pixel baseline as they are
REDUCED = 16  # larger ones are reduced to at most this size


def extract(
  encode: Callable[[np.ndarray], Any],
  dataset: Iterable[Mapping[str, Any]],
  *,
  gather: Callable[[Any], np.ndarray] = np.asarray,
  total: int | None = None,
  description: str = "features",
  progress: bool = True,
) -> dict[str, np.ndarray]:
  """Encodes every valid image of a data set, in order.

  While the device encodes one batch, the host reads the next.

  Args:
    encode: uint8 [B, H, W, C] -> [B, D], any float type. For the reported
      numbers: the target encoder's patches, averaged. All batches have one
      shape, so a jitted `encode` compiles once.
    dataset: batches {"image": uint8 [B, H, W, C], "label": [B] or [B, ...],
      "valid": bool [B]} as arrays, or a tf.data.Dataset of them. Rows that are
      not valid (padding of the last batch) are dropped; no "valid" keeps all.
    gather: the rows of all processes from those of this one, or from a global
      array; called alike by all of them. B counts this process's rows.
    total: images in the data set, for the progress bar alone.
    description: what the progress bar says.
    progress: whether there is a progress bar.

  Returns:
    {"features": float32 [n, D], "labels": [n] or [n, ...]} on the host.

  Raises:
    ValueError: the data set is empty, `encode` returns anything but [B, D],
      or a feature is not finite.
  """
  if hasattr(dataset, "as_numpy_iterator"):
    dataset = dataset.as_numpy_iterator()
  features, labels = [], []
  pending = None
  bar = tqdm.tqdm(
    total=total, desc=description, unit=" images", disable=not progress
  )

  def collect(encoded, batch):
    encoded = np.asarray(gather(encoded), np.float32)
    label = gather(batch["label"])
    rows = len(label)
    if encoded.ndim != 2 or len(encoded) != rows:
      raise ValueError(
        f"encode returned shape {encoded.shape} for {rows} images; it needs "
        f"[{rows}, features]: average over the patches."
      )
    valid = np.ones(rows, bool)
    if "valid" in batch:
      valid = np.asarray(gather(batch["valid"]), bool)
    features.append(encoded[valid])
    labels.append(label[valid])
    bar.update(int(valid.sum()))

  with bar:
    for batch in dataset:
      encoded = encode(batch["image"])  # returns before the device is done
      if pending is not None:
        collect(*pending)
      pending = encoded, batch
    if pending is not None:
      collect(*pending)
  if not sum(map(len, features)):
    raise ValueError(
      f"no valid image to extract {description} from; the data set needs at "
      "least one: check its split and path."
    )
  result = {
    "features": np.concatenate(features),
    "labels": np.concatenate(labels),
  }
  bad = int(np.sum(~np.isfinite(result["features"]).all(axis=1)))
  if bad:
    raise ValueError(
      f"features of {bad} of {len(result['features'])} images are not finite; "
      "the encoder's weights have diverged: use an earlier checkpoint."
    )
  return result


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
    rows = _area_weights(height, min(height, REDUCED))  # [h, H]
    columns = _area_weights(width, min(width, REDUCED))  # [w, W]
    pixels = np.einsum("hH,bHWc,wW->bhwc", rows, pixels, columns, optimize=True)
  return pixels.reshape(len(pixels), -1)


def _area_weights(size: int, reduced: int) -> np.ndarray:
  """float32 [reduced, size]: the share of each pixel in each larger pixel."""
  edges = np.arange(reduced + 1) * (size / reduced)
  pixels = np.arange(size)
  overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(
    edges[:-1, None], pixels
  )
  return (np.clip(overlap, 0, 1) * (reduced / size)).astype(np.float32)
