import io
import pathlib
import time
import types

import hypothesis
from hypothesis import strategies as st
import jax
import ml_collections
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

from jepa_jax import masks, models
from jepa_jax.data import order, pipeline
from jepa_jax.data import unreadable as unreadable_lib

COUNT = 23  # images in the folder: not a multiple of any batch size below


def colour(index):
  """The one colour of the folder's image of that number, exact in PNG."""
  return (10 * index, 255 - 10 * index, 7)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("images")
  for i in range(COUNT):
    path = root / f"class{i % 3}/{i:03}.png"
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (31 + i, 40 - i), colour(i)).save(path)
  return root


def config(root, *, batch_size=6, **data):
  return ml_collections.ConfigDict(
    {
      "seed": 3,
      "batch_size": batch_size,
      "encoder": {"patch_size": 4},
      "data": {
        "source": "folder",
        "name": str(root),
        "split": "all",
        "data_dir": "",
        "image_size": 24,
        "channels": 3,
        "background": (1.0, 1.0, 1.0),
        "range": "full",
        "max_mib": 9.0,
        "crop_scale": (0.3, 1.0),
        "crop_ratio": (3 / 4, 4 / 3),
        "flip": False,
        "color_jitter": 0.0,
        "blur": 0.0,
        "grayscale": 0.0,
        "solarize": 0.0,
        "rand_augment": (0, 9.0),
        "local_scale": (0.05, 0.1),
        "prefetch": 2,
        "max_unreadable": 3,
        "threads": 0,
        **data,
      },
      "masks": {
        "name": "rasterized",  # the quickest to build
        "num_contexts": 1,
        "num_targets": 3,
        "context_scale": (0.85, 1.0),
        "target_scale": (0.15, 0.2),
        "aspect_ratio": (0.75, 1.5),
        "allow_overlap": False,
        "min_keep": 4,
        "context_patches": 0,
      },
    }
  )


def masked_spec(settings):
  """What I-JEPA declares, from the settings of `config` alone."""
  data, size = settings.data, settings.batch_size
  patch = settings.encoder.patch_size
  sides = models.height_and_width(data.image_size)
  grid = models.patch_grid(*sides, patch)
  shapes = masks.mask_shapes(settings.masks, grid)
  context = (size, shapes.num_contexts, shapes.context_patches)
  targets = (size, shapes.num_targets, shapes.target_patches)
  image = (size, *sides, data.channels)
  spec = jax.ShapeDtypeStruct
  return {
    "image": spec(image, np.uint8),
    "context_ids": spec(context, np.int32),
    "context_valid": spec(context, np.bool_),
    "target_ids": spec(targets, np.int32),
    "target_valid": spec(targets, np.bool_),
  }


def train_dataset(settings, **kwargs):
  return pipeline.train_dataset(settings, masked_spec(settings), **kwargs)


def take(dataset, count):
  iterator = dataset.as_numpy_iterator()
  return [next(iterator) for _ in range(count)]


def numbers(batch):
  """Which image of the folder each row shows: files sort by class first."""
  return (batch["image"][:, 0, 0, 0].astype(int) + 5) // 10


def assert_same(a, b):
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], key)


# --- order ------------------------------------------------------------------


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
  count=st.integers(1, 5000),
  seed=st.integers(0, 2**64 - 1),
  epoch=st.integers(0, 1000),
)
def test_every_epoch_is_a_permutation(count, seed, epoch):
  positions = epoch * count + np.arange(count)
  epochs, index = order.permuted(positions, count, seed)
  assert (epochs == epoch).all()
  np.testing.assert_array_equal(np.sort(index), np.arange(count))


def test_epochs_and_seeds_have_orders_of_their_own():
  count = 1000
  orders = [
    order.permuted(epoch * count + np.arange(count), count, seed)[1]
    for seed in (0, 1)
    for epoch in (0, 1, 2)
  ] + [np.arange(count)]
  for i, a in enumerate(orders):
    for b in orders[:i]:
      assert (a == b).sum() < 10  # 1 is expected
      assert abs(np.corrcoef(a, b)[0, 1]) < 5 / np.sqrt(count)


def test_every_image_goes_to_every_place():
  count, epochs = 12, 6000
  _, index = order.permuted(np.arange(epochs * count), count, seed=0)
  table = np.zeros((count, count))
  np.add.at(table, (np.arange(len(index)) % count, index), 1)
  chi2 = ((table - epochs / count) ** 2).sum() / (epochs / count)
  assert chi2 < 11 * 11 + 5 * np.sqrt(2 * 11 * 11)
  following = index.reshape(epochs, count)
  steps = (following[:, 1:] - following[:, :-1]) % count
  pairs = np.bincount(steps.reshape(-1), minlength=count)[1:]
  expected = epochs * (count - 1) / (count - 1)
  assert np.abs(pairs - expected).max() < 5 * np.sqrt(expected)


def test_seeking_costs_the_same_far_into_a_large_data_set():
  start = time.perf_counter()
  epoch, index = order.permuted(10**11 + np.arange(2048), 1_281_167, seed=0)
  assert time.perf_counter() - start < 1
  assert epoch[0] == 10**11 // 1_281_167
  assert len(np.unique(index)) == 2048


# --- training batches -------------------------------------------------------


def test_batches_have_the_shapes_and_types_declared(folder):
  settings = config(folder)
  dataset = train_dataset(settings)
  (batch,) = take(dataset, 1)
  shapes = masks.mask_shapes(settings.masks, (6, 6))
  k, t = shapes.context_patches, shapes.target_patches
  expected = {
    "image": ((6, 24, 24, 3), np.uint8),
    "context_ids": ((6, 1, k), np.int32),
    "context_valid": ((6, 1, k), bool),
    "target_ids": ((6, 3, t), np.int32),
    "target_valid": ((6, 3, t), bool),
  }
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == expected
  declared = dataset.element_spec
  assert declared.keys() == expected.keys()
  for name, (shape, dtype) in expected.items():
    assert tuple(declared[name].shape) == shape
    assert declared[name].dtype == tf.as_dtype(dtype)


def test_images_need_not_be_square(tmp_path):
  for i in range(6):  # left half one colour, lower half brighter
    pixels = np.zeros((50 + i, 70, 3), np.uint8)
    pixels[:, 35:, 1], pixels[25:, :, 2] = 200, 250
    Image.fromarray(pixels).save(tmp_path / f"{i}.png")
  settings = config(tmp_path, image_size=(24, 40), blur=1.0, flip=True)
  (batch,) = take(train_dataset(settings), 1)
  assert batch["image"].shape == (6, 24, 40, 3)
  assert batch["context_ids"].max() < 6 * 10
  whole = pipeline.evaluation_dataset(settings.data, batch_size=6)
  image = next(whole.as_numpy_iterator())["image"]
  assert image.shape == (6, 24, 40, 3)
  assert (image[:, :, -1, 1] == 200).all() and (image[:, -1, :, 2] == 250).all()
  assert not image[:, 0, 0].any()


def test_any_number_of_channels(tmp_path):
  for i in range(6):
    np.save(tmp_path / f"{i}.npy", np.full((30, 31, 12), 1000 * i, np.uint16))
  settings = config(tmp_path, channels=12, range="5000", blur=0.5)
  (batch,) = take(train_dataset(settings), 1)
  assert batch["image"].shape == (6, 24, 24, 12)
  found = np.sort(batch["image"].reshape(6, -1), axis=0)
  np.testing.assert_array_equal(found, np.tile(found[:, :1], 24 * 24 * 12))
  np.testing.assert_array_equal(found[:, 0], 51 * np.arange(6))
  reasons = unreadable_lib.Unreadable(3)
  few = train_dataset(config(tmp_path, channels=3), unreadable=reasons)
  take(few, 1)
  with pytest.raises(ValueError, match="12 channels; data.channels=3"):
    reasons.check()


def test_every_image_once_an_epoch_across_the_ends_of_epochs(folder):
  batches = take(train_dataset(config(folder)), 2 * COUNT)
  seen = np.concatenate([numbers(batch) for batch in batches])
  for epoch in range(12):
    part = seen[epoch * COUNT : (epoch + 1) * COUNT]
    assert sorted(part) == list(range(COUNT))


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_the_batches_of_one(folder, processes):
  settings = config(folder, batch_size=12)
  whole = take(train_dataset(settings), 5)
  parts = [
    take(
      train_dataset(settings, process_index=i, process_count=processes),
      5,
    )
    for i in range(processes)
  ]
  for batch, *shares in zip(whole, *parts):
    joined = {
      key: np.concatenate([share[key] for share in shares]) for key in batch
    }
    assert_same(joined, batch)


@pytest.mark.parametrize("start", [1, 7])
def test_a_resumed_run_sees_what_an_uninterrupted_one_does(folder, start):
  settings = config(folder)
  settings.masks.update(name="released", num_targets=4, min_keep=3)  # by step
  whole = take(train_dataset(settings), 12)
  resumed = take(train_dataset(settings, start_step=start), 12 - start)
  for a, b in zip(whole[start:], resumed, strict=True):
    assert_same(a, b)


def test_threads_and_prefetching_change_nothing(folder):
  (batch,) = take(train_dataset(config(folder)), 1)
  for changes in ({"threads": 1}, {"threads": 3, "prefetch": 5}):
    (other,) = take(train_dataset(config(folder, **changes)), 1)
    assert_same(batch, other)


def test_an_image_looks_the_same_whatever_the_batch_size(folder):
  small = take(train_dataset(config(folder, batch_size=4)), 3)
  large = take(train_dataset(config(folder, batch_size=12)), 1)
  joined = {k: np.concatenate([x[k] for x in small]) for k in small[0]}
  assert_same(joined, large[0])


def test_another_seed_is_another_run(folder):
  (batch,) = take(train_dataset(config(folder)), 1)
  settings = config(folder)
  settings.seed = 4
  (other,) = take(train_dataset(settings), 1)
  assert (numbers(batch) != numbers(other)).any()


def test_grey_is_made_of_colour(folder):
  (batch,) = take(train_dataset(config(folder, channels=1)), 1)
  assert batch["image"].shape == (6, 24, 24, 1)
  reference = take(train_dataset(config(folder)), 1)[0]["image"]
  grey = np.round(reference @ np.asarray([0.299, 0.587, 0.114]))
  assert np.abs(batch["image"][..., 0] - grey).max() <= 1


def test_colour_jitter_and_blur_change_pixels_and_nothing_else(folder):
  (plain,) = take(train_dataset(config(folder)), 1)
  settings = config(folder, color_jitter=1.0, blur=0.5)
  changed, again = (take(train_dataset(settings), 1) for _ in "ab")
  assert_same(changed[0], again[0])
  assert changed[0].keys() == plain.keys()
  assert (changed[0]["image"] != plain["image"]).mean() > 0.2
  np.testing.assert_array_equal(changed[0]["context_ids"], plain["context_ids"])


def test_views_are_crops_of_one_image_drawn_apart(tmp_path):
  rng = np.random.default_rng(0)
  noise = [rng.integers(0, 256, (40, 30, 3), np.uint8) for _ in range(5)]
  for i, pixels in enumerate(noise):
    pixels[..., 0] = 40 * i  # which image it is
    Image.fromarray(pixels).save(tmp_path / f"{i}.png")
  settings = config(tmp_path, batch_size=4, blur=0.5)
  shapes = {"image": (24, 24, 3), "views": (2, 24, 24, 3)}
  shapes["local_views"] = (3, 8, 12, 3)
  spec = {
    name: jax.ShapeDtypeStruct((4, *shape), np.uint8)
    for name, shape in shapes.items()
  }
  make = lambda spec, **how: pipeline.train_dataset(settings, spec, **how)
  whole = take(make(spec), 3)
  # From any step on, and for the second of two processes.
  (rest,) = take(make(spec, start_step=2, process_index=1, process_count=2), 1)
  assert_same(rest, {name: x[2:] for name, x in whole[2].items()})
  # A view is the same whatever else there is.
  only = {"local_views": spec["local_views"]}
  (alone,) = take(make(only), 1)
  assert_same(alone, {"local_views": whole[0]["local_views"]})
  batch = whole[0]
  assert {k: x.shape[1:] for k, x in batch.items()} == shapes
  which = batch["image"][:, 0, 0, 0]
  assert len({*which}) == 4
  for name in ("views", "local_views"):
    views = batch[name]
    assert (views[..., 0] == which.reshape(-1, 1, 1, 1)).all()
    for i in range(1, views.shape[1]):
      assert (views[:, 0] != views[:, i]).any(axis=(1, 2, 3)).all()
  assert (batch["views"] != batch["image"][:, None]).any(axis=(2, 3, 4)).all()


def test_local_views_show_little(tmp_path):
  rows = np.linspace(0, 255, 80).astype(np.uint8)
  ramp = np.broadcast_to(rows[:, None, None], (80, 80, 3))
  Image.fromarray(ramp).save(tmp_path / "a.png")
  shape = (1, 60, 24, 24, 3)
  spec = jax.ShapeDtypeStruct(shape, np.uint8)
  settings = config(tmp_path, batch_size=1, local_scale=(0.04, 0.09))
  given = settings.to_dict()
  spans = {}
  for name in ("views", "local_views"):
    (batch,) = take(pipeline.train_dataset(settings, {name: spec}), 1)
    spans[name] = np.ptp(batch[name][0].astype(float), axis=(1, 2, 3)) / 255
  # Of a side, at a ratio of 3/4 to 4/3: sqrt(.04 * 3/4) and sqrt(.09 * 4/3).
  assert 0.14 < spans["local_views"].min() < spans["local_views"].max() < 0.36
  assert spans["views"].min() > 0.4
  assert settings.to_dict() == given  # nobody's settings are written to


def test_what_does_not_divide_is_refused(folder):
  with pytest.raises(ValueError, match="batch size 6 .* 4 processes"):
    train_dataset(config(folder), process_count=4)
  with pytest.raises(ValueError, match="22 .* 4; .* divide it: 2, 11"):
    train_dataset(config(folder, image_size=22))
  settings = config(folder)
  settings.masks.min_keep = 36
  with pytest.raises(ValueError, match="needs 36"):
    train_dataset(settings)


def test_a_mixture_keeps_shares_and_orders(folder, tmp_path):
  for i in range(4):
    Image.new("RGB", (30, 30), (240 + i, 0, 0)).save(tmp_path / f"{i}.png")
  settings = config(folder, batch_size=50)
  settings.data.source = "mixture"
  settings.data.name = f"3 folder:{folder} + 1 folder:{tmp_path}"
  assert pipeline.num_examples(settings.data) == COUNT + 4
  batches = take(train_dataset(settings), 40)
  red = np.concatenate([x["image"][:, 0, 0, 0] for x in batches]).astype(int)
  small = red >= 240
  for block in small.reshape(2, 1000):
    assert block.sum() == 250
  for part, size in ((red[small] - 240, 4), ((red[~small] + 5) // 10, COUNT)):
    for epoch in range(3):
      once = part[epoch * size : (epoch + 1) * size]
      assert sorted(once) == list(range(size))
  resumed = take(train_dataset(settings, start_step=33), 1)
  assert_same(resumed[0], batches[33])


def test_processes_share_the_batches_of_a_mixture_without_labels(tmp_path):
  shades = {"a": range(0, 8), "b": range(100, 103), "c": range(200, 205)}
  for name, values in shades.items():
    for value in values:
      path = tmp_path / f"{name}/{value:03}.png"  # no classes: files on top
      path.parent.mkdir(exist_ok=True)
      Image.new("RGB", (30, 30), (value, 0, 0)).save(path)
  settings = config(tmp_path, batch_size=40)
  settings.data.source = "mixture"
  settings.data.name = (
    f"5 folder:{tmp_path}/a + 3 folder:{tmp_path}/b + 2 folder:{tmp_path}/c"
  )
  whole = take(train_dataset(settings), 25)
  red = np.concatenate([x["image"][:, 0, 0, 0] for x in whole])
  parts = np.searchsorted([100, 200], red, "right")
  assert np.bincount(parts).tolist() == [500, 300, 200]
  # In any stretch, a share is off by chance alone: no part comes in a run.
  first = np.bincount(parts[:200], minlength=3) / 200
  assert np.abs(first - (0.5, 0.3, 0.2)).max() < 0.15
  shares = [
    take(train_dataset(settings, process_index=i, process_count=4), 25)
    for i in range(4)
  ]
  for batch, *pieces in zip(whole, *shares, strict=True):
    joined = {k: np.concatenate([x[k] for x in pieces]) for k in batch}
    assert_same(joined, batch)
  settings.seed = 4
  (other,) = take(train_dataset(settings), 1)
  assert (other["image"][:, 0, 0, 0] != red[:40]).any()


# --- what cannot be read ----------------------------------------------------


@pytest.fixture
def damaged(folder, tmp_path):
  """The folder, with a PNG cut, a text file, and an empty one in it."""
  for path in folder.rglob("*.png"):
    target = tmp_path / path.relative_to(folder)
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(path.read_bytes())
  noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), np.uint8)
  file = io.BytesIO()
  Image.fromarray(noise).save(file, "PNG")
  bad = {
    tmp_path / "class0/003.png": (file.getvalue()[:900], "damaged PNG data"),
    tmp_path / "class1/010.png": (b"some text", "not a JPEG"),
    tmp_path / "class2/011.png": (b"", "empty"),
  }
  for path, (data, _) in bad.items():
    path.write_bytes(data)
  return tmp_path, {str(path): reason for path, (_, reason) in bad.items()}


def test_unreadable_images_are_replaced_counted_and_named(damaged):
  root, bad = damaged
  unreadable = unreadable_lib.Unreadable(limit=3)
  dataset = train_dataset(config(root), unreadable=unreadable)
  batches = take(dataset, COUNT)  # six epochs
  assert unreadable.reasons.keys() == bad.keys()
  for name, reason in bad.items():
    assert reason in unreadable.reasons[name]
  unreadable.check()
  lost = {int(pathlib.Path(name).stem) for name in bad}
  seen = {int(n) for batch in batches for n in numbers(batch)}
  assert seen == set(range(COUNT)) - lost


def test_replacement_changes_no_other_row_and_no_mask(folder, damaged):
  sound = take(train_dataset(config(folder)), 8)
  mended = take(train_dataset(config(damaged[0])), 8)
  lost = {int(pathlib.Path(name).stem) for name in damaged[1]}
  replaced = 0
  for a, b in zip(sound, mended):
    rows = ~np.isin(numbers(a), list(lost))
    replaced += (~rows).sum()
    np.testing.assert_array_equal(a["image"][rows], b["image"][rows])
    assert set(numbers(b)) == set(numbers(a)[rows])
    assert_same(*[{k: v for k, v in x.items() if k != "image"} for x in (a, b)])
  assert replaced >= 4


def test_replacement_is_the_same_after_resuming(damaged):
  whole = take(train_dataset(config(damaged[0])), 8)
  resumed = take(train_dataset(config(damaged[0]), start_step=5), 3)
  for a, b in zip(whole[5:], resumed, strict=True):
    assert_same(a, b)


def test_too_many_unreadable_images_stop_the_run_in_one_line(damaged):
  root, bad = damaged
  unreadable = unreadable_lib.Unreadable(limit=2)
  take(train_dataset(config(root), unreadable=unreadable), COUNT)
  with pytest.raises(ValueError) as error:
    unreadable.check()
  assert "3 images" in str(error.value)
  assert "max_unreadable=2" in str(error.value)
  assert any(name in str(error.value) for name in bad)
  assert "\n" not in str(error.value)


def test_a_batch_with_nothing_to_read_stops_the_run(tmp_path):
  for i in range(5):
    (tmp_path / f"{i}.jpg").write_bytes(b"nothing")
  unreadable = unreadable_lib.Unreadable(limit=100)
  settings = config(tmp_path, batch_size=5)
  take(train_dataset(settings, unreadable=unreadable), 1)
  with pytest.raises(ValueError, match="none of the 5 images"):
    unreadable.check()


def test_evaluation_leaves_unreadable_images_out(damaged):
  root, bad = damaged
  unreadable = unreadable_lib.Unreadable(limit=3)
  dataset = pipeline.evaluation_dataset(
    config(root).data, batch_size=5, labels=["label"], unreadable=unreadable
  )
  valid = np.concatenate([x["valid"] for x in dataset.as_numpy_iterator()])
  assert valid.sum() == COUNT - 3
  assert unreadable.reasons.keys() == bad.keys()


# --- evaluation -------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 5, 23, 40])
def test_evaluation_has_every_image_once_and_in_order(folder, batch_size):
  dataset = pipeline.evaluation_dataset(
    config(folder).data, batch_size=batch_size, labels=["label"]
  )
  batches = list(dataset.as_numpy_iterator())
  assert len(batches) == -(-COUNT // batch_size)
  for batch in batches:
    assert batch["image"].shape == (batch_size, 24, 24, 3)
    assert batch["labels"]["label"].shape == (batch_size,)
    assert batch["valid"].shape == (batch_size,)
  valid = np.concatenate([x["valid"] for x in batches])
  assert valid.sum() == COUNT and not valid[COUNT:].any()
  seen = np.concatenate([numbers(x) for x in batches])[:COUNT]
  by_class = sorted(range(COUNT), key=lambda i: (i % 3, i))
  assert seen.tolist() == by_class
  labels = np.concatenate([x["labels"]["label"] for x in batches])[:COUNT]
  assert labels.tolist() == [i % 3 for i in by_class]
  assert pipeline.num_examples(config(folder).data) == COUNT


def test_evaluation_twice_is_the_same(folder):
  dataset = pipeline.evaluation_dataset(config(folder).data, batch_size=7)
  for a, b in zip(dataset, dataset, strict=True):
    assert set(a) == {"image", "valid", "labels"} and not a["labels"]
    np.testing.assert_array_equal(a["image"], b["image"])


def test_evaluation_names_the_labels_there_are(folder):
  with pytest.raises(ValueError, match='no label "colour"; there are: label'):
    pipeline.evaluation_dataset(
      config(folder).data, batch_size=7, labels=["colour"]
    )


def test_tensorflow_sees_no_accelerator():
  assert not tf.config.get_visible_devices("GPU")
  assert not tf.config.get_visible_devices("TPU")
  with pytest.raises((ValueError, RuntimeError)):
    # Fixed when the room was imported: nothing may bring devices back.
    tf.config.set_visible_devices([types.SimpleNamespace()], "GPU")


def test_random_bits_are_of_the_image_and_the_epoch(config):
  provide = pipeline._keys(config, {})
  draw = lambda epoch, index: provide(
    0, {"epoch": np.array(epoch), "index": np.array(index)}
  )["key"].numpy()
  bits = draw([0, 0, 1, 1], [5, 6, 5, 6])
  assert bits.dtype == np.uint32 and len({tuple(x) for x in bits}) == 4
  np.testing.assert_array_equal(draw([1, 0], [6, 5]), bits[[3, 0]])
