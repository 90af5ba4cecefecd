"""What a representation says of an image, drawn by a decoder."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import masks as masks_lib
from jepa_jax import models
from jepa_jax.evaluation import figures
from jepa_jax.objectives import decoder as decoder_lib
from jepa_jax.objectives import ijepa
from jepa_jax.pictures import layout

if TYPE_CHECKING:
  from matplotlib import figure as figure_lib

SHOWN = 6  # images
STEPS = 200  # of sampling; fewer, and without noise of their own, draw worse


@dataclasses.dataclass(frozen=True)
class Decoded:
  """What was drawn of n images.

  Attributes:
    samples: uint8 [n, S, h, w, C].
    block: bool [n, gh, gw], the patches whose representation was drawn.
    context: bool [n, gh, gw], what it was predicted from; None where it is the
      target encoder's own.
    nearest: int [n], the image of the pool whose true representation is
      nearest to the one that was drawn: another one where that is the true
      one, of all where it is a prediction.
  """

  samples: np.ndarray
  block: np.ndarray
  context: np.ndarray | None
  nearest: np.ndarray


def decode(
  objective: decoder_lib.Decoder,
  state: Any,
  images: np.ndarray,
  masks: Any = None,
  *,
  shown: int = SHOWN,
  samples: int = 3,
  steps: int = STEPS,
  seed: int = 0,
) -> Decoded:
  """Draws images that have the representations of some.

  Args:
    objective: of the decoder's run.
    state: its TrainState.
    images: uint8 [P, H, W, C], a pool of 2 or more.
    masks: config.masks; None for the defaults.
    shown: the first n of the pool are drawn.
    samples: S, of each.
    steps: of ancestral sampling, where the diffusion has as many.
    seed: of masks, patches and noise.

  Raises:
    ValueError: fewer than two images.
  """
  if len(images) < 2:
    raise ValueError(f"got {len(images)} image; decoding needs 2 or more.")
  n = min(shown, len(images))
  batch = _batch(objective, images[:n], masks, seed)
  wanted, ids, valid = _represent(objective, state, batch)
  draw = _drawer(objective, state, n, steps)
  keys = jax.random.split(jax.random.key(seed), samples)
  found = [np.asarray(draw(wanted, k)) for k in keys]
  context = None
  if "context_ids" in batch:
    context = figures.covered(
      batch["context_ids"][:, 0], batch["context_valid"][:, 0], objective.grid
    )
  truth = _truth(_features(objective, state, images), ids, valid)
  away = _away(truth, wanted[:, None], state.buffers)
  if context is None:
    away[np.arange(n), np.arange(n)] = np.inf  # its own is what was drawn
  return Decoded(
    samples=np.stack(found, axis=1),
    block=figures.covered(ids, valid, objective.grid),
    context=context,
    nearest=away.argmin(axis=1),
  )


def fidelity(
  objective: decoder_lib.Decoder,
  state: Any,
  images: np.ndarray,
  masks: Any = None,
  *,
  steps: int = STEPS,
  seed: int = 0,
) -> dict[str, Any]:
  """How much of an image's representation its samples hold.

  Samples of each image, of another one's representation and of none are
  compared with the image: by their colours, half the sum of the differences of
  histograms of 16 bins a channel, and by the target encoder's features of the
  same patches, mean squares of what is standardised as for the decoder.

  Args:
    objective: of the decoder's run.
    state: its TrainState.
    images: uint8 [P, H, W, C], 6 or more.
    masks: config.masks; None for the defaults.
    steps: of ancestral sampling, where the diffusion has as many.
    seed: of masks, patches and noise.

  Returns:
    "own", "other" and "none", each (colours [P], features [P]); top1 and top5,
    how often in percent a sample's own image is the nearest by features, or
    among the five nearest.

  Raises:
    ValueError: fewer than six images.
  """
  n = len(images)
  if n < 6:
    raise ValueError(f"got {n} images; scores need 6 or more.")
  batch = _batch(objective, images, masks, seed)
  wanted, ids, valid = _represent(objective, state, batch)
  draw = _drawer(objective, state, n, steps)
  key = jax.random.key(seed)
  small = objective.drawn(images)
  mean, std = objective.scale
  small = np.asarray(jnp.round(255 * (small * std + mean)), np.uint8)
  colours = _histograms(small)
  truth = _truth(_features(objective, state, images), ids, valid)
  own = np.arange(n)
  found, away = {}, None
  for name in ("own", "other", "none"):
    given = {"own": wanted, "other": jnp.roll(wanted, 1, axis=0), "none": None}
    samples = np.asarray(draw(given[name], key))
    shape = (n, *objective.image_shape)
    large = jax.image.resize(samples.astype(np.float32), shape, "linear")
    large = np.clip(np.round(large), 0, 255).astype(np.uint8)
    features = _features(objective, state, large)
    said = np.stack([f[i[v]].mean(0) for f, i, v in zip(features, ids, valid)])
    distances = _away(truth, said[:, None], state.buffers)
    if name == "own":
      away = distances
    of_colours = np.abs(_histograms(samples) - colours).sum(axis=(1, 2)) / 2
    found[name] = of_colours / small.shape[-1], distances[own, own]
  rank = (away < away[own, own][:, None]).sum(axis=1)
  top = lambda k: 100 * float((rank < k).mean())
  return found | {"top1": top(1), "top5": top(5)}


def in_words(found: dict[str, Any]) -> str:
  """The figures of `fidelity` as lines."""
  n = len(found["own"][0])
  names = {
    "own": "of its own features",
    "other": "of another image's",
    "none": "of none",
  }
  lines = [
    f"distance of samples to {n} images, mean and deviation",
    f"  {'':<20} {'colours':>15} {'features':>15}",
  ]
  for name, words in names.items():
    cells = (f"{x.mean():.3f} +- {x.std():.3f}" for x in found[name])
    lines.append(f"  {words:<20} " + " ".join(f"{c:>15}" for c in cells))
  lines.append(
    f"a sample's own image is the nearest by features for {found['top1']:.1f} "
    f"%, among the five nearest for {found['top5']:.1f} % (chance: "
    f"{100 / n:.1f} and {500 / n:.1f} %)"
  )
  return "\n".join(lines)


def _batch(objective, images, masks, seed):
  """What the objective makes representations of, with one block an image."""
  n = len(images)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), n)
  batch = {"image": images, "key": np.asarray(jax.random.key_data(keys))}
  if objective.condition == "prediction":
    drawn = masks_lib.sample(
      masks, objective.grid, seed=seed, step=np.arange(n), epoch=0,
      index=np.arange(n), xp=np,
    )  # fmt: skip
    names = ("context_ids", "context_valid", "target_ids", "target_valid")
    batch |= {name: drawn[name][:, :1] for name in names}
  return batch


def _represent(objective, state, batch):
  """Representations [n, D], and the patches they are of, [n, T] each."""
  wanted = jax.jit(objective.targets)(state.frozen, batch, {})
  return wanted, *(np.asarray(x) for x in objective.places(batch))


def _drawer(objective, state, n, steps):
  """A compiled function (representations or None, key) -> images."""
  network, steps = state.network("unet"), min(steps, objective.steps)
  return jax.jit(
    lambda wanted, key: objective.samples(
      network, state.buffers, wanted, jax.random.split(key, n), steps=steps
    )
  )


def _truth(features, ids, valid):
  """Of all images, the features of each one's patches: [n, P, D]."""
  return np.stack([features[:, i[v]].mean(axis=1) for i, v in zip(ids, valid)])


def _away(a, b, buffers):
  """Mean squares of standardised differences, over the last axis."""
  standard = lambda x: np.asarray(decoder_lib.standardized(x, buffers))
  return np.square(standard(a) - standard(b)).mean(axis=-1)


def _histograms(images):
  """Shares of 16 bins of each channel: [n, C, 16]."""
  channels = np.moveaxis(images, -1, 1).reshape(*images.shape[::3], -1) // 16
  return (channels[..., None] == np.arange(16)).mean(axis=2)


def _features(objective, state, images, at_once=64):
  """The target encoder's, of which representations are made: [P, N, D]."""

  @jax.jit
  def encode(images):
    images = models.normalize_images(images, objective.mean, objective.std)
    features = objective.encoder.apply(
      {"params": state.frozen["encoder"]}, images
    ).astype("float32")
    # What a predictor has learned to say.
    predicts = objective.condition == "prediction"
    return ijepa.normalize_targets(features) if predicts else features

  parts = range(0, len(images), at_once)
  return np.concatenate([encode(images[i : i + at_once]) for i in parts])


def draw(images: np.ndarray, found: Decoded) -> "figure_lib.Figure":
  """One row an image: what was given, what was drawn, and the nearest image.

  Args:
    images: uint8 [P, H, W, C], the pool.
    found: of the first of them.
  """
  rows = []
  predicted = found.context is not None
  for i, samples in enumerate(found.samples):
    box = _box(found.block[i])
    whole = found.block[i].all()
    frame = {} if whole else {"box": box}
    row = [layout.photo(images[i], **({} if predicted else frame))]
    if predicted:
      seen, _ = figures.mask_pictures(
        images[i], found.context[i], found.block[i][None]
      )
      row.append(layout.photo(seen, **frame))
    row += [layout.photo(x, **frame) for x in samples]
    nearest = int(found.nearest[i])
    words = "the image itself" if nearest == i else f"image {nearest}"
    row.append(layout.photo(images[nearest], words))
    rows.append(row)
  given = (
    "from the context alone, the features of the framed block are predicted "
    "and averaged"
    if predicted
    else "the features of the framed patch"
    if found.block[0].sum() == 1
    else "the features of all patches are averaged"
  )
  return layout.sheet(
    rows,
    title="What the features say of the image",
    notes=f"{given[0].upper()}{given[1:]}; a decoder draws images that have "
    "such features. What its samples share, the features hold; what differs "
    f"between them, they do not. Right: of {len(images)} images "
    f"{'the' if predicted else 'the other'} one whose own features are nearest "
    "to them.",
    columns=[
      ("image", 1),
      *([("context", 1)] if predicted else []),
      ("samples", found.samples.shape[1]),
      ("nearest", 1),
    ],
  )


def _box(block: np.ndarray) -> tuple[float, float, float, float]:
  """(left, top, width, height) of a block, as shares of the sides."""
  rows, columns = np.nonzero(block)
  h, w = block.shape
  return (
    columns.min() / w,
    rows.min() / h,
    (np.ptp(columns) + 1) / w,
    (np.ptp(rows) + 1) / h,
  )
