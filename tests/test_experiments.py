"""Every experiment, and the command line's way to load it."""

import atexit
import functools
import json
import pathlib
import shutil
import sys
import tempfile

import conftest
import numpy as np
from PIL import Image
import pytest

from jepa_jax import command, objectives, train
from jepa_jax import config as config_lib

FOLDER = conftest.EXPERIMENTS
EXPERIMENTS = ["quickstart", "ijepa_fashion_mnist"]
EXPERIMENTS += [
  f"ijepa_in1k:{v}" for v in ("vitb16", "vitl16", "vith14", "vith16_448")
]
EXPERIMENTS += [f"mae_in1k:{v}" for v in ("vitb16", "vitl16", "vith14")]
EXPERIMENTS += ["transfer", "decoder:scenes", "decoder:in1k"]
EXPERIMENTS += [
  f"finetune_in1k:{v}"
  for v in ("vitl16_1pct", "vith14_1pct", "vith16_448_1pct", "vith16_448")
]
EXPERIMENTS += ["data2vec_in1k:vitb16", "data2vec_in1k:vitl16"]
EXPERIMENTS += [f"ibot_in1k:{v}" for v in ("vits16", "vitb16", "vitl16")]
EXPERIMENTS += ["cae_in1k:vitb16", "cae_in1k:vitl16"]
EXPERIMENTS += [f"lejepa_in1k:{v}" for v in ("vitb16", "vitl16", "vith14")]
EXPERIMENTS += [
  *("rivals:ijepa,scenes", "rivals:ijepa_position,scenes"),
  *(
    f"rivals:{name},{data}"
    for name in sorted(objectives.OBJECTIVES)
    for data in ("scenes", "fashion")
    if name not in ("ijepa", "decoder")
  ),
]
EXPERIMENTS += ["ijepa_in22k:vith14", "ijepa_in22k:vitg16"]
# Those whose variant is a name of data, which may be any.
OF_ANY_DATA = ["folder:PICTURES", "small:PICTURES,32,18", "small:PICTURES"]
OF_ANY_DATA += ["finetune_small:PICTURES", "finetune_small:scenes"]
OF_ANY_DATA += ["finetune_small:fashion_mnist,28,1000"]
OF_ANY_DATA += ["small:scenes", "small:fashion_mnist", "small:stl10,96,5000"]
EXPERIMENTS += OF_ANY_DATA


@functools.cache
def pictures():
  """A folder of 20 pictures of mixed formats and sizes, in two classes."""
  root = pathlib.Path(tempfile.mkdtemp())
  atexit.register(shutil.rmtree, root)
  formats = ("jpg", "png", "bmp", "gif", "webp")
  for i in range(20):
    path = root / f"{'ab'[i % 2]}/{i}.{formats[i % 5]}"
    path.parent.mkdir(exist_ok=True)
    noise = np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)
    Image.fromarray(noise).resize((70 + i, 90 - i)).save(path)
  (root / "a/notes.txt").write_text("no image")
  return root


def load(name, *overrides):
  file, _, variant = name.partition(":")
  if "PICTURES" in variant:
    variant = variant.replace("PICTURES", str(pictures()))
  path = str(FOLDER / f"{file}.py")
  return command.load_config(
    f"{path}:{variant}" if variant else path, overrides
  )


def test_every_file_is_in_the_table():
  named = {name.partition(":")[0] for name in EXPERIMENTS}
  assert named == {path.stem for path in FOLDER.glob("*.py")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_config_is_whole_and_its_head_says_how_to_run_it(name):
  config = load(name)
  config_lib.check(config)
  objective = objectives.load(config.objective).from_config(config)
  spec = objective.batch_spec(config.batch_size)
  assert {x.shape[0] for x in spec.values()} == {config.batch_size}
  file = name.partition(":")[0]
  head = (FOLDER / f"{file}.py").read_text().split('"""')[1]
  for word in ("Command:", "Hardware:", "Expected:", "Seen:"):
    assert word in head, f"{file}.py does not say {word}"


def test_released_shapes():
  # Context patches that the released recipe trains on; see DESIGN's table.
  config = load("ijepa_in1k:vith14")
  shapes = objectives.load("ijepa").from_config(config).shapes
  assert abs(shapes.context_patches - 68) <= 1
  assert shapes.target_patches == 54


@pytest.mark.parametrize("name", EXPERIMENTS[: -len(OF_ANY_DATA)])
def test_unknown_variants_are_named(name):
  file = name.partition(":")[0]
  with pytest.raises(ValueError, match="unknown variant"):
    load(f"{file}:nothing")


def test_overrides_reach_every_type():
  config = load(
    "quickstart",
    "--config.batch_size=64",
    "--config.data.flip=true",
    "--config.data.name=x",
    "--config.data.crop_scale=(0.5,0.75)",
    "--config.optimizer.lr=3e-4",
    "--config.evaluations.count.test=train",
  )
  assert config.batch_size == 64 and config.data.flip is True
  assert config.data.name == "x" and config.data.crop_scale == (0.5, 0.75)
  assert config.optimizer.lr == 3e-4
  assert config.evaluations.count.test == "train"


@pytest.mark.parametrize(
  "override, message",
  [
    ("--config.dat.flip=true", "nearest: data.flip"),
    (
      "--config.data.flip=maybe",
      "data.flip is .maybe.; it needs True or False",
    ),
    ("--config.batch_size=1.5", "batch_size is 1.5; it needs a whole number"),
    ("--config.data.crop_scale=(0.5", "crop_scale is .*; it needs .min, max."),
    ("--config.batch_size", "needs a value"),
  ],
)
def test_bad_overrides_are_named(override, message):
  with pytest.raises(ValueError, match=message):
    load("quickstart", override)


def test_an_experiment_imports_its_own_neighbours(tmp_path):
  """Not those of the same name of an experiment loaded before it."""
  for i, name in enumerate(("a", "b")):
    (tmp_path / name).mkdir()
    (tmp_path / name / "neighbour.py").write_text(f"SEED = {i + 5}\n")
    (tmp_path / name / "mine.py").write_text(
      "import neighbour\nfrom jepa_jax import config\n"
      "def get_config():\n  c = config.defaults()\n"
      "  c.seed = neighbour.SEED\n  return c\n"
    )
  for name, seed in (("a", 5), ("b", 6), ("b", 6), ("a", 5)):
    config = command.load_config(str(tmp_path / name / "mine.py"), [])
    assert config.seed == seed
  assert sys.path.count(str(tmp_path / "a")) == 1


def test_missing_files_are_named(tmp_path):
  with pytest.raises(ValueError, match="no config file.*quickstart.py"):
    command.load_config(str(FOLDER / "quickstrat.py"))
  (tmp_path / "empty.py").write_text("")
  with pytest.raises(ValueError, match="defines no get_config"):
    command.load_config(str(tmp_path / "empty.py"))


def test_the_config_of_an_older_run_gets_the_keys_that_it_lacks(tmp_path):
  config = load("quickstart")
  stored = json.loads(json.dumps(config.to_dict()))
  del stored["sharding"], stored["optimizer"]["mu_dtype"]
  stored["optimizer"]["lr"] = 1  # written for 1.0
  path = tmp_path / "config.json"
  path.write_text(json.dumps(stored))
  expected = config.to_dict()
  expected["optimizer"]["lr"] = 1
  assert config_lib.read(path).to_dict() == expected


def test_a_folder_of_pictures_is_all_that_its_experiment_needs(tmp_path):
  flags = ("data.image_size=40", "total=3 epochs", "batch_size=8")
  flags += ("encoder.width=32", "predictor.depth=1")
  config = load("folder:PICTURES", *(f"--config.{x}" for x in flags))
  assert config.encoder.patch_size == 5
  assert train.train_and_evaluate(config, tmp_path) == 0
  table = json.loads((tmp_path / "evaluations.json").read_text())
  assert {row["evaluation"] for row in table} == {"classes"}
  assert all(0 < row["n_test"] < row["n_train"] < 20 for row in table)
  # 3 epochs of what is not held out, in batches of 8.
  steps = 3 * table[0]["n_train"] // 8
  assert json.loads((tmp_path / "run.json").read_text())["steps"] == steps


def test_the_recipe_for_small_data_follows_size_and_number():
  grid = lambda c: c.data.image_size // c.encoder.patch_size
  folder, scenes = load("small:PICTURES,32,18"), load("small:scenes")
  assert (folder.data.source, grid(folder), folder.total) == (
    "folder", 8, "400 epochs",
  )  # fmt: skip
  assert [*folder.evaluations] == ["label"]
  assert (scenes.data.source, grid(scenes)) == ("scenes", 8)
  assert [*scenes.evaluations] == ["count", "distance"]
  fashion, other = load("small:fashion_mnist"), load("small:stl10,96")
  assert (fashion.data.channels, fashion.total) == (1, "21 epochs")
  assert (grid(fashion), other.data.source, grid(other)) == (4, "tfds", 8)
  assert (other.total, scenes.total) == ("10000 steps", "40 epochs")
  for variant in ("scenes,", "scenes,a", "scenes,64,8000,3", ",64"):
    with pytest.raises(ValueError, match="needs DATA, DATA,SIZE"):
      load(f"small:{variant}")
  with pytest.raises(ValueError, match="no folder pictures/nowhere"):
    load("small:pictures/nowhere")
  with pytest.raises(ValueError, match="such as 64 or 72"):
    load("small:scenes,66")


def test_a_small_run_is_fine_tuned(tmp_path, capsys):
  flags = ("total=4 steps", "batch_size=8", "encoder.width=32")
  flags = [f"--config.{x}" for x in (*flags, "encoder.num_heads=2")]
  start = load("small:PICTURES,32", *flags, "--config.evaluations=")
  assert train.train_and_evaluate(start, tmp_path / "small") == 0
  flags.append(f"--config.init_from={tmp_path / 'small'}")
  config = load("finetune_small:PICTURES,32", *flags)
  assert (config.method.classes, config.data.split) == (2, "train")
  assert train.train_and_evaluate(config, tmp_path / "tuned") == 0
  (row,) = json.loads((tmp_path / "tuned/evaluations.json").read_text())
  assert (row["protocol"], row["encoder"]) == ("head", "trained")
  few = load("finetune_small:fashion_mnist,28,1000")
  assert few.data.split == "train[:1000]" and few.data.num_examples == 1000
  with pytest.raises(ValueError, match="a holds 0 classes; fine-tuning needs"):
    command.load_config(f"{FOLDER / 'finetune_small.py'}:{pictures() / 'a'}")


def test_a_folder_without_classes_is_not_probed(tmp_path):
  for picture in (pictures() / "a").iterdir():
    shutil.copy(picture, tmp_path)
  path = str(FOLDER / "folder.py")
  assert not command.load_config(f"{path}:{tmp_path}").evaluations
  png = next(tmp_path.glob("*.png"))
  for name in "ab":  # two classes, one of them held out
    (tmp_path / "few" / name).mkdir(parents=True)
    shutil.copy(png, tmp_path / "few" / name)
    few = command.load_config(f"{path}:{tmp_path / 'few'}")
    assert not few.evaluations
  with pytest.raises(ValueError, match="folder.py:PATH"):
    command.load_config(path)
  with pytest.raises(ValueError, match="no folder"):
    command.load_config(f"{path}:{tmp_path}/nowhere")


def test_other_data_by_a_flag_are_counted_anew():
  assert load("quickstart").data.num_examples == 8000
  changed = load("quickstart", "--config.data.source=folder")
  assert changed.data.num_examples == 0
  flags = "--config.data.num_scenes=(9, 3)", "--config.data.num_examples=9"
  assert load("quickstart", *flags).data.num_examples == 9


def test_evaluations_come_and_go_by_flags():
  evaluations = lambda *flags: (
    load(
      "quickstart", *(f"--config.evaluations{flag}" for flag in flags)
    ).evaluations
  )
  assert not evaluations("=")
  assert [*evaluations(".count=")] == ["distance"]
  added = evaluations("=", ".near=nearest", '.near.protocols=("ridge",)')
  assert [*added] == ["near"] and added.near.label == "nearest"
  assert added.near.protocols == ("ridge",)
  with pytest.raises(ValueError, match='unknown evaluation "cuont"; known'):
    evaluations(".cuont=")
  with pytest.raises(ValueError, match="NAME=LABEL to add one"):
    evaluations("=none")


def test_every_set_of_the_transfer_is_known_to_tfds():
  """Names and labels by TFDS's own metadata; nothing is downloaded."""
  tfds = pytest.importorskip("tensorflow_datasets")
  classes = {
    "cifar10": 10, "cifar100": 100, "places": 365, "inat18": 8142,
    "flowers": 102, "pets": 37, "dtd": 47,
  }  # fmt: skip
  config = load("transfer")
  for name, settings in config.evaluations.items():
    features = tfds.builder(settings.data.name).info.features
    if name in classes:
      assert features[settings.label].num_classes == classes[name]
    else:  # derived from the objects, see scenes.LABELS
      assert "pixel_coords" in features["objects"].feature
      assert settings.label in ("count", "distance")
