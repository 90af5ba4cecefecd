"""CAE: its tokens, and what its networks see."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_program import config_of, make_batch

from jepa_jax import objectives
from jepa_jax.objectives import cae


class ByBrightness:
  """A tokenizer of somebody else's, without state."""

  def __init__(self, tokens, patch_shape):
    self.tokens = tokens
    assert patch_shape == (8, 8, 3)

  def buffers(self):
    return {}

  def ids(self, patches, buffers):
    return (patches.mean(axis=-1) > 0).astype(jnp.int32)

  def update(self, patches, ids, valid, buffers):
    return buffers


def test_tokens_are_the_nearest_centres_which_follow_their_patches():
  tokenizer = cae.OnlineKMeans(3, (1, 2, 2))  # patches of four numbers
  low, high = np.asarray([[-1, -1, 1, 1], [1, -1, -1, 1]]) * np.sqrt(0.75)
  state = {
    "sums": jnp.asarray([2 * low, high, -high]),
    "counts": jnp.asarray([2.0, 1.0, 1.0]),
  }
  patches = jnp.asarray(
    [[[0, 0, 9, 9.0], [7, 1, 1, 7]], [[5, 5, 6, 6], [1] * 4]]
  )
  ids = tokenizer.ids(patches, state)
  np.testing.assert_array_equal(ids[:, 0], [0, 0])
  assert ids[0, 1] == 1
  valid = jnp.asarray([[True, True], [True, False]])
  new = tokenizer.update(patches, ids, valid, state)
  share = 0.01 * 3 / 4  # of one patch of four, by three tokens
  counts = 0.99 * state["counts"] + share * np.asarray([2, 1, 0])
  np.testing.assert_allclose(new["counts"], counts, rtol=1e-5)
  sums = 0.99 * state["sums"] + share * np.asarray([2 * low, high, 0 * low])
  np.testing.assert_allclose(new["sums"], sums, atol=1e-4)


def test_the_first_centres_tell_smooth_patches_apart():
  tokenizer = cae.OnlineKMeans(64, (8, 8, 3))
  state = tokenizer.buffers()
  rng = np.random.default_rng(0)
  slopes = rng.standard_normal((2, 400, 1, 1, 1))
  rows, columns, _ = np.mgrid[:8, :8, :3]
  ramps = (slopes[0] * rows + slopes[1] * columns).reshape(400, -1)
  ids = tokenizer.ids(jnp.asarray(ramps), state)
  assert len(np.unique(ids)) >= 8


@pytest.fixture(scope="module")
def prepared():
  config = config_of("cae")
  config.encoder.depth = 1
  config.method.tokenizer = f"{__name__}:ByBrightness"
  objective = objectives.load("cae").from_config(config)
  params = jax.jit(objective.init)(jax.random.key(0))
  spec = types.SimpleNamespace(batch_spec=objective.batch_spec(4))
  return objective, params, make_batch(spec)


def test_what_is_hidden_is_seen_as_features_and_tokens_alone(prepared):
  objective, params, batch = prepared
  run = jax.jit(lambda b: objective.loss(params, {}, b, jax.random.key(0), {}))
  changed = dict(batch, image=batch["image"].copy())
  ids, valid = batch["target_ids"][:, 0], batch["target_valid"][:, 0]
  shown = [
    {*i[v]}
    for i, v in zip(batch["context_ids"][:, 0], batch["context_valid"][:, 0])
  ]
  for i, t in np.argwhere(valid):
    if ids[i, t] in shown[i]:
      continue  # make_batch draws both apart
    row, column = divmod(int(ids[i, t]), 5)
    cell = np.s_[i, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
    changed["image"][cell] = changed["image"][cell][::-1]  # as bright
  assert (changed["image"] != batch["image"]).any()
  a, b = run(batch), run(changed)
  for name in ("token_loss", "token_accuracy"):
    np.testing.assert_allclose(a.metrics[name], b.metrics[name], rtol=1e-5)
  assert abs(float(a.metrics["alignment"] - b.metrics["alignment"])) > 1e-5
  both = a.metrics["token_loss"] + 2.0 * a.metrics["alignment"]
  np.testing.assert_allclose(a.total / a.weight, both, rtol=1e-5)
  assert a.weight == valid.sum()


@pytest.mark.parametrize(
  "key, value, message",
  [
    ("masks.num_targets", 2, 'num_targets is 2; objective "cae" needs 1'),
    ("method.tokenizer", "nothing:At", "cannot be imported.*my_module:Class"),
  ],
)
def test_what_cae_lacks_is_said(key, value, message):
  config = config_of("cae")
  config.update_from_flattened_dict({key: value})
  with pytest.raises(ValueError, match=message):
    objectives.load("cae").from_config(config)
