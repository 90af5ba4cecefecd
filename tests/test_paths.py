"""Paths that users give: homes, addresses, and what they are refused with."""

import argparse
import pathlib

import pytest

from jepa_jax import checkpoints, evaluate, paths, train
from jepa_jax.convert import formats
from jepa_jax.data import folder


@pytest.mark.parametrize(
  "given, path",
  [
    ("a/b", "a/b"),
    ("/a/b", "/a/b"),
    ("~", "/home/me"),
    ("~/a", "/home/me/a"),
    ("file:///a/b", "/a/b"),
    ("file://localhost/a", "/a"),
    ("file:/a/b", "/a/b"),
    ("a:b", "a:b"),
    ("C:/a", "C:/a"),
    (pathlib.Path("a"), "a"),
  ],
)
def test_a_path_of_this_machine(given, path, monkeypatch):
  monkeypatch.setenv("HOME", "/home/me")
  assert paths.local(given, "it") == pathlib.Path(path)


ADDRESSES = (
  "gs://b/run",
  "s3://b/run",
  "gs:/b/run",
  "hdfs://h/x",
  "https://h/x",
  pathlib.Path("gs://b/run"),
)


@pytest.mark.parametrize("address", ADDRESSES, ids=str)
def test_an_address_is_refused_and_nothing_is_made(
  address, config, monkeypatch, tmp_path
):
  monkeypatch.chdir(tmp_path)
  text = str(address)
  flags = argparse.Namespace(
    workdir=text, weights=None, report_only=False, folder=text, action="verify"
  )
  for try_it in (
    lambda: train.train_and_evaluate(config, address),
    lambda: evaluate.main(flags),
    lambda: checkpoints.main(flags),
    lambda: formats.read(address),
    lambda: folder.FolderSource(text),
  ):
    with pytest.raises(ValueError, match="an address; it needs a path of this"):
      try_it()
  assert not list(tmp_path.iterdir())


def test_a_home_that_is_not_known_is_named():
  with pytest.raises(ValueError, match="is not known; give the whole path"):
    paths.local("~nobody9/x", "it")
