"""Several encoders under the same evaluations, as one table of scores."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import os
from typing import Any

import jax
import ml_collections
import numpy as np

from jepa_jax import config as config_lib
from jepa_jax.evaluation import encoders
from jepa_jax.evaluation import run as run_lib


def names(paths: Sequence[str]) -> dict[str, str]:
  """{what each of some weights is called: its path}.

  The last part of the path, or all of it where that is not unique, or a
  baseline is called so.
  """
  short = [os.path.basename(os.path.normpath(path)) for path in paths]
  unique = {
    name for name in short if short.count(name) == 1
  } - {"trained", *encoders.BASELINES}  # fmt: skip
  return {
    name if name in unique else os.path.abspath(path): path
    for name, path in zip(short, paths)
  }


def evaluate(
  models: Mapping[str, Any],
  config: ml_collections.ConfigDict,
  mesh: Any,
  chosen: Sequence[str] | None = None,
  check: Callable[[], None] = lambda: None,
) -> run_lib.Rows:
  """The evaluations of a config on several encoders.

  Args:
    models: name -> jepa_jax.Pretrained; the first lends its architecture to
      the baseline "random".
    config: reads data, evaluations, batch_size and seed.
    mesh: over whose devices batches are spread.
    chosen: which of config.evaluations; None for all.
    check: called between batches and between probes; may raise to end it all.

  Returns:
    Rows as of run.evaluate, "encoder" being the names.

  Raises:
    ValueError: an unknown name, or images that an encoder cannot take.
  """
  chosen = list(config.evaluations) if chosen is None else list(chosen)
  for name in chosen:
    config_lib.choose("evaluation", name, list(config.evaluations))
  settings = [config.evaluations[name] for name in chosen]
  layers = run_lib.most_layers(settings)
  baselines = {baseline for x in settings for baseline in x.baselines}
  models = dict(models)
  if "random" in baselines:
    models["random"] = _untrained(next(iter(models.values())), config)
  encode = {
    # On the host: rows of this process, where there are several.
    name: lambda images, of=of: np.asarray(of.encode(images, layers=layers))
    for name, of in models.items()
  }
  widths = {name: of.module.width for name, of in models.items()}
  with_patches = any(map(run_lib.reads_patches, settings))
  if with_patches:
    sizes = {of.module.patch_size for of in models.values()}
    if len(sizes) > 1:
      raise ValueError(
        f"the encoders have patches of {sorted(sizes)} pixels; protocols of "
        "patches compare those of one size: evaluate the others apart."
      )
    with config.unlocked():
      config.encoder.patch_size = sizes.pop()
    encode |= {
      encoders.of_patches(name): lambda images, of=of: np.asarray(
        of.encode(images, pool=None).reshape(len(images), -1, of.module.width)
      )
      for name, of in models.items()
    }
  if "pixels" in baselines:
    encode |= encoders.pixels(config.encoder.patch_size, with_patches)
    widths["pixels"] = 0
  return run_lib.compare(config, mesh, encode, widths, chosen, check=check)


def _untrained(model, config):
  """The same architecture with random parameters."""
  size, channels = config.data.image_size, config.data.channels
  shape = size if isinstance(size, tuple) else (size, size)
  params = jax.jit(model.module.init)(
    jax.random.key(config.seed), np.zeros((1, *shape, channels), np.float32)
  )["params"]
  networks = {model.which: params}
  return dataclasses.replace(
    model, params=params, networks=networks, predictor=None, _copies={}
  )


def table(rows: run_lib.Rows) -> tuple[list[str], list[list[str]], list[Any]]:
  """Header, lines as text, and of each line the columns with its best score."""
  columns = list(dict.fromkeys(row["encoder"] for row in rows))
  lines: dict[tuple[str, ...], dict[str, Any]] = {}
  for row in rows:
    if row["encoder"] == "pixels":
      continue
    title = f"{row['title']} {row['features']}"
    key = (row["evaluation"], title, row["protocol"])
    lines.setdefault(key, {})[row["encoder"]] = row
  pixels = {
    (row["evaluation"], row["protocol"]): row
    for row in rows
    if row["encoder"] == "pixels"
  }
  texts, best = [], []
  for (evaluation, title, protocol), found in lines.items():
    if (evaluation, protocol) in pixels:
      found["pixels"] = pixels[evaluation, protocol]
    some = next(iter(found.values()))
    score, unit = some["score"], some["unit"]
    sign = 1 if some["higher_is_better"] else -1
    values = {name: sign * row[score] for name, row in found.items()}
    digits = 1 if unit == "%" else 3
    texts.append(
      [evaluation, title, f"{score} {unit}".strip()]
      + [
        f"{found[name][score]:.{digits}f}" if name in found else "-"
        for name in columns
      ]
    )
    top = max(values.values())
    best.append([i for i, x in enumerate(columns) if values.get(x) == top])
  return ["evaluation", "protocol", "score", *columns], texts, best


def text(rows: run_lib.Rows) -> str:
  """The table for a terminal."""
  header, lines, _ = table(rows)
  widths = [max(map(len, column)) for column in zip(header, *lines)]

  def aligned(line):
    cells = [
      x.ljust(w) if i < 3 else x.rjust(w)
      for i, (x, w) in enumerate(zip(line, widths))
    ]
    return "  ".join(cells).rstrip()

  return "\n".join(map(aligned, [header, *lines]))


def markdown(rows: run_lib.Rows) -> str:
  """The table in Markdown, the best of each line bold."""
  header, lines, best = table(rows)
  cells = lambda line: "| " + " | ".join(x.replace("|", r"\|") for x in line)
  result = [cells(header) + " |"]
  result.append("|" + "---|" * 3 + "---:|" * (len(header) - 3))
  for line, columns in zip(lines, best):
    line = [f"**{x}**" if i - 3 in columns else x for i, x in enumerate(line)]
    result.append(cells(line) + " |")
  return "\n".join(result)


def latex(rows: run_lib.Rows) -> str:
  """The table as a tabular of LaTeX with booktabs, the best bold."""
  header, lines, best = table(rows)
  escape = lambda x: "".join(f"\\{c}" if c in "%_&#$" else c for c in x)
  cells = lambda line: " & ".join(line) + r" \\"
  result = [
    rf"\begin{{tabular}}{{lll{'r' * (len(header) - 3)}}}",
    r"\toprule",
    cells(map(escape, header)),
    r"\midrule",
  ]
  for line, columns in zip(lines, best):
    line = map(escape, line)
    result.append(
      cells(
        rf"\textbf{{{x}}}" if i - 3 in columns else x
        for i, x in enumerate(line)
      )
    )
  return "\n".join([*result, r"\bottomrule", r"\end{tabular}"])


FORMATS: Mapping[str, Callable[[run_lib.Rows], str]] = {
  "text": text,
  "markdown": markdown,
  "latex": latex,
}
