# %% [markdown]
# # Use a pretrained encoder
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/jepa_jax/blob/main/experiments/colab/1_use_it.ipynb)
#
# An I-JEPA encoder turns an image into a vector a patch. This notebook loads a
# small one that comes with the package, and shows what its features are good for:
# colours, similarity, retrieval. It takes a minute on a CPU.

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
import numpy as np

import jepa_jax
from jepa_jax import pictures
from jepa_jax.pictures import drawings, embedding, layout, patches
from jepa_jax.render import examples

start = time.time()


def show(figure):
  display.display(display.Image(layout.encoded(figure, "JPEG")))


# %% [markdown]
# ## Load
#
# `jepa_jax.load` reads a run's folder, an exported file, the released `.pth.tar`
# and Hugging Face folders alike. The encoder here was trained on rendered scenes
# of 64 pixels, by `experiments/quickstart.py`.

# %%
model = jepa_jax.load(pictures.EXAMPLE)
print(model)

# %% [markdown]
# Scenes that it has not seen, with what is in them. Put your own images here: any
# `uint8` array `[images, height, width, 3]` whose sides the patch size divides.

# %%
scenes = [examples.example(0, "test", i, 64) for i in range(120)]
images = np.stack([scene["image"] for scene in scenes])
counts = np.array([len(scene["objects"]) for scene in scenes])
print(images.shape, "objects in a scene:", counts.min(), "to", counts.max())

# %% [markdown]
# ## Features
#
# `encode` averages the patches, one vector an image; `pool=None` keeps all of them.
# Nothing was labelled, and nothing was learned from pixels: the encoder had to
# predict its own features of hidden parts.

# %%
features = np.asarray(model.encode(images, batch_size=40))
maps = model.encode(images[:8], pool=None)
print(features.shape, maps.shape)
assert features.shape == (120, 64) and maps.shape == (8, 8, 8, 64)

# %% [markdown]
# ## Features as colours
#
# Three principal components of all patches become red, green and blue.
# `fine=4` encodes the image at 16 small offsets, for a map of 32 x 32.

# %%
show(drawings.pca(model, images[:8], fine=4, foreground=True))

# %% [markdown]
# ## What is similar to a patch?
#
# Choose one: `ROW` and `COLUMN` are shares of the image's sides, 0 to 1.

# %%
ROW, COLUMN = 0.55, 0.55
show(drawings.similarity(model, images[:7], at=(ROW, COLUMN), fine=4))

# %%
vectors = patches.features(model, images[:7])
cosines = patches.similarity(vectors, vectors[0, 4, 4])
assert np.isclose(cosines[0, 4, 4], 1) and cosines.min() < 0

# %% [markdown]
# ## Retrieval
#
# The scenes nearest in feature space, beside those nearest in pixels.

# %%
show(embedding.draw_neighbours(images, features, queries=4))

# %% [markdown]
# Are neighbours alike in what matters? The number of objects differs less between
# a scene and its neighbours than between two scenes at random.

# %%
nearest, _ = embedding.nearest(features, k=5)
difference = np.abs(counts[nearest] - counts[:, None]).mean()
chance = np.abs(counts[:, None] - counts[None]).mean()
print(
  f"difference in objects: neighbours {difference:.2f}, chance {chance:.2f}"
)
assert difference < 0.7 * chance

# %% [markdown]
# ## A map of all scenes
#
# `method="tsne"` needs scikit-learn, `"umap"` umap-learn.

# %%
show(embedding.draw_map(images, embedding.coordinates(features)))

# %% [markdown]
# ## Published weights
#
# The authors' ViT-H and ViT-g, by their names on the Hugging Face hub
# (`pip install "jepa_jax[hub]"`, 2.5 GB and more):
#
# ```python
# model = jepa_jax.load("facebook/ijepa_vith14_1k")
# features = model.encode(photos)  # uint8 [images, 224, 224, 3]
# ```
#
# or a file of the released code (`pip install "jepa_jax[torch]"`):
#
# ```python
# model = jepa_jax.load("IN1K-vit.h.14-300e.pth.tar")
# ```

# %%
print(f"{time.time() - start:.0f} seconds")
