"""Weights on the Hugging Face hub; needs the package huggingface_hub.

model = jepa_jax.load("facebook/ijepa_vith14_1k")
jepa_jax.push_to_hub("runs/quickstart", "me/small-ijepa")
"""

import pathlib
import re
from typing import Any


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
  hub = import_hub(f"there is no file or folder {name}; to fetch it")
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
      f"give it ({first_line(error)})."
    ) from None
  return pathlib.Path(folder)


def import_hub(why: str) -> Any:
  """The package; a ValueError that says how to get it where it is not."""
  try:
    import huggingface_hub
  except ImportError:
    raise ValueError(
      f"{why} from or to the Hugging Face hub, install the extra hub with pip "
      'install "jepa_jax[hub]".'
    ) from None
  return huggingface_hub


def first_line(error: Exception) -> str:
  """What an error is, in one line."""
  lines = str(error).strip().splitlines() or [""]
  return f"{type(error).__name__}: {lines[0][:200]}"
