"""The table of all keys: default, what each may be, and what it is.

`jepa_jax.config` makes the defaults and the checks of it, `docs/generate.py`
and --help_config the reference. What relates two keys is in config.check.
"""

from jepa_jax import durations, keys

Key, number, whole = keys.Key, keys.number, keys.whole

MOST_PATCHES = 2**14  # of an image; attention scores are its square

_SHARE = number(0.0, 1.0)
_SOME = number(0.0, 1.0, without="least")  # a share above 0
_CHANCE = number(0.0, 1.0, without="most")
_POSITIVE = number(0.0, without="least")
_DECAY = number(0.0)
_RULE = keys.Choice(("split", "replicate"))
_DTYPE = ("float32", "bfloat16")
# A name of a table, or a thing of somebody else's package.
_NAME = keys.Text("a name, or my_package.module:Name", False, r"[\w.:-]+")

# Every key there is: ViT-H/14 as released, on ImageNet-1k.
KEYS: dict[str, keys.Key] = {
  "seed": Key(
    0, whole(0, 2**32 - 1), "of parameters, order, augmentation and masks"
  ),
  "objective": Key("ijepa", _NAME, "what is predicted from what"),
  "batch_size": Key(
    2048, whole(1, 2**20), "images a step, over all devices and processes"
  ),
  "accumulate_steps": Key(
    1, whole(1, 2**20), "microbatches of a batch, one after the other"
  ),
  "total": Key("300 epochs", durations.Span(False, False), "how long to train"),
  "init_from": Key(
    "",
    keys.Text("a path"),
    'weights to start from, see jepa_jax.load; "": random',
  ),
  "init_which": Key(
    "target",
    keys.Choice(("target", "context", "all")),
    "the encoder that goes into both, or all networks into their own",
  ),
  "init_strict": Key(
    True, keys.Flag(), "False leaves what the weights lack as it is"
  ),
  "data.source": Key(
    "tfds",
    keys.Choice(("tfds", "folder", "scenes", "mixture")),
    "where images come from; scenes are rendered",
  ),
  "data.name": Key(
    "imagenet2012",
    keys.Text("a name or a path"),
    'of the TFDS data set, the folder, or "0.7 tfds:NAME + 0.3 folder:DIR"',
  ),
  "data.split": Key(
    "train",
    keys.Text("a split", False),
    'or slices such as "train[:90%]". Of a folder without folders '
    'for its splits "train" leaves out the tenth that "test" is, evaluated or '
    "not, so that an evaluation added later is of images never seen; "
    '"all" is all',
  ),
  "data.label": Key(
    "",
    keys.Text("a name"),
    "that a supervised objective learns; others need none",
  ),
  "data.data_dir": Key(
    "", keys.Text("a path"), 'where TFDS keeps its data; "": its default'
  ),
  "data.num_examples": Key(
    0, whole(0, 10**12), "images an epoch; 0: count them"
  ),
  "data.num_scenes": Key(
    (8000, 2000),
    keys.Group((whole(1, 10**8),) * 2),
    'rendered for train and test ("scenes")',
  ),
  "data.image_size": Key(
    224,
    keys.Sides(whole(1, 16_384, "pixels")),
    "side in pixels, or (height, width), after cropping",
  ),
  "data.channels": Key(
    3,
    whole(1, 1024),
    "1: grey, 3: colour, to which images are converted; of any other number an "
    "image must have as many, alpha included",
  ),
  "data.background": Key(
    (1.0, 1.0, 1.0),
    keys.Group((_SHARE,) * 3),
    "red, green and blue behind what is transparent in an image",
  ),
  "data.range": Key(
    "full",
    keys.Text(
      '"full", "file" or a number', False, r"full|file|0*[1-9]\d{0,9}(\.\d*)?"
    ),
    "what becomes 0 to 255 of more than 8 bits: full, the type's range (0 to 1 "
    'of floats); file, from each one\'s least value to its greatest; "4095", '
    "from 0 to it",
  ),
  "data.max_mib": Key(
    192.0,
    number(0.0, 2.0**20, without="least", unit="MiB"),
    "that an image's file has, and decodes to, at most",
  ),
  "data.mean": Key(
    (0.485, 0.456, 0.406),
    keys.Many(_SHARE, 1),
    "a channel, on a scale of 0 to 1",
  ),
  "data.std": Key(
    (0.229, 0.224, 0.225),
    keys.Many(_POSITIVE, 1),
    "a channel, on the same scale",
  ),
  "data.crop_scale": Key(
    (0.3, 1.0),
    keys.Group((_SOME,) * 2, ordered=True),
    "share of the image's area, min and max",
  ),
  "data.crop_ratio": Key(
    (3 / 4, 4 / 3),
    keys.Group((number(0.01, 100.0),) * 2, ordered=True),
    "width over height, min and max, relative to image_size's",
  ),
  "data.flip": Key(False, keys.Flag(), "mirrors half of the images"),
  "data.color_jitter": Key(0.0, number(0.0, 10.0), "strength; 0: off"),
  "data.blur": Key(0.0, _SHARE, "probability of a Gaussian blur"),
  "data.grayscale": Key(
    0.0, _SHARE, "probability of grey; .2 at least with colour jitter"
  ),
  "data.solarize": Key(
    0.0, _SHARE, "probability that the brighter half of the scale is inverted"
  ),
  "data.rand_augment": Key(
    (0, 9.0),
    keys.Group((whole(0, 16), number(0.0, 10.0))),
    "RandAugment: operations an image, 0 for none, and their strength of 0 to "
    "10; MAE's fine-tuning has (2, 9.0)",
  ),
  "data.local_scale": Key(
    (0.05, 0.3),
    keys.Group((_SOME,) * 2, ordered=True),
    "share of the image's area in a local view, min and max, of methods that "
    "have them",
  ),
  "data.max_unreadable": Key(
    100, whole(0, 10**9), "images skipped before the run stops"
  ),
  "data.prefetch": Key(2, whole(1, 1024), "batches that wait for the device"),
  "data.threads": Key(0, whole(0, 4096), "of the pipeline; 0: one a core"),
  "masks.name": Key("released", _NAME, "the sampler, see masks.SAMPLERS"),
  "masks.num_contexts": Key(1, whole(1, 64), "context blocks an image"),
  "masks.num_targets": Key(4, whole(1, 64), "target blocks an image"),
  "masks.context_scale": Key(
    (0.85, 1.0),
    keys.Group((_SOME,) * 2, ordered=True),
    "share of the grid's area, min and max",
  ),
  "masks.target_scale": Key(
    (0.15, 0.2),
    keys.Group((_SOME,) * 2, ordered=True),
    "share of the grid's area, min and max",
  ),
  "masks.aspect_ratio": Key(
    (0.75, 1.5),
    keys.Group((number(0.01, 100.0),) * 2, ordered=True),
    "of targets, height over width",
  ),
  "masks.allow_overlap": Key(
    False, keys.Flag(), "of the context with the targets"
  ),
  "masks.min_keep": Key(
    10, whole(0, MOST_PATCHES), "patches that a context must have"
  ),
  "masks.context_patches": Key(
    0,
    whole(0, MOST_PATCHES),
    "K; 0: what the released recipe trains on",
  ),
  "encoder.width": Key(
    1280,
    whole(4, 2**16),
    "features a patch; models.SIZES has others' numbers",
  ),
  "encoder.depth": Key(32, whole(1, 256), "blocks"),
  "encoder.num_heads": Key(
    16, whole(1, 2**14), "of attention, that share the width"
  ),
  "encoder.mlp_ratio": Key(
    4.0, number(0.01, 64.0), "hidden features over width"
  ),
  "encoder.patch_size": Key(14, whole(1, 1024), "pixels"),
  "encoder.dropout": Key(0.0, _CHANCE, "probability, in every block"),
  "encoder.drop_path": Key(0.0, _CHANCE, "stochastic depth of the last block"),
  "encoder.class_token": Key(
    False, keys.Flag(), "a learned token for the whole image; I-JEPA has none"
  ),
  "encoder.registers": Key(0, whole(0, 1024), "learned tokens besides"),
  "predictor.width": Key(384, whole(4, 2**16), "features a patch"),
  "predictor.depth": Key(12, whole(1, 256), "blocks"),
  "predictor.num_heads": Key(
    16, whole(1, 2**14), "of attention, that share the width"
  ),
  "predictor.mlp_ratio": Key(
    4.0, number(0.01, 64.0), "hidden features over width"
  ),
  "loss": Key(
    "smooth_l1", keys.Choice(("smooth_l1", "l2")), "of the predictions"
  ),
  "optimizer.warmup": Key(
    "40 epochs", durations.Span(), "lr rises linearly from lr_start"
  ),
  "optimizer.lr_start": Key(2e-4, _DECAY, "learning rate of the first step"),
  "optimizer.lr": Key(1e-3, _DECAY, "learning rate at the end of the warm-up"),
  "optimizer.lr_end": Key(
    1e-6, _DECAY, "of the last step, reached along a cosine"
  ),
  "optimizer.weight_decay_start": Key(0.04, _DECAY, "of the first step"),
  "optimizer.weight_decay_end": Key(0.4, _DECAY, "of the last step"),
  "optimizer.weight_decay_shape": Key(
    "cosine",
    keys.Choice(("cosine", "linear")),
    "how it goes from start to end",
  ),
  "optimizer.b1": Key(0.9, _CHANCE, "decay of the first moment"),
  "optimizer.b2": Key(0.999, _CHANCE, "decay of the second moment"),
  "optimizer.eps": Key(
    1e-8, _POSITIVE, "added to the root of the second moment"
  ),
  "optimizer.mu_dtype": Key(
    "float32", keys.Choice(_DTYPE), "of the first moment"
  ),
  "optimizer.clip_norm": Key(
    0.0, _DECAY, "global norm of the gradient; 0: no clipping"
  ),
  "optimizer.lr_scale": Key(
    (),
    keys.Many(keys.Group((keys.Pattern(), _DECAY), False, '("encoder", 0.1)')),
    "(pattern of a parameter's path, factor of its learning rate and decay), "
    'the first that matches: (("encoder/patch_embed", 0.0),) keeps it as it is',
  ),
  "momentum": Key(
    (0.996, 1.0),
    keys.Group((_SHARE,) * 2),
    "of the target encoder, start and end; linear",
  ),
  "compute.dtype": Key(
    "bfloat16", keys.Choice(_DTYPE), "of activations; parameters are float32"
  ),
  "compute.scan": Key(
    True, keys.Flag(), "one compiled block for all; False unrolls"
  ),
  "compute.remat": Key(
    "none",
    keys.Choice(("none", "products", "dots", "full")),
    "what the backward pass computes again to save memory, besides GELU and "
    "LayerNorm, which it always does: products is all but matrix products, "
    "dots all but products with weights",
  ),
  "compute.remat_every": Key(1, whole(1, 256), "in every n-th block"),
  "compute.attention": Key(
    "xla",
    keys.Choice(("xla", "pallas", "cudnn")),
    "pallas is one kernel on a TPU (compiled for TPUs, not run on one) and xla "
    "elsewhere; cudnn needs NVIDIA GPUs and 16 bits",
  ),
  "compute.cache": Key(
    "auto",
    keys.Text("a folder, or auto"),
    'what XLA has compiled is kept there for the next start; "auto": '
    '$XDG_CACHE_HOME/jepa_jax, or ~/.cache/jepa_jax; "": nowhere',
  ),
  "mesh.data": Key(-1, whole(1, 2**20, also=(-1,)), "splits the batch"),
  "mesh.fsdp": Key(
    1,
    whole(1, 2**20, also=(-1,)),
    "splits the batch, parameters and their moments",
  ),
  "sharding": Key(
    (
      (r"(bias|scale|mask_token|count|step)$", "replicate"),
      (".*", "split"),
    ),
    keys.Many(
      keys.Group((keys.Pattern(), _RULE), False, '(".*", "split")'),
      1,
    ),
    '(pattern of a parameter\'s path, "split" over fsdp or "replicate"), the '
    "first that matches; the moving average and the moments follow",
  ),
  "log_every": Key("50 steps", durations.Span(), "a row of the log"),
  "checkpoint.every": Key(
    "1 epochs", durations.Span(), "besides the one at the end; 0: that alone"
  ),
  "checkpoint.keep": Key(2, whole(1, 10**6), "newest ones"),
  "checkpoint.keep_best": Key(
    1, whole(0, 10**6), "best ones by `best_metric`; 0: none"
  ),
  "checkpoint.best_metric": Key(
    "",
    keys.Text("a row, evaluation/protocol/features"),
    '"count/linear/last"; "": the first linear one',
  ),
  "checkpoint.resume": Key(
    True, keys.Flag(), "go on from the newest one in the workdir"
  ),
  "profile.start": Key(
    0, whole(0, 10**9), "begins when so many steps are done; 0: no trace"
  ),
  "profile.steps": Key(3, whole(1, 10**6), "that it covers"),
  "collapse.feature_std": Key(
    0.01, _DECAY, "at least; over images, mean of features"
  ),
  "collapse.effective_rank": Key(
    1.5, _DECAY, "at least; of a batch's pooled features"
  ),
  "collapse.mean_cosine": Key(
    0.9995, number(-1.0, 1.0), "at most; between different images"
  ),
  "evaluate_every": Key("0 steps", durations.Span(), "0: at the end alone"),
}
_WEIGHT = number(0.0, 1e6)
# Of the default objective, under `method`. They are not in its file, for that
# imports JAX.
IJEPA: dict[str, keys.Key] = {
  "position_noise": Key(
    0.0,
    number(0.0, 100.0),
    "standard deviation of noise on the targets' positions (StoP; .25 there)",
  ),
  "context_grayscale": Key(
    0.0, _SHARE, "probability that the context, not the targets, is grey"
  ),
  "target_layers": Key(
    1, whole(1, 256), "last blocks of the target encoder that are averaged"
  ),
  "target_sees": Key(
    "image",
    keys.Choice(("image", "block")),
    "what the target encoder is given: the image, or each block alone",
  ),
  "target_norm": Key(
    "layer",
    keys.Choice(("layer", "position", "none")),
    "of the targets: layer norm as released; or each feature standardised over "
    "the batch, position by position",
  ),
  "variance": Key(
    0.0,
    _WEIGHT,
    "weight of a hinge on standard deviations, over the batch, of the averaged "
    "context features; 0: off",
  ),
  "covariance": Key(
    0.0, _WEIGHT, "weight of the same features' squared covariances; 0: off"
  ),
  "sigreg": Key(
    0.0,
    _WEIGHT,
    "weight of their distance from a standard normal distribution; 0: off",
  ),
}
# What is said of a group of keys.
GROUPS = {
  "optimizer": "AdamW",
  "mesh": "devices an axis; -1: the rest",
  "profile": "a trace into the workdir's profile/",
  # They mean "look now", so they lie well outside of what healthy runs show,
  # and of what random ViTs show on 128 images of scenes and Fashion-MNIST.
  "collapse": "the log and the report raise an alarm past these, which lie "
  "well outside of what healthy runs and random ViTs show: standard deviation "
  ".05 to .08, effective rank 6 to 47, cosine .990 to .996 (all images share "
  "their positions, hence the strict limit)",
  "method": "keys of the objective's own",
  "evaluations": "evaluations of the target encoder: name -> `evaluation(...)`",
}
# The keys of one of config.evaluations, beside `data` with keys of config.data.
EVALUATION: dict[str, keys.Key] = {
  "label": Key("label", keys.Text("a name"), "a feature of the data set"),
  "train": Key("train", keys.Text("a split", False), "what is learned from"),
  "test": Key("test", keys.Text("a split", False), "what is scored on"),
  "protocols": Key(
    ("linear", "knn"), keys.Many(_NAME, 1), "rows of evaluation.protocols"
  ),
  "features": Key(
    ("last", "last4"), keys.Many(_NAME, 1), "layers that are pooled"
  ),
  "baselines": Key(
    ("random", "pixels"), keys.Many(_NAME), "what stands beside it"
  ),
}
