# %% [markdown]
# # How I-JEPA works
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/jepa_jax/blob/main/experiments/colab/3_how_it_works.ipynb)
#
# From an image to the loss and one step of training, by hand: forty lines of Flax
# that give the numbers of the package.

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

import flax.linen as nn
from IPython import display
import jax
import jax.numpy as jnp
import numpy as np

from jepa_jax import config as config_lib
from jepa_jax import masks, models
from jepa_jax.objectives import ijepa
from jepa_jax.pictures import drawings, layout
from jepa_jax.render import examples

start = time.time()
images = np.stack(
  [examples.example(1, "test", i, 64)["image"] for i in range(2)]
)

# %% [markdown]
# ## 1. What predicts what
#
# An image is cut in $N = 8 \times 8$ patches. Four blocks of them are *targets*
# $B_1, \dots, B_4$; what is left of one large block is the *context* $B_x$. From
# the context alone, the features of each target are to be predicted.

# %%
settings = {"name": "corrected", "min_keep": 4}
figure = drawings.masks(images, 8, settings, names=("corrected",))
display.display(display.Image(layout.encoded(figure)))

# %% [markdown]
# ## 2. Two encoders and a predictor
#
# A vision transformer $f_\theta$ encodes the patches of the context. A copy of it
# with other weights, $f_{\bar\theta}$, encodes the whole image. A narrow
# transformer $g_\phi$ sees the context's features and, at the place of each target
# patch, a learned mask token with that place's position; what it says there is the
# prediction:
#
# $$ s_x = f_\theta(B_x), \qquad \hat s_{y_i} = g_\phi(s_x, B_i), \qquad
#    s_y = f_{\bar\theta}(\text{image}). $$
#
# These are the networks, for one image at a time:


# %%
class Block(nn.Module):
  heads: int

  @nn.compact
  def __call__(self, x):  # [patches, width]
    width = x.shape[-1]
    y = nn.LayerNorm(epsilon=1e-6, name="norm1")(x)
    y = nn.Dense(3 * width, name="qkv")(y).reshape(len(x), 3, self.heads, -1)
    y = nn.dot_product_attention(y[:, 0], y[:, 1], y[:, 2]).reshape(x.shape)
    x = x + nn.Dense(width, name="out")(y)
    y = nn.LayerNorm(epsilon=1e-6, name="norm2")(x)
    y = nn.gelu(nn.Dense(4 * width, name="fc1")(y), approximate=False)
    return x + nn.Dense(width, name="fc2")(y)


class Encoder(nn.Module):
  width: int
  depth: int
  heads: int

  @nn.compact
  def __call__(self, patches, ids):  # [64, pixels of a patch], [k]
    x = nn.Dense(self.width, name="patch_embed")(patches)
    x = (x + models.sincos_positions((8, 8), self.width))[ids]
    for i in range(self.depth):
      x = Block(self.heads, name=f"block_{i}")(x)
    return nn.LayerNorm(epsilon=1e-6, name="norm")(x)  # [k, width]


class Predictor(nn.Module):
  width: int
  depth: int
  heads: int
  output: int

  @nn.compact
  def __call__(self, context, context_ids, target_ids):
    positions = jnp.asarray(models.sincos_positions((8, 8), self.width))
    x = nn.Dense(self.width, name="embed")(context) + positions[context_ids]
    token = self.param(
      "mask_token", nn.initializers.normal(0.02), (1, 1, self.width)
    )
    x = jnp.concatenate([x, token[0] + positions[target_ids]])
    for i in range(self.depth):
      x = Block(self.heads, name=f"block_{i}")(x)
    x = nn.LayerNorm(epsilon=1e-6, name="norm")(x[len(context_ids) :])
    return nn.Dense(self.output, name="project")(x)  # [t, output]


# %% [markdown]
# ## 3. The loss
#
# The targets are normalised over their features, and no gradient flows into them;
# the distance is smooth L1, as in the released code:
#
# $$ L = \frac{1}{4} \sum_{i=1}^{4} \frac{1}{|B_i|} \sum_{j \in B_i}
#    d\left(\hat s_{y_j},\ \frac{s_{y_j} - \mu_j}{\sigma_j}\right),
#    \qquad d(a, b) = \begin{cases} \frac12 (a - b)^2 & |a - b| < 1 \\
#    |a - b| - \frac12 & \text{else.} \end{cases} $$
#
# (Where blocks of a batch differ in size, the mean is over all their patches.)

# %%
encoder = Encoder(width=32, depth=2, heads=4)
predictor = Predictor(width=24, depth=2, heads=4, output=32)


def patchify(image):  # [64, 64, 3] -> [64, 192]
  pixels = (image / 255.0 - 0.5) / 0.25
  return pixels.reshape(8, 8, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(64, 192)


def distance(prediction, target):
  target = (target - target.mean(-1, keepdims=True)) / jnp.sqrt(
    target.var(-1, keepdims=True) + 1e-5
  )
  size = jnp.abs(prediction - target)
  return jnp.where(size < 1, size**2 / 2, size - 0.5)


def loss(params, target_encoder, images, contexts, blocks):
  total, count = 0.0, 0
  for image, context, targets in zip(images, contexts, blocks):
    patches = patchify(image)
    whole = encoder.apply({"params": target_encoder}, patches, np.arange(64))
    whole = jax.lax.stop_gradient(whole)
    seen = encoder.apply({"params": params["encoder"]}, patches, context)
    for ids in targets:
      said = predictor.apply(
        {"params": params["predictor"]}, seen, context, ids
      )
      errors = distance(said, whole[ids])
      total, count = total + errors.sum(), count + errors.size
  return total / count


# %% [markdown]
# ## 4. The same numbers as the package
#
# The package keeps the weights of all blocks in one array each, `[depth, ...]`;
# here they are taken apart.

# %%
config = config_lib.defaults()
config.data.update(image_size=64, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
config.masks.update(**settings)
config.encoder.update(
  width=32, depth=2, num_heads=4, patch_size=8, mlp_ratio=4.0
)
config.predictor.update(width=24, depth=2, num_heads=4)
config.compute.dtype = "float32"
config_lib.fill_method(config)
ours = ijepa.IJEPA.from_config(config)
theirs = ours.init(jax.random.key(0))


def apart(tree):
  tree = dict(tree)
  blocks = tree.pop("transformer")["blocks"]
  for i in range(2):
    tree[f"block_{i}"] = jax.tree.map(lambda x, i=i: x[i], blocks)
  return tree


def together(tree):
  tree = dict(tree)
  blocks = [tree.pop(f"block_{i}") for i in range(2)]
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *blocks)
  return {**tree, "transformer": {"blocks": stacked}}


drawn = masks.sample(settings, (8, 8), index=np.arange(2), xp=np)
contexts = [
  ids[0][valid[0]]
  for ids, valid in zip(drawn["context_ids"], drawn["context_valid"])
]
blocks = [
  [block[ok] for block, ok in zip(ids, valid)]
  for ids, valid in zip(drawn["target_ids"], drawn["target_valid"])
]
params = {name: apart(tree) for name, tree in theirs.items()}
by_hand_both = jax.jit(
  lambda params, target: jax.value_and_grad(loss)(
    params, target, images, contexts, blocks
  )
)
by_hand, gradient = by_hand_both(params, params["encoder"])

# %%
batch = {"image": images, **drawn}


def package_loss(params):
  targets = jax.lax.stop_gradient(ours.targets(theirs, batch, {}))
  found = ours.loss(params, targets, batch, jax.random.key(1), {})
  return found.total / found.weight


expected, expected_gradient = jax.jit(jax.value_and_grad(package_loss))(theirs)
print(f"by hand {by_hand:.6f}, the package {expected:.6f}")
np.testing.assert_allclose(by_hand, expected, rtol=1e-5)
for name, tree in gradient.items():
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6),
    together(tree),
    dict(expected_gradient[name]),
  )

# %% [markdown]
# ## 5. One step
#
# The gradient moves the context encoder and the predictor. The target encoder
# follows as a moving average, slower and slower, $m$ from 0.996 to 1:
#
# $$ \theta \leftarrow \theta - \eta \nabla_\theta L, \qquad
#    \bar\theta \leftarrow m \bar\theta + (1 - m)\,\theta. $$
#
# That average is all that keeps a constant from being the solution: nobody may
# choose targets that are easy at once.

# %%
rate, momentum = 0.05, 0.996
target = params["encoder"]
losses = []
for _ in range(20):
  value, gradient = by_hand_both(params, target)
  losses.append(float(value))
  params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
  target = jax.tree.map(
    lambda t, p: momentum * t + (1 - momentum) * p, target, params["encoder"]
  )
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in 20 steps on two images")
assert losses[-1] < 0.95 * losses[0]

# %% [markdown]
# What the package adds: batches of static shapes, AdamW with schedules, many
# devices, checkpoints, data, evaluation.

# %%
print(f"{time.time() - start:.0f} seconds")
