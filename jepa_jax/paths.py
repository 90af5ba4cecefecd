"""Where files lie: paths of this machine, and what is none of them."""

import os
import pathlib
import re

# pathlib makes one slash of two: "gs:/bucket" was an address too.
_ADDRESS = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+(.*)", re.DOTALL)


def local(path: str | os.PathLike[str], what: str) -> pathlib.Path:
  """A path of this machine.

  Args:
    path: "~" is the user's home; file:// may stand before it.
    what: names it in an error, such as "--workdir".

  Raises:
    ValueError: it is an address of a store (gs://, s3://, ...), which would
      become a folder of that name here, or there is no such home.
  """
  text = os.fspath(path)
  if match := _ADDRESS.fullmatch(text):
    scheme, rest = match.groups()
    if scheme.lower() != "file":
      raise ValueError(
        f'{what} is "{text}", an address; it needs a path of this machine: '
        "mount the store (gcsfuse, s3fs, ...) and give the folder there."
      )
    text = "/" + rest.removeprefix("localhost/")
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError:
    raise ValueError(
      f'{what} is "{text}", and the home that it means is not known; give the '
      "whole path."
    ) from None


def printable(text: str) -> str:
  """A name as it can be printed: what is no character of text is escaped.

  Names of files may hold the terminal's commands, and bytes of no encoding.
  """
  return "".join(x if x.isprintable() else ascii(x)[1:-1] for x in text)


def check_writable(path: pathlib.Path) -> None:
  """Raises ValueError where a file, or the folders above it, cannot be made."""
  if path.is_dir():
    raise ValueError(f"{path} cannot be written: it is a folder.")
  above = next(x for x in path.absolute().parents if os.path.lexists(x))
  if not above.is_dir():
    raise ValueError(f"{path} cannot be written: {above} is no folder.")
  if not os.access(above, os.W_OK | os.X_OK):
    raise ValueError(f"{path} cannot be written: {above} is forbidden.")
