"""Operations of the networks, from shapes alone.

Floating-point operations of the matrix products, a multiplication and an
addition being two. Norms, activations and the optimizer, a percent or two
beside them, are left out, as usual in statements of utilisation.

Reference: Chowdhery et al. 2022, appendix B (model FLOPs utilisation),
  arXiv:2204.02311.
"""

from typing import Any


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
