"""Digests see every change of an array, and nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.training import digests

TYPES = ("float32", "bfloat16", "int32", "uint8", "bool", "float16")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5, 2)])
def test_host_and_device_agree(dtype, shape):
  x = np.random.default_rng(0).standard_normal(shape) * 90
  x = np.asarray(jnp.asarray(x).astype(dtype))
  on_device = digests._of_jax(jnp.asarray(x))
  np.testing.assert_array_equal(digests._of_numpy(x), on_device)


def test_every_bit_and_every_place_counts():
  x = np.random.default_rng(1).standard_normal(70_001).astype(np.float32)
  of = lambda x: digests.digests({"x": x})["x"]
  seen = {of(x), of(x[::-1]), of(np.roll(x, 1)), of(-x), of(x[:-1])}
  for bit in range(32):
    y = x.copy()
    y.view(np.uint32)[-1] ^= 1 << bit
    seen.add(of(y))
  y = x.copy()
  y[[3, 70_000]] = y[[70_000, 3]]
  seen.add(of(y))
  assert len(seen) == 5 + 32 + 1


def test_the_digest_of_known_numbers_stays():
  # Those of saved checkpoints are compared with it.
  assert digests.digests({"a": [np.arange(3.0, dtype=np.float32)]}) == {
    "a/0": "01af5f1f527353a7"
  }


def test_a_sharded_array_has_the_digest_of_the_whole():
  x = np.random.default_rng(2).standard_normal((6, 5)).astype(np.float32)
  whole = digests._of_numpy(x)
  halves = [x[:3], x[3:]]
  index = np.arange(30, dtype=np.uint32).reshape(6, 5)
  sums = np.zeros(2, np.uint32)
  for half, at in zip(halves, (index[:3], index[3:])):
    sums += np.stack(digests._sums(np, half.view(np.uint32), at))
  np.testing.assert_array_equal(sums, whole)
