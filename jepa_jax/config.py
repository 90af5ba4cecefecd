"""Configuration: every key with its unit, durations, and the check.

An experiment is a file with `get_config(variant)` that starts from
`defaults()` and changes what it wants to. The command line overrides any key:

    python -m jepa_jax.train --config F:variant --config.batch_size=256
"""

from collections.abc import Sequence
import dataclasses
import difflib
import functools
import json
import math
import pathlib
import re
from typing import Any

import ml_collections


def defaults() -> ml_collections.ConfigDict:
  """Every key there is: ViT-H/14 as released, on ImageNet-1k.

  Durations are strings of a number and a unit: "300 epochs", "5000 steps",
  "1e9 examples"; but for the total also "10 %", of the total.
  """
  c = ml_collections.ConfigDict()
  c.seed = 0  # of parameters, order, augmentation and masks
  c.objective = "ijepa"  # or "my_package.module:Name"
  c.batch_size = 2048  # images a step, over all devices and processes
  c.accumulate_steps = 1  # microbatches of a batch, one after the other
  c.total = "300 epochs"  # how long to train
  c.init_from = ""  # weights to start from, see jepa_jax.load; "": random
  c.init_which = "target"  # or "context", into both encoders; or "all"
  c.init_strict = True  # False leaves what the weights lack as it is

  c.data = ml_collections.ConfigDict()
  c.data.source = "tfds"  # "tfds", "folder", "scenes" (rendered) or "mixture"
  # Of the TFDS data set, the folder, or "0.7 tfds:NAME + 0.3 folder:DIR".
  c.data.name = "imagenet2012"
  # A split, or slices such as "train[:90%]". Of a folder without folders for
  # its splits "train" leaves out the tenth that "test" is, evaluated or not, so
  # that an evaluation added later is of images never seen; "all" is all.
  c.data.split = "train"
  c.data.label = ""  # that a supervised objective learns; others need none
  c.data.data_dir = ""  # where TFDS keeps its data; "": its default
  c.data.num_examples = 0  # images an epoch; 0: count them
  c.data.num_scenes = (8000, 2000)  # rendered for train and test ("scenes")
  c.data.image_size = 224  # side in pixels, after cropping
  c.data.channels = 3  # 1: grey, 3: colour
  c.data.mean = (0.485, 0.456, 0.406)  # a channel, on a scale of 0 to 1
  c.data.std = (0.229, 0.224, 0.225)  # a channel, on the same scale
  c.data.crop_scale = (0.3, 1.0)  # share of the image's area, min and max
  c.data.crop_ratio = (3 / 4, 4 / 3)  # width over height, min and max
  c.data.flip = False  # mirrors half of the images
  c.data.color_jitter = 0.0  # strength; 0: off
  c.data.blur = 0.0  # probability of a Gaussian blur
  c.data.max_unreadable = 100  # images skipped before the run stops
  c.data.prefetch = 2  # batches that wait for the device
  c.data.threads = 0  # of the pipeline; 0: one a core

  c.masks = ml_collections.ConfigDict()
  c.masks.name = "released"  # see masks.SAMPLERS; or "my_package.module:name"
  c.masks.num_contexts = 1  # context blocks an image
  c.masks.num_targets = 4  # target blocks an image
  c.masks.context_scale = (0.85, 1.0)  # share of the grid's area, min and max
  c.masks.target_scale = (0.15, 0.2)  # share of the grid's area, min and max
  c.masks.aspect_ratio = (0.75, 1.5)  # of targets, height over width
  c.masks.allow_overlap = False  # of the context with the targets
  c.masks.min_keep = 10  # patches that a context must have
  c.masks.context_patches = 0  # K; 0: what the released recipe trains on

  c.encoder = ml_collections.ConfigDict()
  c.encoder.width = 1280  # features a patch; models.SIZES has others' numbers
  c.encoder.depth = 32  # blocks
  c.encoder.num_heads = 16  # of attention, that share the width
  c.encoder.mlp_ratio = 4.0  # hidden features over width
  c.encoder.patch_size = 14  # pixels
  c.encoder.dropout = 0.0  # probability, in every block
  c.encoder.drop_path = 0.0  # stochastic depth of the last block
  c.predictor = ml_collections.ConfigDict()
  c.predictor.width = 384  # features a patch
  c.predictor.depth = 12  # blocks
  c.predictor.num_heads = 16  # of attention, that share the width
  c.predictor.mlp_ratio = 4.0  # hidden features over width
  c.loss = "smooth_l1"  # or "l2"

  c.optimizer = ml_collections.ConfigDict()  # AdamW
  c.optimizer.warmup = "40 epochs"  # lr rises linearly from lr_start
  c.optimizer.lr_start = 2e-4  # learning rate of the first step
  c.optimizer.lr = 1e-3  # learning rate at the end of the warm-up
  c.optimizer.lr_end = 1e-6  # of the last step, reached along a cosine
  c.optimizer.weight_decay_start = 0.04  # of the first step
  c.optimizer.weight_decay_end = 0.4  # of the last step
  c.optimizer.weight_decay_shape = "cosine"  # or "linear"
  c.optimizer.b1 = 0.9  # decay of the first moment
  c.optimizer.b2 = 0.999  # decay of the second moment
  c.optimizer.eps = 1e-8  # added to the root of the second moment
  c.optimizer.mu_dtype = "float32"  # of the first moment; or "bfloat16"
  c.optimizer.clip_norm = 0.0  # global norm of the gradient; 0: no clipping
  # (pattern of a parameter's path, factor of its learning rate and decay), the
  # first that matches: (("encoder/patch_embed", 0.0),) keeps it as it is.
  c.optimizer.lr_scale = ()
  c.momentum = (0.996, 1.0)  # of the target encoder, start and end; linear

  c.compute = ml_collections.ConfigDict()
  c.compute.dtype = "bfloat16"  # of activations; parameters are float32
  c.compute.scan = True  # one compiled block for all; False unrolls
  # What the backward pass computes again to save memory, besides GELU and
  # LayerNorm, which it always does: "none", "products"
  # (all but matrix products), "dots" (all but products with weights) or
  # "full".
  c.compute.remat = "none"
  c.compute.remat_every = 1  # in every n-th block
  # "xla"; "pallas", which on a TPU is one kernel (compiled for TPUs, not run
  # on one) and elsewhere "xla"; or "cudnn" (NVIDIA GPUs, 16 bits).
  c.compute.attention = "xla"
  c.mesh = ml_collections.ConfigDict()  # devices an axis; -1: the rest
  c.mesh.data = -1  # splits the batch
  c.mesh.fsdp = 1  # splits the batch, parameters and their moments
  # (pattern of a parameter's path, "split" over fsdp or "replicate"), the
  # first that matches; the moving average and the moments follow.
  c.sharding = ((r"(bias|scale|mask_token|count|step)$", "replicate"),)
  c.sharding += ((".*", "split"),)

  c.log_every = "50 steps"  # a row of the log
  c.checkpoint = ml_collections.ConfigDict()
  c.checkpoint.every = "1 epochs"  # besides the one at the end
  c.checkpoint.keep = 2  # newest ones
  c.checkpoint.keep_best = 1  # best ones by `best_metric`; 0: none
  c.checkpoint.best_metric = ""  # "count/linear/last"; "": the first linear one
  c.checkpoint.resume = True  # go on from the newest one in the workdir
  c.profile = ml_collections.ConfigDict()  # a trace into the workdir's profile/
  c.profile.start = 0  # begins when so many steps are done; 0: no trace
  c.profile.steps = 3  # that it covers
  # The log and the report raise an alarm past these. It means "look now", so
  # they lie well outside of what healthy runs show, and of what random ViTs
  # show on 128 images of scenes and Fashion-MNIST: standard deviation .05 to
  # .08, effective rank 6 to 47, cosine .990 to .996 (all images share their
  # positions, hence the strict limit).
  c.collapse = ml_collections.ConfigDict()
  c.collapse.feature_std = 1e-3  # at least; over images, mean of features
  c.collapse.effective_rank = 1.5  # at least; of a batch's pooled features
  c.collapse.mean_cosine = 0.9999  # at most; between different images

  # Evaluations of the target encoder: name -> `evaluation(...)`.
  c.evaluations = ml_collections.ConfigDict()
  c.evaluate_every = "0 steps"  # 0: at the end alone
  return c


def evaluation(
  label: str,
  *,
  train: str = "train",
  test: str = "test",
  protocols: Sequence[str] = ("linear", "knn"),
  **data: Any,
) -> ml_collections.ConfigDict:
  """Settings of one evaluation: a probe on frozen features.

  Args:
    label: a feature of the data set; of scenes "count", "distance" (classes)
      or "nearest" (a number); "label" of a folder of folders.
    train: split that the probe learns from.
    test: split that it is scored on; shares no image with train.
    protocols: rows of evaluation.protocols, or "my_package.module:ROW".
    **data: what differs from config.data, such as name and source.

  Returns:
    A ConfigDict for config.evaluations.
  """
  c = ml_collections.ConfigDict()
  c.label = label
  c.train = train
  c.test = test
  c.protocols = tuple(protocols)
  c.features = ("last", "last4")  # layers that are pooled
  c.baselines = ("random", "pixels")  # what stands beside it
  c.data = ml_collections.ConfigDict(data)
  return c


def evaluation_data(
  config: ml_collections.ConfigDict,
  settings: ml_collections.ConfigDict | None,
) -> ml_collections.ConfigDict:
  """config.data with what an evaluation changes of it."""
  data = ml_collections.ConfigDict(config.data)
  if settings is not None:
    data.update(settings.data)
  return data


def read(path: pathlib.Path) -> ml_collections.ConfigDict:
  """Loads the config.json of a run; keys that it lacks have their defaults."""

  def restore(value: Any) -> Any:
    if isinstance(value, dict):
      return ml_collections.ConfigDict(
        {k: restore(v) for k, v in value.items()}
      )
    return tuple(map(restore, value)) if isinstance(value, list) else value

  try:
    stored = json.loads(path.read_text())
    # An older version had other names, and lacks keys that are newer.
    compute = stored.get("compute", {})
    if compute.get("attention") == "own":
      compute["attention"] = "xla"
    compute.pop("parts", None)  # changed no result
    data = stored.get("data", {})
    if data.get("source") == "folder" and "label" not in data:
      data["split"] = "all"  # a folder had no splits
    stored = restore(stored)
  except (AttributeError, ValueError) as error:
    raise ValueError(f"{path} cannot be read: {error}.") from None
  config = defaults()
  with config.ignore_type():
    config.update(stored)
  return config


@dataclasses.dataclass(frozen=True)
class Duration:
  """A length of training in one of three units, or in percent of the total."""

  amount: float
  unit: str

  @classmethod
  def parse(cls, text: str, key: str) -> "Duration":
    """Reads "300 epochs"; ValueError names the key and the units."""
    match = re.fullmatch(
      r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s+(?:(step|epoch|example)s?|%)\s*",
      str(text),
    )
    try:
      if key == "total" and not match[2]:
        match = None  # of itself
      return cls(float(match[1]), match[2] + "s" if match[2] else "%")
    except (TypeError, ValueError):
      raise ValueError(
        f'{key} is "{text}"; it needs a number and a unit, such as '
        '"300 epochs", "5000 steps" or "1e6 examples".'
      ) from None

  def steps(self, batch_size: int, num_examples: int) -> int:
    """The whole steps in it, for that batch and size of an epoch.

    At least one of what is longer than nothing, for an epoch may be shorter
    than a batch.
    """
    examples = {"steps": batch_size, "epochs": num_examples, "examples": 1}
    steps = math.floor(self.amount * examples[self.unit] / batch_size)
    return max(steps, 1) if self.amount else 0


def steps(config: ml_collections.ConfigDict, key: str) -> int:
  """Steps of the duration under a dotted key, such as "optimizer.warmup".

  Raises:
    ValueError: it cannot be read, or counts epochs of an unknown size.
  """
  value = _value(config, key)
  duration = Duration.parse(value, key)
  if duration.unit == "%":
    return math.floor(duration.amount / 100 * steps(config, "total"))
  if duration.unit == "epochs" and not config.data.num_examples:
    raise ValueError(
      f'{key} is "{value}" but data.num_examples is 0; give the images an '
      "epoch, or a duration in steps."
    )
  return duration.steps(config.batch_size, config.data.num_examples)


def needs_num_examples(config: ml_collections.ConfigDict) -> bool:
  """Whether a duration counts epochs of a size that is not known yet."""
  texts = [_value(config, key) for key in _DURATIONS]
  return not config.data.num_examples and any("epoch" in t for t in texts)


def choose(what: str, name: str, known: Any) -> None:
  """Raises a ValueError with the valid names unless name is one of them."""
  if name not in known:
    near = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f'; did you mean "{near[0]}"?' if near else "."
    raise ValueError(
      f'unknown {what} "{name}"; known: {", ".join(known)}{hint}'
    )


# Key -> what it is called in an error, and the values that it may have.
_CHOICES: dict[str, tuple[str, tuple[str, ...]]] = {
  "data.source": ("data source", ("tfds", "folder", "scenes", "mixture")),
  "init_which": ("init_which", ("target", "context", "all")),
  "loss": ("loss", ("smooth_l1", "l2")),
  "compute.dtype": ("dtype", ("float32", "bfloat16")),
  "compute.attention": ("attention", ("xla", "pallas", "cudnn")),
  "compute.remat": ("remat policy", ("none", "products", "dots", "full")),
  "optimizer.mu_dtype": ("mu_dtype", ("float32", "bfloat16")),
  "optimizer.weight_decay_shape": ("weight decay shape", ("cosine", "linear")),
}
_DURATIONS = (
  "total",
  "optimizer.warmup",
  "log_every",
  "checkpoint.every",
  "evaluate_every",
)


def _value(config: ml_collections.ConfigDict, key: str) -> Any:
  """Of a dotted key, such as "optimizer.warmup"."""
  return functools.reduce(lambda node, part: node[part], key.split("."), config)


def check(config: ml_collections.ConfigDict) -> None:
  """Finds what is wrong before a device is touched.

  Raises:
    ValueError: one line that says what it got and what it needs.
  """
  for key, (what, known) in _CHOICES.items():
    choose(what, _value(config, key), known)
  for key in _DURATIONS:
    Duration.parse(_value(config, key), key)
  if config.compute.attention == "cudnn" and config.compute.dtype == "float32":
    raise ValueError(
      'compute.attention is "cudnn", which computes in 16 bits, and '
      'compute.dtype "float32"; make it "bfloat16", or the attention "xla".'
    )
  _check_sizes(config)
  _check_pairs(config)


def _check_sizes(config: ml_collections.ConfigDict) -> None:
  data = config.data
  if config.compute.remat_every < 1:
    raise ValueError(
      f"compute.remat_every is {config.compute.remat_every}; give 1 for every "
      "block, 2 for every second one."
    )
  for name in ("mean", "std"):
    if len(data[name]) != data.channels:
      raise ValueError(
        f"data.{name} has {len(data[name])} values for {data.channels} "
        "channels; give one a channel."
      )
  sizes = (config.batch_size, config.accumulate_steps)
  if min(sizes) < 1:
    raise ValueError(
      "batch_size {} and accumulate_steps {} need to be at least 1.".format(
        *sizes
      )
    )
  if sizes[0] % sizes[1]:
    raise ValueError(
      "batch_size {} is not a multiple of accumulate_steps {}; change one of "
      "them.".format(*sizes)
    )
  for name, network in (
    ("encoder", config.encoder),
    ("predictor", config.predictor),
  ):
    if network.width % network.num_heads or network.width % 4:
      raise ValueError(
        f"{name}.width {network.width} needs to be a multiple of 4 and of "
        f"its {network.num_heads} heads."
      )


def _check_pairs(config: ml_collections.ConfigDict) -> None:
  for pair in config.optimizer.lr_scale:
    if not isinstance(pair, tuple) or len(pair) != 2 or not pair[1] >= 0:
      raise ValueError(
        f"optimizer.lr_scale has {pair!r}; it needs pairs of a pattern and a "
        'factor of at least 0, such as ("encoder", 0.1).'
      )
  for pair in config.sharding:
    if not isinstance(pair, tuple) or len(pair) != 2:
      raise ValueError(
        f"sharding has {pair!r}; it needs pairs of a pattern and a rule, such "
        'as (".*", "split").'
      )
    pattern, rule = pair
    choose("sharding rule", rule, ("split", "replicate"))
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(
        f'sharding pattern "{pattern}" is not a regular expression: {error}.'
      ) from None
