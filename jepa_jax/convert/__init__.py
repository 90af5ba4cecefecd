"""Weights of the released code, of Hugging Face and of Flax, either way.

    weights = convert.read("IN1K-vit.h.14-300e.pth.tar", which="target")
    convert.write(weights, "encoder.npz")

The command is `python -m jepa_jax.convert`; to use weights see
jepa_jax.pretrained.
"""

from jepa_jax.convert.formats import read, write
from jepa_jax.convert.positions import resize
from jepa_jax.convert.weights import Weights

__all__ = ["Weights", "read", "resize", "write"]
