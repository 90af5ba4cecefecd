"""Data that changed between two starts of a run is noticed."""

import json

import numpy as np
from PIL import Image
import pytest

from jepa_jax import config as config_lib
from jepa_jax.data import fingerprint
from jepa_jax.training import workdir


@pytest.fixture
def data(tmp_path):
  """A folder of images, each of its own size."""
  folder = tmp_path / "photos"
  for number in range(5):
    path = folder / f"class{number % 2}" / f"{number}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((9 + number, 8, 3), number, np.uint8)).save(path)
  config = config_lib.defaults().data
  config.source, config.name, config.split = "folder", str(folder), "all"
  return config, folder


def add(folder):
  (folder / "class0/6.png").write_bytes((folder / "class0/0.png").read_bytes())


def remove(folder):
  (folder / "class0/0.png").unlink()


def rename(folder):
  (folder / "class0/0.png").rename(folder / "class0/1.png")


@pytest.mark.parametrize("change, count", [(add, 6), (remove, 4), (rename, 5)])
def test_a_change_is_refused_and_may_be_accepted(data, tmp_path, change, count):
  config, folder = data
  before = fingerprint.fingerprint(config)
  assert before["images"] == 5 and before == fingerprint.fingerprint(config)
  (tmp_path / "data.json").write_text(json.dumps(before))
  assert workdir.check_data(before, tmp_path) == []
  change(folder)
  now = fingerprint.fingerprint(config)
  said = (
    f"5 training images then, {count} now"
    if count != 5
    else "5 training images as before, of other names"
  )
  with pytest.raises(ValueError, match=f"{said}.*--accept_changes"):
    workdir.check_data(now, tmp_path)
  (changed,) = workdir.check_data(now, tmp_path, accept=True)
  assert changed.startswith(said)


def test_a_run_of_before_or_a_damaged_file_is_no_obstacle(tmp_path, capsys):
  found = {"images": 3, "digest": "x"}
  assert workdir.check_data(found, tmp_path / "none") == []
  for text in ("", "[]", "null", '{"images": "many"}', "{}"):
    (tmp_path / "data.json").write_text(text)
    assert workdir.check_data(found, tmp_path) == []
    assert "is damaged: written anew" in capsys.readouterr().err


def test_scenes_have_one_wherever_they_lie(scenes_dir, config):
  config.data.data_dir = scenes_dir
  seen = fingerprint.fingerprint(config.data)
  assert seen["images"] == 24
  assert seen == fingerprint.fingerprint(config.data)
