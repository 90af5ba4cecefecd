"""The paper's linear probe: its cells, its optimizers, and known answers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_probes

from jepa_jax.evaluation.protocols import linear, linear_grid

SMALL = linear_grid.Recipe(
  "lars", 16384, 50, (15, 30, 45), (0.05, 0.01), (0.0,)
)


@pytest.fixture(scope="module")
def wide():
  """Classes that the last layer of four shows; the others are noise."""
  sides = []
  for seed, count in ((1, 900), (2, 1501)):
    side = test_probes.blobs(count, 7, 4, 1.0, seed)
    noise = np.random.default_rng(seed).normal(size=(count, 21))
    side["features"] = np.hstack([noise, side["features"]]).astype(np.float32)
    sides.append({**side, "width": 7})
  return sides


@pytest.fixture(scope="module")
def found(wide):
  return linear_grid.linear_grid(*wide, recipe=SMALL)


def test_the_grid_has_every_cell_and_chooses_without_the_test_set(found, wide):
  assert len(found["cells"]) == 2 * 2 * 2
  held = [own for own, _ in found["cells"].values()]
  assert found["holdout_top1"] == max(held) == found["cells"][found["cell"]][0]
  assert found["top1"] == found["cells"][found["cell"]][1]
  assert found["best_on_test"] == max(x for _, x in found["cells"].values())
  shuffled = {**wide[1], "labels": np.roll(wide[1]["labels"], 7)}
  again = linear_grid.linear_grid(wide[0], shuffled, recipe=SMALL)
  assert again["cell"] == found["cell"] and 15 < again["top1"] < 35
  assert again["best_on_test_cell"] in again["cells"]


def test_the_optimum_is_that_of_scikit_learn(found, wide):
  linear_model = pytest.importorskip("sklearn.linear_model")
  preprocessing = pytest.importorskip("sklearn.preprocessing")
  train, test = wide
  scaler = preprocessing.StandardScaler().fit(train["features"])
  model = linear_model.LogisticRegression(C=1e4, max_iter=5000).fit(
    scaler.transform(train["features"]), train["labels"]
  )
  expected = model.score(scaler.transform(test["features"]), test["labels"])
  assert found["best_on_test"] >= 100 * expected - 0.5


def test_a_cell_of_the_last_layer_sees_no_other(wide):
  """Its weights are exactly zero elsewhere, and it scores as if alone."""
  train, _ = wide
  grid = linear_grid._Grid(train, SMALL, 4, 0)
  params = grid.fit(train["features"], train["labels"], np.arange(900))
  for name, kernel in zip(grid.names, np.asarray(params["kernel"])):
    assert kernel[21:].all() and kernel[:21].any() != name.startswith("last ")


def test_lars_takes_the_published_step():
  """You et al. 2017, algorithm 1, on two cells of one vmapped update."""
  random = np.random.default_rng(0)
  kernel, grads = random.normal(size=(2, 2, 3, 5))
  momentum, factor, decay, trust = 0.9, 64.0, 5e-4, 1e-3
  rates = np.asarray([0.05, 0.01])
  expected, velocity = kernel.copy(), np.zeros_like(kernel)
  for step in range(3):
    for i, rate in enumerate(rates):
      g = (step + 1) * grads[i] + decay * expected[i]
      local = trust * np.linalg.norm(expected[i]) / np.linalg.norm(g)
      velocity[i] = momentum * velocity[i] + rate * factor * local * g
      expected[i] -= velocity[i]
  params = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros((2, 5))}
  of = lambda rate: linear_grid._optimizer("lars", rate * factor, decay)
  state = jax.vmap(of(1.0).init)(params)
  for step in range(3):
    gradient = {"kernel": (step + 1) * grads, "bias": jnp.ones((2, 5))}
    updates, state = jax.vmap(
      lambda g, s, p, rate: of(rate).update(g, s, p)
    )(gradient, state, params, rates)  # fmt: skip
    params = jax.tree.map(jnp.add, params, updates)
  np.testing.assert_allclose(params["kernel"], expected, rtol=1e-4)
  # Biases have neither decay nor a rate of their own: 1 + 1.9 + 2.71 steps.
  bias = -5.61 * factor * rates[:, None] * np.ones((2, 5))
  np.testing.assert_allclose(params["bias"], bias, rtol=1e-5)


def test_the_recipe_of_imagenet_and_of_few_images():
  size, steps, factor = linear_grid.IMAGENET.schedule(1_281_167)
  assert (size, steps) == (16384, 50 * 78)
  rates = [float(factor(epoch * 78 + 1)) for epoch in (0, 14, 15, 30, 45)]
  np.testing.assert_allclose(rates, [64, 64, 6.4, 0.64, 0.064], rtol=1e-5)
  assert linear_grid.IMAGENET.schedule(90)[:2] == (32, 1000)


def test_the_recipes_of_transfer():
  """Rates over .01 at the start, in the middle and at the end, and epochs."""
  expected = {
    "TRANSFER": (28, 1, 0.1, 0.001), "PLACES": (14, 1, 0.1, 0.001),
    "INATURALIST": (84, 1, 0.1, 0.001), "COUNT": (50, 1, 0.505, 0.01),
    "DISTANCE": (100, 1, 0.505, 0.01),
  }  # fmt: skip
  for name, (epochs, *rates) in expected.items():
    size, steps, factor = getattr(linear_grid, name).schedule(50_000)
    assert (size, steps) == (256, epochs * 195), name
    found = [float(factor(x)) for x in (0, steps // 2, steps)]
    np.testing.assert_allclose(found, rates, rtol=1e-2, err_msg=name)
  few = linear_grid.TRANSFER.schedule(2496)  # smaller batches, smaller rates
  assert few[0] == 32 and float(few[2](0)) == 32 / 256


def test_sgd_takes_the_steps_of_nesterov_with_decay():
  """PyTorch's rule by hand; biases decay as well."""
  velocity, expected = 0.0, 2.0
  params = {"kernel": jnp.full((1, 1), 2.0), "bias": jnp.full(1, 2.0)}
  of = linear_grid._optimizer("sgd", 0.1, 0.5)
  state = of.init(params)
  for gradient in (1.0, -3.0, 0.5):
    decayed = gradient + 0.5 * expected
    velocity = 0.9 * velocity + decayed
    expected -= 0.1 * (decayed + 0.9 * velocity)
    gradients = jax.tree.map(lambda x: jnp.full_like(x, gradient), params)
    updates, state = of.update(gradients, state, params)
    params = jax.tree.map(jnp.add, params, updates)
  for value in jax.tree.leaves(params):
    np.testing.assert_allclose(value, expected, rtol=1e-6)


@pytest.mark.parametrize("row", linear_grid.ROWS, ids=lambda row: row.name)
def test_separable_classes_are_told_apart(row):
  train = test_probes.blobs(90, 5, 3, 0.1, seed=1, labels=[4, -2, 90])
  test = test_probes.blobs(40, 5, 3, 0.1, seed=2, labels=[4, -2, 90])
  test["labels"][:10] = 77  # unseen
  found = row.run(train, test)
  assert (found["top1"], found["unseen"]) == (75, 10)
  recipe = row.run.keywords["recipe"]
  rates = len(recipe.lrs) * len(recipe.weight_decays)
  assert len(found["cells"]) == 2 * rates


@pytest.mark.parametrize(
  "recipe, expected",
  [
    ("CROPS", {100, 200, 300, 400}), ("TRANSFER", {100, 200, 300, 400}),
    ("COUNT", {0, 500}), ("DISTANCE", {0, 500}), ("IMAGENET", {0}),
    ("PLACES", {0}), ("INATURALIST", {0}),
  ],
)  # fmt: skip
def test_a_step_sees_one_of_an_images_views(recipe, expected):
  """Each of them comes, of the right image; without any it is the image."""
  train = test_probes.blobs(30, 5, 3, 0.1)
  shifts = {f"crop {i}": 100 * (i + 1) for i in range(6)} | {"mirror 0": 500}
  train["variants"] = {k: train["features"] + v for k, v in shifts.items()}
  train["variants"]["view 0"] = np.zeros((30, 5))
  rows = np.arange(24).reshape(4, 6) % 7
  recipe = getattr(linear_grid, recipe)
  seen = linear_grid._Grid(train, recipe, 3, 0)._seen(
    train["features"], rows, np.random.default_rng(0)
  )
  shift = seen - train["features"][rows]
  assert set(np.unique(shift.round())) == expected
  assert (np.ptp(shift, axis=-1) < 1e-3).all() and seen.shape == (4, 6, 5)
  (row,) = (x for x in linear_grid.ROWS if x.run.keywords["recipe"] == recipe)
  assert set(row.train_variants) == set(recipe.views) - {"plain"}


def test_what_cannot_be_probed_is_refused():
  train = test_probes.blobs(30, 5, 1, 0.1)
  with pytest.raises(ValueError, match="got 1 class in 30 training images"):
    linear_grid.linear_grid(train, train)


def test_one_image_a_class_has_no_holdout():
  train = test_probes.blobs(30, 5, 3, 0.1)
  rows = [np.argmax(train["labels"] == i) for i in range(3)]
  few = {key: value[rows] for key, value in train.items()}
  recipe = dataclasses.replace(SMALL, lrs=(0.05,))
  found = linear_grid.linear_grid(few, train, recipe=recipe)
  assert found["holdout_top1"] is None and found["cell"].startswith("last lin")
  assert not linear.stratified(few["labels"], 0.1, 0).any()
