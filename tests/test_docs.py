"""Every code block of the pages that strangers read runs, or says why not.

Blocks of Python run, top to bottom and with one namespace a page, in a folder
that has `experiments/`, a small run `runs/quickstart` and some `photos/`. A
block whose first line is `# name.py` is saved under that name, too. Of
commands, those in RUN are run and all others go through their own parser and
config, with nothing started. A block or a command that nothing here knows
fails.
"""

import ast
import configparser
import importlib
import json
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
from typing import NamedTuple

import numpy as np
from PIL import Image
import pytest
import yaml

from jepa_jax import command, train
from jepa_jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = ["README.md", "CONTRIBUTING.md"]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))

# Pages whose Python is only parsed, and whose commands are not looked at.
PARSED = {
  "docs/api.md": "examples of docstrings, which speak of arrays in general",
  "docs/index.md": "the README once more",
}

# Blocks that are no code, by page.
TEXT = {
  "docs/api.md": "signatures",
  "docs/design.md": "a drawing of the flow",
}

# Programs that are not ours. What they start of ours is checked all the same.
OUTSIDE = {
  "gcloud": "a TPU pod",
  "sbatch": "a SLURM cluster",
  "srun": "a SLURM cluster",
  "scontrol": "a SLURM cluster",
  "kubectl": "a Kubernetes cluster",
  "gcc": "a compiler of C",
  "cd": "the shell's",
  "echo": "the shell's",
  "[": "the shell's",
  ".": "the shell's",
  "ruff": "has a step of its own in .ci/run",
  "mkdocs": "has a step of its own in .ci/run",
}

# A run of an experiment that is over in seconds.
SHORT = [
  "--config.total=4 steps",
  "--config.encoder.depth=4",
  "--config.predictor.depth=1",
  "--config.compute.scan=true",
  "--config.optimizer.warmup=1 steps",
  "--config.log_every=2 steps",
  "--config.batch_size=8",
  "--config.data.num_scenes=(48, 24)",
  "--config.data.num_examples=48",
  "--config.data.data_dir=scenes",
]

# Commands that are run: how they begin -> what is added to them.
RUN = {
  "python -m jepa_jax.convert runs/quickstart": [],
  "python -m jepa_jax.evaluate --workdir runs/quickstart --report_only": [],
  "python -m jepa_jax.prepare --source folder": [],
  "python -m jepa_jax.train --config my_experiment.py:denoising": SHORT,
}


class Block(NamedTuple):
  """A fenced block: its page, language, text and first line's number."""

  page: str
  language: str
  text: str
  line: int

  @property
  def place(self):
    return f"{self.page}:{self.line}"


def blocks(page):
  """The fenced blocks of a page; an indented one is an error."""
  found, fence, previous = [], None, ""
  for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
    if line.startswith("```"):
      if fence is None:
        fence, text = (line[3:].strip(), number + 1), []
      else:
        found.append(Block(page, fence[0], "\n".join(text), fence[1]))
        fence = None
    elif fence is not None:
      text.append(line)
    else:
      indented = line.startswith("    ") and not previous.strip()
      assert not indented, f"{page}:{number}: a block needs a fence: {line}"
    previous = line
  assert fence is None, f"{page}: a fence is left open"
  return found


def commands(text):
  """The simple commands of shell text, as lists of words."""
  text = re.sub(r"\$[A-Z_]+", "1", text.replace("\\\n", " "))
  for line in text.splitlines():
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words = []
    for word in [*lexer, ";"]:
      if set(word) <= set(";|&"):
        while words and re.match(r"[A-Z_]+=|[{}]$|export$", words[0]):
          words.pop(0)
        if words:
          yield words
        words = []
      else:
        words.append(word)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
  """A folder as a reader has it after the quickstart, small."""
  folder = tmp_path_factory.mktemp("house")
  for name in ("experiments", "tests", "docs"):
    (folder / name).symlink_to(ROOT / name)
  noise = np.random.default_rng(0)
  (folder / "photos").mkdir()
  for i in range(5):
    pixels = noise.integers(0, 256, (40 + i, 50, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
  before = os.getcwd()
  os.chdir(folder)
  sys.path.insert(0, str(folder))
  config = command.load_config("experiments/quickstart.py", SHORT)
  with config.unlocked():
    del config.evaluations.distance
  config.evaluations.count.update(features=("last",), protocols=("knn",))
  assert train.train_and_evaluate(config, "runs/quickstart") == 0
  yield folder
  sys.path.remove(str(folder))
  os.chdir(before)


@pytest.fixture
def no_compiler(monkeypatch):
  """The plan of planning.md takes libtpu and half an hour: a stand-in."""
  from jepa_jax.planning import estimate, topologies

  monkeypatch.setattr(topologies, "devices_of", lambda topology: [topology])
  monkeypatch.setattr(estimate, "costs", lambda config, devices: {})


def call(module, arguments, monkeypatch, *, start):
  """Gives a command its arguments as the shell would.

  Returns:
    Its exit code. Without start it goes no further than its parsed flags.
  """
  real = command.run

  def run(main, parser, **options):
    del options  # the allocator's settings would start Python anew

    def only_look(parsed):
      config = getattr(parsed, "config", None)
      if config is not None and not isinstance(config, str):
        config_lib.check(config)

    real(main if start else only_look, parser)

  with monkeypatch.context() as patch:
    patch.setattr(sys, "argv", [module, *arguments])
    patch.setattr(command, "run", run)
    # This process is in use already: it can join no others.
    patch.setattr(command.distributed, "join", lambda parsed: None)
    if not start:
      patch.setattr(command.launch, "processes", lambda parsed: 0)
    patch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as stop:
      runpy.run_module(module, run_name="__main__")
  return stop.value.code or 0


def check_python(words, monkeypatch):
  if words[1] == "-m" and words[2].startswith("jepa_jax."):
    line = " ".join(words)
    added = next((RUN[k] for k in RUN if line.startswith(k)), None)
    start = added is not None
    arguments = [*words[3:], *(added or ())]
    assert call(words[2], arguments, monkeypatch, start=start) == 0
  elif words[1] == "-m":
    assert words[2] == "venv"
  else:
    script = (ROOT / words[1]).read_text()
    for flag in (w.partition("=")[0] for w in words[2:]):
      assert flag[:2] != "--" or f'"{flag}"' in script, f"no {flag}: {words}"


def check_pip(words):
  assert words[1] == "install"
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
    for extra in extras.split(","):
      assert setup["options.extras_require"][extra]
  for file in words[words.index("-c") + 1 :][:1] if "-c" in words else ():
    assert (ROOT / file).exists()


def check_pytest(words):
  for word, before in zip(words[1:], words):
    if word.endswith(".py"):
      assert (ROOT / word).exists(), word
    if before == "-m":
      assert f"\n  {word}: " in (ROOT / "setup.cfg").read_text(), word


def check_shell(text, place, monkeypatch):
  for words in commands(text):
    if words[0] == "python":
      check_python(words, monkeypatch)
    elif words[0] == "pip":
      check_pip(words)
    elif words[0] == "pytest":
      check_pytest(words)
    else:
      assert words[0] in OUTSIDE, f"{place}: what is {words[0]!r}?"
      if "python" in words:  # srun python ...
        check_python(words[words.index("python") :], monkeypatch)
      for word in words:
        if "python -m jepa_jax" in word:  # --wrap="srun python ..."
          inner = word.partition("=")[2] if word[:2] == "--" else word
          check_shell(inner, place, monkeypatch)


def run_python(block, namespace, house):
  name = re.match(r"# (\w+)\.py$", block.text.partition("\n")[0])
  if block.page in PARSED:
    ast.parse(block.text)
    return
  if name:
    (house / f"{name[1]}.py").write_text(block.text + "\n")
    importlib.invalidate_caches()
  # Line numbers of errors are those of the page.
  code = "\n" * (block.line - 1) + block.text
  exec(compile(code, str(ROOT / block.page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_blocks(page, house, no_compiler, monkeypatch):
  namespace = {"__name__": page}
  for block in blocks(page):
    if block.language == "python":
      run_python(block, namespace, house)
    elif block.language == "sh":
      if page not in PARSED:
        check_shell(block.text, block.place, monkeypatch)
    elif block.language == "yaml":
      for document in yaml.safe_load_all(block.text):
        assert document
        for words in re.findall(r"python -m [^'\"\]]*", json.dumps(document)):
          check_shell(words, block.place, monkeypatch)
    elif block.language == "json":
      json.loads(block.text)
    else:
      known = block.language == "text" and page in TEXT
      assert known, f"{block.place}: what is {block.language!r}?"


@pytest.mark.parametrize(
  "text, message",
  [
    ("python -m jepa_jax.train --workdir x", "required"),
    ("python -m jepa_jax.evaluate --workdir x --setp 3", "--step"),
    (
      "A=1 python -m jepa_jax.train --workdir x --config "
      "experiments/quickstart.py --config.data.fillp=true",
      "data.flip",
    ),
    (
      "gcloud ssh --command='cd x && python -m jepa_jax.train --workdir x "
      "--config experiments/quickstart.py --config.masks.num_targets=a'",
      "num_targets",
    ),
  ],
)
def test_what_a_command_gets_wrong_is_found(
  text, message, house, monkeypatch, capsys
):
  with pytest.raises(AssertionError):
    check_shell(text, "here", monkeypatch)
  assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["frobnicate x", "pip install -e '.[tset]'"])
def test_unknown_programs_and_extras_are_found(text, monkeypatch):
  with pytest.raises((AssertionError, KeyError)):
    check_shell(text, "here", monkeypatch)


def test_every_table_of_exceptions_is_used():
  text = "\n".join((ROOT / page).read_text() for page in PAGES)
  for start in RUN:
    assert start in text, start
  assert set(PARSED) <= set(PAGES)


def test_pages_made_from_the_code_are_current():
  done = subprocess.run(
    [sys.executable, "docs/generate.py", "--check"],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert not done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
  text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
  for target in re.findall(r"\]\(([^)\s]+)\)", text):
    if not target.startswith("http"):
      path = (ROOT / page).parent / target.partition("#")[0]
      assert path.exists(), f"{page}: {target}"


def test_readme_is_short_and_names_every_experiment():
  text = (ROOT / "README.md").read_text()
  assert len(text.split()) <= 900
  for path in (ROOT / "experiments").glob("*.py"):
    assert f"`{path.name}" in text, path.name


def test_citation_is_whole():
  citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
  for key in ("cff-version", "message", "title", "authors", "version"):
    assert citation[key], key
  import jepa_jax

  assert citation["version"] == jepa_jax.__version__
