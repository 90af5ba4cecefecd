"""Changed images, and the protocols that look at their features."""

import io

import numpy as np
from PIL import Image
import pytest
import test_probes

from jepa_jax.evaluation import variants
from jepa_jax.evaluation.protocols import lidar, retrieval, robustness


def picture(height=22, width=31, channels=3):
  """Two smooth ramps and some texture, far from 0 and 255."""
  y, x = np.mgrid[:height, :width]
  flat = 110 + 2 * y - x + 9 * ((x // 3 + y // 4) % 2)
  return np.stack([flat + 7 * c for c in range(channels)], -1).astype(np.uint8)


ALL = (*variants.corruptions(), "view 0", "crop 7", "mirror 0")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_a_change_is_of_the_image_alone(name, channels):
  """Not of its batch: neither size nor place nor process matter."""
  images = np.stack([picture(channels=channels), picture(channels=channels)])
  images[1] += 3
  changed = variants.apply(name, images)
  assert changed.shape == images.shape and changed.dtype == np.uint8
  assert (changed != images).any()
  alone = variants.apply(name, images[1:])
  np.testing.assert_array_equal(alone[0], changed[1])


def test_noise_has_the_deviation_of_its_level_and_each_level_its_own():
  grey = np.full((1, 120, 90, 3), 128, np.uint8)
  for level, deviation in enumerate((0.08, 0.12), start=1):
    noise = variants.apply(f"noise {level}", grey).astype(float) - 128
    assert noise.std() == pytest.approx(255 * deviation, rel=0.02)
    assert abs(noise.mean()) < 0.5


def test_mirror_contrast_and_brightness_by_hand():
  image = picture()[None]
  np.testing.assert_array_equal(
    variants.apply("mirror 0", image), image[:, :, ::-1]
  )
  mean = image.astype(float).mean(axis=(1, 2), keepdims=True)
  expected = mean + 0.2 * (image - mean)
  np.testing.assert_allclose(
    variants.apply("contrast 3", image), expected, atol=0.51
  )
  np.testing.assert_allclose(
    variants.apply("brightness 2", image),
    np.minimum(image + 51.0, 255),
    atol=0.51,
  )


def test_blur_spreads_a_point_and_keeps_its_mass():
  image = np.zeros((1, 56, 56, 1), np.uint8)
  image[0, 28, 28] = 255
  blurred = variants.apply("blur 5", image)[0, ..., 0].astype(float)
  x = np.arange(-28, 28)
  bell = np.exp(-(x**2) / 2 / 1.5**2)  # 6 pixels of 224 are 1.5 of 56
  bell /= bell.sum()
  np.testing.assert_allclose(blurred, 255 * np.outer(bell, bell), atol=0.6)


def test_jpeg_is_that_of_its_quality():
  file = io.BytesIO()
  Image.fromarray(picture()).save(file, "JPEG", quality=10)
  expected = np.asarray(Image.open(file))
  changed = variants.apply("jpeg 4", picture()[None])[0]
  np.testing.assert_array_equal(changed, expected)
  with pytest.raises(ValueError, match="1 or 3 channels, and these have 2"):
    variants.apply("jpeg 1", picture(channels=2)[None])


def test_views_are_crops_of_their_scale_and_half_are_mirrored():
  """On a ramp a crop's range says its width, and its direction a mirror."""
  ramp = np.tile(np.arange(200, dtype=np.uint8), (200, 1))[None, ..., None]
  for name, (low, _) in variants.CROPS.items():
    rows = [
      variants.apply(f"{name} {i}", ramp)[0, 0, :, 0].astype(int)
      for i in range(60)
    ]
    widths = np.asarray([abs(row[-1] - row[0]) + 1 for row in rows])
    mirrored = np.mean([row[0] > row[-1] for row in rows])
    assert 0.25 < mirrored < 0.75
    assert widths.min() > 0.95 * 200 * np.sqrt(low * 3 / 4)
    assert np.mean(widths) < 195
  assert len({tuple(row) for row in rows}) > 50


def test_encoders_see_changed_images_under_names_of_their_own():
  encode = {"a": lambda x: x.mean(axis=(1, 2)), "a patches": lambda x: x}
  found = variants.encoders(encode, ["a"], {"brightness 1", "contrast 5"})
  assert list(found) == [
    "a", "a patches", "a @ brightness 1", "a @ contrast 5",
  ]  # fmt: skip
  features = {name: of(picture()[None]) for name, of in found.items()}
  mine = variants.of("a", features, slice(1, None))
  assert list(mine) == ["brightness 1", "contrast 5"]
  expected = features["a"][:, 1:] + 25.5
  np.testing.assert_allclose(mine["brightness 1"], expected, atol=0.6)


# --- robustness -------------------------------------------------------------


def test_robustness_is_the_mean_over_corruptions_and_levels():
  """The probe knows two classes; a part of the images is turned around."""
  train = test_probes.blobs(120, 5, 2, 0.05, seed=1)
  test = test_probes.blobs(40, 5, 2, 0.05, seed=2)
  order = np.argsort(test["labels"])[::-1]  # of one's class by the other's
  assert 2 * test["labels"].sum() < 40
  test = {k: x[order] for k, x in test.items()}
  turned = test["features"][::-1]
  test["variants"] = {
    name: turned if name == "blur 4" else test["features"]
    for name in (*variants.corruptions(), "view 0")
  }
  found = robustness.robustness(train, test)
  share = 100 * np.mean(test["labels"] == test["labels"][::-1])
  assert found["top1"] == 100
  assert found["corruptions"]["blur"][3] == pytest.approx(share, abs=1e-3)
  assert found["corruptions"]["noise"] == [100.0] * 5
  assert found["corrupted_top1"] == pytest.approx(100 - (100 - share) / 25)
  assert found["kept"] == found["corrupted_top1"] and share < 50


# --- retrieval --------------------------------------------------------------


def test_average_precision_of_retrieval_by_hand():
  angles = np.deg2rad([0.0, 10, 30, 60, 100])
  features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  # Opposite points beside each, so that standardising changes no angle.
  features = np.concatenate([features, -features]) @ np.diag([1, 1.0])
  deviation = features.std(axis=0)
  features = (features * deviation).astype(np.float32)
  labels = np.asarray([4, 9, 4, 4, 7, *[100 + i for i in range(5)]])
  found = retrieval.retrieval({}, {"features": features, "labels": labels})
  # Query 0: 10 (no), 30 (yes), 60 (yes), ...: (1/2 + 2/3) / 2.
  # Query 2 (30): 10 no, 0 and 60 yes: (1/2 + 2/3) / 2, in either order.
  # Query 3 (60): 30 yes, 100 no, 10 no, 0 yes: (1 + 2/4) / 2.
  expected = 100 * np.mean([7 / 12, 7 / 12, 3 / 4])
  assert found["mAP"] == pytest.approx(expected, abs=1e-3)
  assert found["alone"] == 7 and found["n_test"] == 10
  assert found["recall_1"] == pytest.approx(100 / 3, abs=1e-3)
  assert found["recall_5"] == 100
  assert found["chance"] == pytest.approx(100 * 2 / 9)


def test_a_query_never_finds_itself_nor_depends_on_chunks():
  test = test_probes.blobs(61, 7, 3, 1.0, seed=1)
  found = retrieval.retrieval({}, test, chunk=9)
  assert found == retrieval.retrieval({}, test, chunk=61)
  # Copies of each image with another class: whoever finds itself has it right.
  twice = {k: np.repeat(x, 2, axis=0) for k, x in test.items()}
  twice["labels"] = twice["labels"] + 3 * (np.arange(122) % 2)
  assert retrieval.retrieval({}, twice)["recall_1"] == 0


def test_retrieval_agrees_with_scikit_learn():
  metrics = pytest.importorskip("sklearn.metrics")
  test = test_probes.blobs(53, 7, 3, 1.5, seed=1)
  x = test["features"]
  x = (x - x.mean(axis=0)) / x.std(axis=0)
  x /= np.linalg.norm(x, axis=1, keepdims=True)
  scores = []
  for i in range(53):
    others = np.arange(53) != i
    same = test["labels"][others] == test["labels"][i]
    scores.append(metrics.average_precision_score(same, x[others] @ x[i]))
  found = retrieval.retrieval({}, test)
  assert found["mAP"] == pytest.approx(100 * np.mean(scores), abs=1e-2)


def test_retrieval_needs_two_images_of_a_class():
  test = {"features": np.eye(4, dtype=np.float32), "labels": np.arange(4)}
  with pytest.raises(ValueError, match="4 images of as many classes"):
    retrieval.retrieval({}, test)


# --- LiDAR ------------------------------------------------------------------


def views(between, within):
  """[n, 4, D] whose covariances are exactly diag(between) and diag(within)."""
  count, width = 12, len(between)
  random = np.random.default_rng(0)
  basis = random.normal(size=(count, width))
  basis, _ = np.linalg.qr(basis - basis.mean(axis=0))  # no mean, orthonormal
  means = basis * np.sqrt(count * np.asarray(between))
  signs = np.asarray([[1, 1], [1, -1], [-1, 1], [-1, -1]])[:, :width]
  return means[:, None] + signs * np.sqrt(within) + 5


@pytest.mark.parametrize(
  "between, within, shares",
  [
    ([4.0, 4.0], [1.0, 1.0], [1 / 2, 1 / 2]),
    ([9.0, 2.0], [1.0, 2.0], [9 / 10, 1 / 10]),
    ([9.0, 9.0], [3.0, 1.0], [1 / 4, 3 / 4]),
    ([5.0, 0.0], [1.0, 1.0], [1.0]),
  ],
)
def test_lidar_is_its_closed_form(between, within, shares):
  features = views(between, within)
  expected = np.exp(-sum(p * np.log(p) for p in shares))
  assert lidar.rank(features, 1e-9) == pytest.approx(expected, rel=1e-4)
  turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(2, 2)))
  assert lidar.rank(features @ turn, 1e-9) == pytest.approx(expected, rel=1e-4)


def test_lidar_adds_its_small_number_to_what_varies_within():
  found = lidar.rank(views([9.0, 2.0], [1.0, 0.0]), small=1.0)
  shares = np.asarray([9 / 2, 2 / 1]) / 6.5
  assert found == pytest.approx(np.exp(-np.sum(shares * np.log(shares))), 1e-4)


def test_lidar_of_views_that_tell_no_image_apart_is_one():
  same = np.tile(views([4.0, 4.0], [1.0, 1.0])[:1], (7, 1, 1))
  assert lidar.rank(same) == pytest.approx(1, abs=1e-4)
  x = views([4.0, 4.0], [1.0, 1.0])
  test = {"features": x[:, 0], "variants": {"view 0": x[:, 0]}}
  with pytest.raises(ValueError, match="1 views of 12 images"):
    lidar.lidar({}, test)
  test["variants"] |= {f"view {i}": x[:, i] for i in range(4)}
  test["variants"]["noise 1"] = 9 * x[::-1, 0]
  found = lidar.lidar({}, test)
  assert found["views"] == 4 and found["lidar"] == lidar.rank(x)
