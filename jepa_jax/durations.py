"""Lengths of training, as texts: "300 epochs", "5000 steps", "10 %"."""

import dataclasses
import math
import re
from typing import Any

from jepa_jax import keys


@dataclasses.dataclass(frozen=True)
class Span(keys.Written):
  """A duration, see Duration.

  Attributes:
    zero: whether 0 fits.
    percent: whether a share of the total fits.
  """

  zero: bool = True
  percent: bool = True

  def __str__(self) -> str:
    return (
      "a number" + " above 0" * (not self.zero) + " and a unit: steps, "
      "epochs, examples" + " or % of the total" * self.percent
    )

  def check(self, name: str, value: Any) -> None:
    duration = Duration.parse(value, name)
    if duration.unit == "%" and not self.percent:
      raise Duration.refusal(value, name)
    if not self.zero and not duration.amount:
      raise ValueError(f'{name} is "{value}"; make it longer than 0.')


@dataclasses.dataclass(frozen=True)
class Duration:
  """A length of training in one of three units, or in percent of the total."""

  amount: float
  unit: str

  @classmethod
  def parse(cls, text: str, key: str) -> "Duration":
    """Reads "300 epochs"; ValueError names the key and the units."""
    match = re.fullmatch(
      r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s+(?:(step|epoch|example)s?|%)\s*",
      str(text),
    )
    try:
      amount, unit = float(match[1]), match[2] + "s" if match[2] else "%"
    except (TypeError, ValueError):
      raise cls.refusal(text, key) from None
    if amount > (100 if unit == "%" else 1e15):
      raise ValueError(
        f'{key} is "{text}"; at most 100 % and 1e15 of a unit make sense.'
      )
    return cls(amount, unit)

  @staticmethod
  def refusal(text: Any, key: str) -> ValueError:
    """The error of what is no duration."""
    return ValueError(
      f'{key} is "{text}"; it needs a number and a unit, such as '
      '"300 epochs", "5000 steps" or "1e6 examples".'
    )

  def steps(self, batch_size: int, num_examples: int) -> int:
    """The whole steps in it, for that batch and size of an epoch.

    At least one of what is longer than nothing, for an epoch may be shorter
    than a batch.
    """
    examples = {"steps": batch_size, "epochs": num_examples, "examples": 1}
    steps = math.floor(self.amount * examples[self.unit] / batch_size)
    return max(steps, 1) if self.amount else 0
