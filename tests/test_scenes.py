"""The scenes data set: drawing, geometry, labels and storage."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from tensorflow_datasets.core.utils import gcs_utils

from jepa_jax.data import scenes
from jepa_jax.render import casting, examples, sampling, shading, world

SHAPES = range(len(world.SHAPES))


def one_object(shape, *, center=(0.4, -0.3, 0.8), material=0, size=1):
  """A scene of one red object, turned by 25 degrees, under a fixed camera."""
  scene = sampling.sample_scene(0, "train", 0)
  return dataclasses.replace(
    scene,
    shape=np.array([shape]),
    color=np.array([list(world.COLORS).index("red")]),
    material=np.array([material]),
    size=np.array([size]),
    rotation=np.array([25.0]),
    centers=np.array([center]),
  )


def rays_of(grid):
  """[grid, grid, 3] directions with forward part 1, written independently."""
  steps = (2 * np.arange(grid) + 1 - grid) / grid * world.TANGENT
  right, down, forward = world.AXES
  down = down / world.STRETCH
  return forward + steps[None, :, None] * right + steps[:, None, None] * down


def assert_same(one, other):
  assert one.keys() == other.keys()
  np.testing.assert_array_equal(one["image"], other["image"])
  np.testing.assert_array_equal(one["depth"], other["depth"])
  assert one["file_name"] == other["file_name"]
  for mine, theirs in zip(one["objects"], other["objects"], strict=True):
    assert mine.keys() == theirs.keys()
    for key in mine:
      np.testing.assert_array_equal(mine[key], theirs[key])


def test_example_depends_on_seed_split_and_index_alone():
  first = examples.example(3, "train", 5, 40)
  for other in ((4, "train", 5), (3, "test", 5), (3, "train", 6)):
    assert (examples.example(*other, 40)["image"] != first["image"]).any()
  assert_same(examples.example(3, "train", 5, 40), first)


def test_size_changes_the_resolution_and_not_the_scene():
  small, large = (examples.example(0, "test", 2, size) for size in (32, 96))
  assert large["image"].shape == (96, 96, 3)
  shrunk = large["image"].reshape(32, 3, 32, 3, 3).mean((1, 3))
  assert np.abs(shrunk - small["image"]).mean() < 3
  for one, other in zip(small["objects"], large["objects"], strict=True):
    np.testing.assert_array_equal(one["3d_coords"], other["3d_coords"])
    np.testing.assert_allclose(
      3 * one["pixel_coords"][:2], other["pixel_coords"][:2], rtol=1e-5
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_draws_the_same_bytes(workers):
  job = {"seed": 1, "split": "test", "count": 7, "image_size": 24}
  drawn = list(examples.stream(**job, workers=workers))
  assert len(drawn) == 7
  for index, example in enumerate(drawn):
    assert_same(examples.example(1, "test", index, 24), example)


def test_workers_import_numpy_alone():
  job = json.dumps([0, "train", 0, 1, 1, 24])
  code = (
    "import runpy, sys\n"
    f"sys.argv = ['render', {job!r}]\n"
    "runpy.run_module('jepa_jax.render', run_name='__main__')\n"
    "print(*{m.split('.')[0] for m in sys.modules}, file=sys.stderr)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, check=True
  )
  imported = set(done.stderr.decode().split())
  assert "numpy" in imported
  assert not imported & {"tensorflow", "jax", "flax"}


def test_a_failed_worker_is_reported():
  with pytest.raises(RuntimeError, match="train image 0 of 2"):
    list(
      examples.stream(seed=-1, split="train", count=2, image_size=24, workers=2)
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [0, 1])
def test_rays_end_on_the_surface(shape, size):
  scene = one_object(shape, size=size)
  depth, owner = casting.cast(scene, 101)
  rays = rays_of(101)
  points = (world.CAMERA + depth[..., None] * rays).transpose(2, 0, 1)
  normals = casting.surface_normals(scene, points.astype(np.float32), owner)
  hit = owner == 0
  where = (world.CAMERA + depth[..., None] * rays)[hit] - scene.centers[0]
  turn = math.radians(25.0)
  x = math.cos(turn) * where[:, 0] + math.sin(turn) * where[:, 1]
  y = math.cos(turn) * where[:, 1] - math.sin(turn) * where[:, 0]
  z, half = where[:, 2], scene.half_widths[0]
  outside = {  # each is 0 on the surface of its solid
    "cube": np.max(np.abs([x, y, z]), axis=0) - half,
    "sphere": np.sqrt(x**2 + y**2 + z**2) - half,
    "cylinder": np.maximum(np.hypot(x, y), np.abs(z)) - half,
  }[world.SHAPES[shape]]
  np.testing.assert_allclose(outside, 0, atol=2e-4)
  np.testing.assert_allclose(np.linalg.norm(normals, axis=0), 1, atol=1e-5)
  # The near side: the surface faces the camera.
  assert (np.einsum("nc,cn->n", rays[hit], normals[:, hit]) < 0).all()
  if world.SHAPES[shape] == "sphere":
    np.testing.assert_allclose(normals[:, hit].T, where / half, atol=2e-3)
  # All else is floor.
  floor = (world.CAMERA + depth[..., None] * rays)[~hit]
  np.testing.assert_allclose(floor[:, 2], 0, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_object_is_seen_where_it_projects(shape):
  scene = one_object(shape, center=(1.5, 0.9, 0.7), size=0)
  owner = shading.render(scene, 96)[2]
  x, y, depth = world.project(scene.centers, 96)[0]
  rows, columns = np.nonzero(owner == 0)
  assert abs(columns.mean() + 0.5 - x) < 0.6
  assert abs(rows.mean() + 0.5 - y) < 0.6
  forward = world.AXES[2]
  assert depth == pytest.approx(
    (scene.centers[0] - world.CAMERA) @ forward, rel=1e-6
  )
  # Nothing of the object lies outside the window that was searched for it.
  reach = 96 * 0.35 * math.sqrt(3) / (2 * world.TANGENT * depth)
  aside = (rows + 0.5 - y) / world.STRETCH
  assert np.hypot(columns + 0.5 - x, aside).max() < 1.2 * reach
  if world.SHAPES[shape] == "sphere":
    area = math.pi * (96 * 0.35 / (2 * world.TANGENT * depth)) ** 2
    assert abs(len(rows) / (world.STRETCH * area) - 1) < 0.2


def test_the_camera_stands_upright():
  center, above, right = world.project(
    np.array(
      [
        world.CAMERA_TARGET,
        np.add(world.CAMERA_TARGET, [0, 0, 1]),
        world.CAMERA_TARGET + world.AXES[0],
      ]
    ),
    80,
  )
  np.testing.assert_allclose(center[:2], 40)
  assert above[1] < 35 and abs(above[0] - 40) < 1e-6
  assert right[0] > 42 and abs(right[1] - 40) < 1e-6


def test_depth_map_gives_the_distance_at_the_centre_of_a_sphere():
  scene = one_object(1, center=(0.0, 0.0, 0.7))
  depth = shading.render(scene, 128)[1]
  x, y, middle = world.project(scene.centers, 128)[0]
  # The ray to the centre meets the surface one radius earlier.
  length = np.linalg.norm(scene.centers[0] - world.CAMERA)
  expected = middle * (1 - 0.7 / length)
  assert depth[int(y), int(x)] == pytest.approx(expected, abs=0.01)


def test_an_object_casts_its_shadow_on_the_floor():
  # Two units up in the air, so that the shadow lies away from the object.
  center = np.array([0.0, 0.0, 2.0])
  scene = one_object(1, center=center, size=0)
  away = dataclasses.replace(scene, centers=np.array([[0.0, 0.0, -9.0]]))
  shaded, lit = (shading.render(s, 96)[0].astype(float) for s in (scene, away))
  foot = center - world.KEY_LIGHT * center[2] / world.KEY_LIGHT[2]
  mirrored = foot * [-1, -1, 0]
  for point, low, high in ((foot, 0.3, 0.8), (mirrored, 0.97, 1.01)):
    x, y, _ = world.project(point[None], 96)[0]
    ratio = shaded[int(y), int(x)] / lit[int(y), int(x)]
    assert low < ratio.mean() < high


def test_lit_side_is_brighter_than_the_other():
  scene = one_object(1, center=(0.0, 0.0, 0.7))
  image, _, owner = shading.render(scene, 96)
  key = world.AXES @ world.KEY_LIGHT  # right, down, forward
  x, y, _ = world.project(scene.centers, 96)[0]
  rows, columns = np.nonzero(owner == 0)
  side = (columns + 0.5 - x) * key[0] + (rows + 0.5 - y) * key[1]
  brightness = image[rows, columns].mean(axis=1)
  assert brightness[side > 0].mean() > 1.1 * brightness[side < 0].mean()


def test_metal_has_a_highlight_and_rubber_has_not():
  whitest = []
  for material in (0, 1):
    scene = one_object(1, material=material)
    image = shading.render(scene, 96)[0]
    x, y, _ = world.project(scene.centers, 96)[0].astype(int)
    # Well within the sphere, green and blue are dim but for a white gleam.
    whitest.append(image[y - 4 : y + 5, x - 4 : x + 5].min(axis=2).max())
  rubber, metal = whitest
  assert rubber < 100 and metal > 180


@pytest.mark.parametrize("name", world.COLORS)
def test_colors_can_be_told_apart(name):
  colors = list(world.COLORS)
  scene = dataclasses.replace(
    one_object(0), color=np.array([colors.index(name)])
  )
  image, _, owner = shading.render(scene, 64)
  seen = image[owner == 0].astype(float).mean(axis=0)
  seen /= seen.sum()
  table = np.array(list(world.COLORS.values()), float)
  table /= table.sum(axis=1, keepdims=True)
  assert colors[np.abs(table - seen).sum(axis=1).argmin()] == name


def test_scenes_are_legal_and_classes_well_filled():
  counts, distances = np.zeros(8), np.zeros(6)
  num_scenes = 240
  for index in range(num_scenes):
    scene = sampling.sample_scene(7, "train", index)
    number = len(scene.shape)
    owner = casting.cast(scene, 64)[1]
    visible = np.bincount(owner.ravel() + 1, minlength=number + 1)[1:]
    assert visible.min() >= sampling.MIN_VISIBLE
    pixels = world.project(scene.centers, 64)
    assert (pixels[:, :2] > 0).all() and (pixels[:, :2] < 64).all()
    offset = scene.centers[:, None, :2] - scene.centers[None, :, :2]
    radius = np.array([0.35, 0.7])[scene.size]
    gap = np.linalg.norm(offset, axis=2) - radius[:, None] - radius
    assert (gap + 9 * np.eye(number)).min() > sampling.MIN_GAP - 1e-9
    # On the floor, neither above nor below it.
    np.testing.assert_allclose(scene.centers[:, 2], scene.half_widths)
    counts[number - 3] += 1
    distances[(pixels[:, 2].min() > np.array(scenes.DISTANCE_EDGES)).sum()] += 1
  assert counts.min() > 0.5 * num_scenes / 8
  assert distances.min() > 0.3 * num_scenes / 6


def test_features_are_those_of_clevr(tmp_path):
  clevr = tfds.builder_cls("clevr")(data_dir=tmp_path).info.features
  ours = scenes.Scenes(data_dir=tmp_path).info.features
  assert set(clevr) - {"question_answer"} == set(ours) - {"depth"}
  theirs, objects = clevr["objects"].feature, ours["objects"].feature
  assert set(theirs) == set(objects)
  for key in theirs:
    assert theirs[key].dtype == objects[key].dtype
    assert theirs[key].shape == objects[key].shape
    assert getattr(theirs[key], "names", 0) == getattr(objects[key], "names", 0)


def example_of(depths):
  depths = tf.constant(depths, tf.float32)
  pixels = tf.stack([0 * depths + 99, 0 * depths - 99, depths], axis=1)
  shape = tf.zeros(tf.shape(depths), tf.int64)
  return {"objects": {"pixel_coords": pixels, "shape": shape}}


@pytest.mark.parametrize(
    "nearest, expected",
    [
        (7.0, 0), (8.0, 0), (8.001, 1), (8.5, 1), (8.6, 2), (9.0, 2), (9.2, 3),
        (9.5, 3), (9.9, 4), (10.0, 4), (10.01, 5), (12.5, 5),
    ],
)  # fmt: skip
def test_distance_of_known_depths(nearest, expected):
  label = tf.function(scenes.LABELS["distance"])(
    example_of([14.0, nearest, 13.0])
  )
  assert label.dtype == tf.int32 and label.shape == ()
  assert int(label) == expected < len(scenes.CLASS_NAMES["distance"])


@pytest.mark.parametrize("number, expected", [(3, 0), (4, 1), (10, 7)])
def test_count_of_known_numbers(number, expected):
  label = tf.function(scenes.LABELS["count"])(example_of([9.0] * number))
  assert label.dtype == tf.int32 and label.shape == ()
  assert int(label) == expected < len(scenes.CLASS_NAMES["count"])


def test_classes_are_called_what_they_are():
  assert scenes.CLASS_NAMES["count"][0] == "3"
  assert scenes.CLASS_NAMES["count"][-1] == "10"
  names = "≤ 8", "≤ 8.5", "≤ 9", "≤ 9.5", "≤ 10", "> 10"
  assert scenes.CLASS_NAMES["distance"] == names


def forbid(*unused_args, **unused_kwargs):
  raise AssertionError("must not be called")


def test_prepared_data_are_the_drawn_ones(tmp_path, monkeypatch):
  monkeypatch.setattr(gcs_utils, "exists", forbid)
  sizes = {"image_size": 40, "num_train": 9, "num_test": 3, "seed": 2}
  builder = scenes.prepare(tmp_path, **sizes)
  for split, number in (("train", 9), ("test", 3)):
    assert builder.info.splits[split].num_examples == number
    dataset = builder.as_dataset(split=split)
    labels = dataset.map(lambda e: {k: f(e) for k, f in scenes.LABELS.items()})
    seen = set()
    for stored, label in zip(
      dataset.as_numpy_iterator(), labels.as_numpy_iterator(), strict=True
    ):
      name = stored["file_name"].decode()
      index = int(name.removesuffix(".png").rpartition("_")[2])
      seen.add(index)
      drawn = examples.example(2, split, index, 40)
      assert name == drawn["file_name"]
      np.testing.assert_array_equal(stored["image"], drawn["image"])
      np.testing.assert_array_equal(stored["depth"], drawn["depth"])
      assert label["count"] == len(drawn["objects"]) - 3
      nearest = min(o["pixel_coords"][2] for o in drawn["objects"])
      assert label["distance"] == np.digitize(
        nearest, scenes.DISTANCE_EDGES, right=True
      )
      depth = shading.render(sampling.sample_scene(2, split, index), 40)[1]
      assert label["depth"].shape == (40, 40, 1)
      np.testing.assert_allclose(
        label["depth"][..., 0], np.minimum(depth, 32), atol=5e-4
      )
      for key, feature in builder.info.features["objects"].feature.items():
        values = [o[key] for o in drawn["objects"]]
        if isinstance(feature, tfds.features.ClassLabel):
          values = [feature.str2int(value) for value in values]
        np.testing.assert_array_equal(stored["objects"][key], values)
    assert seen == set(range(number))
  # The second call draws nothing.
  monkeypatch.setattr(examples, "stream", forbid)
  again = scenes.prepare(tmp_path, **sizes)
  assert again.info.splits["train"].num_examples == 9


def test_what_was_cut_short_is_drawn_anew(tmp_path, monkeypatch):
  sizes = {"image_size": 24, "num_train": 4, "num_test": 2}

  def cut_short(*, count, **job):
    yield from stream(count=count // 2, **job)
    raise KeyboardInterrupt

  stream = examples.stream
  monkeypatch.setattr(examples, "stream", cut_short)
  with pytest.raises(KeyboardInterrupt):
    scenes.prepare(tmp_path, **sizes)
  assert not list(tmp_path.rglob("*.tfrecord*"))
  monkeypatch.undo()
  builder = scenes.prepare(tmp_path, **sizes)
  assert len(list(builder.as_dataset(split="train"))) == 4


def test_another_process_may_be_first(tmp_path, monkeypatch):
  sizes = {"image_size": 24, "num_train": 2, "num_test": 1}
  stream = examples.stream

  def overtaken(**job):
    monkeypatch.setattr(examples, "stream", stream)
    scenes.prepare(tmp_path, **sizes)
    yield from stream(**job)

  monkeypatch.setattr(examples, "stream", overtaken)
  builder = scenes.prepare(tmp_path, **sizes)
  assert len(list(builder.as_dataset(split="train"))) == 2
  assert not list(tmp_path.rglob("*incomplete*"))


def test_configs_have_names_of_their_own():
  values = [{}, {"image_size": 96}, {"num_train": 5}, {"seed": 1}]
  names = {scenes.ScenesConfig(**value).name for value in values}
  assert len(names) == 4 and "64px" in names
  assert set(scenes.Scenes.builder_configs) == {
      "64px", "96px", "128px", "224px"
  }  # fmt: skip


@pytest.mark.parametrize(
  "value", [{"image_size": 0}, {"num_test": 0}, {"seed": -1}]
)
def test_wrong_numbers_are_refused(value):
  with pytest.raises(ValueError, match=next(iter(value))):
    scenes.ScenesConfig(**value)
