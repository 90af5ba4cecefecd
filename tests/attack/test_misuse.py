"""What users get wrong: one line that names it, code 2, and nothing written.

Every misuse goes through the command itself, in this process. A new key joins
by its row in the table of keys, see test_keys.py; all else is a row below.
"""

import json
import os
import runpy
import sys

import conftest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
import pytest
from test_keys import outside, quick

from jepa_jax import command, config_table, keys
from jepa_jax import config as config_lib

TRAIN = "jepa_jax.train"
EVALUATE = "jepa_jax.evaluate"
QUICKSTART = str(conftest.EXPERIMENTS / "quickstart.py")


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
  """Gives a command its arguments as a shell would: (code, standard error).

  The folder that it is started in is empty, and has to be afterwards.
  """
  folder = tmp_path / "here"
  folder.mkdir()
  monkeypatch.chdir(folder)
  monkeypatch.setenv("GLIBC_TUNABLES", "")  # or Python starts anew
  # This process is in use already: it can join no others.
  monkeypatch.setattr(command.distributed, "join", lambda flags: None)

  def call(module, *arguments):
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
      runpy.run_module(module, run_name="__main__")
    assert os.listdir(folder) == []
    return stop.value.code or 0, capsys.readouterr().err

  return call


def is_refused(result, *words):
  code, said = result
  assert code == 2, said
  assert said.count("\n") == 1 and "Traceback" not in said, said
  for word in words:
    assert word in said, said


# ---------------------------------------------------------------------------
# Keys of the config.


# Of the others every text on one line is a value.
NAMES = [
  name
  for name, key in config_table.KEYS.items()
  if key.kind != keys.Text(getattr(key.kind, "what", ""))
]


@pytest.mark.parametrize("name", NAMES)
@settings(quick, max_examples=2)
@given(data=st.data())
def test_a_value_outside_of_its_range(call, name, data):
  kind = config_table.KEYS[name].kind
  value = data.draw(outside(kind))
  text = value if isinstance(value, str) else repr(value)
  assume(text.isprintable() and not fits(kind, text))
  flags = ("--config", QUICKSTART, "--workdir", "w")
  is_refused(call(TRAIN, *flags, f"--config.{name}={text}"), name)


def fits(kind, text):
  """Whether a text is a value on the command line, such as "1" for True."""
  try:
    keys.read(kind, "key", text)
  except ValueError:
    return False
  return True


RELATIONS = {
  "batch_size=62|accumulate_steps=4": "not a multiple",
  "data.mean=(0.5,)": "one a channel",
  "data.std=(0.5,0.5)": "one a channel",
  "data.channels=1": "one a channel",
  "encoder.num_heads=5": "encoder.width 64 needs to be a multiple of 4 and of",
  "encoder.width=66": "multiple of 4",
  "predictor.num_heads=5": "predictor.width",
  "optimizer.warmup=2000 steps": "make the warm-up shorter",
  "optimizer.warmup=100 %": "make the warm-up shorter",
  "total=1e12 steps": "the most",
  "total=1e9 epochs": "the most",
  "compute.attention=cudnn": "16 bits",
  "data.image_size=4096|encoder.patch_size=4": "the most are 16,384",
  "encoder.width=65536|encoder.depth=256": "parameters; the most",
  "encoder.width=1000000000": "encoder.width is 1000000000",
  "data.image_size=100000": "data.image_size is 100000",
  "optimizer.lr=-0.001": "optimizer.lr is -0.001",
  "optimizer.clip_norm=-1": "optimizer.clip_norm is -1",
  "optimizer.b1=1.5": "from 0, below 1",
  "momentum=(0.9,1.1)": "momentum[1] is 1.1",
  "encoder.dropout=1.5": "encoder.dropout is 1.5",
  "data.crop_scale=(1.0,0.3)": "min <= max",
  "data.std=(1e999,1,1)": "data.std[0] is inf",
  "checkpoint.keep=0": "checkpoint.keep is 0",
  "data.source": "--config.data.source=...",
  "dta.source=folder": "nearest: data.source",
  "objective=nothing": "known: ijepa",
  "objective=nowhere:Nothing": "cannot be imported",
  "method.nothing=1": "unknown config key",
  "evaluations.cuont=": 'did you mean "count"',
  "evaluations=none": "NAME=LABEL",
  "evaluations.count.protocols=linear": "needs a list of 1 or more",
  "evaluations.count.protocols=()": "needs a list of 1 or more",
  "evaluations.count.features=(4,)": "features[0] is 4",
  "evaluations.count.train=": "evaluations.count.train",
  "evaluations.count.data.image_size=-3": "count.data.image_size is -3",
}


@pytest.mark.parametrize("overrides", RELATIONS)
def test_values_that_do_not_fit_together(call, overrides):
  flags = [f"--config.{override}" for override in overrides.split("|")]
  flags = ("--config", QUICKSTART, "--workdir", "w", *flags)
  is_refused(call(TRAIN, *flags), RELATIONS[overrides])


# What needs the networks, the data or weights to be found: nothing is left.
INPUTS = {
  "checkpoint.best_metric=count/linear/first": "known: count/linear/last",
  "checkpoint.best_metric=loss|evaluations=": "best_metric",
  "evaluations.count.features=('first',)": "known: last",
  "evaluations.count.baselines=('human',)": "known: random, pixels",
  "evaluations.count.protocols=('svm',)": "known: linear",
  "evaluations.count=colour": "colour",
  "evaluations.count.test=validation": "validation",
  "evaluations.count.test=train[:5]": "share 5 images",
  "init_from=nowhere": 'init_from is "nowhere": there is no file or folder',
  "init_from=.": 'init_from is ".": it is neither a run',
  "data.label=colour|objective=supervised": "colour",
  "masks.min_keep=500": "min_keep",
  "masks.name=nothing": "known:",
  "encoder.patch_size=7": "nearest patch sizes",
  "mesh.data=3": "does not fit",
  "encoder.width=16408|encoder.depth=64": "GiB a device",
  "data.source=folder|data.name=nowhere": "no folder nowhere",
  "data.source=folder|data.name=": "name the data set, or the folder",
}


@pytest.mark.parametrize("overrides", INPUTS)
def test_what_is_found_before_anything_is_written(
  call, overrides, scenes_dir, tmp_path
):
  path = tmp_path / "experiment.py"
  path.write_text(
    f"import sys; sys.path.append({str(conftest.ROOT / 'tests')!r})\n"
    "import conftest\n"
    "from jepa_jax import config\n"
    "def get_config():\n"
    "  c = conftest.small_config()\n"
    f"  c.data.data_dir = {scenes_dir!r}\n"
    "  c.evaluations.count = config.evaluation('count')\n"
    "  return c\n"
  )
  flags = [f"--config.{override}" for override in overrides.split("|")]
  code, said = call(TRAIN, "--config", str(path), "--workdir", "w", *flags)
  last = said.splitlines()[-1]  # before it: what is evaluated on what
  is_refused((code, last[last.index("ValueError") :] + "\n"), INPUTS[overrides])
  assert "Traceback" not in said and said.count("ValueError") == 1


# ---------------------------------------------------------------------------
# Files of configs.

EXPERIMENTS = {
  "def get_config(:": "line 1: SyntaxError",
  "x = 1": "defines no get_config",
  "get_config = 3": "defines no get_config",
  "def get_config(): return 3": "get_config returns int",
  "def get_config(): return None": "get_config returns NoneType",
  "def get_config(): return {'batch_size': 3}": "get_config returns dict",
  "import nowhere_to_be_found": "line 1: ModuleNotFoundError: No module named",
  "\ndef get_config(): return 1 / 0": "line 2: ZeroDivisionError",
  "def get_config(a, b): return a": "TypeError: get_config() missing",
  "def get_config(): raise ValueError('no such thing')": "no such thing",
  "\0": "null bytes",
  "def get_config(): return get_config()": "RecursionError",
  "CONFIG\n c.batch_sise = 3\n return c": "nearest: batch_size",
  "CONFIG\n c.optimizer.lr = 'much'\n return c": "TypeError",
  "CONFIG\n c.optimizer.lr = -1.0\n return c": "optimizer.lr is -1.0",
  "CONFIG\n c.evaluations.x = 3\n return c": "evaluations.x",
  "CONFIG\n c.evaluations = 3\n return c": "evaluations",
  "CONFIG\n del c.masks\n return c": "has no masks.name",
  "CONFIG\n c.data = 3\n return c": "data",
}


@pytest.mark.parametrize("text", EXPERIMENTS)
def test_files_that_are_no_config(call, tmp_path, text):
  path = tmp_path / "experiment.py"
  begin = (
    "from jepa_jax import config\ndef get_config():\n c = config.defaults()"
  )
  path.write_text(text.replace("CONFIG", begin))
  result = call(TRAIN, "--config", str(path), "--workdir", "w")
  is_refused(result, EXPERIMENTS[text], str(path) * ("CONFIG" not in text))


def without(key):
  stored = json.loads(json.dumps(conftest.small_config().to_dict()))
  del stored[key]
  return json.dumps(stored)


def changed(key, value):
  config = conftest.small_config()
  with config.ignore_type():
    config[key] = value
  return json.dumps(config.to_dict())


STORED = {
  "[]": "[]",
  "null": "null",
  "{}": "{}",
  "text": "batch_size: 3",
  "nothing": "",
  "torn": json.dumps(conftest.small_config().to_dict())[:400],
  "deep": "[" * 100_000,
  "a number": "3",
  "no encoder": without("encoder"),
  "no data": without("data"),
  "batch_size": changed("batch_size", -4),
  "NaN": changed("batch_size", float("nan")),
  "group": changed("optimizer", 3),
  "evaluations": changed("evaluations", [1]),
  "evaluation": changed("evaluations", {"x": 3}),
}


@pytest.mark.parametrize("name", STORED)
def test_a_config_json_that_is_none(call, tmp_path, name):
  path = tmp_path / "config.json"
  path.write_text(STORED[name])
  result = call("jepa_jax.evaluate", "--workdir", str(tmp_path))
  is_refused(result, str(path), "cannot be read")
  assert sorted(os.listdir(tmp_path)) == ["config.json", "here"]


# ---------------------------------------------------------------------------
# Flags and folders.

C = ("--config", QUICKSTART)
REPORT = ("--report_only",)
RUN = "RUN"  # stands for a workdir with a config.json
V9 = ("--topology", "v9:8")
FLAGS = [
  ((TRAIN,), "required: --config, --workdir"),
  ((TRAIN, *C), "required: --workdir"),
  ((TRAIN, *C, "--workdir"), "--workdir: expected one argument"),
  ((TRAIN, *C, "--workdir", ""), "--workdir is ''"),
  ((TRAIN, *C, "--workdir", "a\nb"), "--workdir is"),
  ((TRAIN, *C, "--workdir", "/dev/null"), "is a file"),
  ((TRAIN, *C, "--workdir", "/dev/null/run"), "is a file"),
  ((TRAIN, *C, "--workdir", "w", "--stop_at", "-3"), "--stop_at is -3"),
  ((TRAIN, *C, "--workdir", "w", "--stop_at", "soon"), "--stop_at is"),
  ((TRAIN, *C, "--workdir", "w", "--stop_at", "1.5"), "--stop_at is 1.5"),
  ((TRAIN, *C, "--workdir", "w", "--stopat", "1"), "nearest: --stop_at"),
  ((TRAIN, *C, "--workdir", "w", "--processes", "0"), "--processes is 0"),
  ((TRAIN, *C, "--workdir", "w", "--processes", "nan"), "--processes is"),
  ((TRAIN, *C, "--workdir", "w", "--process_id", "-1"), "--process_id is -1"),
  ((TRAIN, *C, "--workdir", "w", "--num_processes", "0"), "--num_proc"),
  (
    (TRAIN, *C, "--workdir", "w", "--config.data.source", "folder"),
    "--config.data.source=folder",
  ),
  ((TRAIN, *C, "--workdir", "w", "--config.total", "--x"), ".total=..."),
  ((TRAIN, "--config", "nowhere.py", "--workdir", "w"), "no config file"),
  ((TRAIN, "--config", "", "--workdir", "w"), "no config file"),
  ((TRAIN, "--config", "/", "--workdir", "w"), "no config file"),
  ((TRAIN, "--config", QUICKSTART + ":x", "--workdir", "w"), "variant"),
  ((TRAIN, "--help_config", "optimiser"), "nearest: optimizer"),
  ((EVALUATE, "--workdir", "nowhere"), "holds no run"),
  ((EVALUATE, "--workdir", "w", "--step", "last"), "--step"),
  ((EVALUATE, "--workdir", RUN), "holds no checkpoint yet"),
  ((EVALUATE, "--workdir", RUN, "--only", "cuont"), "did you mean"),
  ((EVALUATE, "--workdir", RUN, "--only", "count,,"), "--only is"),
  ((EVALUATE, "--workdir", RUN, "--data", "folder:d"), "has its own config"),
  ((EVALUATE, "--workdir", RUN, "--out", "f"), "--out is about --weights"),
  ((EVALUATE, "--workdir", RUN, "--label", "a"), "--label is about --data"),
  ((EVALUATE, "--workdir", RUN, *REPORT, "--step", "3"), "neither"),
  ((EVALUATE, "--workdir", RUN, *REPORT, "--only", "count"), "neither"),
  ((EVALUATE, "--config.seed=3"), "give --workdir"),
  ((EVALUATE, "--workdir", "w", "--weights", "w"), "give --workdir"),
  ((EVALUATE, "--weights", "w"), "--weights needs --config FILE, or --data"),
  ((EVALUATE, "--weights", "w", *C, "--data", "folder:d"), "one of them"),
  ((EVALUATE, "--weights", "w", *C), "no file or folder w"),
  ((EVALUATE, "--weights", "w", *C, "--only", "cuont"), "did you mean"),
  ((EVALUATE, "--weights", "w", *C, "--step", "3"), "about --workdir"),
  ((EVALUATE, "--weights", "w", *C, "--out", "/dev/null/x"), "no folder"),
  ((EVALUATE, "--weights", "w", *C, "--out", "."), "is a folder"),
  ((EVALUATE, "--weights", "w", "--data", "cifar10"), "--data is"),
  ((EVALUATE, "--weights", "w", "--data", "web:x"), "data.source"),
  ((EVALUATE, "--weights", "w", "--data", "folder:d"), "no folder d"),
  (
    (EVALUATE, "--weights", "w", "--data", "folder:d", "--protocols", "svm"),
    "known: linear",
  ),
  (("jepa_jax.sweep", *C, "--workdir", ""), "--workdir is ''"),
  (("jepa_jax.sweep", *C, "--workdir", "gs://b/s"), "an address"),
  (("jepa_jax.sweep", *C, "--workdir", "/dev/null"), "is a file"),
  (("jepa_jax.sweep", *C, "--workdir", "w", "--seeds", "0"), "--seeds is 0"),
  (("jepa_jax.sweep", *C, "--workdir", "w", "--seeds", "1.5"), "--seeds is"),
  (("jepa_jax.sweep", *C, "--workdir", "w", "--over", "seed=1"), "--seeds too"),
  (
    ("jepa_jax.sweep", *C, "--workdir", "w", "--over", "batch_size=64,-1"),
    "batch_size is -1",
  ),
  (("jepa_jax.visualize", "pac", "--workdir", RUN), 'did you mean "pca"'),
  (("jepa_jax.visualize", "pca", "--workdir", RUN), "neither a run"),
  (("jepa_jax.visualize", "pca", "--workdir", RUN, "--layer", "1"), "not of"),
  (("jepa_jax.visualize", "pca", "--weights", "w", "--step", "1"), "about --w"),
  (("jepa_jax.visualize", "runs", "nowhere"), "no metrics of a run"),
  (("jepa_jax.checkpoints", "list", ""), "DIR is ''"),
  (("jepa_jax.checkpoints", "list", "nowhere"), "no folder nowhere"),
  (("jepa_jax.checkpoints", "list", "."), "no checkpoints in"),
  (("jepa_jax.checkpoints", "mend", "."), "invalid choice"),
  (("jepa_jax.plan", *C), "required: --topology"),
  (("jepa_jax.plan", *C, "--topology", "v9:8"), "v9"),
  (("jepa_jax.plan", *C, "--topology", ""), "FAMILY:SHAPE"),
  (("jepa_jax.plan", *C, "--topology", "h100:0"), "known"),
  (("jepa_jax.plan", *C, "--topology", "h100:8", *V9), "known"),
  (("jepa_jax.plan", *C, "--topology", "v5e:8x8", "--serach"), "--search"),
  (("jepa_jax.bench",), "required: what"),
  (("jepa_jax.bench", "all"), "invalid choice"),
  (("jepa_jax.bench", "data", "--rounds", "0"), "--rounds is 0"),
  (("jepa_jax.bench", "data", "--images", "-1"), "--images is -1"),
  (("jepa_jax.bench", "data", "--cores", "-1"), "--cores is -1"),
  (("jepa_jax.bench", "data", "--batch_size", "0"), "--batch_size is 0"),
  (("jepa_jax.bench", "data", "--batches", "-1"), "--batches is -1"),
  (("jepa_jax.bench", "data", "--files", "1e99"), "--files is"),
  (("jepa_jax.bench", "masks", "--grid", "8xa"), "--grid"),
  (("jepa_jax.bench", "masks", "--grid", "0x8"), "--grid is (0, 8)"),
  (("jepa_jax.bench", "masks", "--grid", "1e9x8"), "--grid is"),
  (("jepa_jax.bench", "masks", "--sampler", "x"), "known: block"),
  (("jepa_jax.bench", "data", "--resume", "--files", "1000"), "not allowed"),
  (("jepa_jax.bench", "data", "--resume", *C), "not allowed"),
  (("jepa_jax.bench", "step", *C, "--profile", ""), "--profile is ''"),
  (("jepa_jax.bench", "step", "--rounds", "1"), "required: --config"),
  (("jepa_jax.bench", "step", *C, "--steps", "0"), "--steps is 0"),
  (("jepa_jax.bench", "loop", *C, "--steps", "-1"), "--steps is -1"),
  (("jepa_jax.prepare", "--image_size", "0"), "--image_size is 0"),
  (("jepa_jax.prepare", "--image_size", "big"), "--image_size is"),
  (("jepa_jax.prepare", "--num_scenes", "3"), "--num_scenes"),
  (("jepa_jax.prepare", "--num_scenes", "0", "3"), "--num_scenes is 0"),
  (("jepa_jax.prepare", "--source", "web"), "web"),
  (("jepa_jax.prepare", "--source", "folder"), "data.name"),
  (("jepa_jax.prepare", "--source", "folder", "--name", "no"), "no folder"),
  (("jepa_jax.prepare", "--source", "scenes", "--download"), "--download"),
  (("jepa_jax.prepare", "--source", "scenes", "--name", "x"), "--name is"),
  (("jepa_jax.prepare", "--source", "folder", "--name", ""), "data.name"),
  (("jepa_jax.prepare", "--name", "cifar10", "--split", ""), "--split is ''"),
  (("jepa_jax.prepare", "--name", "no such set"), "no such set"),
  (("jepa_jax.convert",), "required: source, destination"),
  (("jepa_jax.convert", "", "b"), "source is ''"),
  (("jepa_jax.convert", "a", ""), "destination is ''"),
  (("jepa_jax.convert", "a", "b.onnx"), "no known suffix"),
  (("jepa_jax.convert", "a", "/dev/null"), "exists"),
  (("jepa_jax.convert", "a", "/dev/null/b.npz"), "no folder"),
  (("jepa_jax.convert", "a", "b", "--push"), "OWNER/NAME"),
  (("jepa_jax.convert", "a", "b", "--private"), "is about --push"),
  (("jepa_jax.convert", "a", "b", "--positions", "bicubic"), "--image_size"),
  (("jepa_jax.convert", "a", "b.npz", "--prefix", "module."), "prefix"),
  (("jepa_jax.convert", "a"), "required: destination"),
  (("jepa_jax.convert", "a", "b"), "a"),
  (("jepa_jax.convert", "a", "b", "--num_heads", "-1"), "--num_heads is -1"),
  (("jepa_jax.convert", "a", "b", "--image_size", "0"), "--image_size is 0"),
  (("jepa_jax.convert", "a", "b", "--image_size", "9" * 9), "--image_size"),
  (("jepa_jax.convert", "a", "b", "--step", "-1"), "--step is -1"),
  (("jepa_jax.convert", "a", "b", "--positions", "none"), "invalid choice"),
  (("jepa_jax.convert", "a", "b", "--config.seed=3"), "unknown flag"),
]


@pytest.mark.parametrize(
  "arguments, words", FLAGS, ids=[" ".join(x) for x, _ in FLAGS]
)
def test_flags_that_are_none(call, tmp_path, arguments, words):
  name, *rest = arguments
  if name in ("jepa_jax.bench", "jepa_jax.convert"):
    name += ".__main__"
  if RUN in rest:
    run = tmp_path / "run"
    run.mkdir()
    config = conftest.small_config()
    config.evaluations.count = config_lib.evaluation("count")
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    rest = [str(run) if x == RUN else x for x in rest]
  is_refused(call(name, *rest), words)


def commands():
  """Every command of the package: (module, its first arguments)."""
  root = conftest.ROOT / "jepa_jax"
  for path in sorted(root.rglob("*.py")):
    if "  command.run(main" in path.read_text():
      parts = ("jepa_jax", *path.relative_to(root).with_suffix("").parts)
      if parts[1] == "bench":
        for what in ("masks", "data", "step", "loop"):
          yield ".".join(parts), (what,)
      else:
        yield ".".join(parts), ()


@pytest.mark.parametrize("module, arguments", list(commands()), ids=str)
def test_every_flag_of_every_command_has_a_kind(
  call, monkeypatch, module, arguments
):
  """And what is none of its values is one line, whatever else is given."""
  found = []
  with monkeypatch.context() as context:
    context.setattr(
      command, "run", lambda main, parser, **_: found.append(parser)
    )
    context.setattr(sys, "argv", [module, *arguments])
    context.delitem(sys.modules, module, raising=False)
    runpy.run_module(module, run_name="__main__")
  (parser,) = found
  for action in parser._actions:
    name = (action.option_strings or [action.dest])[0]
    if action.nargs == 0 or name in (
      "--help",
      "-h",
      "--config",
      "--help_config",
    ):
      continue
    kind = getattr(action.type, "kind", None)
    assert kind or action.choices, f"{name} takes anything; see keys.add_flag"
    if kind is None or not action.option_strings:
      continue
    for text in nonsense(kind):
      is_refused(call(module, *arguments, f"{name}={text}"), name)


def nonsense(kind):
  """Some texts that are no values of a kind."""
  texts = ("", "nan", "-1", "inf", "1e99", "0x", "[1,", "no\nline", "\0")
  return [text for text in texts if not fits(kind, text)]
