"""Prepares and verifies a data set.

    python -m jepa_jax.prepare --source scenes --image_size 64
    python -m jepa_jax.prepare --name cifar10 --data_dir D --download
    python -m jepa_jax.prepare --source folder --name ~/photos --decode

Says for every split how many images it found, of what sizes and formats, and
which of them cannot be read. The network is used with --download alone. Data
sets that must be fetched by hand (ImageNet) say how.
"""

import argparse
import collections
import dataclasses
import os
import types
from typing import Any

import numpy as np
import tqdm

from jepa_jax import command, config_table, keys, paths
from jepa_jax import config as config_lib
from jepa_jax.data import headers, pixels, sources

_CHUNK = 256  # images read at once
_NAMED = 10  # unreadable images to name


@dataclasses.dataclass
class Summary:
  """What was found in a split.

  Attributes:
    images: how many records.
    sizes: [readable, 2] height and width as stored, pixels.
    encodings: images of each format.
    unreadable: what is wrong with each bad image, by name.
  """

  images: int
  sizes: np.ndarray
  encodings: collections.Counter
  unreadable: dict[str, str]

  def __str__(self) -> str:
    lines = [f"{self.images:,} images"]
    if len(self.sizes):
      kinds = [f"{n:,} {name.upper()}" for name, n in self.encodings.items()]
      lines.append(f"  formats: {', '.join(sorted(kinds))}")
      low, middle, high = (
        np.quantile(self.sizes, q, axis=0, method="nearest")
        for q in (0, 0.5, 1)
      )
      for i, side in enumerate(("height", "width")):
        lines.append(
          f"  {side}: {low[i]} to {high[i]} pixels, median {middle[i]}"
        )
    if self.unreadable:
      lines.append(f"  {len(self.unreadable):,} cannot be read:")
      for name, reason in list(self.unreadable.items())[:_NAMED]:
        lines.append(f"    {name}: {reason}")
      if len(self.unreadable) > _NAMED:
        lines.append("    ...")
    return "\n".join(lines)


def verify(source: sources.Source, *, decode_all: bool = False) -> Summary:
  """Reads every image's header, and with decode_all the whole image.

  Args:
    source: what to verify.
    decode_all: finds damage past the header too; as slow as decoding is.
  """
  sizes, encodings, unreadable = [], collections.Counter(), {}
  numbers = np.arange(len(source))
  chunks = np.array_split(numbers, max(1, -(-len(numbers) // _CHUNK)))
  for chunk in tqdm.tqdm(chunks, unit_scale=_CHUNK, leave=False, disable=None):
    for i, data in zip(chunk, source.images(source.read(chunk))):
      try:
        header = headers.read_header(data)
        if decode_all:
          pixels.stored(data)
      except ValueError as error:
        why = source.problem(int(i)) or str(error)
        unreadable[source.name(int(i))] = why
      else:
        sizes.append((header.height, header.width))
        encodings[header.encoding] += 1
  sizes = np.asarray(sizes, int).reshape(-1, 2)
  return Summary(len(source), sizes, encodings, unreadable)


def download(name: str, data_dir: str) -> None:
  """Downloads and prepares a TFDS data set.

  Raises:
    ValueError: unknown, or its files must be fetched by hand first.
  """
  import tensorflow_datasets as tfds

  kwargs = {"data_dir": os.path.expanduser(data_dir)} if data_dir else {}
  try:
    builder = tfds.builder(name, **kwargs)
    builder.download_and_prepare()
  except tfds.core.DatasetNotFoundError:
    sources.find_builder(name, data_dir)  # explains
  except AssertionError as error:  # TFDS's own, of manual downloads
    raise ValueError(str(error)) from None


def _splits(config: Any) -> list[str]:
  """Splits that together hold every image of a source once."""
  if config.source == "tfds":
    builder = sources.find_builder(config.name, config.data_dir)
    return list(builder.info.splits)
  return {"scenes": ["train", "test"], "folder": ["all"]}.get(
    config.source, ["train"]
  )


def main(arguments: argparse.Namespace) -> int:
  config = types.SimpleNamespace(
    source=arguments.source,
    name=arguments.name,
    split=arguments.split or "",
    data_dir=arguments.data_dir,
    image_size=arguments.image_size,
    max_mib=headers.MAX_MIB,
    num_scenes=tuple(arguments.num_scenes),
  )
  if config.source == "scenes" and config.name:
    raise ValueError(f'--name is "{config.name}", and scenes have none.')
  config_lib.check_name(config)
  if arguments.download:
    if config.source != "tfds":
      raise ValueError(
        f'--download is for TFDS; source "{config.source}" needs none'
      )
    download(config.name, config.data_dir)
  bad = 0
  for split in [arguments.split] if arguments.split else _splits(config):
    source = sources.open_source(config, split)
    summary = verify(source, decode_all=arguments.decode)
    bad += len(summary.unreadable)
    name = paths.printable(config.name)
    print(f"{config.source} {name} {split}: {summary}")
  return 1 if bad else 0


if __name__ == "__main__":
  parser = argparse.ArgumentParser(
    prog="python -m jepa_jax.prepare", description=__doc__.split("\n")[0]
  )
  kind = lambda name: config_table.KEYS[f"data.{name}"].kind
  keys.add_flag(
    parser,
    "--source",
    kind("source"),
    default="tfds",
    help="as config.data.source",
  )
  for name in ("name", "data_dir"):
    keys.add_flag(
      parser, f"--{name}", kind(name), default="", help=f"as config.data.{name}"
    )
  keys.add_flag(parser, "--split", kind("split"), help="default: all")
  keys.add_flag(
    parser,
    "--image_size",
    kind("image_size"),
    default=64,
    help="of scenes, pixels",
  )
  keys.add_flag(
    parser,
    "--num_scenes",
    keys.whole(1, 10**8),
    nargs=2,
    default=(8000, 2000),
    help="of scenes, images to train and to test on",
  )
  parser.add_argument(
    "--download", action="store_true", help="may use the network"
  )
  parser.add_argument(
    "--decode", action="store_true", help="decodes every image, too"
  )
  command.run(main, parser)
