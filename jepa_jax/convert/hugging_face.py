"""Hugging Face IJepaModel folders: config.json and *.safetensors.

Reading and writing needs neither torch nor transformers.
"""

from collections.abc import Iterable, Mapping
import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

from absl import logging
import numpy as np
import safetensors.numpy

from jepa_jax import models
from jepa_jax.convert import checked, table
from jepa_jax.convert import weights as weights_lib
from jepa_jax.convert.weights import Weights


def is_folder(path: pathlib.Path) -> bool:
  """Whether a path looks like such a folder."""
  return (path / "config.json").is_file() and any(path.glob("*.safetensors"))


def read(folder: pathlib.Path, which: str) -> Weights:
  """Loads the one encoder of a folder.

  Args:
    folder: of config.json and *.safetensors.
    which: what the encoder is where the folder does not say; "all" takes it
      for the context encoder, as of all published weights.

  Raises:
    ValueError: it is something else, or a model that is not supported.
  """
  files = sorted(folder.glob("*.safetensors"))
  config = folder / "config.json"
  if not is_folder(folder):
    raise ValueError(
      "it is neither a run (config.json, checkpoints/) nor a Hugging Face "
      "folder (config.json, *.safetensors); other files, which may carry "
      "code, are not read"
    )
  with checked.readable("a Hugging Face config.json"):
    settings = weights_lib.read_json(config)
    found = _hugging_face_settings(settings)
  preprocessor = folder / "preprocessor_config.json"
  if preprocessor.is_file():
    with checked.readable("a preprocessor_config.json"):
      images = weights_lib.read_json(preprocessor)
      found = dataclasses.replace(
        found,
        mean=tuple(images.get("image_mean", weights_lib.MEAN)),
        std=tuple(images.get("image_std", weights_lib.STD)),
      )
  name = settings.get("jepa_jax_encoder")
  if name not in (None, *weights_lib.ENCODERS):
    raise ValueError(f"its jepa_jax_encoder is {name!r}, which is no encoder")
  if name is None:
    name = "context" if which == "all" else which
    logging.warning(
      "%s does not say which encoder it holds; the published ones hold the "
      "context encoder, while the paper evaluates the target encoder. Read "
      'as the "%s" encoder.',
      folder,
      name,
    )
  with contextlib.ExitStack() as stack, checked.readable("safetensors"):
    source, shapes = {}, {}
    for file in files:
      opened = stack.enter_context(checked.open_safetensors(file))
      for key, ours in _without_head(opened.shapes, folder).items():
        source[ours] = functools.partial(opened.read, key)
        shapes[ours] = opened.shapes[key]
    return checked.from_foreign(
      found,
      {name: table.HUGGING_FACE_ENCODER},
      lambda _: source,
      {name: shapes},
      {name: ""},
    )


def _without_head(names: Iterable[str], folder: pathlib.Path) -> dict[str, str]:
  """Names of a file's arrays -> what IJepaModel calls them.

  An IJepaForImageClassification has them under "ijepa.", beside its head.
  """
  prefix, names = "ijepa.", list(names)
  if not any(name.startswith(prefix) for name in names):
    return {name: name for name in names}
  if head := [name for name in names if name.startswith("classifier.")]:
    logging.warning(
      "%s holds a classifier; its encoder is read, and its head left out: %s",
      folder,
      ", ".join(sorted(head)),
    )
  return {x: x.removeprefix(prefix) for x in names if x not in head}


def _hugging_face_settings(settings: Mapping[str, Any]) -> Weights:
  """Weights without networks, from an IJepaModel's config.json."""
  supported = {"model_type": "ijepa", "hidden_act": "gelu", "qkv_bias": True}
  for key, value in supported.items():
    if settings.get(key, value if key != "model_type" else None) != value:
      raise ValueError(
        f"{key} is {settings.get(key)!r} in its config.json; only "
        f"{value!r} is supported"
      )
  pair = lambda x: tuple(x) if isinstance(x, (list, tuple)) else (x, x)
  patch = pair(settings.get("patch_size", 16))
  if patch[0] != patch[1]:
    raise ValueError(f"patches of {patch} pixels are not square")
  width = settings.get("hidden_size", 768)
  image_size = pair(settings.get("image_size", 224))
  return Weights(
    networks={},
    encoder=dict(
      width=width,
      depth=settings.get("num_hidden_layers", 12),
      num_heads=settings.get("num_attention_heads", 12),
      patch_size=patch[0],
      mlp_ratio=settings.get("intermediate_size", 3072) / width,
      norm_epsilon=settings.get("layer_norm_eps", 1e-12),
      position_grid=models.patch_grid(*image_size, patch[0]),
    ),
    image_size=image_size,
    channels=settings.get("num_channels", 3),
  )


def write(weights: Weights, folder: pathlib.Path) -> None:
  """Makes a folder that transformers loads; ValueError unless one encoder."""
  names = list(weights.networks)
  if len(names) != 1 or names == ["predictor"]:
    raise ValueError(
      f"a Hugging Face folder holds one encoder, and there are "
      f"{', '.join(names)}; choose one with --which."
    )
  encoder, (height, width) = weights.encoder, weights.image_size
  config = {
    "architectures": ["IJepaModel"],
    "model_type": "ijepa",
    "jepa_jax_encoder": names[0],
    "hidden_size": encoder["width"],
    "num_hidden_layers": encoder["depth"],
    "num_attention_heads": encoder["num_heads"],
    "intermediate_size": int(encoder["width"] * encoder["mlp_ratio"] + 1e-6),
    "patch_size": encoder["patch_size"],
    "image_size": height if height == width else [height, width],
    "num_channels": weights.channels,
    "layer_norm_eps": encoder["norm_epsilon"],
    "hidden_act": "gelu",
    "qkv_bias": True,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "torch_dtype": "float32",
  }
  preprocessor = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "size": {"height": height, "width": width},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(weights.mean),
    "image_std": list(weights.std),
  }
  folder.mkdir()
  for name, content in (("", config), ("preprocessor_", preprocessor)):
    text = json.dumps(content, indent=2) + "\n"
    (folder / f"{name}config.json").write_text(text)
  rows = table.HUGGING_FACE_ENCODER
  arrays = {
    key: np.ascontiguousarray(x)
    for key, x in checked.to_foreign(weights, names[0], rows)
  }
  safetensors.numpy.save_file(
    arrays, folder / "model.safetensors", {"format": "pt"}
  )
