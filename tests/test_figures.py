import base64
import io
import re

import numpy as np
import pytest

from jepa_jax.evaluation import figures

RANDOM = np.random.default_rng(0)


def decode(uri):
  Image = pytest.importorskip("PIL.Image")
  data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
  return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("shape", [(5, 7, 3), (5, 7, 1), (5, 7), (1, 2, 3)])
def test_png_keeps_every_pixel(shape):
  pixels = RANDOM.integers(0, 256, shape, np.uint8)
  np.testing.assert_array_equal(
    decode(figures.png_uri(pixels)).reshape(shape), pixels
  )


def test_png_of_four_channels_shows_three():
  pixels = RANDOM.integers(0, 256, (5, 7, 4), np.uint8)
  np.testing.assert_array_equal(
    decode(figures.png_uri(pixels)), pixels[..., :3]
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


def points(chart):
  """The points of each line of a chart."""
  paths = re.findall(r'<path class="line[^"]*" d="([^"]*)"', chart)
  return [re.findall(r"[ML]([\d.-]+) ([\d.-]+)", path) for path in paths]


def test_chart_draws_each_value_and_shows_the_last():
  steps = np.array([10, 20, 40])
  chart = figures.line_chart("Loss", [("loss", steps, np.array([3.0, 2, 1.5]))])
  ((first, second, last),) = points(chart)
  width = figures.WIDTH - figures.LEFT - figures.RIGHT
  assert float(first[0]) == 0 and float(last[0]) == width
  assert float(second[0]) == pytest.approx(width / 3, abs=0.1)
  assert float(first[1]) < float(second[1]) < float(last[1])  # y goes down
  assert "<b>1.5</b>" in chart


def test_chart_breaks_at_non_finite_values_and_counts_them():
  values = np.array([1.0, 2.0, np.nan, 3.0, np.inf, 4.0, 5.0])
  chart = figures.line_chart("Loss", [("loss", np.arange(7) * 10, values)])
  assert "2 not finite, the first at step 20" in chart
  assert len(points(chart)[0]) == 4 and chart.count("<circle") == 1
  assert "nan" not in chart.lower().replace("loss", "")


def test_chart_of_nothing_finite_or_one_point_is_drawn():
  nothing = figures.line_chart("L", [("l", np.arange(2), np.full(2, np.nan))])
  assert "No finite value" in nothing
  one = figures.line_chart("L", [("l", np.array([5]), np.array([2.0]))])
  assert one.count("<circle") == 1 and "<b>2</b>" in one


def test_outlier_does_not_flatten_the_rest():
  values = RANDOM.normal(size=50) + 220
  values[0] = 12
  chart = figures.line_chart("Speed", [("speed", np.arange(50), values)])
  assert "1 off the scale, farthest 12" in chart
  heights = [float(y) for _, y in points(chart)[0][1:]]
  assert max(heights) - min(heights) > 50


def test_long_noisy_lines_are_thinned_smoothed_and_keep_their_spike():
  values = RANDOM.normal(size=20_000)
  values[12_345] = 6.0
  chart = figures.line_chart("Loss", [("loss", np.arange(20_000), values)])
  raw, smooth = points(chart)
  assert len(raw) <= figures.POINTS and len(smooth) <= figures.POINTS
  assert min(float(y) for _, y in raw) < min(float(y) for _, y in smooth) - 30
  highest = min(raw, key=lambda point: float(point[1]))
  width = figures.WIDTH - figures.LEFT - figures.RIGHT
  assert float(highest[0]) == pytest.approx(12_345 / 19_999 * width, abs=0.1)


def test_chart_escapes_its_words():
  chart = figures.line_chart(
    "<script>", [(n, np.arange(3), np.arange(3.0)) for n in ("<a>", "<b&c>")]
  )
  assert "<script>" not in chart and "<a>" not in chart and "<b&c>" not in chart


def test_mask_pictures_show_context_and_each_target():
  context = np.zeros((3, 5), bool)
  context[0, 1:] = True
  targets = np.zeros((2, 3, 5), bool)
  targets[0, 1:, :2] = True
  targets[1, 2, 4] = True
  image = RANDOM.integers(0, 256, (12, 20, 3), np.uint8)
  shown = figures.mask_pictures(image, context, targets, name="mask-7")
  assert shown.count('viewBox="0 0 5 3"') == 3
  assert shown.count("data:image/png") == 1
  assert shown.count('href="#mask-7"') == 2
  assert "context: 4 of 15 patches" in shown and "targets: 4, 1" in shown
  hidden = re.search(r'class="hidden" d="([^"]*)"', shown)[1]
  assert hidden.count("M") == 11 and hidden.startswith("M0 0h1")
  blocks = re.findall(r'class="block" d="([^"]*)"', shown)
  assert blocks[1] == "M4 2h1v1h-1z"
  edges = re.findall(r'class="edge" d="([^"]*)"', shown)
  assert edges[0].count("M") == 8  # around 2 x 2
  assert set(re.findall("M[^M]*", edges[1])) == {
    "M4 2h1", "M4 3h1", "M4 2v1", "M5 2v1"
  }  # fmt: skip


def test_pca_colours_follow_three_known_directions():
  axes = np.linalg.qr(RANDOM.normal(size=(9, 3)))[0]
  spread = np.array([5.0, 2.0, 1.0])
  components = RANDOM.normal(size=(2, 3, 5, 3)) * spread
  colours, shares = figures.pca_colours(components @ axes.T + 100)
  assert colours.shape == (2, 3, 5, 3) and colours.dtype == np.uint8
  assert shares.sum() == pytest.approx(1) and shares[0] > shares[1] > shares[2]
  for i in range(3):
    correlation = np.corrcoef(
      colours[..., i].ravel(), components[..., i].ravel()
    )
    assert abs(correlation[0, 1]) > 0.85


@pytest.mark.parametrize("width", [1, 2])
def test_pca_of_few_or_constant_features_is_drawn(width):
  colours, shares = figures.pca_colours(np.ones((2, 3, 5, width)))
  assert colours.shape == (2, 3, 5, 3)
  np.testing.assert_array_equal(shares, 0)


@pytest.mark.parametrize(
  "features", [np.ones((3, 5, 7)), np.full((2, 3, 5, 7), np.nan)]
)
def test_pca_refuses_what_it_cannot_colour(features):
  with pytest.raises(ValueError, match="PCA got features"):
    figures.pca_colours(features)
