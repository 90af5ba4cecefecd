"""Operations of the networks, from shapes alone.

Floating-point operations of the matrix products, a multiplication and an
addition being two. Norms, activations and the optimizer, a percent or two
beside them, are left out, as usual in statements of utilisation.

Reference: Chowdhery et al. 2022, appendix B (model FLOPs utilisation),
  arXiv:2204.02311.
"""

import math
from typing import Any

import jax
import numpy as np


def block(
  tokens: int, width: int, hidden: int, *, queries: int | None = None
) -> int:
  """Operations of one transformer block on one sequence, forward.

  Args:
    tokens: length of the sequence.
    width: of a token.
    hidden: width inside the perceptron.
    queries: tokens whose output is needed; None for all. The others give keys
      and values alone.
  """
  queries = tokens if queries is None else queries
  keys_and_values = 4 * tokens * width**2
  attention = 4 * queries * width**2 + 4 * queries * tokens * width
  return keys_and_values + attention + 4 * queries * width * hidden


def encoder(
  network: Any, patches: int, channels: int, queries: int | None = None
) -> int:
  """Operations of an encoder on some patches of one image, forward.

  Args:
    network: models.Encoder.
    patches: how many it receives.
    channels: of the image.
    queries: of how many the output is needed; None for all.
  """
  width, hidden = network.width, int(network.mlp_ratio * network.width + 1e-6)
  tokens = patches + network.num_tokens
  queries = min(tokens, tokens if queries is None else queries)
  blocks = (network.depth - 1) * block(tokens, width, hidden)
  blocks += block(tokens, width, hidden, queries=queries)
  return blocks + embedding(network, patches, channels)


def predictor(network: Any, context: int, targets: int, blocks: int) -> int:
  """Operations of a predictor from one context of one image, forward.

  What every implementation could save is not counted: in the last block, the
  context's queries and all that follows from them; in the first, all but one
  of the target blocks' projections of the same context.

  Args:
    network: models.Predictor.
    context: patches of the context, K.
    targets: patches of a target block, T.
    blocks: target blocks, M.
  """
  width = network.width
  hidden = int(network.mlp_ratio * width + 1e-6)
  tokens = context + targets
  each = (network.depth - 1) * block(tokens, width, hidden)
  each += block(tokens, width, hidden, queries=targets)
  each += 2 * targets * width * network.output_width
  repeated = 6 * context * width**2 if network.depth > 1 else 0
  embed = 2 * context * network.output_width * width
  return blocks * each - (blocks - 1) * repeated + embed


def embedding(network: Any, patches: int, channels: int) -> int:
  """Operations of the patch embedding of an image, forward."""
  return 2 * patches * network.patch_size**2 * channels * network.width


def products(function: Any, *inputs: Any) -> int:
  """Operations of all products and convolutions in a function, forward.

  Args:
    function: of arrays, without loops.
    inputs: arrays or shapes.
  """

  def count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        sides = (equation.invars[0].aval.shape[i] for i in contracted)
        total += 2 * equation.outvars[0].aval.size * math.prod(sides)
      elif equation.primitive.name == "conv_general_dilated":
        total += _convolution(equation)
      for value in equation.params.values():
        inner = getattr(value, "jaxpr", value)
        total += count(inner) if hasattr(inner, "eqns") else 0
    return total

  return count(jax.make_jaxpr(function)(*inputs).jaxpr)


def _convolution(equation: Any) -> int:
  """Operations of a convolution; what meets padding is none."""
  image, kernel = (x.aval.shape for x in equation.invars)
  axes = equation.params["dimension_numbers"]
  out = equation.outvars[0].aval.shape
  total = 2 * out[axes.out_spec[0]] * out[axes.out_spec[1]]
  total *= kernel[axes.rhs_spec[1]]
  strides, padding = (
    equation.params["window_strides"], equation.params["padding"]
  )  # fmt: skip
  for i, (stride, (before, _)) in enumerate(zip(strides, padding)):
    side, size = image[axes.lhs_spec[2 + i]], kernel[axes.rhs_spec[2 + i]]
    starts = stride * np.arange(out[axes.out_spec[2 + i]]) - before
    seen = starts[:, None] + np.arange(size)
    total *= int(((seen >= 0) & (seen < side)).sum())
  return total
