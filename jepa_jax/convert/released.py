"""Checkpoints of the released PyTorch code: *.pth.tar, *.pth, *.pt.

A dict of "encoder" (the context encoder), "target_encoder", "predictor" and
the state of their training. Reading and writing needs torch.
"""

import codecs
import collections
from collections.abc import Callable, Mapping
import functools
import math
import pathlib
import re
from typing import Any
import zipfile

import numpy as np

from jepa_jax import models
from jepa_jax.convert import checked, table
from jepa_jax.convert.weights import Weights

SUFFIXES = (".pth.tar", ".pth", ".pt")
_NETWORKS = {
  "context": "encoder",
  "target": "target_encoder",
  "predictor": "predictor",
}


# NumPy scalars, such as a logged loss, carry no code; NumPy 1 and 2.
_SCALARS = [
  (np._core.multiarray.scalar, f"numpy.{core}.multiarray.scalar")
  for core in ("core", "_core")
] + [np.dtype, codecs.encode]
_SCALARS += [type(np.dtype(kind)) for kind in "fdlqi"]


def _import_torch() -> Any:
  try:
    import torch
  except ImportError:
    raise ValueError(
      "a checkpoint of the released code needs PyTorch; install the extra "
      'with pip install "jepa_jax[torch]".'
    ) from None
  return torch


def _without_prefix(tensors: Mapping[Any, Any]) -> dict[str, Any]:
  """The tensors of a network; data-parallel training prefixes every key."""
  strip = all(str(key).startswith("module.") for key in tensors)
  return {
    str(key).removeprefix("module.") if strip else str(key): value
    for key, value in tensors.items()
  }


def _load_torch(path: pathlib.Path) -> dict[str, Any]:
  torch = _import_torch()
  try:
    # Mapped, so that what is not read (the optimizer) costs no memory.
    with torch.serialization.safe_globals(_SCALARS):
      return torch.load(
        path,
        map_location="cpu",
        weights_only=True,
        mmap=zipfile.is_zipfile(path),
      )
  except Exception as error:  # Many kinds, of many lines.
    text = str(error)
    if code := re.search(r"GLOBAL ([\w.]+)", text):
      raise ValueError(
        f"it wants to run code ({code[1]}) while loading; only tensors are "
        "read, so it is refused"
      ) from None
    first = (text.splitlines() or [""])[0][:120]
    raise ValueError(
      "it cannot be read as a PyTorch checkpoint; it is damaged or something "
      f"else ({type(error).__name__}: {first})"
    ) from None


def read(
  path: pathlib.Path, which: str, num_heads: int, predictor_heads: int
) -> Weights:
  """Loads a checkpoint; the arguments are those of convert.read.

  Raises:
    ValueError: it cannot be read safely, or has other keys or shapes.
  """
  checkpoint = _load_torch(path)
  keys = checkpoint.keys() if isinstance(checkpoint, Mapping) else ()
  names = _NETWORKS if which == "all" else (which,)
  shapes = {
    name: {
      key: tuple(getattr(value, "shape", ()))
      for key, value in _without_prefix(checkpoint[_NETWORKS[name]]).items()
    }
    for name in names
    if _NETWORKS[name] in keys
    and isinstance(checkpoint[_NETWORKS[name]], Mapping)
  }
  promised = sum(math.prod(s) for x in shapes.values() for s in x.values())
  if promised > (size := path.stat().st_size):
    raise ValueError(
      f"it promises {promised} numbers, more than its {size} bytes can hold"
    )
  if not shapes.keys() - {"predictor"}:
    raise ValueError(
      f'it has no "{_NETWORKS.get(which, "target_encoder")}"; its keys: '
      f"{', '.join(map(str, list(keys)[:12])) or 'none'}"
    )
  # Networks are read one by one: mapping the file anew for each lets go of
  # the pages of the one before.
  del checkpoint, keys
  first = next(name for name in shapes if name != "predictor")
  settings = _infer_encoder(shapes[first], num_heads)
  predictor = None
  if "predictor" in shapes:
    predictor = _infer_predictor(shapes["predictor"])
    predictor["num_heads"] = predictor_heads or settings["encoder"]["num_heads"]

  def open_source(name: str) -> dict[str, Callable[[], np.ndarray]]:
    tensors = _without_prefix(_load_torch(path)[_NETWORKS[name]])
    read = lambda tensor: tensor.detach().float().numpy()
    return {key: functools.partial(read, x) for key, x in tensors.items()}

  return checked.from_foreign(
    Weights(networks={}, predictor=predictor, **settings),
    {name: _rows(name) for name in shapes},
    open_source,
    shapes,
    {name: f"{_NETWORKS[name]}: " for name in shapes},
  )


def write(weights: Weights, path: pathlib.Path, prefix: str) -> None:
  """Saves all networks there are; prefix stands before every key."""
  if "predictor" in weights.networks:
    width, output = weights.encoder["width"], weights.output_width
    if output != width:
      raise ValueError(
        f"a released checkpoint's predictor has outputs of the encoder's "
        f"width {width}, and this one's are of width {output}; choose an "
        "encoder with --which, or write .npz or .safetensors."
      )
  torch = _import_torch()
  checkpoint = {}
  for name in weights.networks:
    checkpoint[_NETWORKS[name]] = {
      prefix + key: torch.from_numpy(np.array(x, np.float32, order="C"))
      for key, x in checked.to_foreign(weights, name, _rows(name))
    }
  torch.save(checkpoint, path)


def _rows(name: str) -> tuple[table.Row, ...]:
  if name == "predictor":
    return table.RELEASED_PREDICTOR
  return table.RELEASED_ENCODER


def _vote(
  shapes: Mapping[str, tuple[int, ...]],
  pattern: str,
  axis: int,
  otherwise: int,
) -> int:
  """The most common size, so that one misshapen key does not blame others."""
  sizes = collections.Counter(
    shape[axis]
    for key, shape in shapes.items()
    if re.fullmatch(pattern, key) and -len(shape) <= axis < len(shape)
  )
  return sizes.most_common(1)[0][0] if sizes else otherwise


def _depth(shapes: Mapping[str, tuple[int, ...]], blocks: str) -> int:
  found = [re.match(rf"{blocks}\.(\d+)\.", key) for key in shapes]
  return 1 + max((int(m[1]) for m in found if m), default=-1)


def _infer_encoder(
  shapes: Mapping[str, tuple[int, ...]], num_heads: int
) -> dict[str, Any]:
  """What the shapes of a released encoder tell of its settings."""
  depth = _depth(shapes, "blocks")
  if not depth:
    raise ValueError(
      "it is no encoder of the released code: no key starts with blocks.0.; "
      f"its keys: {', '.join(list(shapes)[:12])}"
    )
  width = _vote(shapes, r"(blocks\.\d+\.norm\d|norm)\.\w+", 0, 0)
  hidden = _vote(shapes, r"blocks\.\d+\.mlp\.fc1\.bias", 0, 4 * width)
  patch = _vote(shapes, r"patch_embed\.proj\.weight", -1, 16)
  patches = _vote(shapes, "pos_embed", 1, 1)
  if not width:
    raise ValueError("it is no encoder of the released code: its width is 0")
  side = round(patches**0.5)
  sizes = [
    size
    for size in models.SIZES.values()
    if (size["width"], size["depth"]) == (width, depth)
  ]
  if not num_heads and not sizes:
    raise ValueError(
      f"width {width} and depth {depth} are of no known size, and the file "
      "does not tell the number of attention heads; give --num_heads"
    )
  if side * side != patches:
    raise ValueError(f"its {patches} positions are of no square grid")
  return dict(
    encoder=dict(
      width=width,
      depth=depth,
      num_heads=num_heads or sizes[0]["num_heads"],
      patch_size=patch,
      mlp_ratio=hidden / width,
      norm_epsilon=1e-6,
      position_grid=(side, side),
    ),
    image_size=(side * patch, side * patch),
    channels=_vote(shapes, r"patch_embed\.proj\.weight", 1, 3),
  )


def _infer_predictor(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
  blocks = "predictor_blocks"
  width = _vote(shapes, rf"{blocks}\.\d+\.norm\d\.\w+", 0, 4)
  if not width:
    raise ValueError("it is no predictor of the released code: its width is 0")
  hidden = _vote(shapes, rf"{blocks}\.\d+\.mlp\.fc1\.bias", 0, 4 * width)
  return dict(
    width=width,
    depth=max(1, _depth(shapes, blocks)),
    mlp_ratio=hidden / width,
  )
