"""The paper's linear probe: the best of a grid, trained by LARS or SGD.

All cells of the grid are trained at once on the same batches, so that many cost
little more than one. A cell on the last layer alone is one on the last four
whose other weights stay zero.

Axes: n training images, B images of a batch, D features, G cells, K classes.
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jepa_jax.evaluation import features
from jepa_jax.evaluation.protocols import accuracy, linear, protocol

HEADS = ("linear", "BatchNorm")
PLAIN = "plain"
FOUR_CROPS = tuple(f"crop {i}" for i in range(4))
CHUNK = 2**24  # numbers that go to the device at a time
EPOCH, LEAST, STEPS = 78, 32, 1000  # steps, images of a batch, steps in all


@dataclasses.dataclass(frozen=True)
class Recipe:
  """How every cell of a grid is trained.

  A set that is too small for such batches has smaller ones, so that an epoch
  has as many steps as ImageNet's, and more epochs if those are too few.

  Attributes:
    optimizer: "lars" or "sgd" (Nesterov's), both with momentum .9.
    batch: images of a batch, at most.
    epochs: passes over the training set, at least.
    drops: epochs of these after which the learning rate is a tenth.
    end: where it is not 0, the rate falls to this share of itself along a
      cosine instead.
    lrs: learning rates for 256 images. That of LARS, whose steps do not depend
      on the gradient's size, is that of `batch` for smaller ones as well.
    weight_decays: to choose from.
    views: of each training image, whose features are kept (names of
      variants.apply, PLAIN for the central part as it is); a step takes one of
      an image's at random. (): PLAIN, every time.
  """

  optimizer: str
  batch: int
  epochs: int
  drops: tuple[int, ...]
  lrs: tuple[float, ...]
  weight_decays: tuple[float, ...]
  end: float = 0.0
  views: tuple[str, ...] = ()

  def schedule(self, images: int) -> tuple[int, int, optax.Schedule]:
    """Images of a batch, steps, and each step's factor of the rates."""
    size = min(self.batch, max(images // EPOCH, LEAST), images)
    steps = max(self.epochs * (images // size), STEPS)
    factor = (self.batch if self.optimizer == "lars" else size) / 256
    if self.end:
      return size, steps, optax.cosine_decay_schedule(factor, steps, self.end)
    drops = {steps * drop // self.epochs: 0.1 for drop in self.drops}
    return size, steps, optax.piecewise_constant_schedule(factor, drops)


IMAGENET = Recipe(
  "lars", 16384, 50, (15, 30, 45), (0.05, 0.01, 0.001), (5e-4, 0.0)
)
CROPS = dataclasses.replace(IMAGENET, views=FOUR_CROPS)
# As VISSL probes encoders of I-JEPA's shapes on other data: one rate, one
# weight decay, and epochs by data set. Of large sets, crops would not fit in a
# host's memory.
PLACES = Recipe("sgd", 256, 14, (4, 8, 12), (0.01,), (5e-4,))
INATURALIST = dataclasses.replace(PLACES, epochs=84, drops=(24, 48, 72))
TRANSFER = dataclasses.replace(
  PLACES, epochs=28, drops=(8, 16, 24), views=FOUR_CROPS
)
COUNT = dataclasses.replace(
  PLACES, epochs=50, drops=(), end=0.01, views=(PLAIN, "mirror 0")
)
DISTANCE = dataclasses.replace(COUNT, epochs=100)


def linear_grid(
  train: protocol.Examples,
  test: protocol.Examples,
  *,
  recipe: Recipe = IMAGENET,
  holdout: float = 0.1,
  seed: int = 0,
) -> dict[str, Any]:
  """Linear classifiers over {layers} x {head} x learning rate x weight decay.

  The head is linear, or linear on features that are standardised by the mean
  and variance of the batch (BatchNorm; by those of train for what is scored).
  The cell with the best accuracy on a stratified part of the training images
  held out (ties: the first) is trained again on all of them.

  Args:
    train: features [n, D], labels [n] integers of any values; "width", the
      features of one layer, if the last ones are to be probed alone as well;
      "variants", with those of the views that the recipe asks for.
    test: features [B, D], labels [B].
    recipe: how cells are trained.
    holdout: share of the training images that chooses, in (0, 1).
    seed: of the first weights, the batches and the images held out.

  Returns:
    Those of accuracy.accuracies, of the cell chosen; cell, its name;
    holdout_top1; best_on_test, the top1 of the cell that is best on the test
    images, as the paper chooses it, which is no fair score, and its
    best_on_test_cell; cells, {name: [holdout_top1, test top1]}; batch, images;
    steps.

  Raises:
    ValueError: shapes disagree, labels are not integers, fewer than two
      classes, or no such holdout.

  Reference: Assran et al. 2023, appendix A, arXiv:2301.08243. For transfer,
    which it leaves to VISSL, that library's own configurations
    (github.com/facebookresearch/vissl, benchmark/linear_image_classification,
    vit_h16_no_cls and those that it stands on).
    Differs: BatchNorm has no scale and shift of its own, which the linear
    layer has, and is scored by the statistics of all training images; a small
    set has smaller batches; of crops a few are kept, not new ones drawn every
    epoch.
  """
  protocol.check(train, test, "class")
  classes, targets = np.unique(train["labels"], return_inverse=True)
  if len(classes) < 2 or not 0 < holdout < 1:
    raise ValueError(
      f"linear grid got {len(classes)} class in {len(targets)} training images "
      f"and holdout={holdout}; it needs at least 2 and 0 < holdout < 1."
    )
  grid = _Grid(train, recipe, len(classes), seed)
  held = linear.stratified(targets, holdout, seed)
  own = np.full(len(grid.names), None)
  if held.any():
    params = grid.fit(train["features"], targets, np.flatnonzero(~held))
    said = grid.classify(params, train["features"][held])
    own = [accuracy.percent(x == targets[held]) for x in said]
  params = grid.fit(train["features"], targets, np.arange(len(targets)))
  labels = np.asarray(test["labels"])
  said = classes[grid.classify(params, test["features"])]  # [G, B]
  top1 = [accuracy.percent(x == labels) for x in said]
  best = int(np.argmax(own)) if held.any() else 0
  luckiest = int(np.argmax(top1))
  scores = grid.logits(params, test["features"], best)
  return {
    **accuracy.accuracies(scores, classes, train, test),
    "cell": grid.names[best],
    "holdout_top1": own[best],
    "best_on_test": top1[luckiest],
    "best_on_test_cell": grid.names[luckiest],
    "cells": {name: pair for name, *pair in zip(grid.names, own, top1)},
    "batch": recipe.schedule(len(targets))[0],
    "steps": recipe.schedule(len(targets))[1],
  }


class _Grid:
  """The cells, those of the first head first."""

  def __init__(self, train, recipe, classes, seed):
    self.recipe, self.seed, self.classes = recipe, seed, classes
    known = {PLAIN: train["features"], **train.get("variants", {})}
    self.views = [known[name] for name in recipe.views if name in known]
    self.mean, self.scale = features.statistics(train["features"])
    width = len(self.mean)
    layer = int(train.get("width", width))
    kinds = {"last": layer} if layer == width else {"last": layer, "all": width}
    cells = list(
      itertools.product(HEADS, kinds, recipe.lrs, recipe.weight_decays)
    )
    self.names = [
      " ".join([kind, head, f"lr {lr:g}", f"decay {decay:g}"])
      for head, kind, lr, decay in cells
    ]
    self.rates = np.asarray([x[2:] for x in cells], np.float32)  # [G, 2]
    used = np.asarray([kinds[x[1]] for x in cells])  # the last ones
    self.mask = np.arange(width) >= width - used[:, None]  # [G, D]

  def fit(self, inputs, targets, chosen):
    """Trains all cells on some images; {"kernel" [G, D, K], "bias" [G, K]}."""
    size, steps, factor = self.recipe.schedule(len(chosen))
    shape = (*self.mask.shape, self.classes)
    kernel = 0.01 * jax.random.normal(jax.random.key(self.seed), shape[1:])
    params = {
      "kernel": kernel * self.mask[:, :, None],
      "bias": jnp.zeros((shape[0], self.classes)),
    }
    state = jax.vmap(_optimizer(self.recipe.optimizer, 0.0, 0.0).init)(params)
    batches = itertools.islice(self._batches(chosen, size), steps)
    random = np.random.default_rng(self.seed + 1)
    most = min(max(CHUNK // (size * shape[1]), 1), steps)
    done = 0
    while rows := list(itertools.islice(batches, most)):
      factors = np.zeros(most, np.float32)  # 0: no step
      factors[: len(rows)] = factor(done + np.arange(len(rows)))
      done += len(rows)
      rows = np.stack(rows + rows[:1] * (most - len(rows)))
      params, state = _train(
        params, state, self._seen(inputs, rows, random), targets[rows],
        self.rates, self.mask,
        factors, self.recipe.optimizer,
      )  # fmt: skip
    return params

  def _seen(self, inputs, rows, random):
    """Features of some images, or of one view of each, at random."""
    if not self.views:
      return inputs[rows]
    which = random.integers(len(self.views), size=rows.shape)
    found = np.empty((*rows.shape, inputs.shape[1]), np.float32)
    for i, features_of_view in enumerate(self.views):
      found[which == i] = features_of_view[rows[which == i]]
    return found

  def _batches(self, chosen, size) -> Iterator[np.ndarray]:
    """Rows [B] of every step, in a new order every epoch."""
    random = np.random.default_rng(self.seed)
    while True:
      order = random.permutation(chosen)
      for start in range(0, len(order) - size + 1, size):
        yield order[start : start + size]

  def classify(self, params, inputs):
    """Columns [G, n] that the cells choose."""
    most = max(CHUNK // (len(self.names) * self.classes), 1)
    found = [
      np.asarray(_choose(params, x, (x - self.mean) / self.scale))
      for x in (inputs[i : i + most] for i in range(0, len(inputs), most))
    ]
    return np.concatenate(found, axis=1)

  def logits(self, params, inputs, cell):
    """Scores [n, K] of one cell."""
    if cell >= len(self.names) // len(HEADS):
      inputs = (inputs - self.mean) / self.scale
    return linear.logits(inputs, *(params[x][cell] for x in ("kernel", "bias")))


def _optimizer(name, lr, decay):
  """In LARS, biases have no weight decay and no rate of their own."""
  if name == "lars":
    weights = {"kernel": True, "bias": False}
    return optax.lars(
      lr, decay, weight_decay_mask=weights, trust_ratio_mask=weights
    )
  return optax.chain(
    optax.add_decayed_weights(decay),
    optax.sgd(lr, momentum=0.9, nesterov=True),
  )


@functools.partial(jax.jit, static_argnums=7)
def _train(params, state, inputs, targets, rates, mask, factors, optimizer):
  """Steps of all cells on inputs [steps, B, D]."""

  def loss(params, x, y):
    errors = optax.softmax_cross_entropy_with_integer_labels(
      _all_logits(params, x, _standardised(x)), y[None]
    )  # [G, B]
    return errors.mean(axis=1).sum()

  def update(grads, state, params, rate, factor):
    of = _optimizer(optimizer, rate[0] * factor, rate[1])
    updates, state = of.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  def step(carry, batch):
    params, state = carry
    x, y, factor = batch
    grads = jax.grad(loss)(params, x, y)
    grads["kernel"] *= mask[:, :, None]
    cells = jax.vmap(update, in_axes=(0, 0, 0, 0, None))
    new = cells(grads, state, params, rates, factor)
    return jax.tree.map(
      lambda new, old: jnp.where(factor > 0, new, old), new, carry
    ), None

  carry, _ = jax.lax.scan(step, (params, state), (inputs, targets, factors))
  return carry


def _standardised(x):
  """BatchNorm of [B, D], in training."""
  return (x - x.mean(axis=0)) * jax.lax.rsqrt(x.var(axis=0) + 1e-5)


def _all_logits(params, x, standardised):
  """Scores [G, B, K]; the first half of the cells sees x, the other the BN."""
  half = len(params["bias"]) // len(HEADS)
  with jax.default_matmul_precision("float32"):
    said = [
      jnp.einsum("bd,gdk->gbk", values, kernel)
      for values, kernel in (
        (x, params["kernel"][:half]),
        (standardised, params["kernel"][half:]),
      )
    ]
  return jnp.concatenate(said) + params["bias"][:, None]


@jax.jit
def _choose(params, x, standardised):
  return _all_logits(params, x, standardised).argmax(axis=-1)


ROWS = tuple(
  protocol.Protocol(
    name=f"linear_{name}",
    title=f"linear probe, the paper's grid, {words}",
    run=functools.partial(linear_grid, recipe=recipe),
    score="top1",
    unit="%",
    higher_is_better=True,
    label="class",
    train_variants=tuple(x for x in recipe.views if x != PLAIN),
  )
  for name, words, recipe in (
    ("imagenet", "LARS", IMAGENET),
    ("imagenet_crops", "LARS, random crops", CROPS),
    ("transfer", "SGD, random crops", TRANSFER),
    ("places", "SGD, 14 epochs", PLACES),
    ("inaturalist", "SGD, 84 epochs", INATURALIST),
    ("count", "SGD, 50 epochs, mirrored or not", COUNT),
    ("distance", "SGD, 100 epochs, mirrored or not", DISTANCE),
  )
)
