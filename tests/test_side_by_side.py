"""The table of several encoders: what is in it, and how it is written."""

import os

from jepa_jax.evaluation import side_by_side


def row(encoder, value, features="last", **more):
  return {
    "evaluation": "a_b", "protocol": "p", "title": "probe", "score": "top1",
    "unit": "%", "higher_is_better": True, "features": features,
    "encoder": encoder, "top1": value, **more,
  }  # fmt: skip


ROWS = [
  row("one", 50.0),
  row("two|x", 61.25),
  row("two|x", 70.0, "last4"),
  row("pixels", 55.0, "pixels"),
]


def test_weights_are_called_by_the_end_of_their_path_where_it_is_unique():
  paths = ["/a/x.npz", "/b/x.npz", "/c/run/", "random"]
  assert side_by_side.names(paths) == {
    "/a/x.npz": "/a/x.npz",
    "/b/x.npz": "/b/x.npz",
    "run": "/c/run/",
    os.path.abspath("random"): "random",
  }


def test_a_line_a_protocol_and_its_features_and_a_column_an_encoder():
  header, lines, best = side_by_side.table(ROWS)
  assert header[3:] == ["one", "two|x", "pixels"]
  assert lines == [
    ["a_b", "probe last", "top1 %", "50.0", "61.2", "55.0"],
    ["a_b", "probe last4", "top1 %", "-", "70.0", "55.0"],
  ]
  assert best == [[1], [1]]


def test_the_best_of_an_error_is_the_smallest():
  rows = [
    row(n, v, higher_is_better=False, unit="m")
    for n, v in (("a", 2.0), ("b", 0.1234))
  ]
  _, ((*_, first, second),), best = side_by_side.table(rows)
  assert (first, second, best) == ("2.000", "0.123", [[1]])


def test_formats():
  text = side_by_side.text(ROWS).splitlines()
  assert len(text) == 3 and len({line.index("top1") for line in text[1:]}) == 1
  markdown = side_by_side.markdown(ROWS).splitlines()
  assert markdown[0].startswith("| evaluation |") and r"two\|x" in markdown[0]
  assert markdown[1] == "|---|---|---|---:|---:|---:|"
  assert markdown[2].endswith("| 50.0 | **61.2** | 55.0 |")
  latex = side_by_side.latex(ROWS)
  assert (
    r"a\_b & probe last & top1 \% & 50.0 & \textbf{61.2} & 55.0 \\" in latex
  )
  assert latex.startswith(r"\begin{tabular}{lllrrr}")
