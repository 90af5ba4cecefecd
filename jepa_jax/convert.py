"""Converts weights between the released code, Hugging Face and Flax.

    python -m jepa_jax.convert IN-vith14.pth.tar encoder.npz --which target
    python -m jepa_jax.convert ijepa_vith14_1k/ encoder.safetensors
    python -m jepa_jax.convert workdir/ hugging_face_folder/
    python -m jepa_jax.convert encoder.npz encoder_448.npz --image_size 448

The format follows from the path:

    *.npz, *.safetensors     our own export: arrays "target/norm/scale", ...,
                             and the JSON text "config"; needs neither JAX nor
                             orbax to read
    *.pth.tar, *.pth, *.pt   a checkpoint of the released code; needs torch
    a folder                 of a run (config.json, checkpoints/), or a Hugging
                             Face IJepaModel (config.json, *.safetensors)

A conversion is strict: all missing, extra and misshapen keys are listed, and
then nothing is written. There and back gives the very same bits, where the
weights are float32.
"""

import argparse
import collections
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys
import tempfile
from typing import Any, NamedTuple
import zipfile

from absl import logging
from flax import traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from jepa_jax import command
from jepa_jax import models

Array = Any  # what numpy takes for an array
Params = dict[str, Any]

# ImageNet's, which all released weights were trained with.
_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)


class Transform(NamedTuple):
  """How one array changes; the second undoes the first.

  Attributes:
    to_flax: foreign array -> Flax array of one layer.
    to_foreign: (Flax array of one layer, patch size) -> foreign array.
  """

  to_flax: Callable[[Array], Array]
  to_foreign: Callable[[Array, int], Array]


def _kernel_to_convolution(kernel: Array, patch_size: int) -> Array:
  kernel = kernel.reshape(patch_size, patch_size, -1, kernel.shape[-1])
  return kernel.transpose(3, 2, 0, 1)  # [D, C, patch, patch]


SAME = Transform(lambda x: x, lambda x, _: x)
LINEAR = Transform(lambda x: x.T, lambda x, _: x.T)
PATCHES = Transform(
    lambda x: x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0]),
    _kernel_to_convolution,
)
POSITIONS = Transform(lambda x: x.reshape(-1, x.shape[-1]), lambda x, _: x[None])


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    foreign: key; "{}" is the block's number, "{q,k,v}" three keys that are
      one array in Flax, joined along the foreign array's first axis.
    path: in the Flax parameters; below "blocks" with a leading layer axis.
    transform: see Transform.
  """

  foreign: str
  path: str
  transform: Transform

  def keys(self, depth: int) -> list[list[str]]:
    """The foreign keys: [layers][parts]."""
    layers = range(depth) if "{}" in self.foreign else [0]
    choice = re.search(r"\{([a-z]+(?:,[a-z]+)+)\}", self.foreign)
    names = choice[1].split(",") if choice else [""]
    pattern = self.foreign.replace(choice[0], "{part}") if choice else (
        self.foreign
    )
    pattern = pattern.replace("{}", "{layer}")
    return [[pattern.format(layer=i, part=n) for n in names] for i in layers]


def _dense(foreign: str, path: str) -> tuple[Row, Row]:
  return (
      Row(f"{foreign}.weight", f"{path}/kernel", LINEAR),
      Row(f"{foreign}.bias", f"{path}/bias", SAME),
  )


def _norm(foreign: str, path: str) -> tuple[Row, Row]:
  return (
      Row(f"{foreign}.weight", f"{path}/scale", SAME),
      Row(f"{foreign}.bias", f"{path}/bias", SAME),
  )


def _blocks(foreign: str, names: Mapping[str, str]) -> tuple[Row, ...]:
  """Rows of all blocks; names: ours -> foreign."""
  rows = ()
  for ours, theirs in names.items():
    make = _norm if ours.startswith("norm") else _dense
    rows += make(f"{foreign}.{{}}.{theirs}", f"transformer/blocks/{ours}")
  return rows


_RELEASED_BLOCK = {
    "norm1": "norm1",
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
_HUGGING_FACE_BLOCK = {
    "norm1": "layernorm_before",
    "qkv": "attention.attention.{query,key,value}",
    "out": "attention.output.dense",
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}

# (foreign key, Flax path, transform). Both directions derive from these.
RELEASED_ENCODER = (
    Row("pos_embed", "positions", POSITIONS),
    Row("patch_embed.proj.weight", "patch_embed/kernel", PATCHES),
    Row("patch_embed.proj.bias", "patch_embed/bias", SAME),
    *_blocks("blocks", _RELEASED_BLOCK),
    *_norm("norm", "norm"),
)
RELEASED_PREDICTOR = (
    Row("predictor_pos_embed", "positions", POSITIONS),
    Row("mask_token", "mask_token", SAME),
    *_dense("predictor_embed", "embed"),
    *_blocks("predictor_blocks", _RELEASED_BLOCK),
    *_norm("predictor_norm", "norm"),
    *_dense("predictor_proj", "project"),
)
HUGGING_FACE_ENCODER = (
    Row("embeddings.position_embeddings", "positions", POSITIONS),
    Row(
        "embeddings.patch_embeddings.projection.weight",
        "patch_embed/kernel",
        PATCHES,
    ),
    Row("embeddings.patch_embeddings.projection.bias", "patch_embed/bias", SAME),
    *_blocks("encoder.layer", _HUGGING_FACE_BLOCK),
    *_norm("layernorm", "norm"),
)


def from_foreign(
    source: Mapping[str, Array], table: tuple[Row, ...], depth: int
) -> Params:
  """Reads a table from foreign to Flax; rows that source lacks are left out.

  Args:
    source: foreign key -> array; each is read once.
    table: rows.
    depth: number of blocks.

  Returns:
    Nested float32 parameters.
  """
  flat = {}
  for row in table:
    layers = row.keys(depth)
    if layers[0][0] not in source:
      continue
    target = None
    for i, parts in enumerate(layers):
      arrays = [np.asarray(source[key]) for key in parts]
      array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
      array = row.transform.to_flax(array)
      if target is None:  # filled layer by layer: a stack would be a copy
        target = np.empty((len(layers), *array.shape), np.float32)
      target[i] = array
    flat[row.path] = target if "{}" in row.foreign else target[0]
  return traverse_util.unflatten_dict(flat, sep="/")


def to_foreign(
    params: Params, table: tuple[Row, ...], patch_size: int = 1
) -> Iterator[tuple[str, np.ndarray]]:
  """Reads a table from Flax to foreign.

  Args:
    params: nested parameters with "positions".
    table: rows.
    patch_size: pixels, of an encoder.

  Yields:
    (foreign key, array), C-contiguous.
  """
  flat = traverse_util.flatten_dict(params, sep="/")
  for row in table:
    array = flat[row.path]
    stacked = "{}" in row.foreign
    for i, keys in enumerate(row.keys(len(array) if stacked else 1)):
      layer = row.transform.to_foreign(array[i] if stacked else array, patch_size)
      for key, part in zip(keys, np.split(layer, len(keys))):
        yield key, np.ascontiguousarray(part)
