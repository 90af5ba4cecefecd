"""Draws what a network has learned.

    python -m jepa_jax.visualize NAME --workdir DIR [--images FOLDER]
    python -m jepa_jax.visualize NAME --weights PATH --images FOLDER
    python -m jepa_jax.visualize runs DIR [DIR ...]

NAME is one of

    masks       what each masking strategy shows, and what it has predicted
    pca         features as colours, of target encoder and context encoder
    similarity  what is similar to a patch, in all images
    attention   where the heads of a block look from a patch
    errors      how well blocks are predicted, against distance to the context
    map         the images where their features put them, on a plane
    neighbours  images with those nearest by features and by pixels, and which
                of them are of the same class
    decode      images that have such features, drawn by the run of a decoder
                (experiments/decoder.py), beside the nearest image
    runs        the curves of several runs on one page
    film        features over the checkpoints of a run, as a GIF
    gallery     the first seven of these that the run's networks allow, in
                DIR/gallery and in the run's report

Images are those of --images, else of the run's own data that it was not trained
on. The picture is written to --out, PNG or WebP by its ending (a film: GIF);
NAME.png (film.gif) by default.
"""

import argparse
from collections.abc import Callable
import dataclasses
import functools
import sys
from typing import Any

from jepa_jax import command, keys, paths
from jepa_jax.pictures.shown import Source


@dataclasses.dataclass(frozen=True)
class Picture:
  """One row of the table of pictures.

  Attributes:
    draw: of a Source, a figure or the frames of a film.
    images: how many, unless --count says so.
    flags: those that it takes besides those of all.
  """

  draw: Callable[[Source], Any]
  images: int
  flags: tuple[str, ...] = ()


def _masks(source):
  from jepa_jax.pictures import drawings

  settings = dict(source.config.masks) if source.config else None
  size = source.model.module.patch_size
  return drawings.masks(source.images, size, settings, seed=source.flags.seed)


def _pca(source):
  from jepa_jax.pictures import drawings

  return drawings.pca(
    source.model, source.images, fine=source.fine,
    foreground=source.flags.foreground,
  )  # fmt: skip


def _similarity(source):
  from jepa_jax.pictures import drawings

  return drawings.similarity(
    source.model, source.images, at=source.flags.patch or (0.5, 0.5),
    fine=source.fine,
  )  # fmt: skip


def _attention(source):
  from jepa_jax.pictures import drawings

  return drawings.attention(
    source.model, source.images, at=source.flags.patch or (0.5, 0.5),
    layer=-1 if source.flags.layer is None else source.flags.layer,
  )  # fmt: skip


def _errors(source):
  from jepa_jax.pictures import errors

  settings = dict(source.config.masks) if source.config else None
  found = errors.errors(
    source.model, source.images, settings, source.flags.seed
  )
  return errors.draw(source.images, found)


def _map(source):
  from jepa_jax.pictures import embedding

  method = source.flags.method or "pca"
  vectors = embedding.pooled(source.model, source.images)
  places = embedding.coordinates(vectors, method, source.flags.seed)
  return embedding.draw_map(source.images, places, method)


def _neighbours(source):
  from jepa_jax.pictures import embedding

  vectors = embedding.pooled(source.model, source.images)
  return embedding.draw_neighbours(source.images, vectors, source.labels)


def _decode(source):
  from jepa_jax.pictures import decoders, decoding

  if source.run is None:
    raise ValueError("what draws is the run of a decoder; give --workdir.")
  objective, state, masks = decoders.load(source.run, source.flags.step)
  if source.flags.score:
    scores = decoding.fidelity(
      objective, state, source.images, masks, seed=source.flags.seed
    )
    print(decoding.in_words(scores))
  found = decoding.decode(
    objective, state, source.images, masks,
    samples=source.flags.samples or 3, seed=source.flags.seed,
  )  # fmt: skip
  return decoding.draw(source.images, found)


def _runs(source):
  from jepa_jax.pictures import training

  return training.draw_runs(training.read(source.flags.run))


def _film(source):
  from jepa_jax.pictures import training

  if source.run is None:
    raise ValueError("a film is of the checkpoints of a run; give --workdir.")
  return training.film(source.run, source.images, fine=source.fine)


PICTURES = {
  "masks": Picture(_masks, 3, ("seed",)),
  "pca": Picture(_pca, 8, ("fine", "foreground")),
  "similarity": Picture(_similarity, 7, ("fine", "patch")),
  "attention": Picture(_attention, 6, ("layer", "patch")),
  "errors": Picture(_errors, 256, ("seed",)),
  "map": Picture(_map, 500, ("method", "seed")),
  "neighbours": Picture(_neighbours, 500, ("label",)),
  "decode": Picture(_decode, 64, ("samples", "score", "seed")),
  "runs": Picture(_runs, 0),
  "film": Picture(_film, 6, ("fine",)),
}
# What a run's report shows.
GALLERY = (
  *("masks", "pca", "similarity", "attention", "errors", "map", "neighbours"),
)
_OWN = sorted({flag for picture in PICTURES.values() for flag in picture.flags})


def gallery(arguments: argparse.Namespace) -> int:
  """Draws GALLERY into the workdir, and the report with it.

  Raises:
    ValueError: no run, no checkpoint, or nothing of it can be drawn.
  """
  from jepa_jax.evaluation import report
  from jepa_jax.pictures import layout
  from jepa_jax.training import checkpoints

  refused = [f"--{flag}" for flag in (*_OWN, "out") if getattr(arguments, flag)]
  if arguments.workdir is None or refused:
    words = f"takes no {refused[0]}" if refused else "needs --workdir of a run"
    raise ValueError(f"gallery {words}.")
  source = Source(
    arguments,
    arguments.count or max(PICTURES[x].images for x in GALLERY),
    labelled=True,
  )
  step = arguments.step
  if step is None and source.config:
    step = max(checkpoints.steps(source.run / "checkpoints"), default=None)
  if step is None:
    raise ValueError(f"{source.run} holds no checkpoint yet.")
  _ = source.images, source.model  # once for all pictures
  folder, drawn = source.run / report.GALLERY / str(step), 0
  folder.mkdir(parents=True, exist_ok=True)
  for name in GALLERY:
    try:
      figure = PICTURES[name].draw(source.first(PICTURES[name].images))
    except ValueError as error:  # such as errors without a predictor
      print(f"{name}: not drawn: {error}", file=sys.stderr)
      continue
    layout.write(figure, folder / f"{name}.webp")
    print(f"picture: {folder / name}.webp", file=sys.stderr)
    drawn += 1
  if not drawn:
    raise ValueError(f"nothing of {source.run} can be drawn.")
  print(f"report: {report.write(source.run)}", file=sys.stderr)
  return 0


def main(arguments: argparse.Namespace) -> int:
  """The command."""
  name = arguments.name
  if name == "gallery":
    return gallery(arguments)
  picture = PICTURES[name]
  for flag in _OWN:
    if (
      getattr(arguments, flag) not in (None, False, 0)
      and flag not in picture.flags
    ):
      takers = [n for n, p in PICTURES.items() if flag in p.flags]
      raise ValueError(f"--{flag} is of {', '.join(takers)}, not of {name}.")
  given = (arguments.workdir is not None) + (arguments.weights is not None)
  if name == "runs":
    if given or not arguments.run:
      raise ValueError("give the folders of runs: visualize runs DIR DIR.")
  elif arguments.run or given != 1:
    raise ValueError(
      f"{name} needs --workdir of a run, or --weights and --images; one of "
      "them."
    )
  from jepa_jax.pictures import layout

  film = name == "film"
  out = arguments.out or f"{name}.{'gif' if film else 'png'}"
  path = paths.local(out, "--out")
  layout.check_path(path, film)
  count = arguments.count or picture.images
  drawn = picture.draw(Source(arguments, count, "label" in picture.flags))
  path.parent.mkdir(parents=True, exist_ok=True)
  layout.write(drawn, path)
  print(f"picture: {out}", file=sys.stderr)
  return 0


if __name__ == "__main__":
  flags = argparse.ArgumentParser(
    prog="python -m jepa_jax.visualize",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = functools.partial(keys.add_flag, flags)
  add(
    "name",
    keys.Choice((*PICTURES, "gallery")),
    metavar="NAME",
    help="see above",
  )
  add("run", keys.FOLDER, nargs="*", metavar="DIR", help="of runs")
  add("--workdir", keys.FOLDER, help="folder of a run")
  add(
    "--weights",
    keys.PATH,
    metavar="PATH",
    help="in its place, what jepa_jax.load reads",
  )
  add("--step", keys.STEP, help="of the checkpoint; the newest by default")
  add("--images", keys.FOLDER, metavar="FOLDER", help="images to draw")
  add("--split", keys.Text("a split", False), help="of the images")
  add("--count", keys.whole(1, 10**6), help="images")
  add("--out", keys.PATH, metavar="FILE", help="where the picture goes")
  add(
    "--seed",
    keys.whole(0, 2**32 - 1),
    default=0,
    help="of masks, errors, maps and samples",
  )
  add(
    "--label",
    keys.Text("a label", False),
    help="of neighbours: what their classes are; by default the first such "
    "label that the run evaluates, or the sub-folders of --images",
  )
  add("--samples", keys.whole(1, 100), help="of decode: an image, 3 by default")
  add(
    "--fine",
    keys.whole(1, 1000),
    help="vectors along a side of a patch, for a finer map of features; the "
    "images are encoded FINE x FINE times. By default up to 4",
  )
  flags.add_argument(
    "--score",
    action="store_true",
    help="of decode: print how near samples of all images come to them",
  )
  flags.add_argument(
    "--foreground",
    action="store_true",
    help="of pca: colour what is not background alone",
  )
  add(
    "--patch",
    keys.number(0, 1),
    nargs=2,
    metavar=("ROW", "COLUMN"),
    help="of similarity and attention: shares of the image's sides; 0.5 0.5 is "
    "the middle",
  )
  add(
    "--layer",
    keys.whole(-1000, 1000),
    help="of attention: the block, 0 the first, -1 the last",
  )
  add(
    "--method",
    keys.Choice(("pca", "tsne", "umap")),
    help="of map: pca by default",
  )
  command.run(main, flags, needs={"--step": "--workdir"})
