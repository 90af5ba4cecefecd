"""How far an evaluation is: a bar at a terminal, lines in a file."""

import io
import sys
from typing import Any

import tqdm

_SECONDS = 20  # between two lines


class _Lines(tqdm.tqdm):
  """A bar that nobody watches would fill a file with half-drawn lines."""

  def display(self, msg: str | None = None, pos: int | None = None) -> None:
    del msg, pos
    words = (
      f"{self.desc}: {self.n}/{self.total}{self.unit} {self.postfix or ''}"
    )
    print(words.rstrip(), file=sys.stderr, flush=True)


def bar(*values: Any, show: bool, **settings: Any) -> tqdm.tqdm:
  """A tqdm bar, or what stands for it where standard error is no terminal.

  Args:
    *values: of tqdm.
    show: whether anything is shown.
    **settings: of tqdm.
  """
  if sys.stderr.isatty():
    return tqdm.tqdm(*values, disable=not show, **settings)
  return _Lines(
    *values,
    disable=not show,
    file=io.StringIO(),  # tqdm ends its bar with an empty line there
    mininterval=_SECONDS,
    maxinterval=_SECONDS,
    **settings,
  )
