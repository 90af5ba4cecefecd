"""Transformer blocks: what the encoder and the predictor are made of.

The parameters of all blocks are stacked along a leading layer axis, [L, ...],
whether the blocks are scanned or unrolled. So one checkpoint serves both, and
the optimizer and the moving average walk over few large arrays.

Reference: Dosovitskiy et al. 2021, arXiv:2010.11929.
"""

from collections.abc import Callable, Iterator
import contextlib
import contextvars
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.models import attention, cpu

Dtype = Any
Rearrange = Callable[[jax.Array], jax.Array]

# Not all products are written as one on a CPU.
_keeping = functools.partial(
  jax.checkpoint_policies.save_from_both_policies, cpu.is_product
)

# What a block keeps for its backward pass: everything, matrix products, those
# with weights, or nothing but its input.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
  "none": jax.checkpoint_policies.everything_saveable,
  "products": _keeping(jax.checkpoint_policies.dots_saveable),
  "dots": _keeping(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
  "full": jax.checkpoint_policies.nothing_saveable,
}

# The released code truncates at 100 standard deviations: a plain normal.
KERNEL_INIT = nn.initializers.normal(stddev=0.02)
NORM_EPSILON = 1e-6


class _Layout(NamedTuple):
  activations: Callable[[jax.Array], jax.Array] | None = None
  weights: Callable[[Any], Any] | None = None
  per_device: Callable[[Callable], Callable] | None = None


_NO_LAYOUT = _Layout()
_layout = contextvars.ContextVar("layout", default=_NO_LAYOUT)


@contextlib.contextmanager
def layout(
  activations: Callable[[jax.Array], jax.Array] | None,
  weights: Callable[[Any], Any] | None,
  per_device: Callable[[Callable], Callable] | None = None,
) -> Iterator[None]:
  """Says where networks that are traced within keep what they compute.

  Args:
    activations: applied to what goes into every block, [B, N, D], where B may
      be a multiple of the batch; None leaves it where it is.
    weights: applied to the kernel of one layer at a time, before its use and,
      for the backward pass, once more: what it returns is not kept. None
      leaves them where they are.
    per_device: of a function of arrays that have the batch in front, the same
      function on every device's own part; None where there is one device.
  """
  token = _layout.set(_Layout(activations, weights, per_device))
  try:
    yield
  finally:
    _layout.reset(token)


# For the backward pass, GELU keeps its input, and LayerNorm its input and two
# numbers a patch: what they make of these costs more memory than time.
@jax.checkpoint
def _gelu(x: jax.Array) -> jax.Array:
  # Through erf: XLA has a fast polynomial for it on CPU and not for the erfc
  # of jax.nn.gelu.
  return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _layer_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Dtype
) -> jax.Array:
  return _layer_norm_forward(x, scale, bias, epsilon, dtype)[0]


def _layer_norm_forward(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: Dtype
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  wide = x.astype(jnp.float32)
  average = lambda x: cpu.row_sums(x, jnp.ones_like(scale)) / scale.size
  mean = average(wide)
  centred = wide - mean[..., None]
  inverse = jax.lax.rsqrt(average(jnp.square(centred)) + epsilon)
  y = centred * (inverse[..., None] * scale) + bias
  return y.astype(dtype), (x, scale, mean, inverse)


def _layer_norm_backward(
  epsilon: float, dtype: Dtype, kept: tuple[jax.Array, ...], dy: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  del epsilon, dtype
  x, scale, mean, inverse = kept
  dy = dy.astype(jnp.float32)
  normal = (x.astype(jnp.float32) - mean[..., None]) * inverse[..., None]
  dscale = dy * normal
  average = lambda x: cpu.row_sums(x, scale)[..., None] / scale.size
  dx = inverse[..., None] * (
    dy * scale - average(dy) - normal * average(dscale)
  )
  rows = tuple(range(x.ndim - 1))
  return dx.astype(x.dtype), dscale.sum(axis=rows), dy.sum(axis=rows)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


class LayerNorm(nn.Module):
  """Layer normalisation in float32: scale [D], bias [D].

  Differentiable backwards only.

  Reference: Ba et al. 2016, arXiv:1607.06450.
  """

  epsilon: float = NORM_EPSILON
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D] of dtype."""
    shape = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    return _layer_norm(x, scale, bias, self.epsilon, self.dtype)


def _product(rows: jax.Array, kernel: jax.Array, columns: slice) -> jax.Array:
  """Rows [R, in] times some columns of a kernel [in, out].

  The kernel is gathered where the layout says.
  """
  gather = _layout.get().weights
  if gather is None:
    return cpu.matmul(rows, kernel[:, columns])
  # A gathered kernel that is kept for the backward pass would fill the memory
  # that splitting it saved: it is gathered once more.
  return jax.checkpoint(
    lambda rows, kernel: cpu.matmul(rows, gather(kernel)[:, columns])
  )(rows, kernel)


class Dense(nn.Module):
  """Linear layer: kernel [in, features], bias [features], both float32."""

  features: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
    """[..., in] -> [..., features], or those of some columns alone."""
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", KERNEL_INIT, shape)
    bias = self.param("bias", nn.initializers.zeros, shape[1:])
    # Flat, or XLA on CPU transposes operands for the weights' gradient: six
    # blocks' backward pass took 1.6 times as long.
    rows = x.astype(self.dtype).reshape(-1, x.shape[-1])
    rows = _product(rows, kernel.astype(self.dtype), columns)
    rows = rows + bias.astype(self.dtype)[columns]
    return rows.reshape(*x.shape[:-1], -1)


class Block(nn.Module):
  """Pre-norm transformer block: attention, then a two-layer perceptron.

  `attention` is "own" for `attention.attend`, "pallas" for `attend_fused`, or
  see `attend_with_jax`.
  """

  num_heads: int
  mlp_ratio: float = 4.0
  dropout: float = 0.0
  dtype: Dtype = jnp.float32
  norm_epsilon: float = NORM_EPSILON
  attention: str = "own"

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    valid: jax.Array | None = None,
    drop_path: jax.Array | float | None = None,
    *,
    expand: Rearrange | None = None,
    select: Rearrange | None = None,
  ) -> jax.Array:
    """Applies the block.

    Args:
      x: [B, N, D].
      valid: [B, N] bool, or None where nothing is padded.
      drop_path: probability of leaving out each residual branch for an
        image; None in inference. Also switches dropout on.
      expand: makes the sequences, [B', R, D] -> [B, N, D] of any D, of what x
        then holds: each patch once, however many sequences it is in.
      select: picks patches whose output is wanted, [B, N, D] -> [B, Q, D] of
        any D; the others give keys and values alone. None picks all.

    Returns:
      [B, N or Q, D].
    """
    train = drop_path is not None
    norm = functools.partial(
      LayerNorm, epsilon=self.norm_epsilon, dtype=self.dtype
    )
    dense = functools.partial(Dense, dtype=self.dtype)
    drop = nn.Dropout(self.dropout, deterministic=not train)
    d = x.shape[-1]

    def keep_path(branch: jax.Array) -> jax.Array:
      if not train or self.is_initializing():
        return branch
      keep = 1.0 - jnp.asarray(drop_path, branch.dtype)
      shape = (branch.shape[0], 1, 1)
      alive = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
      return jnp.where(alive, branch / keep, 0).astype(branch.dtype)

    if expand is not None and select is not None:
      x, expand = expand(x), None
    y = norm(name="norm1")(x)
    project = dense(3 * d, name="qkv")
    heads = (self.num_heads, d // self.num_heads)
    query = None
    if select is None:
      qkv = project(y)
    else:
      query = project(select(y), slice(d))
      query = query.reshape(*query.shape[:2], *heads)
      qkv = project(y, slice(d, None))  # keys and values
      x = select(x)
    if expand is not None:
      x, qkv = expand(x), expand(qkv)
    qkv = qkv.reshape(*qkv.shape[:2], -1, *heads)
    per_device = _layout.get().per_device or (lambda f: f)
    if self.is_initializing():  # from one token, which no mesh divides
      y = attention.attend(qkv, valid, query)
    elif self.attention in ("own", "xla"):
      y = per_device(attention.attend)(qkv, valid, query)
    elif self.attention == "pallas":
      y = per_device(attention.attend_fused)(qkv, valid, query)
    else:
      y = attention.attend_with_jax(qkv, valid, query, self.attention)
    x = x + keep_path(drop(dense(d, name="out")(y)))

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
  norm_epsilon: float = NORM_EPSILON

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    valid: jax.Array | None = None,
    *,
    layers: int = 1,
    train: bool = False,
    expand: Rearrange | None = None,
    select: Rearrange | None = None,
  ) -> list[jax.Array]:
    """Applies all blocks.

    Args:
      x: [B, N, D], or what `expand` makes it of.
      valid: [B, N] bool, or None where nothing is padded.
      layers: how many of the last blocks' outputs to return.
      train: draws dropout and stochastic depth from the rng "dropout".
      expand: of the first block, see Block.
      select: of the last block, see Block.

    Returns:
      The outputs of the last `layers` blocks, in order, each [B, N, D], the
      last [B, N or Q, D].

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

    spread = _layout.get().activations

    def apply_block(
      x: jax.Array,
      layer: tuple[Any, Any],
      expand: Rearrange | None,
      select: Rearrange | None,
    ) -> jax.Array:
      weights, extra = layer
      x = spread(x) if spread else x
      rngs = {"dropout": extra["rng"]} if stochastic else None
      return block.apply(
        {"params": weights},
        x,
        valid,
        extra.get("drop_path"),
        expand=expand,
        select=select,
        rngs=rngs,
      )

    every = self.remat_every if self.remat != "none" else 1
    group = [apply_block] * every
    if self.remat != "none":
      policy = REMAT_POLICIES[self.remat]
      group[0] = jax.checkpoint(
        apply_block, policy=policy, static_argnums=(2, 3)
      )

    def apply_group(x: jax.Array, layers: Any) -> tuple[jax.Array, None]:
      for apply, layer in zip(group, layers):
        x = apply(x, layer, None, None)
      return x, None

    # The scan hands on its last output alone, and its blocks are all alike;
    # what else is wanted is unrolled.
    start = stop = 0  # of the scan
    if self.scan:
      start = min(every, self.depth) if expand else 0
      stop = self.depth - (layers if layers > 1 or select else 0)
      stop = start + max(0, stop - start) // every * every
    sizes = [1] * start + [stop - start] * (stop > start)
    sizes += [1] * (self.depth - stop)
    outputs = []
    i = 0
    for size, part in zip(sizes, _split((params, per_layer), sizes)):
      if size > 1:
        # The slices that the scan makes go straight to the blocks: it keeps
        # what is made of a slice for the backward pass, and not the slice.
        xs = [part]
        if every > 1:
          by_group = lambda leaf: leaf.reshape(-1, every, *leaf.shape[1:])
          xs = _split(jax.tree.map(by_group, part), [1] * every, axis=1)
        x, _ = jax.lax.scan(apply_group, x, xs)
      else:
        ends = (
          None if i else expand,
          select if i == self.depth - 1 else None,
        )
        x = group[i % every](x, part, *ends)
      i += size
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


def _split(tree: Any, sizes: list[int], axis: int = 0) -> list[Any]:
  """Splits an axis of all leaves; parts of size 1 come without it."""
  leaves, structure = jax.tree.flatten(tree)

  def split(leaf: jax.Array) -> list[jax.Array]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      stops = np.cumsum(sizes).tolist()
      parts = [
        jax.lax.slice_in_dim(leaf, stop - size, stop, axis=axis)
        for stop, size in zip(stops, sizes)
      ]
    else:
      # One split, whose transpose is one concatenation: indexing layer by
      # layer would pad and add a full stack of gradients for every layer.
      parts = jax.lax.split(leaf, sizes, axis=axis)
    return [
      jnp.squeeze(part, axis) if size == 1 else part
      for part, size in zip(parts, sizes)
    ]

  columns = [split(leaf) for leaf in leaves]
  return [
    jax.tree.unflatten(structure, [column[i] for column in columns])
    for i in range(len(sizes))
  ]
