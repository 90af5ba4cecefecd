# %% [markdown]
# # The networks in your own JAX code
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/jepa_jax/blob/main/experiments/colab/5_in_your_code.ipynb)
#
# Encoder and predictor are plain Flax modules. Here they are in a training loop of
# one's own, under JAX's transformations, in flax.nnx, over eight devices, and
# exported to run without this package.

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
import tempfile
import time

import flax.linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jepa_jax
from jepa_jax import pictures
from jepa_jax.render import examples

start = time.time()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)  # before JAX's first use
print(len(jax.devices()), "devices")

scenes = [examples.example(2, "test", i, 64) for i in range(32)]
images = np.stack([scene["image"] for scene in scenes])
counts = np.array([len(scene["objects"]) for scene in scenes], np.float32)

# %% [markdown]
# ## Module, parameters, preprocessing
#
# `scan=True` compiles one block for all of them.

# %%
module, params, preprocessing = jepa_jax.load(pictures.EXAMPLE, scan=True)
x = preprocessing(images)  # uint8 to normalised float32
features = jax.jit(module.apply)({"params": params}, x)
print(features.shape)  # [images, patches, width]
assert features.shape == (32, 64, 64)

# %% [markdown]
# ## A training loop of one's own
#
# A head that counts objects, trained together with the encoder.

# %%
head = nn.Dense(1)
head_params = head.init(jax.random.key(0), features[0, 0])["params"]
optimizer = optax.adam(1e-3)


def loss(weights, x, counts):
  vectors = module.apply({"params": weights["encoder"]}, x).mean(axis=1)
  said = head.apply({"params": weights["head"]}, vectors)[:, 0]
  return jnp.square(said - (counts - 6.5) / 2.3).mean()


@jax.jit
def step(weights, state, x, counts):
  value, gradient = jax.value_and_grad(loss)(weights, x, counts)
  updates, state = optimizer.update(gradient, state)
  return optax.apply_updates(weights, updates), state, value


weights = {"encoder": params, "head": head_params}
state = optimizer.init(weights)
losses = []
for _ in range(20):
  weights, state, value = step(weights, state, x, counts)
  losses.append(float(value))
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
assert losses[-1] < 0.7 * losses[0]

# %% [markdown]
# ## jit, vmap, jvp
#
# The modules differentiate in every mode. `vmap` maps over whatever you like, here
# over four scales of the weights.

# %%
pooled = jax.jit(
  lambda params, x: module.apply({"params": params}, x).mean(axis=1)
)
direction = jax.random.normal(jax.random.key(1), x[:2].shape)
value, slope = jax.jvp(lambda x: pooled(params, x), (x[:2],), (direction,))
_, transposed = jax.vjp(lambda x: pooled(params, x), x[:2])
(back,) = transposed(slope)  # forwards and backwards, the same Jacobian
np.testing.assert_allclose(
  jnp.vdot(back, direction), jnp.vdot(slope, slope), rtol=1e-3
)
scales = jnp.array([0.5, 0.9, 1.0, 1.1])
scaled = jax.vmap(
  lambda scale: pooled(jax.tree.map(lambda p: scale * p, params), x[:2])
)(scales)
print(scaled.shape)
np.testing.assert_allclose(scaled[2], value, atol=1e-5)

# %% [markdown]
# ## flax.nnx

# %%
bridged = nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0))
bridged = nnx.bridge.lazy_init(bridged, x[:2])
nnx.update(bridged, nnx.State(jax.tree.map(nnx.Param, dict(params))))
np.testing.assert_allclose(bridged(x[:2]), features[:2], atol=1e-5)

# %% [markdown]
# ## Eight devices
#
# Parameters on all of them, images split among them: the compiler does the rest.

# %%
mesh = jax.sharding.Mesh(jax.devices(), ("data",))
place = lambda tree, *axes: jax.device_put(
  tree, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
)
spread = pooled(place(params), place(x, "data"))
print(spread.sharding)
assert len(spread.sharding.device_set) == 8
np.testing.assert_allclose(spread, features.mean(axis=1), atol=1e-5)

# %% [markdown]
# ## StableHLO
#
# For a process without this package and without Flax: JAX and NumPy read it back,
# for any number of images.

# %%
model = jepa_jax.load(pictures.EXAMPLE)
with tempfile.TemporaryDirectory() as folder:
  model.export(f"{folder}/encoder", platforms=("cpu",))
  data = open(f"{folder}/encoder/encoder.stablehlo", "rb").read()
  arrays = dict(np.load(f"{folder}/encoder/encoder.npz"))
exported = jax.export.deserialize(data)
for count in (1, 3):
  found = exported.call(arrays, images[:count])
  np.testing.assert_allclose(found, model.encode(images[:count]), atol=1e-4)
print(f"{len(data) / 2**10:.0f} KiB of program")

# %%
print(f"{time.time() - start:.0f} seconds")
