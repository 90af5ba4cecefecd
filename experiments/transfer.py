"""The paper's linear transfer, on any weights, as one table.

Command:   python -m jepa_jax.evaluate --config experiments/transfer.py \\
             --weights PATH [PATH ...] [--only cifar100,clevr_count]
           with --config.encoder.patch_size and data.image_size of the weights.
Hardware:  a GPU; the features of iNaturalist and Places take hours.
Data:      TFDS; Places and iNaturalist are large (prepare them beforehand).
Expected:  I-JEPA H/14, Tables 3 and 4 of Assran et al. 2023 (arXiv:2301.08243):
           CIFAR-100 87.5, Places205 58.4, iNat18 47.6, Clevr/Count 86.7,
           Clevr/Dist 72.4.
Seen:      not run here.

The heads, the optimizer and each data set's epochs are those of VISSL's
configurations for encoders of I-JEPA's shapes without a class token. Differs:
Places is TFDS's places365_small, not Places205, and both it and iNaturalist go
without random crops, whose features no host could hold; of the others four
crops of each image are kept. Clevr's images are cut to their central part, as
the paper says, where VISSL makes whole ones square; both are mirrored or not.
For Flowers102, Pets and DTD the custom is mean_per_class (Pets, Flowers), which
every row has beside top1.
"""

import ml_collections

from jepa_jax import config

# name -> TFDS's data set, label, split to learn from, and to be scored on
SETS = {
  "cifar10": ("cifar10", "label", "train", "test"),
  "cifar100": ("cifar100", "label", "train", "test"),
  "places": ("places365_small", "label", "train", "validation"),
  "inat18": ("i_naturalist2018", "label", "train", "validation"),
  "flowers": ("oxford_flowers102", "label", "train+validation", "test"),
  "pets": ("oxford_iiit_pet", "label", "train", "test"),
  "dtd": ("dtd", "label", "train+validation", "test"),
  "clevr_count": ("clevr", "count", "train", "validation"),
  "clevr_dist": ("clevr", "distance", "train", "validation"),
}
# Those that have a schedule of their own.
PROTOCOLS = {
  "places": "linear_places",
  "inat18": "linear_inaturalist",
  "clevr_count": "linear_count",
  "clevr_dist": "linear_distance",
}


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  """No variants: `evaluate --only` takes some of SETS."""
  config.choose("variant", variant, ("",))
  c = config.defaults()
  for name, (data, label, train, test) in SETS.items():
    c.evaluations[name] = config.evaluation(
      label,
      train=train,
      test=test,
      protocols=(PROTOCOLS.get(name, "linear_transfer"),),
      source="tfds",
      name=data,
    )
    c.evaluations[name].features = ("last4",)  # and the last alone, in the grid
  return c
