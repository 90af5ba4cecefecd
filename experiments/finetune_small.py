"""Fine-tuning of a run of small.py with labels, and the same from scratch.

Command:   python -m jepa_jax.train --workdir runs/tuned \\
             --config experiments/finetune_small.py:DATA[,SIZE[,IMAGES]] \\
             --config.init_from=runs/small
           DATA and SIZE as of the run, experiments/small.py; IMAGES are so
           many labels, of the first images (of a folder: of all).
           --config.init_from= --config.method.layer_decay=1 learns from
           scratch. What differs in the run, such as
           --config.encoder.width=64, is given here too.
           A data set of TFDS that small.py does not know needs
           --config.method.classes.
Hardware:  one or two CPU cores, minutes.
Expected:  the paper has no such experiment.
Seen:      Fashion-MNIST, 1,000 labels: 81.5, from scratch 72.4; scenes, count,
           8,000 labels: 53.0, from scratch 47.4. docs/results.md.

The recipe is the paper's of 1 % of ImageNet (experiments/finetune_in1k.py) with
a learning rate for small batches, and without RandAugment, whose ranges are
for photos.
"""

import ml_collections
import small

from jepa_jax import config

CLASSES = {
  **dict.fromkeys(("fashion_mnist", "mnist", "cifar10"), 10),
  "cifar100": 100,
  "scenes": 8,  # counts, from 3 to 10
}


def get_config(variant: str = "scenes") -> ml_collections.ConfigDict:
  """The variant is DATA, DATA,SIZE or DATA,SIZE,IMAGES."""
  start = small.get_config(variant)
  c = config.defaults("supervised")
  for part in ("data", "encoder", "compute", "checkpoint"):
    c[part].update(start[part].to_dict())
  c.batch_size = 64
  c.total = "20 epochs"
  c.init_which = "context"  # small.py's runs have no target encoder

  images = c.data.num_examples
  if c.data.source != "folder" and images:
    c.data.split = f"train[:{images}]"
  label = "count" if c.data.source == "scenes" else "label"
  c.data.label = label
  c.method.classes = _classes(c.data)
  c.method.layer_decay = 0.75
  c.method.label_smoothing = 0.1

  c.optimizer.warmup = "10 %"
  c.optimizer.lr_start = 0.0
  c.optimizer.lr = 1e-3
  c.optimizer.lr_end = 0.0
  c.optimizer.weight_decay_start = 0.05
  c.optimizer.weight_decay_end = 0.05

  c.log_every = "50 steps"
  c.checkpoint.every = "500 steps"
  c.evaluations[label] = config.evaluation(label, protocols=("head",))
  c.evaluations[label].update(features=("last",), baselines=())
  if c.data.source != "folder":
    c.evaluations[label].train = "train[:1000]"  # nothing is fitted
  return c


def _classes(data: ml_collections.ConfigDict) -> int:
  """How many there are; what is not known is set by a flag."""
  if data.source != "folder":
    return CLASSES.get(data.name, 10)
  from jepa_jax.data import folder

  found = folder.FolderSource(data.name, data.split).classes
  if len(found) < 2:
    raise ValueError(
      f"{data.name} holds {len(found)} classes; fine-tuning needs two "
      "sub-folders of images or more."
    )
  return len(found)
