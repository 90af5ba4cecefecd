"""Weights on the Hugging Face hub; needs the package huggingface_hub.

model = jepa_jax.load("facebook/ijepa_vith14_1k")
jepa_jax.push_to_hub("runs/quickstart", "me/small-ijepa")
"""

import pathlib
import re
import tempfile
from typing import Any

from jepa_jax.convert import hugging_face
from jepa_jax.convert.weights import Weights

_CARD = """\
---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- ijepa
- jax
---

# {name}

The {which} encoder of an image joint-embedding predictive architecture
(I-JEPA, [arXiv:2301.08243](https://arxiv.org/abs/2301.08243)): {depth} blocks
of width {width}, {heads} heads, patches of {patch} pixels, trained on images of
{height} x {wide} pixels and {channels} channels.

In JAX, where it becomes a Flax module and its parameters:

    import jepa_jax

    model = jepa_jax.load("{repo}")
    features = model.encode(images)  # uint8 [B, H, W, C] -> [B, {width}]

In PyTorch:

    from transformers import AutoModel

    model = AutoModel.from_pretrained("{repo}")
    features = model(pixel_values).last_hidden_state.mean(dim=1)
"""


def is_name(path: pathlib.Path) -> bool:
  """Whether a path that is not here may be a model's: "owner/name"."""
  named = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", path.as_posix())
  is_file = path.suffix in (".npz", ".safetensors", ".pth", ".pt", ".tar")
  return bool(named) and not is_file and not path.parent.exists()


def download(name: str) -> pathlib.Path:
  """Fetches a model's config and safetensors, or finds them in the cache.

  Args:
    name: "owner/name", or "owner/name@revision".

  Returns:
    The folder that they are in.

  Raises:
    ValueError: the package is not installed, or the hub does not give it.
  """
  repo, _, revision = name.partition("@")
  hub = _import(f"there is no file or folder {name}; to fetch it")
  try:
    folder = hub.snapshot_download(
      repo,
      revision=revision or None,
      allow_patterns=[
        "config.json",
        "preprocessor_config.json",
        "*.safetensors",
      ],
    )
  except Exception as error:  # Of the network, of the hub, of its caches.
    raise ValueError(
      f"there is no file or folder {name}, and the Hugging Face hub does not "
      f"give it ({_first_line(error)})."
    ) from None
  return pathlib.Path(folder)


def push(weights: Weights, repo: str, *, private: bool = False) -> str:
  """Uploads one encoder: model.safetensors, config.json and a model card.

  Args:
    weights: of one encoder.
    repo: "owner/name"; is made where there is none.
    private: of a new one, that its owner alone sees it.

  Returns:
    Its address.

  Raises:
    ValueError: wrong weights or name, the package is not installed, or the hub
      refuses.
  """
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
    raise ValueError(f'"{repo}" is no name of the hub; it needs OWNER/NAME.')
  hub = _import("to upload")
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary) / "model"
    hugging_face.write(weights, folder)
    (folder / "README.md").write_text(card(weights, repo))
    try:
      api = hub.HfApi()
      url = api.create_repo(repo, private=private, exist_ok=True)
      api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:
      raise ValueError(
        f"the Hugging Face hub does not take {repo} ({_first_line(error)})."
      ) from None
  return str(url)


def card(weights: Weights, repo: str) -> str:
  """The model card, README.md, of weights with one encoder."""
  encoder, (height, width) = weights.encoder, weights.image_size
  return _CARD.format(
    name=repo.partition("/")[2],
    repo=repo,
    which=" and ".join(weights.networks),
    depth=encoder["depth"],
    width=encoder["width"],
    heads=encoder["num_heads"],
    patch=encoder["patch_size"],
    height=height,
    wide=width,
    channels=weights.channels,
  )


def _import(why: str) -> Any:
  try:
    import huggingface_hub
  except ImportError:
    raise ValueError(
      f"{why} from or to the Hugging Face hub, install the extra hub with pip "
      'install "jepa_jax[hub]".'
    ) from None
  return huggingface_hub


def _first_line(error: Exception) -> str:
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:200]}"
