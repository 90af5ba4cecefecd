"""Damages images at random: reading ends in pixels or one line, never else.

    python tests/fuzz_images.py --minutes 10

tests/test_pixels.py runs a few of the same. What is watched: any exception but
ValueError, a message of more than one line, more than a second, and more memory
than a few times data.max_mib.
"""

import argparse
import collections
import random
import resource
import time

import test_pixels

from jepa_jax.data import headers, pixels

RULES = pixels.Rules(max_mib=4)
MAGIC = [data[:16] for data, _ in test_pixels.CASES.values()]


def damaged(rng: random.Random) -> bytes:
  """A sound file with a few bytes changed, or noise behind a format's start."""
  data = bytearray(rng.choice([x for x, _ in test_pixels.CASES.values()]))
  kind = rng.randrange(5)
  if kind == 0:
    return bytes(data[: rng.randrange(len(data))])
  if kind == 1:
    return rng.choice(MAGIC) + rng.randbytes(rng.randrange(200))
  if kind == 2:  # a number of 16 or 32 bits, where headers are
    width = rng.choice((2, 4))
    at = rng.randrange(min(len(data), 200))
    number = rng.choice((0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF))
    order = rng.choice(("little", "big"))
    number &= (1 << 8 * width) - 1
    data[at : at + width] = number.to_bytes(width, order)
    return bytes(data)
  span = len(data) if kind == 3 else min(len(data), 100)
  for _ in range(rng.randrange(1, 6)):
    data[rng.randrange(span)] = rng.randrange(256)
  return bytes(data)


def run_one(data: bytes) -> str:
  """What became of a file: "read", or the start of why not."""
  began = time.process_time()
  try:
    array = pixels.read(data, RULES)
    assert array.dtype == "uint8" and array.shape[-1] == 3, array.shape
    header = headers.read_header(data, RULES.max_mib)
    assert array.shape[:2] == (header.height, header.width)
    result = "read"
  except ValueError as error:
    assert str(error).isprintable(), repr(str(error))
    result = str(error).split(":")[0].split(" of ")[0][:24]
  assert time.process_time() - began < 5, "slow"
  return result


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--minutes", type=float, default=10)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  rng, found = random.Random(arguments.seed), collections.Counter()
  end = time.monotonic() + 60 * arguments.minutes
  while time.monotonic() < end:
    data = damaged(rng)
    try:
      found[run_one(data)] += 1
    except BaseException:
      print("ended by", data)
      raise
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
  total, read = sum(found.values()), found["read"]
  print(f"{total:,} files, {read:,} read; at most {peak:,.0f} MiB")


if __name__ == "__main__":
  main()
