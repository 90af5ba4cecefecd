# %% [markdown]
# # Decode what the features say
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/jepa_jax/blob/main/experiments/colab/4_decode.ipynb)
#
# What does a vector of features know of its image? A *decoder* learns to draw
# images that have a given vector: a diffusion model ([RCDM](https://arxiv.org/abs/2112.09164)),
# as in Figures 6 to 8 of the [I-JEPA paper](https://arxiv.org/abs/2301.08243). What
# its samples for one vector share is in the vector; what differs between them is not.
# This notebook draws with a small decoder that comes with the package. It takes two
# minutes on a CPU.

# %%
# Where the package comes from: its name in an index, the address of a repository
# ("git+https://..."), or a wheel file.
import os
import subprocess
import sys

SOURCE = os.environ.get("JEPA_JAX_SOURCE", "jepa_jax")
_ = subprocess.run(
  [sys.executable, "-m", "pip", "install", "-q", SOURCE], check=True
)

# %%
import time

from IPython import display
import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import pictures
from jepa_jax.objectives import diffusion
from jepa_jax.pictures import decoders, decoding, layout
from jepa_jax.render import examples

start = time.time()


def show(figure):
  display.display(display.Image(layout.encoded(figure, "JPEG")))


# %% [markdown]
# ## Load
#
# The decoder of `pictures.EXAMPLE`, an encoder of scenes of 64 pixels that never saw
# a label: `experiments/decoder.py` with averaged targets as the condition, 6,000
# steps. It draws 32 pixels.

# %%
objective, state, masks = decoders.load(pictures.DECODER)
count = sum(x.size for x in jax.tree.leaves(state.network("unet")))
print(f"{count:,} parameters, draws {objective.size}, of {objective.condition}")

# %% [markdown]
# Scenes that neither network has seen:

# %%
images = np.stack(
  [examples.example(0, "test", i, 64)["image"] for i in range(48)]
)

# %% [markdown]
# ## Noise, and how it is taken away
#
# An image is mixed with more and more noise; the network learns to say the noise, at
# any level, given the vector of features. Drawing goes the way back from pure noise.

# %%
signal = diffusion.linear_signal(objective.steps)
levels = [0, 100, 250, 450, objective.steps - 1]
clean = objective.drawn(images[:1])[0]
noise = jax.random.normal(jax.random.key(0), clean.shape)
mean, std = objective.scale
panels = []
for level in levels:
  noisy = diffusion.add_noise(
    clean[None], noise[None], jnp.asarray(signal[[level]], jnp.float32)
  )[0]
  pixels = np.asarray(jnp.clip(255 * (noisy * std + mean), 0, 255), np.uint8)
  panels.append(layout.photo(pixels, f"signal {signal[level]:.2f}"))
show(layout.sheet([panels], title="From an image to noise"))
assert signal[0] > 0.99 and signal[-1] < 0.01

# %% [markdown]
# ## Draw
#
# One vector an image, averaged over its patches; three samples of each. Look at how
# many things there are, how large, and in which colours: that the vector holds. Where
# they are it cannot, for an average over patches has no places; shapes are lost too.

# %%
found = decoding.decode(objective, state, images, masks, steps=100)
show(decoding.draw(images, found))

# %% [markdown]
# ## Is it the image, or just any scene?
#
# Samples of an image's own vector, of another image's and of none, held against the
# image: by their colours, and by the encoder's features of them.

# %%
scores = decoding.fidelity(objective, state, images, masks, steps=50)
print(decoding.in_words(scores))
own, other, none = (scores[name][1] for name in ("own", "other", "none"))
for worse in (other, none):
  error = (worse - own).std() / len(own) ** 0.5
  assert (worse - own).mean() > 3 * error
assert scores["top5"] > 2 * 100 * 5 / len(images)

# %% [markdown]
# ## Between two images
#
# Vectors are points in a space: go from one to another, with the same noise.

# %%
batch = {
  "image": images[:2],
  "key": np.zeros((2, 2), np.uint32),
}
one, two = objective.targets(state.frozen, batch, {})
shares = jnp.linspace(0, 1, 6)[:, None]
drawn = objective.samples(
  state.network("unet"),
  state.buffers,
  (1 - shares) * one + shares * two,
  jnp.stack([jax.random.key(4)] * 6),
  steps=100,
)
ends = [layout.photo(image) for image in images[:2]]
row = [ends[0], *map(layout.photo, np.asarray(drawn)), ends[1]]
show(layout.sheet([row], title="From one image to another"))
assert drawn.shape == (6, 32, 32, 3)

# %% [markdown]
# ## Your own
#
# A decoder of your run; on two cores half an hour, on a GPU minutes. The first line
# draws what is *predicted* of a block that the encoder has not seen, Figure 6 of the
# paper, the second what the target encoder says of the whole image:
#
# ```sh
# python -m jepa_jax.train --config experiments/decoder.py:scenes --workdir runs/decoder --config.init_from=runs/quickstart
# python -m jepa_jax.train --config experiments/decoder.py:scenes --workdir runs/decoder --config.init_from=runs/quickstart --config.method.condition=target --config.init_which=target
# python -m jepa_jax.visualize decode --workdir runs/decoder --score
# ```
#
# `decoders.save("runs/decoder", "decoder.safetensors")` writes what this notebook
# loaded; `experiments/decoder.py:in1k` has the paper's setting for ImageNet.

# %%
print(f"{time.time() - start:.0f} seconds")
