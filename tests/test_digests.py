"""Digests see every change of an array, and nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax.training import digests

TYPES = ("float32", "bfloat16", "int32", "uint8", "bool", "float16")


def normal(shape, dtype="float32"):
  x = np.random.default_rng(0).standard_normal(shape) * 90
  return np.asarray(jnp.asarray(x).astype(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5, 2)])
def test_host_and_device_agree(dtype, shape):
  x, starts = normal(shape, dtype), np.zeros(len(shape), np.uint32)
  on_device = digests._of_jax(jnp.asarray(x), starts, shape)
  np.testing.assert_array_equal(
    digests._of_numpy(x, tuple(starts), shape), on_device
  )


def test_every_bit_and_every_place_counts():
  x = normal(70_001)
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


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("on", ["host", "device"])
def test_the_digests_of_shares_add_up_to_that_of_the_whole(axis, on):
  x = normal((6, 10, 4))
  whole = digests._of_numpy(x, (0, 0, 0), x.shape)
  sums = np.zeros(2, np.uint32)
  for number, share in enumerate(np.split(x, 2, axis)):
    starts = [0, 0, 0]
    starts[axis] = number * share.shape[axis]
    if on == "host":
      sums += digests._of_numpy(share, tuple(starts), x.shape)
    else:
      starts = np.asarray(starts, np.uint32)
      sums += digests._of_jax(jnp.asarray(share), starts, x.shape)
  np.testing.assert_array_equal(sums, whole)
