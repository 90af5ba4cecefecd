import base64
import io
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
from PIL import Image
import pytest

from jepa_jax.evaluation import components as components_lib
from jepa_jax.evaluation import figures

RANDOM = np.random.default_rng(0)


def decode(uri):
  data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
  return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize(
  "shape", [(5, 7, 3), (5, 7, 1), (5, 7), (1, 2, 3), (5, 7, 4)]
)
def test_png_keeps_every_pixel(shape):
  pixels = RANDOM.integers(0, 256, shape, np.uint8)
  np.testing.assert_array_equal(
    decode(figures.png_uri(pixels)).reshape(shape), pixels
  )


@pytest.mark.parametrize(
  "value, text",
  [
    (0.0, "0"), (0.12345, "0.1235"), (-2.5, "−2.5"), (1234.4, "1234"),
    (375_000, "375k"), (85.8e6, "85.8M"), (1e-6, "1e−6"), (-1e4, "−10k"),
    (float("nan"), "NaN"), (float("inf"), "∞"),
  ],
)  # fmt: skip
def test_numbers_are_short(value, text):
  assert figures.number(value) == text


def test_chart_draws_each_value_from_edge_to_edge():
  steps, values = np.array([10, 20, 40]), np.array([3.0, 2, 1.5])
  (axes,) = figures.line_chart([("loss", steps, values)]).axes
  np.testing.assert_array_equal(axes.lines[0].get_xdata(), steps)
  np.testing.assert_array_equal(axes.lines[0].get_ydata(), values)
  assert axes.get_xlim() == (10, 40) and axes.get_xlabel() == "step"
  low, high = axes.get_ylim()
  assert 1.3 < low < 1.5 and 3 < high < 3.2


def test_chart_breaks_at_non_finite_values_and_counts_them():
  values = np.array([1.0, 2.0, np.nan, 3.0, np.inf, 4.0, 5.0])
  series = [("loss", np.arange(7) * 10, values)]
  assert figures.notes(series) == ["2 not finite, the first at step 20"]
  (axes,) = figures.line_chart(series).axes
  missing = np.isnan(axes.lines[0].get_ydata())
  np.testing.assert_array_equal(np.flatnonzero(missing), [2, 4])
  (dots,) = axes.collections  # what no line reaches
  np.testing.assert_array_equal(dots.get_offsets(), [[30, 3]])


def test_chart_of_nothing_finite_or_one_point_is_drawn():
  nothing = [("l", np.arange(2), np.full(2, np.nan))]
  (axes,) = figures.line_chart(nothing).axes
  assert [text.get_text() for text in axes.texts] == ["No finite value"]
  assert figures.notes(nothing) == ["2 not finite, the first at step 0"]
  one = figures.line_chart([("l", np.array([5]), np.array([2.0]))])
  np.testing.assert_array_equal(
    one.axes[0].collections[0].get_offsets(), [[5, 2]]
  )


def test_outlier_does_not_flatten_the_rest():
  values = RANDOM.normal(size=50) + 220
  values[0] = 12
  series = [("speed", np.arange(50), values)]
  assert figures.notes(series) == ["1 off the scale, farthest 12"]
  low, high = figures.line_chart(series).axes[0].get_ylim()
  assert high - low < 3 * np.ptp(values[1:]) and low > 200


def test_long_noisy_lines_are_thinned_smoothed_and_keep_their_spike():
  values = RANDOM.normal(size=20_000)
  values[12_345] = 6.0
  steps = np.arange(20_000) * 10
  (axes,) = figures.line_chart([("loss", steps, values)]).axes
  raw, smooth = (line.get_xydata() for line in axes.lines)
  assert len(raw) <= figures.POINTS and len(smooth) <= figures.POINTS
  assert axes.lines[0].get_alpha() < 0.5
  np.testing.assert_array_equal(raw[raw[:, 1].argmax()], [123_450, 6])
  assert np.abs(smooth[:, 1]).max() < 0.5


def test_a_chart_with_a_title_has_a_legend_and_takes_any_words():
  series = [(n, np.arange(3), np.arange(3.0)) for n in ("_a", "$b")]
  (axes,) = figures.line_chart(series, title="$x_").axes
  assert axes.get_title(loc="left") == "$x_"
  names = [text.get_text() for text in axes.get_legend().get_texts()]
  assert names == ["_a", "$b"]
  assert figures.line_chart(series).axes[0].get_legend() is None
  assert "$x_" in figures.svg(axes.figure, "a", "x")


def test_svg_follows_the_page_and_its_ids_are_its_own():
  values = np.array([1.0, 2.0, np.nan, 3.0, np.nan, 4.0, 5.0])
  series = [(n, np.arange(7), values) for n in ("a", "b")]
  texts = [
    figures.svg(figures.line_chart(series), name, "<Loss> & more")
    for name in ("chart-1", "chart-2", "chart-1")
  ]
  assert texts[0] == texts[2]
  found = []
  for name, text in zip(("chart-1", "chart-2"), texts, strict=False):
    root = ElementTree.fromstring(text)
    assert root.tag == "svg" and root.get("aria-label") == "<Loss> & more"
    assert root.get("viewBox") == f"0 0 {figures.WIDTH} {figures.HEIGHT}"
    ids = {x.get("id") for x in root.iter() if x.get("id")}
    assert ids and all(x.startswith(name) for x in ids)
    used = set(re.findall(r"""(?:url\(|href=")#([^)"]*)""", text))
    assert used == ids
    found.append(ids)
    words = [x.text for x in root.iter("text")]
    assert "step" in words and "2" in words
    colours = set(re.findall(r"#[0-9a-f]{6}", text))
    assert colours == {
      figures.PALETTE[x][0] for x in ("c0", "c1", "faint", "rule")
    }
    assert text.count("#") == text.count(", #") + len(
      re.findall("#chart", text)
    )
    assert "<style" not in text and "font-family" not in text
  assert not found[0] & found[1]
  assert len(texts[0]) < 8000


def test_charts_choose_no_backend_and_cost_nothing_before():
  code = (
    "import sys, numpy as np; from jepa_jax.evaluation import figures, report; "
    "assert 'matplotlib' not in sys.modules; "
    "import matplotlib; before = matplotlib.rcParams.copy(); "
    "s = np.arange(3); "
    "figures.svg(figures.line_chart([('a', s, s * 1.0)]), 'a', 'b'); "
    "assert matplotlib.rcParams.copy() == before; "
    "assert 'matplotlib.pyplot' not in sys.modules"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def test_mask_pictures_show_context_and_each_target():
  context = np.zeros((3, 5), bool)
  context[0, 1:] = True
  targets = np.zeros((2, 3, 5), bool)
  targets[0, 1:, :2] = True
  targets[1, 2, 4] = True
  image = RANDOM.integers(0, 256, (12, 20, 3), np.uint8)
  seen, predicted = figures.mask_pictures(image, context, targets)
  scale = figures.ENLARGED // 20
  assert seen.shape == (12 * scale, 20 * scale, 4)
  assert predicted.shape == (12 * scale, 20 * scale, 3)
  patch = 4 * scale
  enlarged = image.repeat(scale, axis=0).repeat(scale, axis=1)
  for i in range(3):
    for j in range(5):
      # The middle of each patch, between the edges of blocks.
      where = np.s_[
        i * patch + 4 : (i + 1) * patch - 4, j * patch + 4 : (j + 1) * patch - 4
      ]
      assert (seen[where][..., 3] == (255 if context[i, j] else 0)).all()
      if context[i, j]:
        np.testing.assert_array_equal(seen[where][..., :3], enlarged[where])
      block = 0 if targets[0, i, j] else 1
      colour = tuple(
        int(figures.PALETTE[f"c{block}"][0][k : k + 2], 16) for k in (1, 3, 5)
      )
      expected = enlarged[where].astype(int)
      if targets[:, i, j].any():
        expected = (expected + colour) // 2
      assert np.abs(predicted[where] - expected).max() <= 1
  # A block is framed, its inside is not.
  blue = [int(figures.PALETTE["c0"][0][k : k + 2], 16) for k in (1, 3, 5)]
  framed = (predicted == blue).all(axis=-1)
  assert framed[patch:, 0].all() and framed[patch, : 2 * patch].all()
  assert framed[:, 2 * patch - 1][patch:].all()
  assert not framed[2 * patch, 4 : 2 * patch - 4].any()


def test_mask_pictures_of_large_or_grey_images():
  context, targets = np.ones((3, 5), bool), np.ones((1, 3, 5), bool)
  image = RANDOM.integers(0, 256, (300, 500, 1), np.uint8)
  seen, predicted = figures.mask_pictures(image, context, targets)
  assert seen.shape == (300, 500, 4) and predicted.shape == (300, 500, 3)
  np.testing.assert_array_equal(seen[9:-9, 9:-9, 1], image[9:-9, 9:-9, 0])


def test_pca_colours_follow_three_known_directions():
  axes = np.linalg.qr(RANDOM.normal(size=(9, 3)))[0]
  spread = np.array([5.0, 2.0, 1.0])
  components = RANDOM.normal(size=(2, 3, 5, 3)) * spread
  vectors = components @ axes.T + 100
  basis = components_lib.Basis.fit(vectors)
  colours, shares = basis.colours(vectors), basis.shares
  assert colours.shape == (2, 3, 5, 3) and colours.dtype == np.uint8
  assert shares.sum() == pytest.approx(1) and shares[0] > shares[1] > shares[2]
  for i in range(3):
    correlation = np.corrcoef(
      colours[..., i].ravel(), components[..., i].ravel()
    )
    assert abs(correlation[0, 1]) > 0.85


@pytest.mark.parametrize("width", [1, 2])
def test_pca_of_few_or_constant_features_is_drawn(width):
  vectors = np.ones((2, 3, 5, width))
  basis = components_lib.Basis.fit(vectors)
  assert basis.colours(vectors).shape == (2, 3, 5, 3)
  np.testing.assert_array_equal(basis.shares, 0)


@pytest.mark.parametrize(
  "features", [np.ones((0, 3, 5, 7)), np.full((2, 3, 5, 7), np.nan)]
)
def test_pca_refuses_what_it_cannot_colour(features):
  with pytest.raises(ValueError, match="PCA got features"):
    components_lib.Basis.fit(features)
