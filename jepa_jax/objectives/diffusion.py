"""Diffusion: how noise is added to images step by step, and taken away again.

At step t an image x_0 has become x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise.
What follows needs a_t alone ("signal": the share of the image in the variance),
which falls from almost 1 to almost 0.

Reference: Ho et al. 2020, arXiv:2006.11239 (DDPM); Song et al. 2021,
  arXiv:2010.02502 (DDIM).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def linear_signal(steps: int) -> np.ndarray:
  """a_t of the linear schedule, float64 [steps].

  The variance added by a step rises from 1e-4 to .02 over 1,000 steps; of
  another number the steps are as much larger.

  Raises:
    ValueError: fewer than 21 steps, the last of which would leave nothing.

  Reference: Ho et al. 2020, section 4, arXiv:2006.11239.
  """
  if steps <= 20:
    raise ValueError(
      f"a linear schedule of {steps} steps adds more than all the noise there "
      "is; it needs 21 or more."
    )
  added = np.linspace(1e-4, 0.02, steps) * 1000 / steps
  return np.cumprod(1 - added)


def add_noise(
  images: jax.Array, noise: jax.Array, signal: jax.Array
) -> jax.Array:
  """x_t of x_0 [B, ...], normal noise [B, ...] and a_t [B].

  Reference: Ho et al. 2020, eq. 4, arXiv:2006.11239.
  """
  signal = _column(signal, images)
  return jnp.sqrt(signal) * images + jnp.sqrt(1 - signal) * noise


def remove_noise(
  noisy: jax.Array, noise: jax.Array, signal: jax.Array
) -> jax.Array:
  """x_0 of x_t [B, ...], the noise that is in it, and a_t [B]."""
  signal = _column(signal, noisy)
  return (noisy - jnp.sqrt(1 - signal) * noise) / jnp.sqrt(signal)


def posterior(
  images: jax.Array, noisy: jax.Array, signal: jax.Array, before: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Mean and variance of x_s, an earlier step, where x_0 and x_t are known.

  Args:
    images: x_0, [B, ...].
    noisy: x_t, [B, ...].
    signal: a_t, [B].
    before: a_s, [B], at least a_t.

  Returns:
    [B, ...], and [B] for all elements alike.

  Reference: Ho et al. 2020, eq. 7, arXiv:2006.11239.
  """
  kept = signal / before  # of x_s in x_t
  variance = (1 - before) / (1 - signal) * (1 - kept)
  of_images = jnp.sqrt(before) * (1 - kept) / (1 - signal)
  of_noisy = jnp.sqrt(kept) * (1 - before) / (1 - signal)
  mean = _column(of_images, images) * images + _column(of_noisy, noisy) * noisy
  return mean, variance


def sample(
  predict: Callable[[jax.Array, jax.Array], jax.Array],
  rng: jax.Array,
  shape: tuple[int, ...],
  signal: np.ndarray,
  *,
  steps: int = 0,
  eta: float = 0.0,
  limits: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
  """Images from noise.

  Args:
    predict: (x_t [B, ...], t int32 [B]) -> the noise in x_t.
    rng: key; or a key an image, [B], so that each is what it is in any batch.
    shape: [B, ...].
    signal: a_t of all steps.
    steps: how many of them are taken, evenly spread; 0: all.
    eta: 0 for DDIM, where the noise at the start decides all; 1 for ancestral
      sampling, which draws every step from `posterior`. Between: between.
    limits: least and greatest value of an image, that broadcast.

  Returns:
    float32 [B, ...].

  Raises:
    ValueError: more steps than there are.

  Reference: Song et al. 2021, eq. 12 and 16, arXiv:2010.02502.
  """
  if not 0 <= steps <= len(signal):
    raise ValueError(
      f"got {steps} steps to sample by; the diffusion has {len(signal)}."
    )
  count = steps or len(signal)
  times = np.linspace(0, len(signal) - 1, count).round().astype(np.int32)[::-1]
  signals = np.append(np.asarray(signal)[times], 1.0)

  def draw(number):
    """Normal noise of a step."""
    if rng.ndim:
      keys = jax.vmap(jax.random.fold_in, (0, None))(rng, number)
      return jax.vmap(lambda key: jax.random.normal(key, shape[1:]))(keys)
    return jax.random.normal(jax.random.fold_in(rng, number), shape)

  def step(noisy, x):
    number, time, now, before = x
    every = lambda value: jnp.full(shape[:1], value)
    noise = predict(noisy, every(time))
    images = remove_noise(noisy, noise, every(now))
    if limits is not None:
      images = jnp.clip(images, *limits)
      noise = (noisy - jnp.sqrt(now) * images) / jnp.sqrt(1 - now)
    _, variance = posterior(images, noisy, now[None], before[None])
    spread = eta * jnp.sqrt(variance[0])
    along = jnp.sqrt(jnp.maximum(1 - before - jnp.square(spread), 0.0))
    noisy = jnp.sqrt(before) * images + along * noise
    if eta:
      noisy += spread * draw(number)
    return noisy, None

  numbers = np.arange(1, count + 1)
  tables = jnp.asarray(signals, jnp.float32)
  xs = (jnp.asarray(numbers), jnp.asarray(times), tables[:-1], tables[1:])
  return jax.lax.scan(step, draw(0), xs)[0]


def _column(values: jax.Array, like: jax.Array) -> jax.Array:
  """[B] -> [B, 1, ...], to broadcast."""
  return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
