"""Every key of the configuration takes what is inside its range, no more.

Values are drawn for every key of the table and of the objectives; a new key
joins by being in the table, and a new kind by a line in INSIDE and OUTSIDE.
"""

import functools
import math

import conftest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

from jepa_jax import (
  command,
  config_table,
  durations,
  keys,
  known_keys,
  objectives,
)
from jepa_jax import config as config_lib

OUTSIDE_OBJECTIVE = "outside_objective:Outside"


def rows():
  """(name in a message, key, objective) of the package and of the tests."""
  for name, key, objective in known_keys.of_package():
    yield name.replace(".NAME.", ".x."), key, objective
  for name, key in known_keys.of_objective(OUTSIDE_OBJECTIVE).items():
    yield f"method.{name}", key, OUTSIDE_OBJECTIVE


ROWS = list(rows())
every_key = pytest.mark.parametrize(
  "name, key, objective", ROWS, ids=[f"{row[2]}{row[0]}" for row in ROWS]
)


# ---------------------------------------------------------------------------
# Values of a kind, and values that are none of its.


@functools.singledispatch
def inside(kind):
  raise NotImplementedError(f"draw values of {type(kind)}")


@functools.singledispatch
def outside(kind):
  raise NotImplementedError(f"draw values that are not of {type(kind)}")


@inside.register
def _(kind: keys.Number):
  if kind.whole:
    values = st.integers(kind.least, kind.most)
  else:
    bounded = lambda x: x if math.isfinite(x) else None
    values = st.floats(
      bounded(kind.least),
      bounded(kind.most),
      exclude_min=kind.without in ("least", "both"),
      exclude_max=kind.without in ("most", "both"),
      allow_nan=False,
      allow_infinity=False,
    )
  return values | st.sampled_from(kind.also) if kind.also else values


@outside.register
def _(kind: keys.Number):
  ends = [math.nan, math.inf, -math.inf, True, None, "1", (1,)]
  for end, name, step in (
    (kind.least, "least", -1),
    (kind.most, "most", 1),
  ):
    if math.isfinite(end):
      beyond = end + step if kind.whole else math.nextafter(end, step * 1e300)
      ends += [beyond, end + step * 1e6, end + step * 1e30]
      ends += [end] * (kind.without in (name, "both"))
  if kind.whole:
    ends += [kind.least + 0.5, float(kind.most)]
  return st.sampled_from([x for x in ends if x not in kind.also])


@inside.register
def _(kind: keys.Sides):
  side = inside(kind.kind)
  return side | st.tuples(side, side)


@outside.register
def _(kind: keys.Sides):
  side, wrong = inside(kind.kind), outside(kind.kind)
  return (
    wrong | st.tuples(side, wrong) | st.tuples(side) | st.tuples(*[side] * 3)
  )


@inside.register
def _(kind: keys.Flag):
  return st.booleans()


@outside.register
def _(kind: keys.Flag):
  return st.sampled_from([0, 1, "true", "", None, (True,)])


@inside.register
def _(kind: keys.Text):
  values = st.from_regex(kind.pattern, fullmatch=True)
  return values | st.just("") if kind.empty else values


@outside.register
def _(kind: keys.Text):
  values = [1, 2.5, None, True, ("a",), "a\nb", "a\0b"]
  return st.sampled_from(values + [""] * (not kind.empty))


@inside.register
def _(kind: keys.Choice):
  return st.sampled_from(kind.known)


@outside.register
def _(kind: keys.Choice):
  texts = st.text(max_size=9).filter(lambda x: x not in kind.known)
  return texts | st.sampled_from([0, None, kind.known, kind.known[0].upper()])


@inside.register
def _(kind: keys.Pattern):
  return st.sampled_from(["", ".*", "a|b$", r"encoder/block_\d+"])


@outside.register
def _(kind: keys.Pattern):
  return st.sampled_from(["(", "*", "[a", 1, None, ("a",)])


@inside.register
def _(kind: keys.Group):
  values = st.tuples(*map(inside, kind.kinds))
  return values.map(sorted).map(tuple) if kind.ordered else values


@outside.register
def _(kind: keys.Group):
  good = inside(kind)
  one_wrong = st.tuples(*map(inside, kind.kinds[:-1]), outside(kind.kinds[-1]))
  wrong = st.sampled_from([1, "ab", None, {}]) | one_wrong
  wrong |= good.map(lambda x: x[:-1]) | good.map(lambda x: (*x, x[-1]))
  if kind.ordered:
    upside_down = good.filter(lambda x: x[0] != x[1]).map(lambda x: x[::-1])
    wrong |= upside_down
  return wrong


@inside.register
def _(kind: keys.Many):
  return st.lists(inside(kind.kind), min_size=kind.least, max_size=4).map(tuple)


@outside.register
def _(kind: keys.Many):
  wrong = st.sampled_from([1, "ab", None]) | st.lists(
    outside(kind.kind), min_size=1, max_size=3
  ).map(tuple)
  return wrong | st.just(()) if kind.least else wrong


UNITS = ("steps", "epochs", "examples", "step")


@inside.register
def _(kind: durations.Span):
  amount = st.integers(not kind.zero, 10**9)
  spans = st.tuples(amount, st.sampled_from(UNITS))
  texts = spans.map(lambda x: f"{x[0]} {x[1]}")
  return texts | st.sampled_from(["5 %", "0.1 %"]) if kind.percent else texts


@outside.register
def _(kind: durations.Span):
  wrong = ["", "many", "-1 steps", "nan steps", "inf epochs", "1e400 steps"]
  wrong += [
    "3 weeks",
    "steps",
    "3",
    3,
    None,
    "1e16 steps",
    "101 %",
    "1. . steps",
  ]
  wrong += ["0 steps"] * (not kind.zero) + ["5 %"] * (not kind.percent)
  return st.sampled_from(wrong)


# ---------------------------------------------------------------------------


quick = settings(
  max_examples=40,
  deadline=None,
  derandomize=True,
  database=None,
  suppress_health_check=list(HealthCheck),
)


@every_key
def test_the_default_is_inside_and_said_in_words(name, key, objective):
  key.kind.check(name, key.default)
  assert key.doc and str(key.kind) and "\n" not in key.doc + str(key.kind)
  text = key.default if isinstance(key.default, str) else repr(key.default)
  assert keys.read(key.kind, name, text) == key.default


@every_key
@quick
@given(data=st.data())
def test_what_is_inside_passes(name, key, objective, data):
  key.kind.check(name, data.draw(inside(key.kind)))


@every_key
@quick
@given(data=st.data())
def test_what_is_outside_is_one_line_that_names_the_key(
  name, key, objective, data
):
  value = data.draw(outside(key.kind))
  with pytest.raises(ValueError) as error:
    key.kind.check(name, value)
  assert name in str(error.value) and len(str(error.value)) < 600


@every_key
def test_check_walks_the_whole_table(name, key, objective):
  config = conftest.small_config()
  config.objective = objective or config.objective
  config_lib.fill_method(config)
  config.evaluations.x = config_lib.evaluation("count")
  *parents, leaf = name.split(".")
  node = functools.reduce(lambda node, part: node[part], parents, config)
  with config.ignore_type():
    node[leaf] = object()
  with pytest.raises(ValueError, match=name.replace(".", r"\.")):
    config_lib.check(config)


def test_numbers_are_read_from_the_command_line_as_their_kind_says():
  assert keys.read(keys.whole(1, 10**7), "n", "1e6") == 10**6
  assert type(keys.read(keys.number(0.0), "x", "1")) is float


def test_what_an_evaluation_changes_of_the_data_is_checked():
  config = conftest.small_config()
  config.evaluations.x = config_lib.evaluation("count", image_size=-3)
  with pytest.raises(ValueError, match="evaluations.x.data.image_size is -3"):
    config_lib.check(config)
  config.evaluations.x = config_lib.evaluation("count", imagesize=40)
  with pytest.raises(
    ValueError, match="nearest: evaluations.x.data.image_size"
  ):
    config_lib.check_names(config)


# ---------------------------------------------------------------------------
# Keys that belong to one objective.


def experiment(folder, objective):
  path = folder / "experiment.py"
  path.write_text(
    "from jepa_jax import config\n"
    f"def get_config(): return config.defaults({objective!r})\n"
  )
  return str(path)


def test_what_an_evaluation_changes_of_the_data_is_its_own():
  config = config_lib.defaults()
  config.data.image_size = 64
  config.encoder.patch_size = config.data.get_ref("image_size") // 8
  settings = config_lib.evaluation("label", image_size=48)
  assert config_lib.evaluation_data(config, settings).image_size == 48
  assert config.data.image_size == 64 and config.encoder.patch_size == 8


def test_an_objective_brings_its_keys(tmp_path):
  plain, other = (experiment(tmp_path, name) for name in ("", ""))
  own = {name: key.default for name, key in config_table.IJEPA.items()}
  assert command.load_config(plain).method.to_dict() == own
  flag = f"--config.objective={OUTSIDE_OBJECTIVE}"
  config = command.load_config(other, ["--config.method.classes=7", flag])
  assert config.method.to_dict() == {"classes": 7, "keep": 0.9}
  path = experiment(tmp_path, OUTSIDE_OBJECTIVE)
  config = command.load_config(path, ["--config.objective=ijepa"])
  assert config.method.to_dict() == own
  with pytest.raises(ValueError, match="method.classes is 1; it needs a whole"):
    command.load_config(path, ["--config.method.classes=1"])
  with pytest.raises(ValueError, match="nearest: method.classes"):
    command.load_config(path, ["--config.method.clases=7"])


def test_an_experiment_may_name_its_objective_after_the_defaults(tmp_path):
  path = tmp_path / "experiment.py"
  path.write_text(
    "from jepa_jax import config\n"
    "def get_config():\n"
    "  c = config.defaults()\n"
    f"  c.objective = {OUTSIDE_OBJECTIVE!r}\n"
    "  return c\n"
  )
  config = command.load_config(str(path))
  assert config.method.to_dict() == {"classes": 11, "keep": 0.9}


def test_an_objective_without_its_keys_is_told_how_to_get_them():
  config = conftest.small_config()
  config.objective = OUTSIDE_OBJECTIVE
  with pytest.raises(ValueError, match="no method.classes.*fill_method"):
    config_lib.check(config)


def test_the_default_objective_has_the_keys_of_the_table():
  default = config_table.KEYS["objective"].default
  assert objectives.load(default).keys is config_table.IJEPA
