"""Class token, registers and mask tokens of the encoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jepa_jax import models
from jepa_jax.models import flops

B, H, W, C, PATCH, N = 2, 12, 20, 3, 4, 15
SETTINGS = dict(width=28, depth=3, num_heads=7, patch_size=PATCH)


@pytest.fixture(scope="module")
def images():
  return jax.random.normal(jax.random.key(0), (B, H, W, C))


def moved(params):
  """Parameters that all matter: none is zero or one."""
  keys = iter(jax.random.split(jax.random.key(2), 100))
  return jax.tree.map(
    lambda x: x + 0.3 * jax.random.normal(next(keys), x.shape), params
  )


@functools.cache
def made(class_token, registers):
  encoder = models.Encoder(
    **SETTINGS, class_token=class_token, registers=registers
  )
  images = jnp.zeros((1, H, W, C))
  masked = jnp.zeros((1, N), bool)
  return encoder, moved(encoder.init(jax.random.key(1), images, masked=masked))


TOKENS = [(True, 0), (False, 3), (True, 2)]


@pytest.mark.parametrize("class_token, registers", TOKENS)
def test_tokens_stand_before_the_patches_and_attend(
  images, class_token, registers
):
  encoder, variables = made(class_token, registers)
  count = class_token + registers
  params = variables["params"]
  assert ("class_token" in params) == class_token
  assert ("registers" in params) == bool(registers)
  whole = encoder.apply(variables, images, all_tokens=True)
  assert whole.shape == (B, count + N, 28)
  patches = encoder.apply(variables, images)
  np.testing.assert_allclose(patches, whole[:, count:], atol=1e-5)
  # A plain transformer over tokens and patches, by hand.
  plain = models.Encoder(**SETTINGS)
  tokens = [params[n] for n in ("class_token", "registers") if n in params]

  def transformer(x):
    from jepa_jax.models import transformer

    network = transformer.Transformer(depth=3, num_heads=7)
    (y,) = network.apply({"params": params["transformer"]}, x)
    norm = transformer.LayerNorm()
    return norm.apply({"params": params["norm"]}, y)

  embed = params["patch_embed"]
  x = models.patchify(images, PATCH) @ embed["kernel"] + embed["bias"]
  x += models.sincos_positions((3, 5), 28)
  x = jnp.concatenate([*(jnp.repeat(t, B, axis=0) for t in tokens), x], axis=1)
  np.testing.assert_allclose(whole, transformer(x), atol=1e-4)
  # Without them the patches are others.
  shared = {k: v for k, v in params.items() if k in ("patch_embed", "norm")}
  shared["transformer"] = params["transformer"]
  without = plain.apply({"params": shared}, images)
  assert np.abs(without - patches).max() > 1e-2


@pytest.mark.parametrize("class_token, registers", TOKENS)
@pytest.mark.parametrize("layers", [1, 2])
def test_tokens_beside_chosen_padded_and_queried_patches(
  images, class_token, registers, layers
):
  encoder, variables = made(class_token, registers)
  apply = functools.partial(encoder.apply, variables, images, layers=layers)
  whole = apply()
  assert whole.shape == (B, N, layers * 28)
  ids = jnp.asarray([[2, 5, 9], [4, 6, 11]])
  np.testing.assert_allclose(
    apply(query_ids=ids), models.gather_patches(whole, ids), atol=1e-4
  )
  everything = jnp.broadcast_to(jnp.arange(N), (B, N))
  np.testing.assert_allclose(apply(everything), whole, atol=1e-4)
  padded = jnp.pad(ids, ((0, 0), (0, 4)))
  valid = jnp.broadcast_to(jnp.arange(7) < 3, (B, 7))
  count = class_token + registers
  np.testing.assert_allclose(
    apply(padded, valid, all_tokens=True)[:, : count + 3],
    apply(ids, all_tokens=True),
    atol=1e-4,
  )
  with pytest.raises(ValueError, match="query_ids and patch_ids or all_tok"):
    apply(query_ids=ids, all_tokens=True)


def test_masked_patches_are_seen_as_the_mask_token(images):
  encoder, variables = made(True, 2)
  masked = jax.random.bernoulli(jax.random.key(4), 0.4, (B, N))
  seen = encoder.apply(variables, images, masked=masked)
  # What is in a masked patch changes nothing.
  pixels = jnp.repeat(jnp.repeat(masked.reshape(B, 3, 5), 4, 1), 4, 2)
  noise = jax.random.normal(jax.random.key(5), images.shape)
  other = jnp.where(pixels[..., None], noise, images)
  np.testing.assert_allclose(
    encoder.apply(variables, other, masked=masked), seen, atol=1e-5
  )
  assert np.abs(encoder.apply(variables, other) - seen).max() > 1e-2
  nothing = encoder.apply(variables, images, masked=jnp.zeros((B, N), bool))
  np.testing.assert_array_equal(nothing, encoder.apply(variables, images))
  # The token is the parameter's, and there is none unless it is asked for.
  params = dict(variables["params"])
  params["mask_token"] = -params["mask_token"]
  moved = encoder.apply({"params": params}, images, masked=masked)
  assert np.abs(moved - seen).max() > 1e-2
  assert "mask_token" not in encoder.init(jax.random.key(0), images)["params"]


def test_the_final_norm_may_be_left_out(images):
  encoder, variables = made(True, 2)
  apply = functools.partial(encoder.apply, variables, images, layers=2)
  bare, normed = apply(normalize=False), apply()
  norm = variables["params"]["norm"]
  for i in range(2):
    x = bare[..., i * 28 : (i + 1) * 28]
    x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(
      x.var(-1, keepdims=True) + 1e-6
    )
    np.testing.assert_allclose(
      normed[..., i * 28 : (i + 1) * 28],
      x * norm["scale"] + norm["bias"],
      atol=1e-4,
    )


def test_a_predictor_takes_tokens_without_a_position():
  """They attend as patches do, wherever they stand before the context."""
  rng = jax.random.key(0)
  network = models.Predictor(width=24, depth=2, num_heads=3, output_width=7)
  context = jax.random.normal(rng, (B, 1, 2 + 4, 28))
  ids = jnp.asarray([[[3, 1, 5, 9]]] * B)
  targets = jnp.asarray([[[0, 2], [4, 0]]] * B)
  call = lambda apply, x, valid=None: apply(x, ids, targets, (3, 5), valid)
  variables = moved(call(functools.partial(network.init, rng), context))
  apply = functools.partial(network.apply, variables)
  seen = call(apply, context)
  assert seen.shape == (B, 1, 2, 2, 7)
  swapped = context[:, :, jnp.asarray([1, 0, 2, 3, 4, 5])]
  np.testing.assert_allclose(call(apply, swapped), seen, atol=1e-4)
  other = context.at[:, :, 0].add(1.0)
  assert np.abs(call(apply, other) - seen).max() > 1e-3
  # Padding of the context leaves them there.
  valid = jnp.asarray([[[True, True, True, False]]] * B)
  some = call(apply, context, valid)
  assert np.abs(call(apply, other, valid) - some).max() > 1e-3
  np.testing.assert_allclose(
    call(apply, context.at[:, :, 5].add(1.0), valid), some, atol=1e-4
  )


def test_operations_count_the_tokens():
  plain = models.Encoder(**SETTINGS)
  with_tokens, _ = made(True, 2)
  assert flops.encoder(with_tokens, N, C) - flops.embedding(
    with_tokens, N, C
  ) == flops.encoder(plain, N + 3, C) - flops.embedding(plain, N + 3, C)
