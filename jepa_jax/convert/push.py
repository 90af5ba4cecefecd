"""Uploads weights to the Hugging Face hub, with a model card.

jepa_jax.push_to_hub("runs/quickstart", "me/small-ijepa")
"""

import os
import pathlib
import re
import tempfile

from jepa_jax.convert import formats, hugging_face
from jepa_jax.convert import hub as hub_lib
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


def push_to_hub(
  path: str | os.PathLike[str],
  repo: str,
  which: str | None = None,
  *,
  private: bool = False,
) -> str:
  """Uploads one encoder, as transformers reads it, with a model card.

  Args:
    path: what jepa_jax.load reads.
    repo: "owner/name" of the Hugging Face hub; is made where there is none.
    which: "target" or "context"; None for the one that is evaluated.
    private: of a new one, that its owner alone sees it.

  Returns:
    Its address.

  Raises:
    ValueError: wrong weights or name, huggingface_hub is not installed, or the
      hub refuses.
  """
  return push(formats.read(path, which), repo, private=private)


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
  check_name(repo)
  hub = hub_lib.import_hub("to upload")
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary) / "model"
    hugging_face.write(weights, folder)
    (folder / "README.md").write_text(card(weights, repo))
    try:
      api = hub.HfApi()
      url = api.create_repo(repo, private=private, exist_ok=True)
      api.upload_folder(repo_id=repo, folder_path=folder)
    except Exception as error:
      why = hub_lib.first_line(error)
      raise ValueError(
        f"the Hugging Face hub does not take {repo} ({why})."
      ) from None
  return str(url)


def check_name(repo: str) -> None:
  """Raises ValueError where nothing can be uploaded under a name."""
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
    raise ValueError(f'"{repo}" is no name of the hub; it needs OWNER/NAME.')
  hub_lib.import_hub("to upload")


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
