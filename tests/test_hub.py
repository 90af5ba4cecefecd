"""The Hugging Face hub, by a stand-in that keeps its models in a folder."""

import inspect
import json
import shutil
import sys
import types

import numpy as np
import pytest
from test_convert import assert_same, make
from test_convert import run as run_command

import jepa_jax
from jepa_jax import convert


class Hub(types.ModuleType):
  """As huggingface_hub, of which it has what is called."""

  def __init__(self, root):
    super().__init__("huggingface_hub")
    self.root = root

  def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None):
    folder = self.root / repo_id / (revision or "main")
    if not folder.is_dir():
      raise OSError(f"404 Client Error: no {repo_id}\nat {revision}")
    cached = self.root / "cache"
    shutil.rmtree(cached, ignore_errors=True)
    cached.mkdir()
    for pattern in allow_patterns:
      for path in folder.glob(pattern):
        shutil.copy(path, cached)
    return str(cached)

  def HfApi(self):  # noqa: N802, its name
    return self

  def create_repo(self, repo_id, *, private=None, exist_ok=False):
    assert exist_ok
    if repo_id.startswith("others/"):
      raise PermissionError("403 Forbidden\nno rights")
    folder = self.root / repo_id / "main"
    folder.mkdir(parents=True)
    (folder / "private").write_text(str(private))
    return f"https://hub/{repo_id}"

  def upload_folder(self, *, repo_id, folder_path):
    shutil.copytree(
      folder_path, self.root / repo_id / "main", dirs_exist_ok=True
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  stand_in = Hub(tmp_path / "hub")
  monkeypatch.setitem(sys.modules, "huggingface_hub", stand_in)
  return stand_in


def test_what_is_pushed_loads_by_its_name(hub, tmp_path):
  weights = make("target", "context", "predictor")
  convert.write(weights, tmp_path / "all.npz")
  url = jepa_jax.push_to_hub("all.npz", "me/small-1.5", private=True)
  assert url == "https://hub/me/small-1.5"
  folder = hub.root / "me/small-1.5/main"
  assert {p.name for p in folder.iterdir()} == {
    *("README.md", "config.json", "model.safetensors"),
    *("preprocessor_config.json", "private"),
  }
  assert (folder / "private").read_text() == "True"
  assert json.loads((folder / "config.json").read_text())["hidden_size"] == 28
  card = (folder / "README.md").read_text()
  assert card.startswith("---\n") and "{" not in card
  for words in (
    "# small-1.5\n", "The target encoder", "3 blocks\nof width 28, 7 heads",
    "patches of 4 pixels", "12 x 20 pixels and 3 channels",
    'jepa_jax.load("me/small-1.5")',
  ):  # fmt: skip
    assert words in card, words
  assert_same(convert.read("me/small-1.5"), weights.only("target"))
  model = jepa_jax.load("me/small-1.5")
  np.testing.assert_array_equal(
    model.params["norm"]["scale"], weights.networks["target"]["norm"]["scale"]
  )


def test_the_command_pushes_and_fetches(hub, tmp_path, capsys):
  weights = make("target", "context")
  convert.write(weights, tmp_path / "e.npz")
  run_command("e.npz", "me/small", "--push", "--which", "context")
  assert "e.npz -> https://hub/me/small: context" in capsys.readouterr().err
  (hub.root / "me/small/main").rename(hub.root / "me/small/v2")
  run_command("me/small@v2", tmp_path / "back.npz")
  assert_same(convert.read(tmp_path / "back.npz"), weights.only("context"))


def test_its_errors_are_one_line(hub, tmp_path, monkeypatch):
  convert.write(make("target", "predictor"), tmp_path / "e.npz")
  refused = lambda words: pytest.raises(ValueError, match=words)
  with refused("there is no file or folder a/b, .*give it .*OSError: 404") as e:
    jepa_jax.load("a/b")
  assert "\n" not in str(e.value)
  with refused('"small" is no name of the hub; it needs OWNER/NAME'):
    jepa_jax.push_to_hub("e.npz", "small")
  with refused("does not take others/x .*PermissionError: 403"):
    jepa_jax.push_to_hub("e.npz", "others/x")
  with refused("holds one encoder"):
    run_command("e.npz", "me/x", "--push", "--which", "all")
  # A path that is mistyped beside files of one's own is no name.
  (tmp_path / "runs").mkdir()
  with refused("there is no file or folder runs/quikstart.$"):
    jepa_jax.load("runs/quikstart")
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  for call in (
    lambda: jepa_jax.load("a/b"),
    lambda: jepa_jax.push_to_hub("e.npz", "me/x"),
  ):
    with refused(r'install "jepa_jax\[hub\]"'):
      call()


def test_the_stand_in_is_called_as_the_package_is():
  real = pytest.importorskip("huggingface_hub")
  for own, theirs in (
    (Hub.snapshot_download, real.snapshot_download),
    (Hub.create_repo, real.HfApi.create_repo),
    (Hub.upload_folder, real.HfApi.upload_folder),
  ):
    assert inspect.signature(own).parameters.keys() <= (
      inspect.signature(theirs).parameters.keys() | {"self"}
    )
