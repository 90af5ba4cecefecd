"""Vision transformer for I-JEPA: the encoder and the predictor.

    encoder = Encoder(**SIZES["s"], patch_size=16)
    variables = encoder.init(jax.random.key(0), images)   # [B, H, W, C] float
    features = encoder.apply(variables, images)           # [B, N, D]

Reference: Dosovitskiy et al. 2021, arXiv:2010.11929; Assran et al. 2023,
section 3 and appendix A, arXiv:2301.08243.
"""

from collections.abc import Callable
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jepa_jax.models import kernels as kernels_lib
from jepa_jax.models import patches as patches_lib
from jepa_jax.models import transformer

# Encoder sizes by name; the keys are the arguments of Encoder.
SIZES: dict[str, dict[str, Any]] = {
  "ti": dict(width=192, depth=12, num_heads=3, mlp_ratio=4.0),
  "s": dict(width=384, depth=12, num_heads=6, mlp_ratio=4.0),
  "b": dict(width=768, depth=12, num_heads=12, mlp_ratio=4.0),
  "l": dict(width=1024, depth=24, num_heads=16, mlp_ratio=4.0),
  "h": dict(width=1280, depth=32, num_heads=16, mlp_ratio=4.0),
  "g": dict(width=1408, depth=40, num_heads=16, mlp_ratio=48 / 11),
}


class Encoder(nn.Module):
  """Vision transformer over all patches of an image, or over chosen ones.

  Chosen patches are gathered before the embedding, so that the work falls with
  their number. Class token and registers, of which I-JEPA has none, stand
  before the patches, have no position, and are left out of the output unless
  it is asked for them.

  Attributes:
    width: D, a multiple of 4 and of num_heads.
    depth: number of blocks.
    num_heads: attention heads a block.
    patch_size: side of a square patch, pixels.
    mlp_ratio: hidden width of a block's perceptron over D.
    dropout: see Transformer.
    drop_path: see Transformer.
    dtype: of the computation; parameters are float32.
    scan: see Transformer.
    remat: see Transformer.
    remat_every: see Transformer.
    norm_epsilon: see Transformer.
    position_grid: (h, w) of position embeddings that are a parameter
      "positions", [N, D], as in foreign weights; None computes sine-cosine
      ones for any grid.
    class_token: whether there is a learned token for the whole image.
    registers: learned tokens besides; Darcet et al. 2024, arXiv:2309.16588.
    kernels: how it computes, see Kernels.
  """

  width: int
  depth: int
  num_heads: int
  patch_size: int
  mlp_ratio: float = 4.0
  dropout: float = 0.0
  drop_path: float = 0.0
  dtype: transformer.Dtype = jnp.float32
  scan: bool = False
  remat: str = "none"
  remat_every: int = 1
  norm_epsilon: float = transformer.NORM_EPSILON
  position_grid: tuple[int, int] | None = None
  class_token: bool = False
  registers: int = 0
  kernels: kernels_lib.Kernels = kernels_lib.Kernels()

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    patch_ids: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    layers: int = 1,
    train: bool = False,
    query_ids: jax.Array | None = None,
    masked: jax.Array | None = None,
    all_tokens: bool = False,
    normalize: bool = True,
  ) -> jax.Array:
    """Encodes images.

    Args:
      images: [B, H, W, C], float, normalised.
      patch_ids: [B, K] or [B, S, K] row-major patch indices, or None for all
        patches. Each [K] is encoded by itself.
      valid: as patch_ids, bool; False marks padding, which no patch sees and
        whose own output means nothing. None where nothing is padded.
      layers: 1 for the normalised output of the last block; n for the last n
        blocks' outputs, each normalised by the final LayerNorm, side by side.
      train: draws dropout and stochastic depth from the rng "dropout".
      query_ids: [B, *any] row-major indices of the patches whose output is
        needed, of all that are encoded, which saves the last block work on the
        others; None for all that are encoded. Not beside patch_ids.
      masked: [B, N] bool, or as patch_ids: patches that are seen as a learned
        mask token at their position. The token is a parameter if `init` gets
        this argument.
      all_tokens: whether class token and registers, in this order, stand
        before the patches of the output. Not beside query_ids.
      normalize: False leaves the final LayerNorm out.

    Returns:
      [B, N, layers * D], [B, (S,) K, layers * D] for chosen patches, or
      [B, *any, layers * D] for query_ids.

    Raises:
      ValueError: shapes do not fit; the message says which.
    """
    if query_ids is not None and (patch_ids is not None or all_tokens):
      raise ValueError(
        "got query_ids and patch_ids or all_tokens; query_ids are of the "
        "patches of whole images alone."
      )
    compute = dict(dtype=self.dtype, kernels=self.kernels)
    x = self._embed(images, patch_ids, masked)
    lead = x.shape[:-1]
    x = x.reshape(-1, lead[-1], self.width)  # [B * S, K, D]
    if valid is not None:
      valid = valid.reshape(-1, lead[-1])
    x, valid = self._prepend_tokens(x, valid)
    select, early = self._selection(query_ids, x.shape[1], all_tokens)
    if query_ids is not None:
      lead = query_ids.shape
    elif all_tokens:
      lead = (*lead[:-1], x.shape[1])
    *outputs, last = transformer.Transformer(
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      dropout=self.dropout,
      drop_path=self.drop_path,
      scan=self.scan,
      remat=self.remat,
      remat_every=self.remat_every,
      norm_epsilon=self.norm_epsilon,
      **compute,
      name="transformer",
    )(x, valid, layers=layers, train=train, select=early)
    if select:
      outputs = [select(y) for y in outputs]
      last = last if early else select(last)
    norm = transformer.LayerNorm(
      epsilon=self.norm_epsilon, **compute, name="norm"
    )
    outputs = [norm(y) if normalize else y for y in (*outputs, last)]
    x = jnp.concatenate(outputs, axis=-1)
    return x.reshape(*lead, layers * self.width)

  def _selection(
    self, query_ids: jax.Array | None, length: int, all_tokens: bool
  ) -> tuple[Callable | None, Callable | None]:
    """What takes the outputs asked for from all tokens [B, length, D].

    Returns:
      For outputs; and for the last block, where it may do so for its queries.
    """
    if query_ids is not None:
      ids = self.num_tokens + jax.lax.collapse(query_ids, 1)
      select = lambda x: patches_lib.gather_patches(x, ids)
      # Patches may be named several times: all of them may be fewer.
      return select, select if ids.shape[1] < length else None
    if all_tokens or not self.num_tokens:
      return None, None
    return lambda x: x[:, self.num_tokens :], None

  @property
  def num_tokens(self) -> int:
    """Class token and registers."""
    return self.class_token + self.registers

  def _embed(
    self,
    images: jax.Array,
    patch_ids: jax.Array | None,
    masked: jax.Array | None,
  ) -> jax.Array:
    """The patches as tokens with their positions, [B, (S,) K, D]."""
    patches = patches_lib.patchify(images, self.patch_size).astype(self.dtype)
    grid = patches_lib.patch_grid(*images.shape[1:3], self.patch_size)
    positions = self._positions(grid)
    if patch_ids is not None:
      # [B, (S,) K, patch pixels]
      patches = patches_lib.gather_patches(patches, patch_ids)
      positions = positions[patch_ids]
    x = transformer.Dense(
      self.width, dtype=self.dtype, kernels=self.kernels, name="patch_embed"
    )(patches)
    if masked is not None:
      token = self._token("mask_token")
      x = jnp.where(masked[..., None], token.astype(self.dtype), x)
    return x + positions.astype(self.dtype)

  def _token(self, name: str, count: int = 1) -> jax.Array:
    """A parameter; three axes as in the released code, so that it decays."""
    shape = (1, count, self.width)
    return self.param(name, transformer.KERNEL_INIT, shape)

  def _prepend_tokens(
    self, x: jax.Array, valid: jax.Array | None
  ) -> tuple[jax.Array, jax.Array | None]:
    """[B, K, D] and [B, K] with class token and registers in front."""
    tokens = [self._token("class_token")] if self.class_token else []
    if self.registers:
      tokens.append(self._token("registers", self.registers))
    if not tokens:
      return x, valid
    count = self.num_tokens
    token = jnp.concatenate(tokens, axis=1).astype(self.dtype)
    token = jnp.broadcast_to(token, (len(x), count, self.width))
    if valid is not None:
      valid = jnp.pad(valid, ((0, 0), (count, 0)), constant_values=True)
    return jnp.concatenate([token, x], axis=1), valid

  def _positions(self, grid: tuple[int, int]) -> jax.Array:
    if self.position_grid is None:
      wide = kernels_lib.at_least_float32(self.dtype)
      positions = patches_lib.sincos_positions(grid, self.width, wide)
      return jnp.asarray(positions)
    stored = tuple(self.position_grid)
    if grid != stored:
      raise ValueError(
        f"images have {grid[0]}x{grid[1]} patches but the stored position "
        f"embeddings {stored[0]}x{stored[1]}; resize the images, or convert "
        "the weights with --image_size and --positions bicubic."
      )
    return self.param(
      "positions",
      lambda _: jnp.asarray(patches_lib.sincos_positions(grid, self.width)),
    )


class Predictor(nn.Module):
  """Predicts the target encoder's output at target patches from a context.

  A narrow transformer over the context's patches and, at every target patch,
  a learned mask token with that patch's position. Each target block is
  predicted by itself.

  Attributes:
    width: P, a multiple of 4 and of num_heads.
    depth: number of blocks.
    num_heads: attention heads a block.
    output_width: D of the target encoder.
    mlp_ratio: hidden width of a block's perceptron over P.
    dtype: of the computation; parameters are float32.
    scan: see Transformer.
    remat: see Transformer.
    remat_every: see Transformer.
    kernels: how it computes, see Kernels.

  Reference: Assran et al. 2023, section 3, arXiv:2301.08243.
  """

  width: int
  depth: int
  num_heads: int
  output_width: int
  mlp_ratio: float = 4.0
  dtype: transformer.Dtype = jnp.float32
  scan: bool = False
  remat: str = "none"
  remat_every: int = 1
  kernels: kernels_lib.Kernels = kernels_lib.Kernels()

  @nn.compact
  def __call__(
    self,
    context: jax.Array,
    context_ids: jax.Array,
    target_ids: jax.Array,
    grid: tuple[int, int],
    context_valid: jax.Array | None = None,
    target_valid: jax.Array | None = None,
    *,
    target_noise: jax.Array | None = None,
    train: bool = False,
  ) -> jax.Array:
    """Predicts every target block from every context block.

    Args:
      context: [B, S, K, D], the context encoder's output; or more than K, of
        which the first ones are tokens without a position.
      context_ids: [B, S, K], where it lies, row-major.
      target_ids: [B, M, T], what to predict.
      grid: (h, w) of the image.
      context_valid: [B, S, K] bool, or None where nothing is padded.
      target_valid: [B, M, T] bool, or None where nothing is padded.
      target_noise: [B, M, T, D], where a target's position is uncertain; it
        goes the way of the context's features, so that its size is learned
        with theirs. Bar et al. 2024 (StoP), arXiv:2308.00566.
      train: accepted for symmetry with the encoder; nothing is stochastic.

    Returns:
      [B, S, M, T, output_width].
    """
    compute = dict(dtype=self.dtype, kernels=self.kernels)
    dense = functools.partial(transformer.Dense, **compute)
    (b, s, k, _), (_, m, t) = context.shape, target_ids.shape
    wide = kernels_lib.at_least_float32(self.dtype)
    positions = jnp.asarray(
      patches_lib.sincos_positions(grid, self.width, wide), self.dtype
    )
    places, context_valid = _with_tokens(
      k - context_ids.shape[2], positions[context_ids], context_valid
    )
    embed = dense(self.width, name="embed")
    mask_tokens = self._mask_token() + positions[target_ids]
    if target_noise is not None:
      mask_tokens += embed(target_noise.astype(self.dtype))

    def pair(x: jax.Array) -> jax.Array:
      """Each context before each block: [B * S * M, K + T, ...]."""
      (left, right), rest = jnp.split(x, [s * k], axis=1), x.shape[2:]
      whole = lambda x, t: jnp.broadcast_to(x, (b, s, m, t, *rest))
      left = whole(left.reshape(b, s, 1, k, *rest), k)
      right = whole(right.reshape(b, 1, m, t, *rest), t)
      joined = jnp.concatenate([left, right], axis=3)
      return joined.reshape(b * s * m, k + t, *rest)

    valid = None
    if context_valid is not None or target_valid is not None:
      seen_valid = _or_true(context_valid, context.shape[:3])
      valid = pair(
        _concat(seen_valid, _or_true(target_valid, target_ids.shape))
      )
    blocks = transformer.Transformer(
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      scan=self.scan,
      remat=self.remat,
      remat_every=self.remat_every,
      **compute,
      name="transformer",
    )
    tokens = _concat(embed(context) + places, mask_tokens)
    last = lambda x: x[:, k:]
    (x,) = blocks(tokens, valid, train=train, expand=pair, select=last)
    norm = transformer.LayerNorm(**compute, name="norm")
    x = dense(self.output_width, name="project")(norm(x))
    return x.reshape(b, s, m, t, self.output_width)

  def _mask_token(self) -> jax.Array:
    # Three axes as in the released code, where only tensors of fewer than two
    # are free of weight decay: the mask token is decayed.
    shape = (1, 1, self.width)
    token = self.param("mask_token", transformer.KERNEL_INIT, shape)
    return token.astype(self.dtype)


def _concat(left: jax.Array, right: jax.Array) -> jax.Array:
  """[B, S, K, ...] and [B, M, T, ...] -> [B, S * K + M * T, ...]."""
  flat = lambda x: jax.lax.collapse(x, 1, 3)
  return jnp.concatenate([flat(left), flat(right)], axis=1)


def _with_tokens(
  count: int, places: jax.Array, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
  """[B, S, K, P] and [B, S, K] for tokens without a position in front."""
  at_the_front = ((0, 0), (0, 0), (count, 0))
  if valid is not None:
    valid = jnp.pad(valid, at_the_front, constant_values=True)
  return jnp.pad(places, (*at_the_front, (0, 0))), valid


def _or_true(valid: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
  return jnp.ones(shape, bool) if valid is None else valid
