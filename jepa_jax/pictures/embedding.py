"""A data set as an encoder sees it: a map of it, and who is near whom.

Axes: n images, D features.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jepa_jax.evaluation import components
from jepa_jax.evaluation import features as features_lib
from jepa_jax.pictures import layout, patches

if TYPE_CHECKING:
  from matplotlib import figure as figure_lib

METHODS = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}
SIDE, THUMB = 7.4, 0.42  # of a map and of an image in it, inches


def pooled(model: Any, images: np.ndarray) -> np.ndarray:
  """Features averaged over patches, float32 [n, D]."""
  size = min(len(images), patches.BATCH_SIZE)
  return np.asarray(model.encode(images, batch_size=size))


def coordinates(
  vectors: np.ndarray, method: str = "pca", seed: int = 0
) -> np.ndarray:
  """Places of features on a plane, where neighbours should be near.

  Args:
    vectors: [n, D], n of 4 or more.
    method: a key of METHODS. "tsne" needs scikit-learn, "umap" umap-learn.
    seed: of t-SNE and UMAP.

  Returns:
    float64 [n, 2], each axis from 0 to 1.

  Raises:
    ValueError: an unknown method, too few images, or what it needs is not
      installed.
  """
  if method not in METHODS:
    raise ValueError(f'unknown map "{method}"; known: {", ".join(METHODS)}.')
  if len(vectors) < 4:
    raise ValueError(f"got {len(vectors)} images; a map needs 4 or more.")
  vectors = standardised(vectors)
  if method == "pca":
    found = components.Basis.fit(vectors).components(vectors)[:, :2]
  else:
    found = _neighbourhoods(vectors, method, seed)
  found = found - found.min(axis=0)
  return found / np.maximum(found.max(axis=0), 1e-12)


def nearest(vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
  """The k nearest others of each, by cosine of standardised features.

  Returns:
    int [n, k] and their cosines [n, k], the nearest first.
  """
  vectors = standardised(vectors)
  vectors = vectors / np.maximum(
    np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12
  )
  cosines = vectors @ vectors.T
  np.fill_diagonal(cosines, -np.inf)
  order = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
  return order, np.take_along_axis(cosines, order, axis=1)


def draw_map(
  images: np.ndarray, places: np.ndarray, method: str = "pca"
) -> "figure_lib.Figure":
  """Images where `coordinates` puts them; a dot where one would hide another.

  Args:
    images: uint8 [n, H, W, C].
    places: [n, 2], 0 to 1.
    method: that made them.
  """
  blank = np.full((1, 1, 3), 255, np.uint8)
  figure = layout.sheet(
    [[layout.Panel(blank)]],
    title=f"A map of {len(images)} images",
    notes=f"By {METHODS[method]} of the encoder's features: near each other "
    "is what it finds alike. The axes mean nothing by themselves. A dot is an "
    "image that there is no room for.",
    side=SIDE,
  )
  axes = figure.axes[0]
  share = THUMB / SIDE
  middle = share / 2 + places * (1 - share)
  kept: list[int] = []
  for i, place in enumerate(middle):
    free = np.abs(middle[kept] - place).max(axis=1) > 0.8 * share
    if free.all():
      kept.append(i)
  hidden = np.setdiff1d(np.arange(len(images)), kept)
  axes.scatter(*middle[hidden].T, s=7, color="#b9bcc2", linewidths=0)
  for i in kept:
    x, y = middle[i]
    pixels = images[i] if images.shape[-1] != 1 else images[i][..., 0]
    axes.imshow(
      pixels, cmap="gray", vmin=0, vmax=255, interpolation="antialiased",
      extent=(x - share / 2, x + share / 2, y + share / 2, y - share / 2),
      zorder=2,
    )  # fmt: skip
  axes.set(xlim=(0, 1), ylim=(1, 0), aspect="auto")
  return figure


def draw_neighbours(
  images: np.ndarray,
  vectors: np.ndarray,
  labels: Sequence[str] | None = None,
  queries: int = 6,
  k: int = 5,
) -> "figure_lib.Figure":
  """Images with those nearest by features, and by pixels.

  Args:
    images: uint8 [n, H, W, C], n above k.
    vectors: [n, D], features of them.
    labels: the class of each. With them the rows are of classes in turn, what
      is of an image's class has a green edge and the rest a red one, and the
      notes count both over all images.
    queries: rows; the first images.
    k: neighbours of each kind.

  Raises:
    ValueError: too few images.
  """
  if len(images) <= k:
    raise ValueError(
      f"got {len(images)} images; {k} neighbours need more than {k}."
    )
  both = [nearest(x, k) for x in (vectors, features_lib.raw_pixels(images))]
  caption = lambda i, words: (
    "\n".join([shortened(labels[i]), *words]) if labels else "".join(words)
  )
  rows = []
  for i in in_turn(labels or [""] * len(images))[:queries]:
    row = [layout.photo(images[i], caption(i, []))]
    for order, cosines in both:
      row += [
        layout.photo(
          images[j],
          caption(j, [f"{cosine:.2f}"]),
          right=labels[i] == labels[j] if labels else None,
        )
        for j, cosine in zip(order[i], cosines[i])
      ]
    rows.append(row)
  return layout.sheet(
    rows,
    title=f"The nearest of {len(images)} images",
    notes="Below each: the cosine of features, each standardised over all "
    "images. On the right, for comparison, the nearest by pixels alone."
    + (_counted(labels, [order for order, _ in both]) if labels else ""),
    columns=[
      ("image", 1),
      ("nearest by the encoder's features", k),
      ("nearest by pixels", k),
    ],
    side=0.95,
  )  # fmt: skip


def in_turn(labels: Sequence[str]) -> list[int]:
  """All images' numbers: the first of each class, the second of each, ..."""
  seen: dict[str, int] = {}
  rounds = []
  for label in labels:
    rounds.append(seen.get(label, 0))
    seen[label] = rounds[-1] + 1
  return sorted(range(len(labels)), key=lambda i: rounds[i])


def agreement(labels: Sequence[str], order: np.ndarray) -> tuple[float, float]:
  """How often the nearest, and all of the nearest, are of an image's class.

  Args:
    labels: of n images.
    order: int [n, k], see `nearest`.

  Returns:
    Shares of the n nearest ones, and of all n k.
  """
  names = np.asarray(labels)
  same = names[order] == names[:, None]
  return float(same[:, 0].mean()), float(same.mean())


def shortened(name: str, most: int = 13) -> str:
  """A name for below a small picture."""
  return name if len(name) <= most else name[: most - 1] + "…"


def _counted(labels, orders):
  shares = [agreement(labels, order) for order in orders]
  (one, all_), (pixels_one, pixels_all) = shares
  return (
    " A green edge: of the same class; a red one: of another. Over all images "
    f"the nearest is right for {100 * one:.0f} % (by pixels for "
    f"{100 * pixels_one:.0f} %), and of the {orders[0].shape[1]} nearest "
    f"{100 * all_:.0f} % are ({100 * pixels_all:.0f} %)."
  )


def standardised(vectors: np.ndarray) -> np.ndarray:
  """Each feature with mean 0 and deviation 1 over the images."""
  vectors = np.asarray(vectors, np.float64)
  return (vectors - vectors.mean(axis=0)) / (vectors.std(axis=0) + 1e-6)


def _neighbourhoods(vectors, method, seed):
  extra = "it needs the extra: pip install 'jepa_jax[pictures]'"
  try:
    if method == "umap":
      import umap

      return umap.UMAP(random_state=seed).fit_transform(vectors)
    from sklearn import manifold
  except ImportError as error:
    raise ValueError(f"{METHODS[method]} is not there; {extra}.") from error
  perplexity = min(30.0, (len(vectors) - 1) / 3)
  return manifold.TSNE(
    perplexity=perplexity, init="pca", random_state=seed
  ).fit_transform(vectors)
