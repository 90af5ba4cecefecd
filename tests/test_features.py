import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.evaluation import bank as bank_lib
from jepa_jax.evaluation import features
from jepa_jax.evaluation.protocols import knn, linear

PIXELS = {"pixels": features.raw_pixels}
RANDOM = np.random.default_rng(0)


def batches(count, batch_size, shape=(6, 4, 3)):
  """Batches of one size, the last padded, as the pipeline gives them."""
  images = RANDOM.integers(0, 256, (count, *shape), np.uint8)
  labels = np.arange(count, dtype=np.int32)
  result = []
  for start in range(0, count, batch_size):
    rows = np.arange(start, start + batch_size)
    valid = rows < count
    rows = np.where(valid, rows, 0)
    result.append(
      {
        "image": images[rows],
        "labels": {"number": labels[rows]},
        "valid": valid,
      }
    )
  return images, labels, result


def test_extract_keeps_order_and_drops_padding():
  images, labels, dataset = batches(count=11, batch_size=4)
  compilations = []

  @jax.jit
  def encode(images):
    compilations.append(images.shape)
    return images.mean(axis=(1, 2)).astype(jnp.bfloat16)

  encoders = {"mean": encode, "pixels": features.raw_pixels}
  result = features.extract(encoders, dataset, total=11, progress=False)
  assert result["features"]["mean"].dtype == np.float32
  np.testing.assert_array_equal(result["labels"]["number"], labels)
  np.testing.assert_allclose(
    result["features"]["mean"], images.mean(axis=(1, 2)), rtol=1e-2
  )
  np.testing.assert_allclose(
    result["features"]["pixels"], images.reshape(11, -1) / 255, rtol=1e-6
  )
  assert compilations == [(4, 6, 4, 3)]


def test_features_stand_on_the_host_once(monkeypatch):
  """What a bank, and a probe of it, add is less than half of their bytes."""
  monkeypatch.setattr(bank_lib, "CHUNK", 40_000)
  monkeypatch.setattr(features, "STATISTICS_CHUNK", 40_000)
  monkeypatch.setattr(linear, "TEST_CHUNK", 400)
  labels = np.arange(8000) % 3
  train, test = (
    {
      "features": RANDOM.normal(size=(8000, 90)).astype(np.float32),
      "labels": labels,
    }
    for _ in range(2)
  )
  tracemalloc.start()
  try:
    held = 2 * train["features"].nbytes  # those of train and test
    bank_lib.Bank(train["features"], unit=True)
    assert tracemalloc.get_traced_memory()[1] < 0.4 * held
    linear.linear_probe(train, test, strengths=(0.1,), max_iterations=3)
    knn.nearest_neighbours(train, test, chunk=100)
    assert tracemalloc.get_traced_memory()[1] < 0.5 * held
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize("limit, shards", [(None, 1), (99, 2), (30_000, 1)])
def test_a_bank_is_split_where_no_device_holds_it(limit, shards, monkeypatch):
  class Device:
    def memory_stats(self):
      return limit and {"bytes_limit": limit}

  monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
  monkeypatch.setattr(jax, "devices", lambda: [1, 2])
  assert len(bank_lib._devices(10_000)) == shards


def test_extract_without_valid_keeps_every_row():
  _, _, dataset = batches(count=8, batch_size=4)
  for batch in dataset:
    del batch["valid"]
  result = features.extract(PIXELS, dataset, total=8, progress=False)
  assert result["features"]["pixels"].shape == (8, 6 * 4 * 3)


def test_extract_reads_a_tf_dataset():
  tf = pytest.importorskip("tensorflow")
  images, labels, dataset = batches(count=5, batch_size=3)
  dataset = tf.data.Dataset.from_tensor_slices(
    jax.tree.map(lambda *x: np.stack(x), *dataset)
  )
  result = features.extract(PIXELS, dataset, total=5, progress=False)
  np.testing.assert_array_equal(result["labels"]["number"], labels)
  np.testing.assert_allclose(
    result["features"]["pixels"], images.reshape(5, -1) / 255, rtol=1e-6
  )


def test_extract_shows_progress_in_images(capsys):
  _, _, dataset = batches(count=11, batch_size=4)
  features.extract(PIXELS, dataset, total=11, description="features of train")
  shown = capsys.readouterr().err
  assert "features of train" in shown and "11/11" in shown


@pytest.mark.parametrize(
  "encode, message",
  [
    (lambda x: x.reshape(4, 6, -1), "average over the patches"),
    (lambda x: x.reshape(4, -1)[:3], "for 4 images"),
    (lambda x: np.full((4, 2), np.nan), "7 of 7 images are not finite"),
  ],
)
def test_extract_refuses_bad_features(encode, message):
  _, _, dataset = batches(count=7, batch_size=4)
  with pytest.raises(ValueError, match=message):
    features.extract({"x": encode}, dataset, total=7, progress=False)


def test_extract_refuses_an_empty_dataset():
  with pytest.raises(ValueError, match="at least one"):
    features.extract(PIXELS, [], total=3, progress=False)


def test_an_image_is_read_once_and_its_features_are_held_once():
  _, _, dataset = batches(count=11, batch_size=4)
  reads = []

  def stream():
    for batch in dataset:
      reads.append(len(batch["image"]))
      yield batch

  encoders = {name: features.raw_pixels for name in "abc"}
  result = features.extract(encoders, stream(), total=12, progress=False)
  assert reads == [4, 4, 4]
  for found in result["features"].values():
    assert found.shape == (11, 72) and found.base.shape == (12, 72)


def test_small_images_are_their_own_features():
  images = RANDOM.integers(0, 256, (3, 28, 20, 1), np.uint8)
  np.testing.assert_allclose(
    features.raw_pixels(images), images.reshape(3, -1) / 255, rtol=1e-6
  )


def test_large_images_are_averaged_over_equal_areas():
  images = RANDOM.integers(0, 256, (2, 48, 12, 3), np.uint8)
  expected = images.reshape(2, 16, 3, 12, 3).mean(axis=2) / 255
  np.testing.assert_allclose(
    features.raw_pixels(images), expected.reshape(2, -1), rtol=1e-5
  )


def test_reduction_by_a_fraction_keeps_mean_and_constants():
  images = RANDOM.integers(0, 256, (2, 37, 41, 3), np.uint8)
  reduced = features.raw_pixels(images).reshape(2, 16, 16, 3)
  np.testing.assert_allclose(
    reduced.mean(axis=(1, 2)), images.mean(axis=(1, 2)) / 255, rtol=1e-5
  )
  constant = features.raw_pixels(np.full((2, 37, 41, 3), 51, np.uint8))
  np.testing.assert_allclose(constant, 0.2, rtol=1e-5)
