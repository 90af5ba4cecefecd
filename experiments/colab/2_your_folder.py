# %% [markdown]
# # Pretrain on your own folder
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/jepa_jax/blob/main/experiments/colab/2_your_folder.ipynb)
#
# From a folder of images to an encoder, its curves and a probe, on a CPU, a GPU or
# a TPU. The images here are rendered, so that nothing is downloaded; name a folder
# of your own in their place.

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
import json
import pathlib
import tempfile
import time

from IPython import display
from PIL import Image
import numpy as np

import jepa_jax
from jepa_jax import config as config_lib
from jepa_jax import train
from jepa_jax.pictures import drawings, layout, training
from jepa_jax.render import examples

start = time.time()
home = pathlib.Path(tempfile.mkdtemp())


def show(figure):
  display.display(display.Image(layout.encoded(figure, "JPEG")))


# %% [markdown]
# ## A folder
#
# Sub-folders are classes, if there are any: here scenes with few and with many
# objects. Labels are for the probe alone; pretraining never sees them.

# %%
FOLDER = ""  # such as "/content/drive/MyDrive/photos"

if not FOLDER:
  FOLDER = str(home / "scenes")
  for index in range(240):
    scene = examples.example(3, "train", index, 48)
    kind = "many" if len(scene["objects"]) > 6 else "few"
    path = pathlib.Path(FOLDER, kind, f"{index}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(scene["image"]).save(path)

# %% [markdown]
# ## An experiment
#
# Every key has a default and a check; the command line takes the same ones
# (`python -m jepa_jax.train --help_config`). This is tiny, to be over in a minute:
# for features worth having, raise `total`, `width` and `image_size`.

# %%
c = config_lib.defaults()
c.batch_size = 32
c.total = "40 steps"
c.data.source = "folder"
c.data.name = FOLDER
c.data.image_size = 48  # pixels
c.masks.name = "corrected"
c.masks.min_keep = 4  # patches, of a grid of 6 x 6
c.encoder.update(width=64, depth=4, num_heads=4, mlp_ratio=4.0)
c.encoder.patch_size = 8  # pixels
c.predictor.update(width=32, depth=2, num_heads=4)
c.optimizer.warmup = "10 %"
c.optimizer.lr = 1e-3
c.compute.dtype = "float32"  # "bfloat16" on a GPU or TPU
c.compute.scan = False
c.log_every = "2 steps"
if len([x for x in pathlib.Path(FOLDER).iterdir() if x.is_dir()]) > 1:
  c.evaluations.classes = config_lib.evaluation("label")

# %% [markdown]
# ## Train
#
# Run the cell again after an interruption: it goes on from the newest checkpoint.

# %%
workdir = home / "run"
code = train.train_and_evaluate(c, workdir)
assert code == 0

# %%
show(training.draw_runs(training.read([str(workdir)])))

# %% [markdown]
# ## What it is worth
#
# Probes on frozen features, beside the same network before training and the pixels.
# `report.html` in the run's folder has all of it. With so few steps and images, do
# not expect much.

# %%
for row in json.loads((workdir / "evaluations.json").read_text()):
  print(
    row["protocol"], row["encoder"], row["features"], f"{row['top1']:.1f} %"
  )
losses = training.read([str(workdir)])["run"]["loss"][1]
assert np.isfinite(losses).all() and losses[-1] < losses[0]
assert (workdir / "report.html").exists()

# %% [markdown]
# ## Use it

# %%
model = jepa_jax.load(workdir)
files = sorted(pathlib.Path(FOLDER).rglob("*.png"))[:6]
images = np.stack([np.asarray(Image.open(file)) for file in files])
print(model.encode(images).shape)
show(drawings.pca(model, images, fine=4))

# %%
print(f"{time.time() - start:.0f} seconds")
