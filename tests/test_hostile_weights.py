"""Files of weights that mean harm, or that met with an accident.

The targets at the end change good files at random. JEPA_FUZZ_SECONDS=600 makes
each of them go on for as long.
"""

import io
import itertools
import json
import os
import resource
import time
import zipfile

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import safetensors.numpy
from test_convert import make, tiny_config

from jepa_jax import convert

SECONDS = float(os.environ.get("JEPA_FUZZ_SECONDS", "0"))
MEGABYTES = 400  # that reading small files may add to the process at most


def peak():
  """Megabytes that this process has had at most."""
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refused(path, words, **kwargs):
  """Refused in one line with these words, soon and without memory."""
  begin, before = time.process_time(), peak()
  with pytest.raises(ValueError, match=words) as caught:
    convert.read(path, **kwargs)
  assert "\n" not in str(caught.value)
  assert time.process_time() - begin < 10 and peak() - before < MEGABYTES


def npy(shape, data=b"", dtype="<f4"):
  """An array's file that says a shape and holds some bytes."""
  file = io.BytesIO()
  header = {"descr": dtype, "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(file, header)
  return file.getvalue() + data


def archive(path, change, compression=zipfile.ZIP_STORED):
  """A good export with some of its files changed."""
  convert.write(make("target"), path)
  with zipfile.ZipFile(path) as good:
    files = {name: good.read(name) for name in good.namelist()}
  files |= change
  with zipfile.ZipFile(path, "w", compression) as bad:
    for name, data in files.items():
      bad.writestr(name, data)
  return path


def config_npy(**changes):
  """The "config" of an export with other settings."""
  settings = json.loads(make("target").describe())
  for name, value in changes.items():
    part, _, key = name.rpartition("__")
    (settings[part] if part else settings)[key] = value
  file = io.BytesIO()
  np.save(file, np.array(json.dumps(settings)))
  return {"config.npy": file.getvalue()}


NPZ = {
  "more than it holds": (
    {"target/norm/scale.npy": npy((28,), b"1234")},
    "expected 112 bytes got 4",
  ),
  "far more": (
    {"target/norm/scale.npy": npy((2**40, 2**20))},
    f"promises {2**62} bytes and has 128",
  ),
  "another shape": (
    {"target/norm/scale.npy": npy((7,), bytes(28))},
    r"target/norm/scale is \[7\], not \[28\]",
  ),
  "texts": (
    {"target/norm/scale.npy": npy((28,), bytes(112), "<U1")},
    "could not convert string to float",
  ),
  "no array": ({"target/norm/scale.npy": b"hello"}, "magic string"),
  "no file": ({"target/norm/scale.npy": b""}, "damaged|magic|EOF"),
  "a deep network": (config_npy(encoder__depth=10**8), "depth is 100000000"),
  "a wide network": (config_npy(encoder__width=10**9), "width is 1000000000"),
  "a large image": (
    config_npy(image_size=[8_000_000, 8_000_000]),
    r"image_size\[0\] is 8000000",
  ),
  "other settings": (config_npy(encoder__color=1), 'unknown.*"color"'),
  "no settings": (config_npy(encoder={}), "position_grid|lacks"),
  "networks that are none": (config_npy(networks=["a"]), 'unknown network "a"'),
  "no means": (config_npy(mean=[]), "settings cannot be read"),
  "no list of networks": (config_npy(networks=7), "settings cannot be read"),
}


@pytest.mark.parametrize("case", NPZ)
def test_archives_are_held_to_what_they_hold(case, tmp_path):
  change, words = NPZ[case]
  refused(archive(tmp_path / "e.npz", change), words)


def test_a_bomb_is_not_unpacked(tmp_path):
  """Half a gigabyte of zeros in half a megabyte."""
  path = tmp_path / "e.npz"
  convert.write(make("target"), path)
  with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as bad:
    with bad.open("target/bomb.npy", "w", force_zip64=True) as file:
      file.write(npy((2**27,)))
      for _ in range(2**9):
        file.write(bytes(2**20))
  assert path.stat().st_size < 2**20
  refused(path, "promises 5369.* bytes of arrays, more than the")


def lying(path, change=lambda header: header, length=None):
  """A good export as safetensors with another header."""
  convert.write(make("target"), path)
  data = path.read_bytes()
  size = int.from_bytes(data[:8], "little")
  header = json.loads(data[8 : 8 + size])
  text = json.dumps(change(header) or header).encode()
  length = len(text) if length is None else length
  path.write_bytes(length.to_bytes(8, "little") + text + data[8 + size :])
  return path


SAFETENSORS = {
  "a long header": (dict(length=2**40), f"header promises {2**40} bytes"),
  "the longest header": (dict(length=2**64 - 1), f"promises {2**64 - 1} bytes"),
  "a short header": (dict(length=7), "damaged or something else"),
  "a large array": (
    dict(change=lambda h: h["target/norm/scale"].update(shape=[2**40])),
    "damaged or something else",
  ),
  "far places": (
    dict(
      change=lambda h: h["target/norm/scale"].update(
        data_offsets=[0, 2**40], shape=[2**38]
      )
    ),
    "damaged or something else",
  ),
  "no header": (dict(change=lambda h: [1]), "damaged or something else"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_safetensors_are_held_to_what_they_hold(case, tmp_path):
  arguments, words = SAFETENSORS[case]
  refused(lying(tmp_path / "e.safetensors", **arguments), words)


def folder(path, text):
  """A Hugging Face folder with a config.json of this text."""
  convert.write(make("target"), path)
  (path / "config.json").write_text(text)
  return path


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("[" * 100_000, "damaged or something else"),
    (" " * 2**25, "settings need fewer than"),
    ("[]", "config.json"),
    ("null", "config.json"),
    ("{}", "model_type is None"),
    ('{"model_type": "ijepa", "hidden_size": ' + "9" * 5000 + "}", "digits"),
  ],
)
def test_settings_that_are_none_are_refused(text, words, tmp_path):
  refused(folder(tmp_path / "f", text), words)


def test_a_run_of_a_network_that_nobody_has_is_refused(tmp_path):
  (tmp_path / "checkpoints").mkdir()
  config = tiny_config().to_dict()
  for part, key, value, words in (
    ("encoder", "depth", 10**8, "encoder.depth"),
    ("data", "image_size", 8_000_000, "data.image_size"),
  ):
    text = json.dumps(config | {part: config[part] | {key: value}})
    (tmp_path / "config.json").write_text(text)
    refused(tmp_path, words)


@pytest.mark.torch
def test_tensors_that_are_more_than_their_file_are_refused(tmp_path):
  import torch

  path = tmp_path / "c.pth"
  tensor = torch.zeros(1).expand(2**36)
  torch.save({"target_encoder": {"blocks.0.norm1.bias": tensor}}, path)
  refused(path, f"promises {2**36} numbers, more than its", which="target")


# Targets: changes of good files, at random.

NUMBERS = st.one_of(
  st.integers(-(2**70), 2**70),
  st.sampled_from([0, -1, 10**8, 8_000_000, 2**31, 2**63]),
  st.floats(allow_nan=True, allow_infinity=True),
)
VALUES = st.recursive(
  st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=9)),
  lambda inner: st.one_of(
    st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner)
  ),
  max_leaves=4,
)


@st.composite
def changed_settings(draw, settings):
  """JSON with some of its values in other places, or of other kinds."""
  settings = json.loads(json.dumps(settings))
  for _ in range(draw(st.integers(1, 3))):
    node = settings
    while True:
      key = draw(st.sampled_from(sorted(node)))
      if not isinstance(node[key], dict) or not node[key]:
        break
      if draw(st.integers(0, 9)) == 0:
        break
      node = node[key]
    if draw(st.integers(0, 5)) == 0:
      del node[key]
    else:
      node[key] = draw(VALUES)
    if not settings:
      break
  return json.dumps(settings)


@st.composite
def changed_bytes(draw, data, ends=(600, 3000)):
  """Bytes that are flipped, cut, doubled; mostly where headers are."""
  data = bytearray(data)
  for _ in range(draw(st.integers(1, 4))):
    size = max(len(data), 1)
    place = draw(
      st.one_of(
        st.integers(0, min(ends[0], size) - 1),
        st.integers(max(0, size - ends[1]), size - 1),
        st.integers(0, size - 1),
      )
    )
    kind = draw(st.sampled_from(("flip", "set", "cut", "insert", "end")))
    if kind == "flip" and data:
      data[place] ^= 1 << draw(st.integers(0, 7))
    elif kind == "set":
      new = draw(st.binary(min_size=1, max_size=8))
      data[place : place + len(new)] = new
    elif kind == "cut":
      del data[place : place + draw(st.integers(1, 64))]
    elif kind == "insert":
      data[place:place] = draw(st.binary(min_size=1, max_size=64))
    else:
      del data[place:]
  return bytes(data)


def small():
  return make("target", "predictor", depth=1)


def good_file(name, folder):
  """The bytes of a good file of a format."""
  path = folder / f"good-{name}"
  if name.endswith(".pth"):
    import torch

    networks = ("target", "context", "predictor")
    convert.write(make(*networks, depth=1, grid=(4, 4)), path)
    whole = torch.load(path, weights_only=True) | {"loss": np.float64(1.0)}
    torch.save(
      whole,
      path,
      _use_new_zipfile_serialization=name.startswith("zip"),
    )
  else:
    convert.write(small(), path)
  return path.read_bytes()


def hugging_face_settings(folder):
  convert.write(small().only("target"), folder / "good-hf")
  return json.loads((folder / "good-hf/config.json").read_text())


def in_safetensors(path, text):
  """An export whose settings are this text."""
  weights = small()
  arrays = {
    f"target/{key}": np.zeros(2, np.float32) for key in weights.networks
  }
  safetensors.numpy.save_file(arrays, path, {"config": text})


# Name -> (strategy of a folder, what writes a draw, name of the file to read).
TARGETS = {
  "npz": (
    lambda d: changed_bytes(good_file("e.npz", d)),
    lambda d, x: (d / "x.npz").write_bytes(x),
    "x.npz",
  ),
  "safetensors": (
    lambda d: changed_bytes(good_file("e.safetensors", d), (3000, 100)),
    lambda d, x: (d / "x.safetensors").write_bytes(x),
    "x.safetensors",
  ),
  "settings": (
    lambda d: changed_settings(json.loads(small().describe())),
    lambda d, x: in_safetensors(d / "x.safetensors", x),
    "x.safetensors",
  ),
  "Hugging Face config.json": (
    lambda d: changed_settings(hugging_face_settings(d)),
    lambda d, x: (d / "good-hf/config.json").write_text(x),
    "good-hf",
  ),
  "config.json of a run": (
    lambda d: changed_settings(tiny_config().to_dict()),
    lambda d, x: (
      (d / "run/checkpoints").mkdir(parents=True, exist_ok=True),
      (d / "run/config.json").write_text(x),
    ),
    "run",
  ),
  "pth": (
    lambda d: changed_bytes(good_file("zip.pth", d), (3000, 3000)),
    lambda d, x: (d / "x.pth").write_bytes(x),
    "x.pth",
  ),
  "pth of old": (
    lambda d: changed_bytes(good_file("old.pth", d), (3000, 3000)),
    lambda d, x: (d / "x.pth").write_bytes(x),
    "x.pth",
  ),
}


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=pytest.mark.torch if "pth" in name else ())
    for name in TARGETS
  ],
)
def test_changed_files_are_read_or_refused_in_one_line(name, tmp_path):
  strategy, write, path = TARGETS[name]
  heads = {"num_heads": 7, "predictor_heads": 3} if "pth" in name else {}
  counts = {"read": 0, "refused": 0, "slowest": 0.0}

  def target(change):
    write(tmp_path, change)
    begin = time.process_time()
    try:
      convert.read(tmp_path / path, **heads)
      counts["read"] += 1
    except ValueError as error:
      assert "\n" not in str(error), error
      counts["refused"] += 1
    counts["slowest"] = max(counts["slowest"], time.process_time() - begin)

  strategy, before = strategy(tmp_path), peak()
  end = time.monotonic() + SECONDS
  for seed in itertools.count():
    run = hypothesis.settings(
      max_examples=300 if SECONDS else 25,
      deadline=None,
      database=None,
      suppress_health_check=list(hypothesis.HealthCheck),
    )(hypothesis.seed(seed)(hypothesis.given(strategy)(target)))
    run()
    if time.monotonic() >= end:
      break
  more = peak() - before
  print(f"{name}: {counts}, {more:.0f} MB more")
  assert more < MEGABYTES and counts["slowest"] < 30
