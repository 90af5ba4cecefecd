"""What a key of a configuration may be: its default, its values, its words.

    Key(0.05, number(0.0, 1.0), "probability of a Gaussian blur")

A kind says of a value whether it fits, in words for people what does, and how
it is written on a command line. `jepa_jax.config` has the table of all keys;
an objective declares those that are its own, see objectives.Objective.keys.
"""

import argparse
import ast
from collections.abc import Callable, Iterable, Sequence
import dataclasses
import difflib
import math
import re
from typing import Any

_SHOWN = 80  # characters of a value in a message


class Kind:
  """What values a key may have; str() says it in words."""

  def has(self, value: Any) -> bool:
    """Whether a value fits."""
    raise NotImplementedError

  def check(self, name: str, value: Any) -> None:
    """Raises a ValueError of one line that names the key, unless it fits."""
    if not self.has(value):
      raise _refusal(name, value, self)

  def parse(self, text: str) -> Any:
    """The value that a text of the command line is; ValueError if none."""
    try:
      return _as_tuple(ast.literal_eval(text))
    except (MemoryError, RecursionError, SyntaxError, TypeError) as error:
      raise ValueError(str(error)) from None


class Written(Kind):
  """A kind whose values are texts, written as they are."""

  def parse(self, text: str) -> str:
    """The text."""
    return text


@dataclasses.dataclass(frozen=True)
class Key:
  """A key: its default, the values that it takes, and what it is.

  Attributes:
    default: a value that the kind has.
    kind: what values it may have.
    doc: half a sentence or more, for the reference and for --help_config.
  """

  default: Any
  kind: Kind
  doc: str


@dataclasses.dataclass(frozen=True)
class Number(Kind):
  """A finite number of a range, see `number` and `whole`.

  Attributes:
    least: smallest value.
    most: largest value.
    without: the ends that are outside themselves: "", "least", "most", "both".
    whole: an int; otherwise a float, or an int that stands for one.
    also: values beside the range, such as -1 for "the rest".
    unit: "pixels"; "" for none.
  """

  least: float
  most: float
  without: str = ""
  whole: bool = False
  also: tuple[int, ...] = ()
  unit: str = ""

  def __str__(self) -> str:
    kind = "a whole number" if self.whole else "a number"
    low, high = (f"{x:,}".removesuffix(".0") for x in (self.least, self.most))
    least = self.without in ("least", "both")
    most = self.without in ("most", "both")
    if self.most == math.inf:
      ends = f"above {low}" if least else f"{low} or more"
    else:
      ends = f"above {low}" if least else f"from {low}"
      ends += f", below {high}" if most else f" to {high}"
    if self.least == -math.inf:
      ends = "finite" if self.most == math.inf else f"{high} or less"
    unit = f" of {self.unit}" if self.unit else ""
    other = "".join(f", or {x}" for x in self.also)
    return f"{kind}{unit}, {ends}{other}"

  def has(self, value: Any) -> bool:
    types = int if self.whole else (int, float)
    if not isinstance(value, types) or isinstance(value, bool):
      return False
    low = self.without in ("least", "both") and value == self.least
    high = self.without in ("most", "both") and value == self.most
    inside = self.least <= value <= self.most and not low and not high
    return math.isfinite(value) and inside or value in self.also

  def parse(self, text: str) -> Any:
    value = super().parse(text)
    if self.whole and isinstance(value, float) and value.is_integer():
      return int(value)  # such as 1e6
    wrong_end = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if wrong_end and not self.whole else value


def number(
  least: float = -math.inf,
  most: float = math.inf,
  without: str = "",
  unit: str = "",
) -> Number:
  """A finite number; the ends count unless `without` names them."""
  return Number(least, most, without, unit=unit)


def whole(
  least: int, most: int, unit: str = "", also: tuple[int, ...] = ()
) -> Number:
  """A whole number of a range, or one of `also`."""
  return Number(least, most, whole=True, also=also, unit=unit)


@dataclasses.dataclass(frozen=True)
class Sides(Kind):
  """A side in pixels, or two of them: height and width.

  Attributes:
    kind: of each.
  """

  kind: Number

  def __str__(self) -> str:
    return f"{self.kind}, or (height, width)"

  def has(self, value: Any) -> bool:
    sides = value if _is_list(value) else (value,) * 2
    return len(sides) == 2 and all(map(self.kind.has, sides))


@dataclasses.dataclass(frozen=True)
class Flag(Kind):
  """True or False."""

  def __str__(self) -> str:
    return "True or False"

  def has(self, value: Any) -> bool:
    return isinstance(value, bool)

  def parse(self, text: str) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in known:
      raise ValueError(text)
    return known[text.lower()]


@dataclasses.dataclass(frozen=True)
class Text(Written):
  """A string on one line.

  Attributes:
    what: what it names, "the path of a folder".
    empty: whether "" fits.
    pattern: a regular expression that the whole of it has to match.
  """

  what: str = "a text"
  empty: bool = True
  pattern: str = r"[^\0\r\n]+"

  def __str__(self) -> str:
    return self.what + (' or ""' if self.empty else "")

  def has(self, value: Any) -> bool:
    if not isinstance(value, str):
      return False
    return self.empty if not value else bool(re.fullmatch(self.pattern, value))


@dataclasses.dataclass(frozen=True)
class Choice(Written):
  """One of a few values.

  Attributes:
    known: the values.
  """

  known: tuple[str, ...]

  def __str__(self) -> str:
    return " or ".join(f'"{x}"' for x in self.known)

  def check(self, name: str, value: Any) -> None:
    choose(name, value, self.known)


@dataclasses.dataclass(frozen=True)
class Pattern(Written):
  """A regular expression."""

  def __str__(self) -> str:
    return "a regular expression"

  def check(self, name: str, value: Any) -> None:
    try:
      re.compile(value)
    except (re.error, TypeError) as error:
      raise ValueError(
        f'{name} "{value}" is not a regular expression: {error}.'
      ) from None


@dataclasses.dataclass(frozen=True)
class Group(Kind):
  """So many values, each of its own kind.

  Attributes:
    kinds: of each.
    ordered: whether the first may not be above the second.
    example: shown in messages, after "such as"; "" for none.
  """

  kinds: tuple[Kind, ...]
  ordered: bool = False
  example: str = ""

  def __str__(self) -> str:
    if len(set(self.kinds)) > 1:
      words = f"({', '.join(map(str, self.kinds))})"
    elif len(self.kinds) > 2:
      words = f"{len(self.kinds)} values, each {self.kinds[0]}"
    else:
      words = f"(first, last), each {self.kinds[0]}"
    if self.ordered:
      words = f"(min, max), min <= max, each {self.kinds[0]}"
    return words + (f", such as {self.example}" if self.example else "")

  def has(self, value: Any) -> bool:
    return _is_list(value) and len(value) == len(self.kinds)

  def check(self, name: str, value: Any) -> None:
    super().check(name, value)
    for i, kind in enumerate(self.kinds):
      kind.check(f"{name}[{i}]", value[i])
    if self.ordered and value[0] > value[1]:
      raise _refusal(name, value, self)


@dataclasses.dataclass(frozen=True)
class Many(Kind):
  """Any number of values of one kind.

  Attributes:
    kind: of each.
    least: how many there are at least.
    most: how many there are at most.
  """

  kind: Kind
  least: int = 0
  most: int = 4096

  def __str__(self) -> str:
    least = f" of {self.least} or more" if self.least else ""
    return f"a list{least}, each {self.kind}"

  def has(self, value: Any) -> bool:
    return _is_list(value) and self.least <= len(value) <= self.most

  def check(self, name: str, value: Any) -> None:
    super().check(name, value)
    for i, each in enumerate(value):
      self.kind.check(f"{name}[{i}]", each)


FOLDER = Text("the path of a folder", empty=False)
PATH = Text("the path of a file or a folder", empty=False)
STEP = whole(0, 10**9)
NAMES = Text("names, with commas between", False, r"[\w.:-]+(,[\w.:-]+)*")


def choose(what: str, name: Any, known: Iterable[str]) -> None:
  """Raises a ValueError with the valid names unless name is one of them."""
  known = list(known)
  if name not in known:
    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f'; did you mean "{near[0]}"?' if near else "."
    raise ValueError(
      f'unknown {what} "{name}"; known: {", ".join(known)}{hint}'
    )


def unknown(what: str, name: str, known: Sequence[str]) -> ValueError:
  """The error of a name among many, with the nearest of them."""
  near = difflib.get_close_matches(name.split("=")[0], known, n=3, cutoff=0.5)
  hint = f"nearest: {', '.join(near)}." if near else f"known: {list(known)}."
  return ValueError(f'unknown {what} "{name}"; {hint}')


def read(kind: Kind, name: str, text: str) -> Any:
  """The value that a text of the command line stands for.

  Raises:
    ValueError: one line with the name, unless the text is a value that fits.
  """
  try:
    value = kind.parse(text)
  except ValueError:
    raise ValueError(f'{name} is "{text}"; it needs {kind}.') from None
  kind.check(name, value)
  return value


def flag(kind: Kind, name: str) -> Callable[[str], Any]:
  """The `type` of a flag for argparse: the text's value, if it fits."""

  def parse(text: str) -> Any:
    try:
      return read(kind, name, text)
    except ValueError as error:
      raise argparse.ArgumentTypeError(error) from None

  parse.kind = kind  # for tests
  return parse


def add_flag(
  parser: argparse._ActionsContainer, name: str, kind: Kind, **options: Any
) -> None:
  """Adds a flag, or an argument, with values of a kind.

  Args:
    parser: of a command.
    name: "--step"; what users see of it.
    kind: of the value, or of each.
    **options: of argparse's add_argument.
  """
  shown = options.get("metavar", name) if name[0] != "-" else name
  parser.add_argument(name, type=flag(kind, shown), **options)


def _refusal(name: str, value: Any, kind: Kind) -> ValueError:
  shown = repr(value)
  if len(shown) > _SHOWN:
    shown = shown[: _SHOWN - 4] + " ..."
  return ValueError(f"{name} is {shown}; it needs {kind}.")


def _is_list(value: Any) -> bool:
  return isinstance(value, (list, tuple))


def _as_tuple(value: Any) -> Any:
  return tuple(map(_as_tuple, value)) if _is_list(value) else value
