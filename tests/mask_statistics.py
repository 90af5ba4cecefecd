"""Holds the `released` mask sampler to statistics of the released code.

    python tests/mask_statistics.py FILE.json [--sampler released]

FILE.json has the format of multiblock_statistics.json: `settings`, and for each
of `grids` what the released code drew in `num_images` batches of one image.

Every row below is one test of the hypothesis that the reference was drawn from
our sampler, and gives a p-value:
- block shapes: chi-square of the reference's counts on our exact probabilities
  (cells that expect fewer than 5 are pooled; a shape that we never draw fails);
- mean of context tokens and of the union of targets: z-test;
- standard deviations: z-test, with the fourth moment for the error;
- quantiles of context tokens: the share of our draws up to the reference's
  quantile, binomial error; min and max: the probability of one as extreme;
- coverage of every patch by context and by targets: the largest z-score of all
  patches, Bonferroni-corrected; a patch reached by one sampler alone fails.
The file passes where no row's p-value is below 0.001 / number of rows
(Bonferroni again): a right sampler fails once in a thousand files or less.
Ours is drawn ten times as often as the reference, and its own error counts.
"""

import argparse
import dataclasses
import json
import math
import sys
from typing import Any

import numpy as np
import scipy.stats

from jepa_jax import masks
from jepa_jax.masks import rectangles

LEVEL = 1e-3  # probability that a right sampler fails a file
OVERSAMPLING = 10
_CHUNK = 2000  # images drawn at once


@dataclasses.dataclass(frozen=True)
class Row:
  """One test: what the reference has, what we have, and the p-value."""

  grid: str
  statistic: str
  reference: str
  ours: str
  p_value: float


def compare(reference: dict[str, Any], sampler: str = "released") -> list[Row]:
  """Tests every grid of a reference file; see the module's docstring."""
  rows = []
  for name, entry in reference["grids"].items():
    rows += _compare_grid(name, entry, reference["settings"], sampler)
  return rows


def failures(rows: list[Row]) -> list[Row]:
  return [row for row in rows if row.p_value < LEVEL / len(rows)]


def _compare_grid(
  name: str, entry: dict[str, Any], settings: dict[str, Any], sampler: str
) -> list[Row]:
  coverage = np.asarray(entry["target_coverage_per_patch"])
  grid, n = coverage.shape, entry["num_images"]
  config = {
    "name": sampler,
    "num_contexts": settings["num_context_blocks"],
    "num_targets": settings["num_target_blocks"],
    "context_scale": settings["context_scale"],
    "target_scale": settings["target_scale"],
    "aspect_ratio": settings["aspect_ratio"],
    "allow_overlap": settings["allow_overlap"],
    "min_keep": entry["min_keep"],
    "context_patches": math.prod(grid),  # all: nothing is cut
  }
  context, target = _draw(config, grid, OVERSAMPLING * n)
  shapes = rectangles.enumerate_shapes(
    tuple(config["target_scale"]),
    tuple(config["aspect_ratio"]),
    grid,
    released=sampler == "released",
  )
  counts = entry["target_block_shape_frequency"]
  rows = [_shapes_row(shapes.frequencies(), counts, n)]
  sizes, expected = context.sum(2).mean(1), entry["context_tokens"]
  rows += _moments("context tokens", sizes, expected, n)
  rows += _quantiles(context.sum(2).reshape(-1), expected, n)
  union = target.any(1).sum(1).astype(float)
  rows += _moments("target union", union, entry["target_union_tokens"], n)
  for statistic, drawn, key in (
    ("target coverage", target, "target_coverage_per_patch"),
    ("context coverage", context, "context_coverage_per_patch"),
  ):
    rows.append(_coverage_row(statistic, drawn, np.asarray(entry[key]), n))
  return [dataclasses.replace(row, grid=name) for row in rows]


def _draw(
  config: dict[str, Any], grid: tuple[int, int], count: int
) -> tuple[np.ndarray, np.ndarray]:
  """Contexts [images, S, N] and targets [images, M, N], bool."""
  contexts, targets = [], []
  for start in range(0, count, _CHUNK):
    index = np.arange(start, min(start + _CHUNK, count))
    drawn = masks.sample(
      config, grid, seed=1, step=index, epoch=0 * index, index=index, xp=np
    )
    for kind, out in (("context", contexts), ("target", targets)):
      ids, valid = drawn[f"{kind}_ids"], drawn[f"{kind}_valid"]
      member = np.zeros((*ids.shape[:2], math.prod(grid)), bool)
      i, j, k = np.nonzero(valid)
      member[i, j, ids[i, j, k]] = True
      out.append(member)
  return np.concatenate(contexts), np.concatenate(targets)


def _shapes_row(
  ours: dict[tuple[int, int], float], reference: dict[str, float], n: int
) -> Row:
  counts = {
    tuple(int(x) for x in key.split("x")): share * n
    for key, share in reference.items()
  }
  impossible = set(counts) - {shape for shape, p in ours.items() if p}
  if impossible:
    return Row("", "block shapes", f"{sorted(impossible)}", "never drawn", 0.0)
  cells = sorted((p * n, counts.get(shape, 0.0)) for shape, p in ours.items())
  pooled = [[0.0, 0.0]]
  for expected, observed in cells:
    if pooled[-1][0] >= 5:
      pooled.append([0.0, 0.0])
    pooled[-1][0] += expected
    pooled[-1][1] += observed
  if len(pooled) > 1 and pooled[-1][0] < 5:
    last = pooled.pop()
    pooled[-1] = [pooled[-1][0] + last[0], pooled[-1][1] + last[1]]
  chi2 = sum((o - e) ** 2 / e for e, o in pooled)
  freedom = len(pooled) - 1
  p_value = scipy.stats.chi2.sf(chi2, freedom) if freedom else 1.0
  return Row(
    "", "block shapes", f"{len(counts)} shapes", f"chi2 {chi2:.1f}", p_value
  )


def _two_sided(z: float) -> float:
  return math.erfc(abs(z) / math.sqrt(2))


def _moments(
  statistic: str, ours: np.ndarray, reference: dict[str, float], n: int
) -> list[Row]:
  errors = 1 / n + 1 / len(ours)
  mean, std = ours.mean(), ours.std()
  kurtosis = ((ours - mean) ** 4).mean() / max(std, 1e-9) ** 4
  std_error = max(std * math.sqrt(max(kurtosis - 1, 0) / 4 * errors), 1e-6)
  z_mean = (reference["mean"] - mean) / max(std * math.sqrt(errors), 1e-6)
  z_std = (reference["std"] - std) / std_error
  return [
    Row("", f"{statistic}: {key}", f"{reference[key]:.2f}", f"{x:.2f}", p)
    for key, x, p in (
      ("mean", mean, _two_sided(z_mean)),
      ("std", std, _two_sided(z_std)),
    )
  ]


def _quantiles(
  ours: np.ndarray, reference: dict[str, Any], n: int
) -> list[Row]:
  rows = []
  for key, value in reference["quantiles"].items():
    share = float(key)
    # A quantile is interpolated between neighbours, and tokens are integers:
    # any share from below one to above the other agrees with it.
    below = (ours < math.floor(value)).mean()
    up_to = (ours <= math.ceil(value)).mean()
    distance = max(below - share, share - up_to, 0.0)
    error = math.sqrt(share * (1 - share) * (1 / n + 1 / len(ours)))
    got = np.quantile(ours, share)
    p_value = _two_sided(distance / error)
    name = f"context tokens: quantile {share:g}"
    rows.append(Row("", name, f"{value:g}", f"{got:g}", p_value))
  least, most = reference["min"], reference["max"]
  # Add-one estimates: our own tails are a sample, too.
  tails = {
    "min": ((ours <= least).sum() + 1) / len(ours),
    "max": ((ours >= most).sum() + 1) / len(ours),
  }
  inside = {"min": (ours < least).mean(), "max": (ours > most).mean()}
  for key, tail in tails.items():
    as_extreme = 1 - (1 - min(tail, 1.0)) ** n
    no_further = (1 - inside[key]) ** n
    p_value = min(1.0, 2 * min(as_extreme, no_further))
    got = getattr(ours, key)()
    name = f"context tokens: {key} of {n}"
    rows.append(Row("", name, f"{reference[key]}", f"{got}", p_value))
  return rows


def _coverage_row(
  statistic: str, drawn: np.ndarray, reference: np.ndarray, n: int
) -> Row:
  share = drawn.mean(1)  # [images, N], of an image's blocks
  ours, variance = share.mean(0), share.var(0)
  reference = reference.reshape(-1)
  reached = (ours > 0) == (reference > 0)
  # A patch that one of them barely reaches is not evidence; rows of them are.
  strangers = ~reached & (np.maximum(ours, reference) > 20 / n)
  error = np.sqrt(variance * (1 / n + 1 / len(share)))
  rounding = 5e-5  # the file has four decimals
  distance = np.maximum(np.abs(ours - reference) - rounding, 0)
  z = np.where(error > 0, distance / np.maximum(error, 1e-12), 0)
  worst = int(z.argmax())
  patches = max(int((variance > 0).sum()), 1)
  p_value = min(1.0, patches * _two_sided(z[worst]))
  if strangers.any():
    worst, p_value = int(strangers.argmax()), 0.0
  return Row(
    "",
    f"{statistic}: worst patch {worst}",
    f"{reference[worst]:.4f}",
    f"{ours[worst]:.4f}",
    p_value,
  )


def main(arguments: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("file")
  parser.add_argument("--sampler", default="released")
  options = parser.parse_args(arguments)
  with open(options.file) as file:
    rows = compare(json.load(file), options.sampler)
  bad = failures(rows)
  print(f"{'grid':8} {'statistic':34} {'reference':>14} {'ours':>14} {'p':>9}")
  for row in rows:
    print(
      f"{row.grid:8} {row.statistic:34} {row.reference:>14} {row.ours:>14}"
      f" {row.p_value:9.2g}{'  FAILS' if row in bad else ''}"
    )
  print(
    f"{len(rows) - len(bad)} of {len(rows)} tests pass at level"
    f" {LEVEL / len(rows):.2g}"
  )
  return 1 if bad else 0


if __name__ == "__main__":
  sys.exit(main())
