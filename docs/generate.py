"""Makes the pages that follow from the code: config.md, api.md, index.md.

    python docs/generate.py          # writes them
    python docs/generate.py --check  # says which are not current, and exits 1

config.md has every key of jepa_jax.config_table with its default and values,
api.md the public names of MODULES with their docstrings, and index.md the
README for the site. All but the keys are read from the source.
"""

import argparse
import ast
import pathlib
import re
import sys
import textwrap
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]

# What a program outside may import, in the order of the page.
MODULES = (
  "jepa_jax.pretrained",
  "jepa_jax.convert",
  "jepa_jax.convert.push",
  "jepa_jax.convert.warm_start",
  "jepa_jax.models",
  "jepa_jax.models.kernels",
  "jepa_jax.masks",
  "jepa_jax.masks.interface",
  "jepa_jax.masks.samplers",
  "jepa_jax.objectives",
  "jepa_jax.objectives.ijepa",
  "jepa_jax.config",
  "jepa_jax.keys",
  "jepa_jax.durations",
  "jepa_jax.data.pipeline",
  "jepa_jax.data.scenes",
  "jepa_jax.training.program",
  "jepa_jax.training.sharding",
  "jepa_jax.planning.estimate",
  "jepa_jax.planning.topologies",
  "jepa_jax.evaluation.collapse",
  "jepa_jax.evaluation.protocols",
  "jepa_jax.evaluation.protocols.protocol",
  "jepa_jax.evaluation.protocols.linear",
  "jepa_jax.evaluation.protocols.linear_grid",
  "jepa_jax.evaluation.protocols.attentive",
  "jepa_jax.evaluation.protocols.dense",
  "jepa_jax.evaluation.protocols.knn",
  "jepa_jax.evaluation.protocols.ridge",
  "jepa_jax.train",
  "jepa_jax.evaluation.run",
)

_MADE = "<!-- Made by docs/generate.py: change the source, not this page. -->\n"
_CONFIG = """\
An experiment starts from these defaults and changes what it wants to; the
command line overrides any key, as in `--config.batch_size=256`. A key that does
not exist ends in one line that names the nearest.
"""
_HEAD = "| key | default | values | what |\n|---|---|---|---|\n"
_API = """\
What a program outside may import. `jepa_jax.load`, `Pretrained` and
`warm_start` are those of `jepa_jax.pretrained`. Axes: B batch, H W pixels, C
channels, N patches, K context patches, M target blocks, T patches a block, D
encoder width, P predictor width.
"""
_SECTION = re.compile(
  r"^(Args|Attributes|Returns|Yields|Raises|Reference|Differs): ?(.*)$"
)


def source_of(module: str) -> pathlib.Path:
  """The file of a module or of a package."""
  path = ROOT.joinpath(*module.split("."))
  return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


# ---------------------------------------------------------------------------
# config.md


def config_page() -> str:
  """Every key with its default, the values it takes and what it is."""
  from jepa_jax import config_table, known_keys

  functions = {
    node.name: node
    for node in ast.parse(source_of("jepa_jax.config").read_text()).body
    if isinstance(node, ast.FunctionDef)
  }
  page = [_MADE, "# Configuration\n", _CONFIG]
  page.append(docstring(functions["defaults"]))
  groups: dict[str, list[str]] = {"": []}
  for name, key, objective in known_keys.of_package():
    group = groups.setdefault(name.rpartition(".")[0], [])
    group.append(row(name, key, objective))
  for group, rows in groups.items():
    group = group.removesuffix(".NAME")
    page.append(f"## {group or 'The run'}\n")
    if group in config_table.GROUPS:
      page.append(_sentence(config_table.GROUPS[group]) + "\n")
    if group == "evaluations":
      page.append(docstring(functions["evaluation"]))
    page.append(_HEAD + "".join(rows))
  return "\n".join(page)


def row(name: str, key: Any, objective: str) -> str:
  """A line of a table of keys."""
  of = f" of `{objective}`" if objective else ""
  cells = (
    f"`{name}`{of}",
    f"`{key.default!r}`",
    str(key.kind),
    _sentence(key.doc),
  )
  escaped = [cell.rstrip(".").replace("|", "\\|") for cell in cells]
  return f"| {' | '.join(escaped)} |\n"


def _sentence(text: str) -> str:
  return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


# ---------------------------------------------------------------------------
# api.md


def prose(text: str | None) -> str:
  """A docstring's text as Markdown; indented examples become blocks."""
  blocks = []
  for block in re.split(r"\n\s*\n", textwrap.dedent(text or "")):
    lines = block.splitlines()
    if lines and all(line.startswith("  ") for line in lines):
      block = textwrap.dedent(block).strip()
      block = f"```{_language(block)}\n{block}\n```"
    blocks.append(block)
  return re.sub(r"\n```\n\n```\w+\n", "\n\n", "\n\n".join(blocks))


def _language(block: str) -> str:
  if block.startswith("python -m"):
    return "sh"
  try:
    ast.parse(block)
  except SyntaxError:
    return "text"
  return "python"


def docstring(node: ast.AST) -> str:
  """The docstring of a node, with its sections as lists."""
  text, page, section = ast.get_docstring(node) or "", [], None
  head: list[str] = []
  body: list[str] = []

  def close() -> None:
    if section is None:
      page.append(prose("\n".join(head).strip()))
    elif section in ("Args", "Attributes"):
      page.append(f"**{section}**\n\n{_items(body)}")
    else:
      page.append(f"**{section}**: {_inline(body)}")

  for line in text.splitlines():
    if match := _SECTION.match(line):
      close()
      section, body = match[1], [match[2]] if match[2] else []
    elif section is not None and line and not line.startswith(" "):
      close()
      section, head = None, [line]
      body = []
    else:
      (head if section is None else body).append(line)
  close()
  return "\n\n".join(part for part in page if part.strip()) + "\n"


def _items(lines: list[str]) -> str:
  """`name: text` items, indented, as a list."""
  items: list[str] = []
  for line in textwrap.dedent("\n".join(lines)).splitlines():
    if line and not line.startswith(" "):
      name, _, text = line.partition(": ")
      items.append(f"- `{name}`: {_escape(text)}")
    elif line.strip():
      items[-1] += f" {_escape(line.strip())}"
  return "\n".join(items)


def _inline(lines: list[str]) -> str:
  return _escape(" ".join(" ".join(lines).split()))


def _escape(text: str) -> str:
  """Shapes such as [B, N] are no links, nor are <names> tags."""
  parts = text.split("`")
  for i in range(0, len(parts), 2):  # what stands between backticks is code
    part = parts[i].replace("[", "\\[").replace("*", "\\*")
    parts[i] = part.replace("<", "&lt;")
  return "`".join(parts)


def signature(node: ast.FunctionDef, name: str = "") -> str:
  """The line of `def`, on more lines where it is long."""
  arguments = ast.unparse(node.args)
  returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
  line = f"{name or node.name}({arguments}){returns}"
  if len(line) <= 76:
    return line
  parts, depth, start = [], 0, 0
  for i, letter in enumerate(arguments):
    depth += (letter in "([{") - (letter in ")]}")
    if letter == "," and not depth:
      parts.append(arguments[start:i].strip())
      start = i + 1
  parts.append(arguments[start:].strip())
  lines = "".join(f"  {part},\n" for part in parts)
  return f"{name or node.name}(\n{lines}){returns}"


def definition(node: ast.AST, level: int = 3) -> str:
  """A function, or a class with its public methods, as Markdown."""
  page = [f"{'#' * level} `{node.name}`\n"]
  if isinstance(node, ast.FunctionDef):
    if any(ast.unparse(d) == "property" for d in node.decorator_list):
      page.append("A property.\n")
    else:
      page.append(f"```text\n{signature(node)}\n```\n")
    return "\n".join([*page, docstring(node)])
  fields = [
    f"{statement.target.id}: {ast.unparse(statement.annotation)}"
    + (f" = {ast.unparse(statement.value)}" if statement.value else "")
    for statement in node.body
    if isinstance(statement, ast.AnnAssign)
    and not statement.target.id.startswith("_")
  ]
  if fields:
    page.append("```text\n{}\n```\n".format("\n".join(fields)))
  page.append(docstring(node))
  for method in node.body:
    if not isinstance(method, ast.FunctionDef) or not ast.get_docstring(method):
      continue
    if not method.name.startswith("_") or method.name == "__call__":
      page.append(definition(method, level + 1))
  return "\n".join(page)


def public(module: str) -> list[ast.AST]:
  """Functions and classes that a module defines, or takes in by name."""
  tree = ast.parse(source_of(module).read_text())
  names = next(
    (
      {constant.value for constant in node.value.elts}
      for node in tree.body
      if isinstance(node, ast.Assign)
      and ast.unparse(node.targets[0]) == "__all__"
    ),
    set(),
  )
  found = []
  for node in tree.body:
    if isinstance(node, ast.ImportFrom) and names:
      wanted = names & {alias.name for alias in node.names}
      inner = ast.parse(source_of(node.module).read_text() if wanted else "")
      found += [n for n in inner.body if getattr(n, "name", "") in wanted]
    elif (
      isinstance(node, (ast.FunctionDef, ast.ClassDef))
      and not node.name.startswith("_")
      and ast.get_docstring(node)
    ):
      found.append(node)
  return found


def api_page() -> str:
  """The public names of MODULES."""
  page = [_MADE, "# API\n"]
  page.append(_API)
  for module in MODULES:
    page.append(f"## {module}\n")
    page.append(docstring(ast.parse(source_of(module).read_text())))
    page += [definition(node) for node in public(module)]
  return "\n".join(page)


# ---------------------------------------------------------------------------
# index.md


def index_page() -> str:
  """The README, with links as they are from inside docs/."""
  text = (ROOT / "README.md").read_text().replace("](docs/", "](")
  outside = r"\[([\w.]+)\]\((?!http)[\w.]+\.(?:cff|py)\)"
  text = re.sub(outside, r"`\1`", text)
  text = text.replace("[CONTRIBUTING.md](CONTRIBUTING.md)", "`CONTRIBUTING.md`")
  return _MADE + "\n" + text


PAGES = {
  "config.md": config_page,
  "api.md": api_page,
  "index.md": index_page,
}


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--check", action="store_true", help="writes nothing")
  check = parser.parse_args().check
  sys.path.insert(0, str(ROOT))
  stale = []
  for name, make in PAGES.items():
    path = ROOT / "docs" / name
    text = make()
    if not path.exists() or path.read_text() != text:
      stale.append(name)
      if not check:
        path.write_text(text)
  if stale and check:
    print(f"{', '.join(stale)}: run python docs/generate.py")
  return int(bool(stale) and check)


if __name__ == "__main__":
  sys.exit(main())
