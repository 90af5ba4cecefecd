import configparser
import html.parser
import json
import math
import pathlib
import re

import numpy as np
import pytest

from jepa_jax.evaluation import curves, report, verdict

RANDOM = np.random.default_rng(0)
EVIL = "<script>alert('x')</script>&$title"


class Checker(html.parser.HTMLParser):
  """Every opened element is closed, in order; collects text and addresses."""

  OPTIONAL = {"td", "th", "tr", "tbody", "thead"}  # end tags HTML leaves out
  VOID = {"meta", "img"}

  def __init__(self):
    super().__init__()
    self.open, self.words, self.addresses, self.tags = [], [], [], []
    self.ids, self.doubled = set(), set()

  def note(self, tag, attributes):
    self.tags.append(tag)
    self.addresses += [v for k, v in attributes if k in ("src", "href")]
    ids = {v for k, v in attributes if k == "id"}
    self.doubled |= ids & self.ids
    self.ids |= ids

  def handle_starttag(self, tag, attributes):
    self.note(tag, attributes)
    if tag not in self.OPTIONAL | self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attributes):
    self.note(tag, attributes)

  def handle_endtag(self, tag):
    if tag not in self.OPTIONAL:
      assert self.open.pop() == tag

  def handle_data(self, data):
    self.words.append(data)


def read(workdir):
  """Writes and parses the report; returns the checker and its plain text."""
  page = report.write(workdir).read_text(encoding="utf-8")
  checker = Checker()
  checker.feed(page)
  checker.close()
  assert not checker.open
  for address in checker.addresses:  # nothing from outside
    assert address.startswith(("data:image/png;base64,", "#"))
  assert "@import" not in page
  assert page.count("url(") == page.count("url(#chart-")
  assert not checker.doubled, checker.doubled
  return checker, re.sub(r"\s+", " ", " ".join(checker.words))


def row(evaluation, encoder, top1, title="linear probe", features="last"):
  features = "pixels" if encoder == "pixels" else features
  share = top1 / 100
  return {
    "evaluation": evaluation, "protocol": title[:3], "title": title,
    "score": "top1", "unit": "%", "higher_is_better": True,
    "features": features, "encoder": encoder, "top1": top1,
    "standard_error": 100 * math.sqrt(share * (1 - share) / 2000),
    "n_train": 8000, "n_test": 2000,
  }  # fmt: skip


def error_row(encoder, rmse, standard_error=0.02):
  return {
    "evaluation": "depth", "protocol": "my.file:ROW", "title": "regression",
    "score": "rmse", "unit": "m", "higher_is_better": False,
    "features": "last", "encoder": encoder, "rmse": rmse,
    "standard_error": standard_error,
  }  # fmt: skip


def write_pictures(path, n=3, h=3, w=5, channels=3, **changes):
  arrays = {
    "masks_image": RANDOM.integers(0, 256, (n, 12, 20, channels), np.uint8),
    "masks_context": RANDOM.random((n, h, w)) < 0.5,
    "masks_targets": RANDOM.random((n, 4, h, w)) < 0.2,
    "features_image": RANDOM.integers(0, 256, (n, 12, 20, channels), np.uint8),
    "features": RANDOM.normal(size=(n, h, w, 7)),
    "features_random": RANDOM.normal(size=(n, h, w, 7)),
  } | changes
  np.savez(path, **{k: v for k, v in arrays.items() if v is not None})


def fill(workdir):
  workdir.joinpath("config.json").write_text(
    json.dumps({"seed": 3, "note": EVIL, "data": {"mean": [0.5], EVIL: None}})
  )
  workdir.joinpath("run.json").write_text(
    json.dumps(
      {
        "device": EVIL,
        "devices": 4,
        "seconds": 3725,
        "parameters": 85_800_000,
        "images_per_second": 216.4,
        "versions": {"jax": "0.10.2"},
      }
    )  # fmt: skip
  )
  with workdir.joinpath("metrics.jsonl").open("w") as file:
    for step in range(5, 105, 5):
      values = {"step": step, "loss": 1 / step, "effective_rank": 20.0}
      values |= {EVIL: 1.0, "eval/count/linear": step, "grad_norm": 2.0}
      file.write(json.dumps(values) + "\n")
  scores = [("trained", 50.0), ("random", 40.0), ("pixels", 30.0)]
  rows = [row(EVIL, encoder, top1) for encoder, top1 in scores]
  rows.append({"evaluation": "depth", "encoder": "trained", "rmse": 0.25})
  workdir.joinpath("evaluations.json").write_text(json.dumps(rows))
  write_pictures(workdir / "pictures.npz")


def test_full_report_is_one_sound_page_with_every_part(tmp_path):
  fill(tmp_path)
  checker, text = read(tmp_path)
  assert checker.tags.count("script") == 0
  assert EVIL in text  # shown as text
  for words in (
    "The trained encoder beats its baselines", "+10.0", "+20.0", "0.25", "rmse",
    "85.8M", "1 h 2 min", "216.4", "Loss", "Effective rank of the features",
    "Evaluations during training", "its patches", "of 15 patches", "0.10.2",
    "Not recorded: data_wait_seconds",
  ):  # fmt: skip
    assert words in text
  assert "COLLAPSE" not in text and "There is no" not in text
  # Image, context and targets; image, trained twice and random; 3 of each.
  images = [a for a in checker.addresses if a.startswith("data:")]
  assert len(images) == 3 * 3 + 3 * 4
  assert checker.tags.count("svg") == 5  # loss, gradient, rank, EVIL, count
  assert text.count(" step ") >= 4  # and each says what its axis is


def test_report_of_an_empty_workdir_names_what_is_missing(tmp_path):
  _, text = read(tmp_path)
  for name in ("config.json", "run.json", "metrics.jsonl", "evaluations.json"):
    assert f"There is no {name} in the workdir" in text
  assert text.count("There is no pictures.npz") == 2
  assert "nothing is known" in text


FILES = (
  "config.json", "run.json", "metrics.jsonl", "evaluations.json", "pictures.npz"
)  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_one_missing_part_is_said(tmp_path, name):
  fill(tmp_path)
  (tmp_path / name).unlink()
  assert f"There is no {name} in the workdir" in read(tmp_path)[1]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [b"", b"{[", b"PK\x03\x04\xff\x00", b"\xff"])
def test_a_damaged_part_is_said(tmp_path, name, damage):
  fill(tmp_path)
  (tmp_path / name).write_bytes(damage)
  _, text = read(tmp_path)
  assert f"{name} is damaged" in text or f"{name} holds no" in text


def test_truncated_pictures_are_said(tmp_path):
  fill(tmp_path)
  path = tmp_path / "pictures.npz"
  path.write_bytes(path.read_bytes()[:-300])
  assert "pictures.npz is damaged" in read(tmp_path)[1]


@pytest.mark.parametrize(
  "changes, words",
  [
    ({"masks_targets": None}, "pictures.npz lacks masks_targets"),
    ({"features_random": None}, "there is no comparison"),
    ({"features": np.full((3, 3, 5, 7), np.nan)}, "features: PCA got"),
    ({"masks_context": np.zeros(3, bool)}, "unexpected shapes"),
    ({"features_image": np.zeros((3, 12), np.uint8)}, "unexpected shape"),
    ({"features": np.ones((1, 3, 5, 7))}, "variance"),
  ],
)
def test_incomplete_pictures_are_said(tmp_path, changes, words):
  write_pictures(tmp_path / "pictures.npz", **changes)
  assert words in read(tmp_path)[1]


def test_grey_images_are_shown(tmp_path):
  write_pictures(tmp_path / "pictures.npz", channels=1)
  checker, _ = read(tmp_path)
  assert sum(a.startswith("data:") for a in checker.addresses) == 21


def test_metrics_of_a_resumed_run_keep_the_last_of_each_step():
  text = (
    b'{"step": 10, "loss": 3.0, "text": "x", "flag": true}\n'
    b'{"step": 20, "loss": 2.0}\n\n'
    b'{"step": 30, "loss": 1.0}\n'
    b'{"step": 20, "loss": NaN, "eval/count": null}\n'
    b'{"step": 30, "grad_norm": Infinity}\n'
    b'{"step": 40, "lo'
  )
  metrics, notes = curves.read(text)
  assert set(metrics) == {"loss", "eval/count", "grad_norm"}
  np.testing.assert_array_equal(metrics["loss"][0], [10, 20, 30])
  np.testing.assert_array_equal(metrics["loss"][1], [3, np.nan, 1])
  assert np.isnan(metrics["eval/count"][1]) and notes == [
    "The last line of metrics.jsonl is cut off and was skipped."
  ]


def test_broken_lines_amid_the_metrics_are_counted():
  text = (
    b'{"step": 1, "loss": 2}\n{"st\n[1]\n{"loss": 1}\n{"step": 2, "loss": 1}'
  )
  metrics, notes = curves.read(text)
  np.testing.assert_array_equal(metrics["loss"][1], [2, 1])
  assert "3 lines" in notes[0] and "line 2" in notes[0]


def test_collapse_and_divergence_raise_an_alarm(tmp_path):
  (tmp_path / "metrics.jsonl").write_text(
    '{"step": 1, "effective_rank": 30.0, "loss": 1.0}\n'
    '{"step": 2, "effective_rank": 1.01, "loss": NaN}\n'
  )
  _, text = read(tmp_path)
  assert "COLLAPSE" in text and "effective rank 1.01" in text
  assert "The last loss is nan" in text


def test_verdict_states_each_outcome():
  def rows(name, trained, random, pixels):
    scores = {"trained": trained, "random": random, "pixels": pixels}
    return [row(name, encoder, top1) for encoder, top1 in scores.items()]

  count, distance = rows("count", 50, 40, 20), rows("distance", 55, 44, 72)
  assert verdict.verdict(count).startswith("The trained encoder beats its base")
  mixed = verdict.verdict(count + distance)
  assert "raw pixels are not beaten on distance: " in mixed
  assert "count 50.0 % (+10.0 over the random encoder, +30.0" in mixed
  assert "distance 55.0 % (+11.0 over the random encoder, −17.0" in mixed
  flat = rows("flat", 41, 40, 20)  # 1 point of 2,000 images is noise
  assert verdict.verdict(flat).startswith("Training did not help on flat:")
  partly = verdict.verdict(count + flat)
  assert partly.startswith("Training helped on count, not on flat:")


def test_verdict_takes_the_best_features_and_the_first_protocol():
  rows = [
    row("count", "trained", 50, features="last"),
    row("count", "trained", 60, features="last4"),
    row("count", "random", 45, features="last"),
    row("count", "random", 41, features="last4"),
    row("count", "trained", 99, title="k-NN"),
    row("count", "random", 1, title="k-NN"),
  ]
  sentence = verdict.verdict(rows)
  assert "linear probe on count 60.0 % (+15.0 over the random" in sentence
  assert "k-NN on count 99.0 % (+98.0" in verdict.verdict(rows[4:])


def test_a_score_of_which_less_is_better_is_read_so():
  rows = [error_row("trained", 0.5), error_row("random", 0.8)]
  sentence = verdict.verdict(rows)
  assert sentence.startswith("The trained encoder beats its baselines: ")
  assert "regression on depth rmse 0.500 m (−0.300 over the random" in sentence
  assert "lower is better" in sentence
  rows += [error_row("trained", 0.3) | {"features": "last4"}]
  assert "rmse 0.300 m" in verdict.verdict(rows)  # the best of two features
  worse = verdict.verdict([error_row("trained", 0.9), rows[1]])
  assert worse.startswith("Training did not help on depth:")
  (line,) = verdict.table(rows[:2])
  assert line["over"][0] == {"text": "−0.300", "verdict": "good"}
  assert line["scores"][0] == {"text": "0.500", "error": "0.020"}
  assert line["scores"][2] is line["over"][1] is None  # no pixels
  assert line["score"] == "rmse m, lower is better"


def test_scores_without_a_standard_error_or_not_finite():
  rows = [error_row("trained", 0.5, None), error_row("random", 0.51, None)]
  assert verdict.verdict(rows).startswith("The trained encoder beats")
  rows = [error_row("trained", math.nan), error_row("random", 0.5)]
  assert verdict.verdict(rows).startswith("No probe with a baseline")
  assert not verdict.compares(rows[0]) and verdict.compares(rows[1])


def test_rows_of_the_first_version_still_compare(tmp_path):
  """They name neither score nor unit, and no standard error."""
  rows = [
    {k: v for k, v in row("count", encoder, top1).items()
     if k not in ("title", "score", "unit", "higher_is_better",
                  "standard_error")}
    for encoder, top1 in (("trained", 41.0), ("random", 40.0))
  ]  # fmt: skip
  assert "lin on count 41.0 % (+1.0 over the random" in verdict.verdict(rows)
  assert verdict.verdict(rows).startswith("Training did not help on count:")
  (line,) = verdict.table(rows)
  assert line["scores"][0] == {"text": "41.0", "error": "1.1"}
  assert line["over"][0]["verdict"] == "faint"


def test_limits_of_collapse_are_those_of_the_run(tmp_path):
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "effective_rank": 3}')
  assert "COLLAPSE" not in read(tmp_path)[1]
  limits = {"collapse": {"effective_rank": 4.0}}
  (tmp_path / "config.json").write_text(json.dumps(limits))
  assert "effective rank 3 is below 4" in read(tmp_path)[1]
  (tmp_path / "config.json").write_text('{"collapse": {"rank": 4}}')
  assert "unknown collapse threshold 'rank'" in read(tmp_path)[1]


def test_what_an_objective_lacks_is_not_missed(tmp_path):
  fill(tmp_path)
  changes = dict.fromkeys(("masks_image", "masks_context", "masks_targets"))
  write_pictures(tmp_path / "pictures.npz", **changes)
  _, text = read(tmp_path)
  assert "Masks" not in text and "masks" not in text and "Features" in text
  assert "momentum" not in text.lower()  # nothing is averaged
  names = ("features_image", "features", "features_random")
  write_pictures(tmp_path / "pictures.npz", **dict.fromkeys(names))
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 105, "momentum": 0.9, "a_norm": 1, "b_norm": 2}')
  _, text = read(tmp_path)
  assert "Masks" in text and "Patch features" not in text
  assert "Momentum of the moving average" in text
  assert re.search(r"Norms +a 1 +b 2 ", text)


def test_the_page_itself_is_in_the_wheel():
  root = pathlib.Path(report.__file__).resolve().parents[2]
  options = configparser.ConfigParser()
  options.read(root / "setup.cfg")
  patterns = options["options.package_data"]["jepa_jax.evaluation"].split()
  template = pathlib.Path(report.__file__).with_name("report.html.j2")
  assert any(template.match(pattern) for pattern in patterns)


def test_differences_within_the_noise_are_grey(tmp_path):
  rows = [row("count", "trained", 41.0), row("count", "random", 40.0)]
  path = tmp_path / "evaluations.json"
  path.write_text(json.dumps(rows))
  page = report.write(tmp_path).read_text()
  assert '<span class="faint">+1.0</span>' in page and "±1.1" in page
  rows[0]["top1"] = 30.0
  path.write_text(json.dumps(rows))
  page = report.write(tmp_path).read_text()
  assert '<span class="bad">−10.0</span>' in page


def test_no_directory_is_a_clear_error(tmp_path):
  with pytest.raises(ValueError, match="pass the --workdir of a run"):
    report.write(tmp_path / "nowhere")


def test_differences_of_the_headline_stand_in_the_table(tmp_path):
  rows = [
    row("count", "trained", 50, features="last"),
    row("count", "trained", 61, features="last4"),
    row("count", "random", 45, features="last"),
    row("count", "random", 41, features="last4"),
    row("count", "pixels", 30),
  ]
  said = re.findall(r"[+−][0-9.]+", verdict.verdict(rows))
  assert said == ["+16.0", "+31.0"]
  lines = verdict.table(rows)
  assert [line["features"] for line in lines] == ["last", "last4", "best"]
  assert [x["text"] for x in lines[-1]["over"]] == said
  assert [x["text"] for x in lines[1]["over"]] == ["+20.0", "+31.0"]
  assert len(verdict.table(rows[::2])) == 1  # one kind of features: no best
  (tmp_path / "evaluations.json").write_text(json.dumps(rows))
  _, text = read(tmp_path)
  assert all(text.count(difference) >= 2 for difference in said)


def test_a_table_says_chance_classes_top5_train_and_each_class(tmp_path):
  more = {
    "majority": 13.5, "classes": 8, "top5": 91.0, "train_top1": 66.5,
    "per_class": {"ant": 70.0, "über-bee": 20.0}, "skipped": 3, "unseen": 4,
    "confusion": {"ant": {"ant": 7, "über-bee": 3}, "über-bee": {"fly": 9}},
  }  # fmt: skip
  rows = [
    row("count", "trained", 50) | more,
    row("count", "random", 45) | more | {"per_class": {"ant": 33.0}},
  ]
  (line,) = verdict.table(rows)
  assert (line["top5"], line["train"]) == ("91.0", "66.5")
  for words in (
    "8 classes", "chance 13.5 %", "8,000 images", "scored on 2,000",
    "4 of a class that training lacks", "3 unreadable",
  ):  # fmt: skip
    assert words in line["facts"]
  (part,) = verdict.per_class(rows)
  assert part["classes"] == [
    {"name": "ant", "trained": 70.0, "random": 33.0},
    {"name": "über-bee", "trained": 20.0, "random": None},
  ]
  (tmp_path / "evaluations.json").write_text(json.dumps(rows))
  page = report.write(tmp_path).read_text()
  assert part["confusion"]["columns"] == ["ant", "über-bee", "fly"]
  assert part["confusion"]["rows"][0] == ["ant", [(7, 0.7), (3, 0.3), (0, 0.0)]]
  assert page.count('<td style="--share:') == 6 and "--share: 30%" in page
  assert 'style="width: 70.0%"' in page and 'style="left: 33.0%"' in page
  assert "last4</i> those of the last four layers" in page


def test_spectra_of_features_are_drawn(tmp_path):
  rows = [
    row("x", "trained", 5) | {"spectrum": [0.9, 0.09, 0.01, 0.0]},
    row("x", "random", 4) | {"spectrum": [0.5, 0.5]},
    row("y", "trained", 4) | {"spectrum": ["no"]},
  ]
  (part,) = verdict.spectra(rows)
  assert part["lines"] == [
    ("trained", [0.9, 0.09, 0.01]), ("random", [0.5, 0.5]),
  ]  # fmt: skip
  (tmp_path / "evaluations.json").write_text(json.dumps(rows))
  page = report.write(tmp_path).read_text()
  assert "x last: spectrum" in page
  assert "spectrum0" in page and "spectrum1" not in page and "rank" in page


def test_charts_have_words_for_names_and_none_comes_twice(tmp_path):
  values = {
    "loss": 1.0, "images_per_second": 5.0, "images_per_second_per_chip": 5.0,
    "host_memory_gib": 2.0, "model_flops_utilisation": 0.4, "my_metric": 3.0,
    "grad_norm": 1.0, "grad_norm/encoder": 1.0, "teacher_entropy/low_part": 2.0,
  }  # fmt: skip
  lines = [json.dumps({"step": n, **values}) for n in (1, 2)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  metrics, _ = curves.read("\n".join(lines).encode())
  sections = curves.draw(metrics)
  titles = [x["title"] for part in sections.values() for x in part["charts"]]
  assert titles == [
    "Loss", "Gradient norm", "Gradient norm, by part", "Images a second",
    "Memory of the host, GiB", "Share of the devices' peak FLOPs",
    "My metric", "Teacher entropy, by part",
  ]  # fmt: skip
  # Words about targets that the network makes are of those that make them.
  assert "can be healthy" not in read(tmp_path)[1]
  lines = [json.dumps({"step": n, **values, "momentum": 0.9}) for n in (1, 2)]
  (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
  assert "can be healthy" in read(tmp_path)[1]
  metrics["images_per_second_per_chip"][1][:] = 2.5  # two devices
  (chart,) = [
    x
    for x in curves.draw(metrics)["Speed"]["charts"]
    if x["title"] == "Images a second"
  ]
  assert [x["name"] for x in chart["lines"]] == ["all devices", "a device"]
