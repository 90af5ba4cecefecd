"""Converts weights between the released code, Hugging Face and Flax.

    python -m jepa_jax.convert IN1K-vit.h.14-300e.pth.tar encoder.npz
    python -m jepa_jax.convert ijepa_vith14_1k/ encoder.safetensors
    python -m jepa_jax.convert workdir/ hugging_face_folder/
    python -m jepa_jax.convert encoder.npz encoder_448.npz --image_size 448
    python -m jepa_jax.convert facebook/ijepa_vith14_1k encoder.npz
    python -m jepa_jax.convert workdir/ OWNER/NAME --push

The format follows from the path:

    *.npz, *.safetensors     our own export: arrays "target/norm/scale", ...,
                             and the JSON text "config"
    *.pth.tar, *.pth, *.pt   a checkpoint of the released code; needs torch
    a folder                 of a run (config.json, checkpoints/), or a Hugging
                             Face IJepaModel (config.json, *.safetensors)
    OWNER/NAME               such a folder on the Hugging Face hub; needs the
                             extra "hub"

A conversion is strict: all missing, extra and misshapen keys are listed, and
then nothing is written. There and back gives the very same bits, where the
weights are float32.

The encoder is the *target* encoder unless --which says otherwise: that is the
one the paper evaluates. The published Hugging Face weights hold the *context*
encoder and do not say so; they are read as that.
"""

import argparse
import pathlib
import sys

from jepa_jax import command, keys


def parser() -> argparse.ArgumentParser:
  """The command's flags."""
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.convert",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  keys.add_flag(flags, "source", keys.PATH, help="file or folder to read")
  keys.add_flag(flags, "destination", keys.PATH, help="file or folder to write")
  flags.add_argument(
    "--which",
    choices=("target", "context", "all"),
    help="encoder to convert, or both and the predictor; default: target, "
    "what a Hugging Face folder holds, or context of a run without average",
  )
  keys.add_flag(
    flags,
    "--num_heads",
    keys.whole(0, 2**14),
    default=0,
    help="of a released checkpoint that is of no known size",
  )
  keys.add_flag(
    flags,
    "--predictor_heads",
    keys.whole(0, 2**14),
    default=0,
    help="the same of its predictor; default: as the encoder",
  )
  keys.add_flag(
    flags,
    "--step",
    keys.STEP,
    help="checkpoint of a run; default: the newest",
  )
  keys.add_flag(
    flags,
    "--image_size",
    keys.whole(1, 16_384, "pixels"),
    nargs="+",
    metavar="PIXELS",
    help="fit the positions to this size, or height and width",
  )
  flags.add_argument(
    "--positions",
    choices=("recompute", "bicubic"),
    default="recompute",
    help="for --image_size: compute the sine-cosine positions of the new "
    "grid (default), or interpolate the old ones",
  )
  keys.add_flag(
    flags,
    "--prefix",
    keys.Text("what keys begin with"),
    default="",
    help='of the keys of a released checkpoint; its training needs "module."',
  )
  flags.add_argument(
    "--push",
    action="store_true",
    help="upload to the model OWNER/NAME that the destination names, with a "
    "model card",
  )
  flags.add_argument(
    "--private",
    action="store_true",
    help="with --push: a new model is seen by its owner alone",
  )
  return flags


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  import jax

  from jepa_jax import convert
  from jepa_jax.convert import formats, push

  source, size = pathlib.Path(arguments.source), arguments.image_size
  destination = arguments.destination
  if size and len(size) > 2:
    raise ValueError(f"--image_size takes one or two numbers, not {size}.")
  # Reading takes long.
  if arguments.push:
    push.check_name(destination)
  else:
    formats.check_destination(destination, prefix=arguments.prefix)
  weights = convert.read(
    source,
    arguments.which,
    num_heads=arguments.num_heads,
    predictor_heads=arguments.predictor_heads,
    step=arguments.step,
  )
  if size:
    weights = convert.resize(weights, (size[0], size[-1]), arguments.positions)
  if arguments.push:
    destination = push.push(weights, destination, private=arguments.private)
  else:
    convert.write(weights, destination, prefix=arguments.prefix)
  count = sum(x.size for x in jax.tree.leaves(weights.networks))
  print(
    f"{source} -> {destination}: {', '.join(weights.networks)}; "
    f"{count / 1e6:.1f} M parameters",
    file=sys.stderr,
  )
  return 0


if __name__ == "__main__":
  needs = {"--private": "--push", "--positions": "--image_size"}
  command.run(main, parser(), needs=needs)
