import types

import numpy as np
from PIL import Image
import pytest

from jepa_jax import prepare
from jepa_jax.data import sources


@pytest.fixture
def folder(tmp_path):
  noise = np.random.default_rng(0)
  for i, suffix in enumerate(("png", "jpg", "png")):
    pixels = noise.integers(0, 256, (10 + i, 20 + 3 * i, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"{i}.{suffix}")
  return tmp_path


def arguments(folder, **changes):
  settings = {
    "source": "folder",
    "name": str(folder),
    "split": "",
    "data_dir": "",
    "image_size": 64,
    "max_mib": 9,
    "num_scenes": (8, 3),
    "download": False,
    "decode": False,
  }
  return types.SimpleNamespace(**{**settings, **changes})


def open_folder(folder):
  return sources.open_source(arguments(folder, split="all"))


def test_counts_sizes_and_formats(folder, capsys):
  assert prepare.main(arguments(folder)) == 0
  printed = capsys.readouterr().out
  assert "all: 3 images" in printed, "those that tests are held out for, too"
  assert "1 JPEG, 2 PNG" in printed
  assert "height: 10 to 12 pixels, median 11" in printed
  assert "width: 20 to 26 pixels, median 23" in printed


def test_unreadable_images_are_named_and_fail(folder, capsys):
  (folder / "3.png").write_bytes(b"text")
  png = (folder / "2.png").read_bytes()
  (folder / "2.png").write_bytes(png[: len(png) // 2])
  assert prepare.main(arguments(folder)) == 1
  printed = capsys.readouterr().out
  assert f"{folder}/3.png: not a JPEG" in printed
  assert "2.png" not in printed, "its header is sound"
  summary = prepare.verify(open_folder(folder), decode_all=True)
  assert set(summary.unreadable) == {f"{folder}/2.png", f"{folder}/3.png"}
  assert summary.unreadable[f"{folder}/2.png"] == "damaged PNG data"
  assert len(summary.sizes) == 2


def test_what_is_not_prepared_says_how(tmp_path):
  settings = arguments("cifar10", source="tfds", data_dir=str(tmp_path))
  with pytest.raises(ValueError, match="prepare --name cifar10"):
    prepare.main(settings)


def test_download_by_hand_is_explained(tmp_path):
  settings = arguments(
    "imagenet2012", source="tfds", data_dir=str(tmp_path), download=True
  )
  with pytest.raises(ValueError, match="[Mm]anual"):
    prepare.main(settings)


def test_download_is_for_tfds(folder):
  with pytest.raises(ValueError, match="--download is for TFDS"):
    prepare.main(arguments(folder, download=True))


def test_scenes_are_drawn_and_counted(tmp_path, capsys):
  settings = arguments(
    "", source="scenes", data_dir=str(tmp_path), image_size=32
  )
  assert prepare.main(settings) == 0
  printed = capsys.readouterr().out
  assert "train: 8 images" in printed and "test: 3 images" in printed
  assert "height: 32 to 32 pixels" in printed
