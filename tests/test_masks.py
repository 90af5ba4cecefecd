import json
import math

import conftest
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import mask_statistics
import numpy as np
import pytest
import tensorflow as tf

from jepa_jax import config as config_lib
from jepa_jax import masks
from jepa_jax.data import tf_masks
from jepa_jax.masks import counter_rng, rectangles

REFERENCE = conftest.DATA / "multiblock_statistics.json"
# What a sampler needs beside the defaults, to have a legal mask on small grids.
SAMPLERS = {
  "released": {"min_keep": 2},
  "corrected": {},
  "block": {"num_targets": 1, "target_scale": (0.4, 0.6)},
  "random": {"num_targets": 2, "target_scale": (0.2, 0.35)},
  "rasterized": {"num_targets": 3},
  "union": {},
}
BLOCKS = ("released", "corrected", "block")
NO_LEAK = ("corrected", "block", "random", "rasterized", "union")


def config(name="released", **changes):
  return {
    "name": name,
    "num_contexts": 1,
    "num_targets": 4,
    "context_scale": (0.85, 1.0),
    "target_scale": (0.15, 0.2),
    "aspect_ratio": (0.75, 1.5),
    "allow_overlap": False,
    "min_keep": 4,
    "context_patches": 0,
    **SAMPLERS[name],
    **changes,
  }


def draw(settings, grid, count=50, *, seed=0, step=0, epoch=0, first=0, xp=np):
  index = np.arange(first, first + count)
  drawn = masks.sample(
    settings, grid, seed=seed, step=step, epoch=epoch, index=index, xp=xp
  )
  return {key: np.asarray(value) for key, value in drawn.items()}


def members(ids, valid, patches):
  """bool [B, *, N] from ids and validity [B, *, K]."""
  result = np.zeros((*ids.shape[:2], patches), bool)
  i, j, k = np.nonzero(valid)
  result[i, j, ids[i, j, k]] = True
  return result


def sets(drawn, grid):
  n = math.prod(grid)
  return (
    members(drawn["context_ids"], drawn["context_valid"], n),
    members(drawn["target_ids"], drawn["target_valid"], n),
  )


def test_every_sampler_is_under_test():
  assert set(SAMPLERS) == set(masks.SAMPLERS)


def check_promises(settings, grid, drawn):
  """What every sampler promises of every batch."""
  name, shapes = settings["name"], masks.mask_shapes(settings, grid)
  sizes = {
    "context": (shapes.num_contexts, shapes.context_patches),
    "target": (shapes.num_targets, shapes.target_patches),
  }
  context, target = sets(drawn, grid)
  for kind, size in sizes.items():
    ids, valid = drawn[f"{kind}_ids"], drawn[f"{kind}_valid"]
    assert ids.dtype == np.int32 and valid.dtype == bool
    assert ids.shape[1:] == valid.shape[1:] == size
    assert ids.min() >= 0 and ids.max() < math.prod(grid)
    assert (ids[~valid] == 0).all(), "padding is 0"
    assert (valid[..., 1:] <= valid[..., :-1]).all(), "valid ones come first"
    later = valid[..., 1:]
    assert (np.diff(ids)[later] > 0).all(), "ascending, hence unique"
    assert valid[..., 0].all(), "no empty set"
  if name in NO_LEAK and not settings["allow_overlap"]:
    assert not (context & target.any(1, keepdims=True)).any()
    least = min(max(settings["min_keep"], 1), shapes.context_patches)
    assert drawn["context_valid"].sum(-1).min() >= least
  if name in ("random", "rasterized"):
    assert target.sum(1).max() == 1, "targets are disjoint"
  if name in BLOCKS:
    box = target.reshape(*target.shape[:2], *grid)
    rows, columns = box.any(3), box.any(2)
    area = rows.sum(2) * columns.sum(2)
    assert (area == box.sum((2, 3))).all(), "a block is a full rectangle"
    for line in (rows, columns):  # and has no gap
      steps = np.diff(np.pad(line, ((0, 0), (0, 0), (1, 1))).astype(int))
      assert (np.abs(steps).sum(2) == 2).all()


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("name", SAMPLERS)
def test_promises_hold_for_any_settings(name, data):
  grid = data.draw(st.tuples(st.integers(3, 17), st.integers(3, 17)))
  low = data.draw(st.floats(0.05, 0.3))
  contexts = 1 if name == "rasterized" else data.draw(st.integers(1, 3))
  targets = data.draw(st.integers(1, 5))
  aspect = data.draw(st.floats(0.5, 1.0))
  settings = config(
    name,
    num_contexts=contexts,
    num_targets=3 if name == "rasterized" else targets,
    context_scale=(data.draw(st.floats(0.4, 0.9)), 1.0),
    target_scale=(low, low + data.draw(st.floats(0, 0.15))),
    aspect_ratio=(aspect, aspect + data.draw(st.floats(0, 1))),
    allow_overlap=data.draw(st.booleans()),
    min_keep=data.draw(st.integers(0, 6)),
  )
  try:
    masks.mask_shapes(settings, grid)
  except ValueError as error:  # a clear refusal is a right answer
    assert "masks." in str(error)
    return
  drawn = draw(settings, grid, 40, seed=data.draw(st.integers(0, 2**64 - 1)))
  check_promises(settings, grid, drawn)


def check_agreement(settings, grid, count, *, seed, step, epoch, first):
  """NumPy, jitted JAX and TensorFlow draw the same masks."""
  options = {"seed": seed, "step": step, "epoch": epoch}
  expected = draw(settings, grid, count, first=first, **options)

  @jax.jit
  def in_jax(step, epoch, index):
    return masks.sample(
      settings, grid, seed=seed, step=step, epoch=epoch, index=index
    )

  @tf.function
  def in_tensorflow(step, epoch, index):
    return tf_masks.sample(
      settings, grid, seed=seed, step=step, epoch=epoch, index=index
    )

  arrays = (np.int64(step), np.full(count, epoch), np.arange(count) + first)
  from_jax = in_jax(*(jnp.asarray(x, jnp.int32) for x in arrays))
  from_tensorflow = in_tensorflow(*map(tf.constant, arrays))
  for key, value in expected.items():
    np.testing.assert_array_equal(from_jax[key], value, key)
    np.testing.assert_array_equal(from_tensorflow[key], value, key)
    assert from_jax[key].dtype == from_tensorflow[key].dtype == value.dtype
  return expected


@pytest.mark.parametrize("name", SAMPLERS)
def test_numpy_jax_and_tensorflow_draw_the_same_masks(name):
  check_agreement(config(name), (9, 14), 33, seed=5, step=7, epoch=3, first=11)


@pytest.mark.parametrize(
  "settings, grid",
  [
    (config("released", min_keep=3, context_scale=(0.3, 0.3)), (6, 5)),
    (config("corrected", target_scale=(0.5, 0.6), min_keep=6), (4, 5)),
  ],
)
def test_they_agree_where_most_first_draws_are_illegal(settings, grid):
  drawn = check_agreement(settings, grid, 64, seed=0, step=0, epoch=0, first=0)
  check_promises(settings, grid, drawn)


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_image_has_its_masks_whatever_its_batch(name):
  grid = (9, 8)
  whole = draw(config(name), grid, 30, step=4, epoch=2)
  for part in (slice(0, 7), slice(7, 30)):
    alone = draw(
      config(name),
      grid,
      part.stop - part.start,
      step=4,
      epoch=2,
      first=part.start,
    )
    for key in whole:
      np.testing.assert_array_equal(alone[key], whole[key][part])


@pytest.mark.parametrize("name", SAMPLERS)
def test_seed_epoch_and_image_each_change_the_masks(name):
  base = draw(config(name), (9, 8), 30)
  for change in ({"seed": 1}, {"seed": 2**32}, {"epoch": 1}, {"first": 30}):
    other = draw(config(name), (9, 8), 30, **change)
    same = (base["context_ids"] == other["context_ids"]).all((1, 2))
    # Four quadrants repeat by chance for a quarter of the images.
    assert same.mean() < 0.6, change


def test_released_draws_shapes_once_a_batch_and_corrected_every_block():
  def areas(name, step):
    valid = draw(config(name), (16, 16), step=step)["target_valid"]
    return set(valid.sum(-1).reshape(-1).tolist())

  released = [areas("released", step) for step in range(20)]
  assert all(len(batch) == 1 for batch in released)
  assert len(set.union(*released)) > 2
  assert len(areas("corrected", 0)) > 5


# --- the released sampler ---------------------------------------------------


def test_released_has_the_statistics_of_the_released_code():
  rows = mask_statistics.compare(json.loads(REFERENCE.read_text()))
  assert len(rows) == 80
  assert not mask_statistics.failures(rows)


def test_the_statistics_tell_another_sampler_apart():
  reference = json.loads(REFERENCE.read_text())
  reference["grids"] = {"14x14": reference["grids"]["14x14"]}
  rows = mask_statistics.compare(reference, "corrected")
  failed = mask_statistics.failures(rows)
  failed = {row.statistic.split(":")[0] for row in failed}
  assert {"target coverage", "context coverage"} <= failed


def test_released_shapes_follow_from_one_uniform_number():
  # u = 0: area floor(.15 * 256) = 38, aspect .75: round(sqrt(28.5)) = 5 by
  # round(sqrt(50.7)) = 7. u = 1: area 51, aspect 1.5: 9 x 6.
  shapes = rectangles.enumerate_shapes(
    (0.15, 0.2), (0.75, 1.5), (16, 16), released=True
  )
  ends = shapes.table[[0, -1]]
  assert shapes.heights[ends].tolist() == [5, 9]
  assert shapes.widths[ends].tolist() == [7, 6]
  assert sorted(set(shapes.areas.tolist())) == [35, 36, 42, 48, 54]
  assert sum(shapes.frequencies().values()) == pytest.approx(1)


def test_released_never_reaches_the_last_row_and_column():
  grid = (9, 7)
  drawn = draw(config("released", context_scale=(1, 1)), grid, 300)
  for covered in sets(drawn, grid):
    covered = covered.any((0, 1)).reshape(grid)
    assert not covered[-1].any() and not covered[:, -1].any()
    assert covered[:-1, :-1].any()


def released_context_size(rng, grid, target, context, m, min_keep):
  """One image of the released procedure, attempt by attempt."""
  free = []
  for _ in range(m):
    top = rng.integers(grid[0] - target[0])
    left = rng.integers(grid[1] - target[1])
    outside = np.ones(grid, bool)
    outside[top : top + target[0], left : left + target[1]] = False
    free.append(outside)
  failures = 0
  while True:
    top = rng.integers(grid[0] - context[0])
    left = rng.integers(grid[1] - context[1])
    block = np.zeros(grid, bool)
    block[top : top + context[0], left : left + context[1]] = True
    for outside in free[: max(m - failures // 20, 0)]:
      block &= outside
    if block.sum() > min_keep:
      leak = (block & ~np.all(free, 0)).any()
      return block.sum(), leak
    failures += 1


def test_released_leaks_as_often_as_the_procedure_step_by_step():
  grid, m, min_keep = (6, 5), 3, 7
  settings = config(
    "released",
    num_targets=m,
    min_keep=min_keep,
    target_scale=(0.4, 0.4),  # 12 patches: 3 x 4
    aspect_ratio=(0.8, 0.8),
    context_scale=(0.6, 0.6),  # 18 patches: 4 x 4
    context_patches=30,
  )
  count, rng = 3000, np.random.default_rng(0)
  drawn = draw(settings, grid, count)
  context, target = sets(drawn, grid)
  leaks = (context & target.any(1, keepdims=True)).any((1, 2))
  procedure = [
    released_context_size(rng, grid, (3, 4), (4, 4), m, min_keep)
    for _ in range(count)
  ]
  expected_sizes, expected_leaks = map(np.asarray, zip(*procedure))
  assert 0.02 < expected_leaks.mean() < 0.98
  error = math.sqrt(0.25 * 2 / count)
  assert abs(leaks.mean() - expected_leaks.mean()) < 4 * error
  # Two-sample Kolmogorov-Smirnov at 1e-4.
  sizes = context.sum((1, 2))
  values = np.arange(31)[:, None]
  distance = (sizes <= values).mean(1) - (expected_sizes <= values).mean(1)
  assert np.abs(distance).max() < 2.23 * math.sqrt(2 / count)


def test_released_keeps_the_first_patches_and_corrected_a_random_subset():
  grid = (14, 14)
  whole = {
    name: sets(draw(config(name, context_patches=196), grid, 2000), grid)[0]
    for name in ("released", "corrected")
  }
  for name, every in whole.items():
    cut = sets(draw(config(name, context_patches=30), grid, 2000), grid)[0]
    assert (cut <= every).all()
    if name == "released":
      np.testing.assert_array_equal(cut, every & (every.cumsum(-1) <= 30))
      continue
    # Kept patches have no place of their own: half of them lie in the half
    # that comes first, within five standard errors.
    half = every.cumsum(-1) <= every.sum(-1, keepdims=True) / 2
    first = (cut & half).sum() / cut.sum()
    wanted = (every & half).sum() / every.sum()
    assert abs(first - wanted) < 5 * math.sqrt(0.25 / cut.sum())
    spread = (cut & half).sum(-1).std()
    assert 2 < spread < 3.5  # hypergeometric: sqrt(30 / 4) less a little


# --- the corrected sampler --------------------------------------------------


def test_corrected_corners_are_uniform_over_every_place():
  grid, count = (6, 8), 20000
  settings = config(
    "corrected", num_targets=2, target_scale=(0.25, 0.25), aspect_ratio=(1, 1)
  )  # 3 x 3
  ids = draw(settings, grid, count)["target_ids"][..., 0]
  corners = np.bincount(ids.reshape(-1), minlength=48).reshape(grid)
  assert (corners[4:] == 0).all() and (corners[:, 6:] == 0).all()
  counts = corners[:4, :6]
  expected = 2 * count / 24
  chi2 = ((counts - expected) ** 2 / expected).sum()
  assert chi2 < 63  # 23 degrees of freedom, p = 1.4e-5


def test_corrected_reaches_last_row_and_column_like_the_first():
  grid, count = (8, 8), 20000
  _, target = sets(draw(config("corrected"), grid, count), grid)
  covered = target.reshape(-1, *grid).mean(0)
  for mirrored in (covered[::-1], covered[:, ::-1]):
    assert np.abs(covered - mirrored).max() < 5 * math.sqrt(0.5 / (4 * count))
  assert covered[-1].min() > 0 and covered[:, -1].min() > 0


def test_corrected_scale_and_aspect_ratio_are_independent():
  def correlation(released):
    shapes = rectangles.enumerate_shapes(
      (0.1, 0.3), (0.5, 2.0), (64, 64), released=released
    )
    area = shapes.areas[shapes.table].astype(float)
    aspect = (shapes.heights / shapes.widths)[shapes.table]
    return np.corrcoef(area, aspect)[0, 1]

  assert correlation(released=True) > 0.95
  assert abs(correlation(released=False)) < 0.05


def test_corrected_falls_back_to_a_legal_mask_where_most_draws_fail():
  grid = (4, 4)
  settings = config("corrected", target_scale=(0.5, 0.55), min_keep=7)
  drawn = draw(settings, grid, 500)
  check_promises(settings, grid, drawn)
  _, target = sets(drawn, grid)
  copies = (target == target[:, :1]).all((1, 2))
  assert 0.05 < copies.mean() < 1


# --- sizes and errors -------------------------------------------------------


@pytest.mark.parametrize(
  "side, k, t", [(16, 68, 54), (14, 51, 40), (8, 12, 12)]
)
def test_k_is_what_the_released_recipe_trains_on(side, k, t):
  shapes = masks.mask_shapes(config("released"), (side, side))
  assert abs(shapes.context_patches - k) <= 1
  assert shapes.target_patches == t
  assert shapes.context_padding < 0.005


@pytest.mark.parametrize("name", SAMPLERS)
def test_padding_is_as_reported(name):
  grid = (12, 10)
  shapes = masks.mask_shapes(config(name), grid)
  parts = [draw(config(name), grid, 8, step=s, first=8 * s) for s in range(400)]
  for kind in ("context", "target"):
    valid = np.concatenate([part[f"{kind}_valid"] for part in parts])
    reported = getattr(shapes, f"{kind}_padding")
    assert abs(1 - valid.mean() - reported) < 0.02


def test_union_is_the_union_of_corrected_targets():
  grid = (10, 11)
  union = draw(config("union"), grid, 60)
  separate = draw(config("corrected"), grid, 60)
  _, targets = sets(separate, grid)
  _, target = sets(union, grid)
  assert target.shape[1] == 1
  assert (target[:, 0] <= targets.any(1)).all()
  size = masks.mask_shapes(config("union"), grid).target_patches
  whole = np.minimum(targets.any(1).sum(1), size)
  np.testing.assert_array_equal(target.sum((1, 2)), whole)
  np.testing.assert_array_equal(union["context_ids"], separate["context_ids"])


@pytest.mark.parametrize("name", ("block", "random"))
def test_context_is_all_but_the_targets(name):
  grid = (7, 6)
  context, target = sets(draw(config(name, context_patches=42), grid), grid)
  np.testing.assert_array_equal(context[:, 0], ~target.any(1))


def test_random_patches_are_equally_likely_alone_and_in_pairs():
  grid, count = (5, 7), 20000
  settings = config("random", num_contexts=3, context_patches=6)
  for kept in sets(draw(settings, grid, count), grid):
    for i in range(kept.shape[1]):
      members = kept[:, i].astype(float)
      share = members.sum() / members.size
      both = members.T @ members / count
      alone, pairs = np.diag(both), both[~np.eye(35, dtype=bool)]
      assert np.abs(alone - share).max() < 5 * math.sqrt(share / count)
      wanted = ((members.sum(1) * (members.sum(1) - 1)).mean()) / (35 * 34)
      assert np.abs(pairs - wanted).max() < 5 * math.sqrt(wanted / count)


def test_random_contexts_are_cut_at_places_of_their_own():
  grid = (5, 7)  # 35 less two targets of 7 to 12: at least 11 for the context
  cut = sets(
    draw(config("random", num_contexts=2, context_patches=5), grid), grid
  )[0]
  assert not (cut[:, 0] & cut[:, 1]).any()
  assert (cut.sum(-1) == 5).all()


def test_rasterized_takes_every_quadrant_as_context_equally_often():
  context, target = sets(draw(config("rasterized"), (6, 8), 4000), (6, 8))
  assert (context.sum((1, 2)) == 12).all() and (target.sum(2) == 12).all()
  corner = context[:, 0].reshape(-1, 6, 8)[:, [0, 0, 5, 5], [0, 7, 0, 7]]
  assert (corner.sum(1) == 1).all()
  assert np.abs(corner.mean(0) - 0.25).max() < 5 * math.sqrt(0.19 / 4000)


def test_nothing_need_be_said():
  """What is left out is as in the config's defaults: the released masks."""
  settings = {**config_lib.defaults().masks}
  for given, whole in (
    ((), settings),
    (({"num_targets": 3},), settings | {"num_targets": 3}),
  ):
    expected = masks.sample(
      whole, (14, 14), seed=0, step=0, epoch=0, index=np.zeros(1, int)
    )
    assert expected["target_ids"].shape[:2] == (1, whole["num_targets"])
    jax.tree.map(np.testing.assert_array_equal, masks.sample(*given), expected)


@pytest.mark.parametrize(
  "settings, grid, words_of_it",
  [
    ({"name": "relaesd"}, (8, 8), ["relaesd", "released", "corrected"]),
    ({"num_target": 3}, (8, 8), ["num_target", 'did you mean "num_targets"']),
    ({"min_keep": 10}, (8, 8), ["target", "9 patches", "min_keep=10"]),
    ({"min_keep": 0}, (2, 2), ["0 patches", "2x2", "target_scale"]),
    ({"context_scale": (0.9, 0.5)}, (8, 8), ["context_scale", "0.9"]),
    ({"target_scale": (0.5, 1.5)}, (8, 8), ["target_scale", "<= 1"]),
    ({"num_targets": 0}, (8, 8), ["num_targets is 0"]),
    ({"context_patches": 65}, (8, 8), ["context_patches is 65", "8x8"]),
    ({"name": "corrected", "min_keep": 60}, (8, 8), ["60", "12 patches"]),
    ({"name": "corrected"}, (2, 2), ["0 patches", "target_scale"]),
    ({"name": "block", "target_scale": (1, 1)}, (4, 4), ["16 patches"]),
    (
      {"name": "random", "target_scale": (0.2, 0.3)},
      (8, 8),
      ["4 disjoint targets of up to 19 patches"],
    ),
    ({"name": "rasterized"}, (8, 8), ["num_targets is 4", "3"]),
    ({"name": "rasterized", "num_targets": 3}, (3, 3), ["1 patches"]),
  ],
)
def test_what_cannot_be_says_so(settings, grid, words_of_it):
  base = {**config(), "min_keep": 4}
  with pytest.raises(ValueError) as error:
    masks.mask_shapes({**base, **settings}, grid)
  for word in words_of_it:
    assert word in str(error.value)


# --- random words -----------------------------------------------------------


def test_words_are_uniform_and_uncorrelated():
  key = counter_rng.fold_in(
    np, counter_rng.stream_key(0, 1), np.arange(20000, dtype=np.uint32)
  )
  drawn = counter_rng.random_bits(np, key, 5) / 2.0**32
  assert abs(drawn.mean() - 0.5) < 5 * math.sqrt(1 / 12 / drawn.size)
  table = np.histogram(drawn, 64, (0, 1))[0]
  assert ((table - drawn.size / 64) ** 2).sum() / (drawn.size / 64) < 130
  correlation = np.corrcoef(drawn.T) - np.eye(5)
  assert np.abs(correlation).max() < 5 / math.sqrt(20000)
  next_key = np.corrcoef(drawn[1:, 0], drawn[:-1, 0])[0, 1]
  assert abs(next_key) < 5 / math.sqrt(20000)


def test_streams_of_a_seed_differ():
  keys = {
    int(counter_rng.stream_key(seed, stream)[0])
    for seed in (0, 1, 2**32, 2**63)
    for stream in (1, 2, 3, 4)
  }
  assert len(keys) == 16


@pytest.mark.parametrize("n", [1, 2, 35, 256])
def test_permutations_hold_every_number_once(n):
  key = counter_rng.fold_in(
    np, counter_rng.stream_key(0, 1), np.arange(999, dtype=np.uint32)
  )
  orders = counter_rng.permutation(np, key, n)
  np.testing.assert_array_equal(
    np.sort(orders), np.broadcast_to(np.arange(n), (999, n))
  )
  assert len(np.unique(orders, axis=0)) == min(math.factorial(min(n, 8)), 999)
