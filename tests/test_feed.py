"""Batches on their way to the devices."""

import threading

import jax
import numpy as np

from jepa_jax.training import feed


def test_data_that_never_come_are_not_waited_for_after_a_signal(monkeypatch):
  monkeypatch.setattr(feed, "_PATIENCE", 0.05)
  never, signals = threading.Event(), []

  def batches():
    yield {"x": np.full((2, 3), 7, np.float32)}
    never.wait(30)

  place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  spec = {"x": jax.ShapeDtypeStruct((2, 3), np.float32, sharding=place)}
  with feed.Feed(batches(), spec, stopped=lambda: bool(signals)) as fed:
    np.testing.assert_array_equal(next(fed)["x"], np.full((2, 3), 7))
    threading.Timer(0.3, signals.append, [1]).start()
    assert next(fed, None) is None
    assert fed.wait_seconds > 0.3
    never.set()
