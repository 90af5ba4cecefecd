"""Transformer blocks: what the encoder and the predictor are made of.

The parameters of all blocks are stacked along a leading layer axis, [L, ...],
whether the blocks are scanned or unrolled. So one checkpoint serves both, and
the optimizer and the moving average walk over few large arrays.

Reference: Dosovitskiy et al. 2021, arXiv:2010.11929.
"""

from collections.abc import Callable
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax.models import kernels as kernels_lib

Dtype = Any
Rearrange = Callable[[jax.Array], jax.Array]
Kernels = kernels_lib.Kernels

# What a block keeps for its backward pass: everything, matrix products, those
# with weights, or nothing but its input.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
  "none": jax.checkpoint_policies.everything_saveable,
  "products": jax.checkpoint_policies.dots_saveable,
  "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  "full": jax.checkpoint_policies.nothing_saveable,
}

# The released code truncates at 100 standard deviations: a plain normal.
KERNEL_INIT = nn.initializers.normal(stddev=0.02)
NORM_EPSILON = 1e-6


class LayerNorm(nn.Module):
  """Layer normalisation, at least in float32: scale [D], bias [D].

  Reference: Ba et al. 2016, arXiv:1607.06450.
  """

  epsilon: float = NORM_EPSILON
  dtype: Dtype = jnp.float32
  kernels: Kernels = Kernels()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """[..., D] -> [..., D] of dtype."""
    shape = x.shape[-1:]
    scale = self.param("scale", nn.initializers.ones, shape)
    bias = self.param("bias", nn.initializers.zeros, shape)
    y = self.kernels.layer_norm(x, scale, bias, self.epsilon)
    return y.astype(self.dtype)


class Dense(nn.Module):
  """Linear layer: kernel [in, features], bias [features], both float32."""

  features: int
  dtype: Dtype = jnp.float32
  kernels: Kernels = Kernels()

  @nn.compact
  def __call__(self, x: jax.Array, columns: slice = slice(None)) -> jax.Array:
    """[..., in] -> [..., features], or those of some columns alone."""
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", KERNEL_INIT, shape).astype(self.dtype)
    bias = self.param("bias", nn.initializers.zeros, shape[1:])
    bias = bias.astype(self.dtype)
    return self.kernels.dense(
      x.astype(self.dtype), kernel[:, columns], bias[columns]
    )


class Block(nn.Module):
  """Pre-norm transformer block: attention, then a two-layer perceptron."""

  num_heads: int
  mlp_ratio: float = 4.0
  dropout: float = 0.0
  dtype: Dtype = jnp.float32
  norm_epsilon: float = NORM_EPSILON
  kernels: Kernels = Kernels()

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    valid: jax.Array | None = None,
    drop_path: jax.Array | float | None = None,
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
      select: picks patches whose output is needed, [B, N, D] -> [B, Q, D] of
        any D; the others give keys and values alone. None picks all.

    Returns:
      [B, N or Q, D].
    """
    norm = functools.partial(
      LayerNorm,
      epsilon=self.norm_epsilon,
      dtype=self.dtype,
      kernels=self.kernels,
    )
    dense = functools.partial(Dense, dtype=self.dtype, kernels=self.kernels)
    drop = nn.Dropout(
      self.dropout, deterministic=drop_path is None, name="dropout"
    )
    d = x.shape[-1]
    heads = (self.num_heads, d // self.num_heads)
    x = self.kernels.constrain(x)
    if expand is not None and select is not None:
      x, expand = expand(x), None

    y = norm(name="norm1")(x)
    project = dense(3 * d, name="qkv")
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
    num = qkv.shape[2] // d  # 3, or 2 without queries
    qkv = qkv.reshape(*qkv.shape[:2], num, *heads)  # [B, N, num, heads, ...]
    y = self.kernels.attention(qkv, valid, query)
    y = drop(dense(d, name="out")(y))
    x = x + self._drop_path(y, drop_path)

    y = norm(name="norm2")(x)
    # Cut, not rounded, as released; the epsilon mends ratios such as 209 / 48.
    y = dense(int(self.mlp_ratio * d + 1e-6), name="fc1")(y)
    y = drop(self.kernels.gelu(y))
    y = drop(dense(d, name="fc2")(y))
    return x + self._drop_path(y, drop_path)

  def _drop_path(
    self, branch: jax.Array, rate: jax.Array | float | None
  ) -> jax.Array:
    if rate is None:
      return branch
    keep = 1.0 - jnp.asarray(rate, branch.dtype)
    shape = (branch.shape[0], 1, 1)
    alive = jax.random.bernoulli(self.make_rng("dropout"), keep, shape)
    return jnp.where(alive, branch / keep, 0).astype(branch.dtype)


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
    norm_epsilon: added to the variance in every LayerNorm.
    kernels: see Kernels.
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
  norm_epsilon: float = NORM_EPSILON
  kernels: Kernels = Kernels()

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
    settings = dict(
      num_heads=self.num_heads,
      mlp_ratio=self.mlp_ratio,
      dropout=self.dropout,
      dtype=self.dtype,
      norm_epsilon=self.norm_epsilon,
      kernels=self.kernels,
    )
    rates = None
    if train and (self.dropout > 0 or self.drop_path > 0):
      rates = np.linspace(0.0, self.drop_path, self.depth)
    if self.is_initializing():
      # All parameters at once, and the same however the blocks then run.
      x = expand(x) if expand else x
      apply = lambda block, x, rate: (block(x, valid, rate), None)
      x, _ = _scan(apply, self.depth)(
        Block(**settings, name="blocks"), x, rates
      )
      return [x] * (layers - 1) + [select(x) if select else x]

    group = [functools.partial(Block, **settings)]
    if self.remat != "none":
      recomputed = nn.remat(
        Block, policy=REMAT_POLICIES[self.remat], static_argnums=(4, 5)
      )
      group *= self.remat_every
      group[0] = functools.partial(recomputed, **settings)
    # A scan hands on its last output alone, and its blocks are all alike; what
    # else is needed is unrolled.
    start = stop = 0  # of the scan
    if self.scan:
      start = min(len(group), self.depth) if expand else 0
      stop = self.depth - (layers if layers > 1 or select else 0)
      stop = start + max(0, stop - start) // len(group) * len(group)
    runs = [(i, 1) for i in range(self.depth) if not start <= i < stop]
    if stop > start:
      runs.insert(start, (start, stop - start))
    blocks = nn.map_variables(
      _Blocks, "params", functools.partial(_by_run, runs, len(group))
    )(tuple(runs), tuple(group), name="blocks")
    return blocks(x, valid, rates, expand, select)[-layers:]

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


class _Blocks(nn.Module):
  """Blocks in runs: one block, or a scan over several.

  Attributes:
    runs: (first, count) of each.
    group: constructors of the blocks; block i is made by group[i % len(group)].
  """

  runs: tuple[tuple[int, int], ...]
  group: tuple[Callable[..., Block], ...]

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    valid: jax.Array | None,
    rates: np.ndarray | None,
    expand: Rearrange | None,
    select: Rearrange | None,
  ) -> list[jax.Array]:
    """The output of every run; rates are probabilities of drop path, [L]."""
    outputs = []
    depth = sum(self.runs[-1])
    for first, count in self.runs:
      name = _run_name(first, count)
      rate = None if rates is None else rates[first : first + count]
      if count > 1:
        size = len(self.group)
        if rate is not None:
          rate = rate.reshape(-1, size)
        group = _scan(_Group, count // size, in_axes=(nn.broadcast, 0))
        x, _ = group(self.group, name=name)(x, valid, rate)
      else:
        block = self.group[first % len(self.group)](name=name)
        x = block(
          x,
          valid,
          None if rate is None else rate[0],
          None if first else expand,
          select if first == depth - 1 else None,
        )
      outputs.append(x)
    return outputs


class _Group(nn.Module):
  """Blocks that a scan repeats together."""

  group: tuple[Callable[..., Block], ...]

  @nn.compact
  def __call__(
    self, x: jax.Array, valid: jax.Array | None, rates: jax.Array | None
  ) -> tuple[jax.Array, None]:
    for i, block in enumerate(self.group):
      rate = None if rates is None else rates[i]
      # All arguments, for nn.remat counts them.
      x = block(name=str(i))(x, valid, rate, None, None)
    return x, None


def _scan(target: Any, length: int, in_axes: Any = 0) -> Any:
  return nn.scan(
    target,
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=in_axes,
    length=length,
  )


def _run_name(first: int, count: int) -> str:
  return str(first) if count == 1 else f"{first}-{first + count - 1}"


def _by_run(
  runs: list[tuple[int, int]], group_size: int, variables: dict[str, Any]
) -> dict[str, Any]:
  """Parameters [L, ...] of all blocks as _Blocks has them, by run."""
  parts = _split(variables["params"], [count for _, count in runs])
  params = {}
  for run, part in zip(runs, parts):
    if run[1] > 1:
      # The slices that the scan makes go straight to the blocks: it keeps what
      # is made of a slice for the backward pass, and not the slice.
      part = jax.tree.map(
        lambda leaf: leaf.reshape(-1, group_size, *leaf.shape[1:]), part
      )
      part = _split(part, [1] * group_size, axis=1)
      part = {str(i): block for i, block in enumerate(part)}
    params[_run_name(*run)] = part
  return {"params": params}


def _split(tree: Any, sizes: list[int], axis: int = 0) -> list[Any]:
  """Splits an axis of all leaves; parts of size 1 come without it."""
  leaves, structure = jax.tree.flatten(tree)
  columns = []
  for leaf in leaves:
    # One split, whose transpose is one concatenation: indexing layer by layer
    # would pad and add a full stack of gradients for every layer.
    parts = zip(jax.lax.split(leaf, sizes, axis=axis), sizes)
    columns.append([x if n > 1 else jnp.squeeze(x, axis) for x, n in parts])
  return [jax.tree.unflatten(structure, part) for part in zip(*columns)]
