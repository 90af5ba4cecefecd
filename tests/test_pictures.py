import argparse
import io
import json
import types

import jax
import matplotlib.colors
import numpy as np
from PIL import Image
import pytest
import tensorflow as tf

from jepa_jax import config as config_lib
from jepa_jax import models, pretrained, visualize
from jepa_jax.evaluation import figures, report
from jepa_jax.objectives import ijepa
from jepa_jax.pictures import (
  drawings,
  embedding,
  errors,
  images,
  layout,
  patches,
  training,
)

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (5, 12, 20, 3), np.uint8)  # 3 x 5 patches


@pytest.fixture(scope="module")
def model():
  module = models.Encoder(
    width=28, depth=2, num_heads=7, patch_size=4, mlp_ratio=2.0
  )
  params = module.init(jax.random.key(0), np.zeros((1, 12, 20, 3)))["params"]
  params = jax.tree.map(lambda x: x * 3, params)  # far from uniform attention
  return pretrained.Pretrained(
    module=module,
    params=params,
    preprocessing=pretrained.Preprocessing((0.5,) * 3, (0.2,) * 3, (12, 20)),
    which="target",
    networks={"target": params},
    predictor=None,
  )


def fake(encode, **more):
  """A model of known features."""
  return types.SimpleNamespace(
    module=types.SimpleNamespace(patch_size=4, width=6, depth=1),
    encode=encode,
    which="target",
    networks={"target": None},
    **more,
  )


def mean_pixels(images, which=None, **_):
  del which
  n, h, w, c = images.shape
  blocks = images.reshape(n, h // 4, 4, w // 4, 4, c)
  return blocks.astype(np.float32).mean(axis=(2, 4))


def test_fine_features_are_those_of_windows_between_the_patches():
  rows = np.broadcast_to(np.arange(12)[:, None], (12, 20))
  columns = np.broadcast_to(5 * np.arange(20), (12, 20))
  image = np.stack([rows, columns], axis=-1)[None].astype(np.uint8)
  coarse = patches.features(fake(mean_pixels), image)
  np.testing.assert_allclose(coarse[0, :, 0, 0], [1.5, 5.5, 9.5])
  found = patches.features(fake(mean_pixels), image, fine=2)
  assert found.shape == (1, 6, 10, 2)
  inner = found[0, 1:-1, 1:-1]  # the edges repeat
  np.testing.assert_allclose(inner[:, 0, 0], [2.5, 4.5, 6.5, 8.5])
  np.testing.assert_allclose(inner[0, :2, 1], [12.5, 22.5])
  with pytest.raises(ValueError, match="fine is 3; it needs to divide the pat"):
    patches.features(fake(mean_pixels), image, fine=3)


def test_foreground_is_what_lies_less_on_the_edges():
  things = np.zeros((2, 5, 7), bool)
  things[0, 1:3, 2:5] = things[1, 3, 0] = True
  for sign in (1, -1):
    vectors = np.where(things[..., None], sign * np.array([4.0, 1, 0, 2]), 0.0)
    vectors = vectors + 0.1 * RANDOM.normal(size=vectors.shape)
    np.testing.assert_array_equal(patches.foreground(vectors), things)


def test_similarity_is_the_cosine_about_the_mean():
  vectors = np.full((1, 2, 2, 3), 100.0)
  vectors[0, :, 0] += [1, 0, 0]
  vectors[0, 0, 1] -= [1, 0, 0]
  vectors[0, 1, 1] += [-1, 0, 0]
  found = patches.similarity(vectors, vectors[0, 0, 0])
  np.testing.assert_allclose(found[0], [[1, -1], [1, -1]], atol=1e-6)


@pytest.mark.parametrize("layer", [0, -2])
def test_attention_is_the_softmax_of_queries_and_keys(model, layer):
  found = patches.attention(model, IMAGES[:2], layer=layer)
  assert found.shape == (2, 7, 3, 5, 3, 5)
  module, params, preprocessing = model
  pixels = models.patchify(preprocessing(IMAGES[:2]), 4)
  x = pixels @ params["patch_embed"]["kernel"] + params["patch_embed"]["bias"]
  x = np.asarray(x + models.sincos_positions((3, 5), 28), np.float64)
  block = jax.tree.map(lambda y: np.asarray(y[0]), params["transformer"])
  block = block["blocks"]
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
  x = x * block["norm1"]["scale"] + block["norm1"]["bias"]
  qkv = x @ block["qkv"]["kernel"] + block["qkv"]["bias"]
  query, key, _ = np.moveaxis(qkv.reshape(2, 15, 3, 7, 4), 2, 0)
  scores = np.exp(np.einsum("bqhd,bkhd->bhqk", query, key) / 2)
  scores /= scores.sum(axis=-1, keepdims=True)
  assert scores.max() > 0.12  # not all alike
  np.testing.assert_allclose(found.reshape(scores.shape), scores, atol=1e-4)


@pytest.mark.parametrize(
  "settings, words",
  [
    ({"layer": 2}, "layer is 2; the encoder has 2 blocks, 0 to 1."),
    ({"which": "context"}, 'no "context" network here; there are: target.'),
  ],
)
def test_attention_refuses(model, settings, words):
  with pytest.raises(ValueError, match=words):
    patches.attention(model, IMAGES, **settings)


def test_figures_say_what_they_show(model):
  figure = drawings.masks(IMAGES[:2], 2, {"min_keep": 2})
  assert len(figure.axes) == 2 * 2 * len(drawings.WORDS)
  for drawn, panels in (
    (drawings.pca(model, IMAGES, fine=2, foreground=True), 2 * 5),
    (drawings.similarity(model, IMAGES), 5 + 4 * 6 + 1),
    (drawings.attention(model, IMAGES, at=(0, 1)), 5 * 8 + 1),
  ):
    assert len(drawn.axes) == panels
    assert drawn.texts[0].get_text() and drawn.texts[1].get_text()
  with pytest.raises(ValueError, match="the column of the patch is 1.5"):
    drawings.similarity(model, IMAGES, at=(0, 1.5))


def test_errors_are_nothing_where_the_prediction_is_right():
  features = RANDOM.normal(size=(4, 5, 5, 6)).astype(np.float32)
  truth = np.asarray(ijepa.normalize_targets(features)).reshape(4, 25, 6)

  def predict(images, context, ids, *valid):
    del images, context, valid
    return truth[np.arange(4)[:, None, None], ids][:, None] + shift

  known = fake(
    lambda *_, **__: features,
    predictor=types.SimpleNamespace(output_width=6),
    predict=predict,
  )
  images = np.zeros((4, 20, 20, 3), np.uint8)
  settings = {"name": "corrected", "min_keep": 2}
  unit = np.square(truth - truth.mean(axis=(0, 1))).mean()
  for shift in (0, 0.5):
    found = errors.errors(known, images, settings)
    blocks = found.targets.any(axis=1)
    np.testing.assert_array_equal(np.isnan(found.predicted), ~blocks)
    np.testing.assert_allclose(
      found.predicted[blocks], shift**2 / unit, rtol=1e-4, atol=1e-9
    )
  assert (found.distance[found.context] == 0).all()
  assert (found.distance[~found.context] >= 1).all()
  # Of the others' mean: the variance of 3 and of itself.
  others = (truth.sum(axis=0) - truth) / 3
  expected = np.square(truth - others).mean(axis=-1).reshape(4, 5, 5) / unit
  np.testing.assert_allclose(found.place[blocks], expected[blocks], rtol=1e-5)
  assert len(errors.draw(images, found).axes) == 3 * 4 + 2
  known.predictor = None
  with pytest.raises(ValueError, match="predict no features of a target"):
    errors.errors(known, images)


def test_nearest_patch_of_a_context():
  context = np.zeros((1, 3, 5), bool)
  context[0, 0, 0] = context[0, 2, 4] = True
  distance, nearest = errors._nearest(context)
  assert distance[0, [0, 1, 6]].tolist() == pytest.approx([0, 1, 2**0.5])
  assert nearest[0, [0, 1, 13]].tolist() == [0, 0, 14]


def test_maps_and_neighbours_follow_known_features():
  line = np.arange(6.0)[:, None] * [1, 2, -1]
  places = embedding.coordinates(line)
  order = np.argsort(places[:, 0])
  assert order.tolist() in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0])
  assert places.min() == 0 and places.max() == pytest.approx(1)
  angles = np.array([0, 0.1, 3, 3.2, 6.0])
  circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  order, cosines = embedding.nearest(circle, 2)
  assert order[:, 0].tolist() == [1, 0, 3, 2, 0]
  assert (np.diff(cosines) <= 0).all() and cosines.max() <= 1 + 1e-9
  large = IMAGES.repeat(2, axis=1).repeat(2, axis=2)
  drawn = embedding.draw_neighbours(large, circle, queries=3, k=2)
  assert len(drawn.axes) == 3 * 5
  assert "green" not in drawn.texts[1].get_text()
  drawn = embedding.draw_neighbours(large, circle, list("aabba"), 3, k=2)
  rows = [drawn.axes[i : i + 5] for i in (0, 5, 10)]
  shown = [[axes.texts[0].get_text() for axes in row[:3]] for row in rows]
  assert [row[0] for row in shown] == ["a", "b", "a"]  # classes in turn
  assert [text[0] for text in shown[1][1:]] == ["b", "a"]
  edges = [[len(axes.patches) for axes in row] for row in rows]
  assert edges == [[0, 1, 1, 1, 1]] * 3
  good, bad = (
    matplotlib.colors.to_rgba(figures.PALETTE[x][0]) for x in ("good", "bad")
  )
  assert rows[1][1].patches[0].get_edgecolor() == good
  assert rows[1][2].patches[0].get_edgecolor() == bad
  notes = " ".join(drawn.texts[1].get_text().split())
  assert "the nearest is right for 100 % (by pixels" in notes
  shares = embedding.agreement(list("aabba"), order)
  assert shares == (1.0, np.mean([1, 1, 1, 1, 1, 1, 0, 0, 0, 0]))
  drawn = embedding.draw_map(large, np.zeros((5, 2)))
  assert len(drawn.axes[0].images) == 2  # the sheet's ground, and one image
  assert len(drawn.axes[0].collections[0].get_offsets()) == 4


def test_images_come_with_their_classes(tmp_path):
  for i, name in enumerate(("cat", "dog", "cat", "dog")):
    (tmp_path / name).mkdir(exist_ok=True)
    Image.fromarray(IMAGES[i]).save(tmp_path / name / f"{i}.png")
  data = config_lib.defaults().data
  data.update(source="folder", name=str(tmp_path), image_size=12)
  label = images.class_label(data, "all", ["nothing", "label"])
  found, classes = images.of_data(data, "all", 3, label)
  assert found.shape == (3, 12, 12, 3) and {*classes} == {"cat", "dog"}
  assert images.of_data(data, "all", 3, label)[1] == classes
  # Each has its own; of a sorted folder the first ones are of several classes.
  known = {
    IMAGES[i, :, 4:16].tobytes(): "dog" if i % 2 else "cat" for i in range(4)
  }
  assert classes == [known[image.tobytes()] for image in found]
  assert {*images.of_data(data, "all", 2, label)[1]} == {"cat", "dog"}
  assert sorted(images.of_data(data, "all", 9, label)[1]) == sorted(
    known.values()
  )
  assert images.of_data(data, "all", 3)[1] is None
  with pytest.raises(ValueError, match='no label "nothing"; there are: '):
    images.class_label(data, "all", ["nothing"])
  Image.fromarray(IMAGES[4]).save(tmp_path / "none.png")  # in no class
  with pytest.raises(ValueError, match='no label "label"'):
    images.class_label(data, "all", ["label"])


def test_classes_of_scenes_are_called_by_their_number(scenes_dir, config):
  config.data.data_dir = scenes_dir
  label = images.class_label(config.data, "test", ["depth", "count"])
  _, classes = images.of_data(config.data, "test", 4, label)
  assert label == "count" and len(classes) == 4
  assert set(classes) <= set(map(str, range(3, 11)))


def test_maps_of_numbers_are_no_classes(monkeypatch):
  specs = {
    "depth": tf.TensorSpec((4, 4), tf.float32),
    "nearest": tf.TensorSpec((), tf.float32),
    "kind": tf.TensorSpec((), tf.string),
  }
  monkeypatch.setattr(images.labels_lib, "spec", lambda _, __, x: specs[x])
  assert images.class_label(None, "test", list(specs)) == "kind"
  with pytest.raises(ValueError, match='"nearest" is float32 of shape ()'):
    images.class_label(None, "test", ["depth", "nearest"])


@pytest.mark.parametrize(
  "vectors, method, words",
  [
    (np.ones((3, 2)), "pca", "got 3 images; a map needs 4"),
    (np.ones((5, 2)), "tsen", 'unknown map "tsen"; known: pca, tsne, umap'),
  ],
)
def test_maps_refuse(vectors, method, words):
  with pytest.raises(ValueError, match=words):
    embedding.coordinates(vectors, method)


def test_tsne_parts_two_groups():
  pytest.importorskip("sklearn")
  vectors = RANDOM.normal(size=(20, 4)) + 20 * (np.arange(20) < 8)[:, None]
  places = embedding.coordinates(vectors, "tsne")
  apart = np.linalg.norm(places[:8].mean(0) - places[8:].mean(0))
  assert apart > places[:8].std() and places.shape == (20, 2)


def test_a_sheet_has_its_panels_and_files_are_whole(tmp_path):
  red = np.full((3, 4, 3), (200, 30, 10), np.uint8)
  figure = layout.sheet([[layout.Panel(red, "red"), None]], title="T")
  layout.write(figure, tmp_path / "a.png")
  shown = np.asarray(Image.open(tmp_path / "a.png"))
  assert ((shown == red[0, 0]).all(axis=-1)).sum() > 5000
  frames = [np.full((6, 8, 3), v, np.uint8) for v in (0, 120, 255)]
  layout.write(frames, tmp_path / "a.gif")
  layout.write(figure, tmp_path / "a.webp")
  film = Image.open(io.BytesIO((tmp_path / "a.gif").read_bytes()))
  assert film.n_frames == 3 and film.size == (8, 6)
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "a.gif",
    "a.png",
    "a.webp",
  ]
  for drawn, name in ((figure, "a.gif"), (frames, "a.png"), (figure, "a")):
    with pytest.raises(ValueError, match="this picture is written as"):
      layout.write(drawn, tmp_path / name)


def test_curves_of_runs_share_a_page(tmp_path):
  for name in ("a/run", "b/run", "empty"):
    (tmp_path / name).mkdir(parents=True)
  row = {"step": 1, "loss": 2.0, "eval/count/knn": 30.0, "seconds": 1.0}
  lines = [row, {**row, "step": 9, "loss": 1.0}]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  for name in ("a/run", "b/run"):
    (tmp_path / name / "metrics.jsonl").write_text(text)
  (tmp_path / "empty/metrics.jsonl").write_text("")
  metrics = training.read([str(tmp_path / "a/run"), str(tmp_path / "b/run")])
  assert list(metrics) == ["a/run", "b/run"]
  figure = training.draw_runs(metrics)
  titles = [axes.get_title(loc="left") for axes in figure.axes]
  assert titles == ["Loss", "count, knn"]
  assert len(figure.axes[0].lines) == 2
  for name, words in (("c", "no metrics of a run"), ("empty", "no metrics ye")):
    with pytest.raises(ValueError, match=words):
      training.read([str(tmp_path / name)])
  with pytest.raises(ValueError, match="holds 0 checkpoints; a film needs two"):
    training.film(tmp_path / "a/run", IMAGES)


def flags_of(**given):
  """All flags of the command, unset unless given."""
  every = dict.fromkeys(
    ("workdir", "weights", "step", "images", "split", "count", "out", "fine",
     "patch", "layer", "method", "samples", "label")
  )  # fmt: skip
  every |= {"run": [], "seed": 0, "foreground": False, "score": False}
  return argparse.Namespace(**every | given)


def test_the_gallery_is_part_of_the_report(
  model, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(pretrained, "load", lambda *_, **__: model)
  monkeypatch.setattr(
    visualize.Source,
    "_read",
    lambda _: (np.tile(IMAGES, (2, 1, 1, 1)), list("ab" * len(IMAGES))),
  )
  flags = flags_of(name="gallery", workdir=str(tmp_path))
  with pytest.raises(ValueError, match="there is no .*config.json"):
    visualize.main(flags)
  config = config_lib.defaults()
  config.masks.min_keep = 0
  text = json.dumps(config.to_dict())
  (tmp_path / "config.json").write_text(text)
  with pytest.raises(ValueError, match="holds no checkpoint yet"):
    visualize.main(flags)
  for step in (3, 20):
    (tmp_path / f"checkpoints/{step}").mkdir(parents=True)
    assert visualize.main(flags) == 0
  drawn = sorted(path.stem for path in tmp_path.glob("gallery/20/*.webp"))
  assert drawn == sorted(set(visualize.GALLERY) - {"errors"})
  assert "errors: not drawn: " in capsys.readouterr().err
  # No steps: a name that int refuses, and a word; and a step without pictures.
  for name in ("²", "old", "30"):
    (tmp_path / "gallery" / name).mkdir()
    if name != "30":
      (tmp_path / "gallery" / name / "pca.webp").write_bytes(b"")
  report.write(tmp_path)
  page = (tmp_path / "report.html").read_text()
  assert "of step 20." in page and page.count('class="sheet"') == len(drawn)


@pytest.mark.parametrize(
  "flags, words",
  [
    ({"name": "gallery", "weights": "a"}, "gallery needs --workdir"),
    ({"name": "gallery", "workdir": "a", "fine": 2}, "takes no --fine"),
    ({"name": "film", "workdir": "a", "out": "a.png"}, "written as .gif"),
    ({"name": "pca"}, "pca needs --workdir of a run, or --weights"),
    ({"name": "pca", "workdir": "a", "weights": "b"}, "one of them"),
    ({"name": "runs"}, "give the folders of runs"),
    ({"name": "runs", "run": ["a"], "workdir": "b"}, "give the folders"),
    ({"name": "map", "workdir": "a", "fine": 2}, "--fine is of pca, similar"),
    ({"name": "pca", "workdir": "nowhere"}, "no file or folder nowhere"),
    ({"name": "film", "weights": "a.npz"}, "give --workdir"),
    ({"name": "decode", "weights": "a.npz"}, "give --workdir"),
    ({"name": "pca", "workdir": "a", "score": True}, "--score is of decode"),
  ],
)
def test_the_command_refuses(flags, words, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=words):
    visualize.main(flags_of(**flags))
