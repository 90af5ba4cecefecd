"""Vision transformer for I-JEPA: the encoder and the predictor.

    encoder = Encoder(**SIZES["s"], patch_size=16)
    variables = encoder.init(jax.random.key(0), images)   # [B, H, W, C] float
    features = encoder.apply(variables, images)           # [B, N, D]

The parameters of all blocks are stacked along a leading layer axis, [L, ...],
whether the blocks are scanned or unrolled. So one checkpoint serves both, and
the optimizer and the moving average walk over few large arrays.

Reference: Dosovitskiy et al. 2021, arXiv:2010.11929; Assran et al. 2023,
section 3 and appendix A, arXiv:2301.08243.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = Any

_layout = contextvars.ContextVar("layout", default=(None, None))


@contextlib.contextmanager
def layout(
  activations: Callable[[jax.Array], jax.Array] | None,
  weights: Callable[[Any], Any] | None,
) -> Iterator[None]:
  """Says where networks that are traced within keep what they compute.

  Args:
    activations: applied to what goes into every block, [B, N, D], where B may
      be a multiple of the batch; None leaves it where it is.
    weights: applied to the parameters of one block at a time, before their
      use and, for the backward pass, once more: what it returns is not kept.
      None leaves them where they are.
  """
  token = _layout.set((activations, weights))
  try:
    yield
  finally:
    _layout.reset(token)


# Encoder sizes by name; the keys are the arguments of Encoder.
SIZES: dict[str, dict[str, Any]] = {
  "ti": dict(width=192, depth=12, num_heads=3, mlp_ratio=4.0),
  "s": dict(width=384, depth=12, num_heads=6, mlp_ratio=4.0),
  "b": dict(width=768, depth=12, num_heads=12, mlp_ratio=4.0),
  "l": dict(width=1024, depth=24, num_heads=16, mlp_ratio=4.0),
  "h": dict(width=1280, depth=32, num_heads=16, mlp_ratio=4.0),
  "g": dict(width=1408, depth=40, num_heads=16, mlp_ratio=48 / 11),
}

# What a block keeps for its backward pass: everything, matrix products, those
# with weights, or nothing but its input.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
  "none": jax.checkpoint_policies.everything_saveable,
  "products": jax.checkpoint_policies.dots_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}

# The released code truncates at 100 standard deviations: a plain normal.
_KERNEL_INIT = nn.initializers.normal(stddev=0.02)
_NORM_EPSILON = 1e-6


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
  """Rows and columns of the patch grid.

  Args:
    height: of the image, pixels.
    width: of the image, pixels.
    patch_size: side of a square patch, pixels.

  Returns:
    (h, w).

  Raises:
    ValueError: the patch size does not divide the image.
  """
  for side in (height, width):
    if patch_size < 1 or side % patch_size:
      divisors = [p for p in range(2, side + 1) if side % p == 0]
      nearest = sorted(divisors, key=lambda p: abs(p - patch_size))[:2]
      raise ValueError(
        f"image size {side} is not a multiple of patch size {patch_size}; "
        "nearest patch sizes that divide it: "
        f"{', '.join(str(p) for p in sorted(nearest))}."
      )
  return height // patch_size, width // patch_size


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
  """Cuts images into flattened patches.

  Args:
    images: [B, H, W, C].
    patch_size: side of a patch, pixels.

  Returns:
    [B, N, patch_size * patch_size * C]; patches in row-major order, the
    pixels of a patch in the order row, column, channel.

  Raises:
    ValueError: images is not of rank 4, or the patch size does not divide it.
  """
  if images.ndim != 4:
    raise ValueError(
      f"images have shape {images.shape}; they need to be [B, H, W, C]."
    )
  b, height, width, c = images.shape
  h, w = patch_grid(height, width, patch_size)
  x = images.reshape(b, h, patch_size, w, patch_size, c)
  x = x.transpose(0, 1, 3, 2, 4, 5)  # [B, h, w, patch, patch, C]
  return x.reshape(b, h * w, patch_size * patch_size * c)


def sincos_positions(grid: tuple[int, int], width: int) -> np.ndarray:
  """Fixed 2-D sine-cosine position embeddings.

  The first half of the channels encodes the column, the second the row; each
  half holds the sines of all frequencies, then the cosines.

  Args:
    grid: (h, w), rows and columns; they need not be equal.
    width: channels, a multiple of 4.

  Returns:
    [N, width] float32, row-major.

  Raises:
    ValueError: width is not a multiple of 4.

  Reference: Vaswani et al. 2017, section 3.5, arXiv:1706.03762, once an axis.
  """
  if width % 4:
    raise ValueError(
      f"width {width} is not a multiple of 4, as 2-D sine-cosine positions "
      f"need; nearest: {width - width % 4 or 4}, {width - width % 4 + 4}."
    )
  h, w = grid
  frequencies = 1.0 / 10000 ** (np.arange(width // 4) / (width / 4))
  rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")

  def encode(positions: np.ndarray) -> np.ndarray:
    angles = np.outer(positions.reshape(-1), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

  return np.concatenate([encode(columns), encode(rows)], axis=1).astype(
    np.float32
  )


def gather_patches(x: jax.Array, ids: jax.Array) -> jax.Array:
  """Picks patches by index.

  Args:
    x: [B, N, ...].
    ids: [B, *any] integers in [0, N).

  Returns:
    [B, *any, ...].
  """
  return jax.vmap(lambda row, index: row[index])(x, ids)


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  valid: jax.Array | None,
) -> jax.Array:
  """Scaled dot-product attention; scores and softmax in float32.

  Args:
    query: [B, heads, Q, head_dim].
    key: [B, heads, N, head_dim].
    value: [B, heads, N, head_dim].
    valid: [B, N] bool, False for padding that no query may see, or None.

  Returns:
    [B, heads, Q, head_dim] in the type of value.
  """
  scores = jnp.einsum(
    "bhqd,bhkd->bhqk",
    query * (query.shape[-1] ** -0.5),
    key,
    preferred_element_type=jnp.float32,
  )
  if valid is not None:
    scores = jnp.where(valid[:, None, None, :], scores, -1e30)
  weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
  return jnp.einsum("bhqk,bhkd->bhqd", weights, value)


def attend_with_jax(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  valid: jax.Array | None,
  implementation: str,
) -> jax.Array:
  """What `attend` does, by jax.nn.dot_product_attention.

  Args:
    query: as of attend, and so key, value and valid.
    key: see query.
    value: see query.
    valid: see query.
    implementation: "cudnn" (NVIDIA GPUs; 16 bits; fused) or "xla".

  Returns:
    [B, heads, Q, head_dim].
  """
  tokens_first = lambda x: x.transpose(0, 2, 1, 3)  # [B, tokens, heads, _]
  y = jax.nn.dot_product_attention(
    *map(tokens_first, (query, key, value)),
    mask=None if valid is None else valid[:, None, None, :],
    implementation=implementation,
  )
  return tokens_first(y)


# The backward pass needs its input alone, not the error function besides.
@jax.checkpoint
def _gelu(x: jax.Array) -> jax.Array:
  # Through erf: XLA has a fast polynomial for it on CPU and not for the erfc
  # of jax.nn.gelu.
  return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


class Dense(nn.Module):
  """Linear layer: kernel [in, features], bias [features], both float32."""

  features: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., in] -> [..., features]."""
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", _KERNEL_INIT, shape)
    bias = self.param("bias", nn.initializers.zeros, shape[1:])
    # Flat, or XLA on CPU transposes operands for the weights' gradient: six
    # blocks' backward pass took 1.6 times as long.
    rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
    rows = rows @ kernel.astype(self.dtype) + bias.astype(self.dtype)
    return rows.reshape(*x.shape[:-1], self.features)


class Block(nn.Module):
  """Pre-norm transformer block: attention, then a two-layer perceptron.

  `attention` is "own" for `attend`, or see `attend_with_jax`.
  """

  num_heads: int
  mlp_ratio: float = 4.0
  dropout: float = 0.0
  dtype: Dtype = jnp.float32
  norm_epsilon: float = _NORM_EPSILON
  attention: str = "own"

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    valid: jax.Array | None = None,
    drop_path: jax.Array | float | None = None,
    *,
    first: int = 0,
  ) -> jax.Array:
    """Applies the block.

    Args:
      x: [B, N, D].
      valid: [B, N] bool, or None where nothing is padded.
      drop_path: probability of leaving out each residual branch for an
        image; None in inference. Also switches dropout on.
      first: of the patches whose output is wanted; those before it give keys
        and values alone.

    Returns:
      [B, N - first, D].
    """
    train = drop_path is not None
    norm = functools.partial(
      nn.LayerNorm,
      epsilon=self.norm_epsilon,
      dtype=self.dtype,
      use_fast_variance=False,
    )
    dense = functools.partial(Dense, dtype=self.dtype)
    drop = nn.Dropout(self.dropout, deterministic=not train)
    b, n, d = x.shape

    def keep_path(branch: jax.Array) -> jax.Array:
      if not train or self.is_initializing():
        return branch
      keep = 1.0 - jnp.asarray(drop_path, branch.dtype)
      alive = jax.random.bernoulli(self.make_rng("dropout"), keep, (b, 1, 1))
      return jnp.where(alive, branch / keep, 0).astype(branch.dtype)

    y = norm(name="norm1")(x)
    qkv = dense(3 * d, name="qkv")(y)  # [B, N, 3 * D]
    qkv = qkv.reshape(b, n, 3, self.num_heads, d // self.num_heads)
    query, key, value = qkv.transpose(2, 0, 3, 1, 4)  # [B, heads, N, head_dim]
    query = query[:, :, first:]
    if self.attention == "own":
      y = attend(query, key, value, valid)
    else:
      y = attend_with_jax(query, key, value, valid, self.attention)
    y = y.transpose(0, 2, 1, 3).reshape(b, n - first, d)
    x = x[:, first:] + keep_path(drop(dense(d, name="out")(y)))

    y = norm(name="norm2")(x)
    # Cut, not rounded, as released; the epsilon mends ratios such as 209 / 48.
    y = dense(int(self.mlp_ratio * d + 1e-6), name="fc1")(y)
    y = drop(_gelu(y))
    return x + keep_path(drop(dense(d, name="fc2")(y)))


class Transformer(nn.Module):
  """A stack of blocks whose parameters lie in arrays of shape [L, ...].

  Attributes:
    depth: number of blocks, L.
    num_heads: attention heads a block.
    mlp_ratio: hidden width of the perceptron over the block's width.
    dropout: probability of dropping an activation, in training.
    drop_path: stochastic depth; the last block's probability, growing
      linearly from 0 at the first.
    dtype: of the computation; parameters are float32.
    scan: compiles one block and loops over it (short compiles, for deep
      models on TPU and GPU); False unrolls (faster on CPU).
    remat: what blocks compute again for the backward pass: "none" nothing,
      "products" all but matrix products, "dots" all but products with
      weights, "full" everything.
    remat_every: n to apply remat to every n-th block alone.
    attention: see Block.
    norm_epsilon: added to the variance in every LayerNorm.
  """

  depth: int
  num_heads: int
  mlp_ratio: float = 4.0
  dropout: float = 0.0
  drop_path: float = 0.0
  dtype: Dtype = jnp.float32
  scan: bool = False
  remat: str = "none"
  remat_every: int = 1
  attention: str = "own"
  norm_epsilon: float = _NORM_EPSILON

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    valid: jax.Array | None = None,
    *,
    layers: int = 1,
    train: bool = False,
    first: int = 0,
  ) -> list[jax.Array]:
    """Applies all blocks.

    Args:
      x: [B, N, D].
      valid: [B, N] bool, or None where nothing is padded.
      layers: how many of the last blocks' outputs to return.
      train: draws dropout and stochastic depth from the rng "dropout".
      first: of the patches whose output of the last block is wanted: those
        before it cost that block their keys and values alone.

    Returns:
      The outputs of the last `layers` blocks, in order, each [B, N, D], the
      last [B, N - first, D].

    Raises:
      ValueError: unknown remat policy, more layers asked than there are, or
        a width that the heads do not divide.
    """
    self._check(x.shape[-1], layers)
    block = Block(
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      dropout=self.dropout,
      dtype=self.dtype,
      norm_epsilon=self.norm_epsilon,
      attention=self.attention,
      parent=None,
    )

    def init_blocks(rng: jax.Array) -> Any:
      sample = jnp.zeros((1, 1, x.shape[-1]), x.dtype)
      return jax.vmap(lambda r: block.init(r, sample)["params"])(
        jax.random.split(rng, self.depth)
      )

    params = self.param("blocks", init_blocks)
    stochastic = train and (self.dropout > 0 or self.drop_path > 0)
    per_layer: dict[str, jax.Array] = {}
    if stochastic:
      per_layer["rng"] = jax.random.split(self.make_rng("dropout"), self.depth)
      per_layer["drop_path"] = jnp.linspace(0.0, self.drop_path, self.depth)

    spread, gather = _layout.get()

    def apply_block(
      x: jax.Array, layer: tuple[Any, Any], first: int
    ) -> jax.Array:
      weights, extra = layer
      weights = gather(weights) if gather else weights
      x = spread(x) if spread else x
      rngs = {"dropout": extra["rng"]} if stochastic else None
      return block.apply(
        {"params": weights},
        x,
        valid,
        extra.get("drop_path"),
        first=first,
        rngs=rngs,
      )

    every = self.remat_every if self.remat != "none" else 1
    group = [_remat(apply_block, self.remat, gather is not None)]
    group += [_remat(apply_block, "none", gather is not None)] * (every - 1)

    def apply_group(x: jax.Array, layers: Any) -> tuple[jax.Array, None]:
      for apply, layer in zip(group, layers):
        x = apply(x, layer, 0)
      return x, None

    # The scan hands on its last output alone; what else is wanted is unrolled.
    stacked = (params, per_layer)
    scanned = 0
    if self.scan:
      scanned = self.depth
      if layers > 1 or first:
        scanned -= layers
      scanned -= scanned % every
    if scanned:
      # The slices that the scan makes go straight to the blocks: it keeps
      # what is made of a slice for the backward pass, and not the slice.
      head = jax.tree.map(lambda leaf: leaf[:scanned], stacked)
      if every > 1:
        head = jax.tree.map(
          lambda leaf: leaf.reshape(-1, every, *leaf.shape[1:]), head
        )
        xs = _unstack(head, 0, every, axis=1)
      else:
        xs = [head]
      x, _ = jax.lax.scan(apply_group, x, xs)
    outputs = [x]
    for i, layer in enumerate(_unstack(stacked, scanned, self.depth), scanned):
      last = i == self.depth - 1
      x = group[i % every](x, layer, first if last else 0)
      outputs.append(x)
    return outputs[-layers:]

  def _check(self, width: int, layers: int) -> None:
    if self.remat not in REMAT_POLICIES:
      raise ValueError(
        f'unknown remat policy "{self.remat}"; known: '
        f"{', '.join(REMAT_POLICIES)}."
      )
    if self.remat_every < 1:
      raise ValueError(f"remat_every is {self.remat_every}; at least 1.")
    if not 1 <= layers <= self.depth:
      raise ValueError(
        f"the last {layers} layers were asked of {self.depth}; ask for 1 to "
        f"{self.depth}."
      )
    if width % self.num_heads:
      raise ValueError(
        f"width {width} is not a multiple of {self.num_heads} heads; change "
        "one of them."
      )


def _remat(function: Callable[..., Any], name: str, gathers: bool) -> Any:
  """Makes a block recompute what the policy says, and its gathered weights."""
  if name == "none" and not gathers:
    return function

  def keeps(primitive: Any, *args: Any, **params: Any) -> bool:
    # What only changed its layout is made again: a gathered weight that is
    # kept would fill the memory that splitting it saved.
    if primitive.name == "sharding_constraint":
      return False
    return REMAT_POLICIES[name](primitive, *args, **params)

  return jax.checkpoint(function, policy=keeps, static_argnums=2)


def _unstack(tree: Any, start: int, stop: int, axis: int = 0) -> list[Any]:
  """Splits an axis of all leaves into a list of trees."""
  leaves, structure = jax.tree.flatten(tree)

  def split(leaf: jax.Array) -> list[jax.Array]:
    count = leaf.shape[axis]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return [jnp.take(leaf, i, axis=axis) for i in range(count)]
    # One split, whose transpose is one concatenation: indexing layer by layer
    # would pad and add a full stack of gradients for every layer.
    parts = jax.lax.split(leaf, [1] * count, axis=axis)
    return [jnp.squeeze(part, axis) for part in parts]

  columns = [split(leaf) for leaf in leaves]
  return [
    jax.tree.unflatten(structure, [column[i] for column in columns])
    for i in range(start, stop)
  ]


class Encoder(nn.Module):
  """Vision transformer over all patches of an image, or over chosen ones.

  Without class token. Chosen patches are gathered before the embedding, so
  that the work falls with their number.

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
    attention: see Block.
    norm_epsilon: see Transformer.
    position_grid: (h, w) of position embeddings that are a parameter
      "positions", [N, D], as in foreign weights; None computes sine-cosine
      ones for any grid.
  """

  width: int
  depth: int
  num_heads: int
  patch_size: int
  mlp_ratio: float = 4.0
  dropout: float = 0.0
  drop_path: float = 0.0
  dtype: Dtype = jnp.float32
  scan: bool = False
  remat: str = "none"
  remat_every: int = 1
  attention: str = "own"
  norm_epsilon: float = _NORM_EPSILON
  position_grid: tuple[int, int] | None = None

  @nn.compact
  def __call__(
    self,
    images: jax.Array,
    patch_ids: jax.Array | None = None,
    valid: jax.Array | None = None,
    *,
    layers: int = 1,
    train: bool = False,
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

    Returns:
      [B, N, layers * D], or [B, (S,) K, layers * D] for chosen patches.

    Raises:
      ValueError: shapes do not fit; the message says which.
    """
    grid = patch_grid(images.shape[1], images.shape[2], self.patch_size)
    patches = patchify(images, self.patch_size).astype(self.dtype)
    positions = self._positions(grid)
    if patch_ids is not None:
      patches = gather_patches(patches, patch_ids)  # [B, (S,) K, patch pixels]
      positions = positions[patch_ids]
    lead = patches.shape[:-1]
    x = Dense(self.width, dtype=self.dtype, name="patch_embed")(patches)
    x = x + positions.astype(self.dtype)
    x = x.reshape(-1, lead[-1], self.width)  # [B * S, K, D]
    if valid is not None:
      valid = valid.reshape(-1, lead[-1])
    outputs = Transformer(
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      dropout=self.dropout,
      drop_path=self.drop_path,
      dtype=self.dtype,
      scan=self.scan,
      remat=self.remat,
      remat_every=self.remat_every,
      attention=self.attention,
      norm_epsilon=self.norm_epsilon,
      name="transformer",
    )(x, valid, layers=layers, train=train)
    norm = nn.LayerNorm(
      epsilon=self.norm_epsilon,
      dtype=self.dtype,
      use_fast_variance=False,
      name="norm",
    )
    x = jnp.concatenate([norm(y) for y in outputs], axis=-1)
    return x.reshape(*lead, layers * self.width)

  def _positions(self, grid: tuple[int, int]) -> jax.Array:
    if self.position_grid is None:
      return jnp.asarray(sincos_positions(grid, self.width))
    stored = tuple(self.position_grid)
    if grid != stored:
      raise ValueError(
        f"images have {grid[0]}x{grid[1]} patches but the stored position "
        f"embeddings {stored[0]}x{stored[1]}; resize the images, or convert "
        "the weights with --image_size and --positions bicubic."
      )
    return self.param(
      "positions", lambda _: jnp.asarray(sincos_positions(grid, self.width))
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
    attention: see Block.

  Reference: Assran et al. 2023, section 3, arXiv:2301.08243.
  """

  width: int
  depth: int
  num_heads: int
  output_width: int
  mlp_ratio: float = 4.0
  dtype: Dtype = jnp.float32
  scan: bool = False
  remat: str = "none"
  remat_every: int = 1
  attention: str = "own"

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
    train: bool = False,
  ) -> jax.Array:
    """Predicts every target block from every context block.

    Args:
      context: [B, S, K, D], the context encoder's output.
      context_ids: [B, S, K], where it lies, row-major.
      target_ids: [B, M, T], what to predict.
      grid: (h, w) of the image.
      context_valid: [B, S, K] bool, or None where nothing is padded.
      target_valid: [B, M, T] bool, or None where nothing is padded.
      train: accepted for symmetry with the encoder; nothing is stochastic.

    Returns:
      [B, S, M, T, output_width].
    """
    dense = functools.partial(Dense, dtype=self.dtype)
    b, s, k, _ = context.shape
    _, m, t = target_ids.shape
    positions = jnp.asarray(sincos_positions(grid, self.width), self.dtype)
    seen = dense(self.width, name="embed")(context) + positions[context_ids]
    # Three axes as in the released code, where only tensors of fewer than two
    # are free of weight decay: the mask token is decayed.
    token = self.param("mask_token", _KERNEL_INIT, (1, 1, self.width))
    asked = token.astype(self.dtype) + positions[target_ids]  # [B, M, T, P]

    def pair(left: jax.Array, right: jax.Array) -> jax.Array:
      """Joins [B, S, K, ...] and [B, M, T, ...] to [B * S * M, K + T, ...]."""
      rest = left.shape[3:]
      left = jnp.broadcast_to(left[:, :, None], (b, s, m, k, *rest))
      right = jnp.broadcast_to(right[:, None], (b, s, m, t, *rest))
      joined = jnp.concatenate([left, right], axis=3)
      return joined.reshape(b * s * m, k + t, *rest)

    valid = None
    if context_valid is not None or target_valid is not None:
      if context_valid is None:
        context_valid = jnp.ones(context_ids.shape, bool)
      if target_valid is None:
        target_valid = jnp.ones(target_ids.shape, bool)
      valid = pair(context_valid, target_valid)
    (x,) = Transformer(
      depth=self.depth,
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      dtype=self.dtype,
      scan=self.scan,
      remat=self.remat,
      remat_every=self.remat_every,
      attention=self.attention,
      name="transformer",
    )(pair(seen, asked), valid, train=train, first=k)
    x = nn.LayerNorm(
      epsilon=_NORM_EPSILON,
      dtype=self.dtype,
      use_fast_variance=False,
      name="norm",
    )(x)
    x = dense(self.output_width, name="project")(x)
    return x.reshape(b, s, m, t, self.output_width)
