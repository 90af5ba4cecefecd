"""Speed of the input pipeline, and time to its first batch."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import tempfile
import time
from typing import Any

import numpy as np

from jepa_jax import bench
from jepa_jax.bench import pil as pil_lib

IMAGENET = 1_281_167  # images an epoch, of `resume`
RESUME_STEP = 100_000
JPEG_HEIGHT, JPEG_WIDTH, JPEG_QUALITY = 375, 500, 90
SHARDS = 1024  # of the simulated data set, as TFDS has for ImageNet
# Batches a round that fill the pipeline, untimed. Even, as those timed should
# be: the pipeline decodes two at a time.
_WARM_UP = 4


def measure(
  config: Any | None,
  *,
  cores: int,
  images: int = 512,
  batch_size: int = 128,
  rounds: int = 5,
  batches: int = 8,
) -> list[bench.Row]:
  """Speed of the input pipeline, with masks, beside others on the same cores:

  - "pil": PIL and the usual Python transforms to normalised float32, in worker
    processes. The pipeline leaves normalising to the device.
  - "pil_uint8": the same without ToTensor and Normalize.
  - "decode": the pipeline's crops decoded, nothing else: the limit.

  Args:
    config: whose pipeline to time; None for generated JPEGs of 500 x 375
      pixels, cropped to 224, and the comparison.
    cores: threads of the pipeline and decoder, and processes of PIL; limiting
      this process to as many cores is the caller's business.
    images: JPEGs to generate.
    batch_size: images a batch; a config brings its own.
    rounds: how often each is timed.
    batches: timed a round.

  Returns:
    A row a reader, "pipeline" and those above; "decode_share" is the share of
    the pipeline's time that decoding takes.

  Raises:
    ValueError: the config's data cannot be read.
  """
  from jepa_jax import config as config_lib

  with contextlib.ExitStack() as stack:
    turns: dict[str, Callable[[], float]] = {}
    if config is None:
      config = config_lib.defaults()
      config.batch_size = batch_size
      config.data.source = "folder"
      config.data.name = stack.enter_context(tempfile.TemporaryDirectory())
      config.data.threads = cores
      files = write_jpegs(pathlib.Path(config.data.name), images)
      turns["pipeline"] = lambda: _time_pipeline(config, batches)
      turns["decode"] = _decode_turn(config, files, batches, cores)
      pil = stack.enter_context(pil_lib.Workers(config, files, cores))
      turns["pil"] = lambda: pil.time(batches)
      turns["pil_uint8"] = lambda: pil.time(batches, tensors=False)
    else:
      config = config.copy_and_resolve_references()
      with config.unlocked():
        config.data.threads = config.data.threads or cores
      turns["pipeline"] = lambda: _time_pipeline(config, batches)
    seconds = bench.in_turns(turns, rounds)
  rows = []
  for reader in turns:
    rate = batches * config.batch_size / seconds[reader]
    row = {
      "reader": reader,
      "images_per_second": rate,
      "images_per_second_per_core": rate / cores,
      "cores": cores,
      "batch_size": config.batch_size,
      "image_size": config.data.image_size,
      "rounds": rounds,
    }
    if len(turns) > 1:
      for other in ("pil", "pil_uint8"):
        row[f"times_{other}"] = seconds[other] / seconds[reader]
      if reader == "pipeline":
        row["decode_share"] = seconds["decode"] / seconds["pipeline"]
    rows.append(row)
  return rows


def resume(
  *,
  batch_size: int = 128,
  records: int = IMAGENET,
  step: int = RESUME_STEP,
) -> list[bench.Row]:
  """Time to the first batch of a run that goes on in mid-epoch.

  The data set is as many records as ImageNet has, in as many files as TFDS
  gives it; the images are of 8 x 8 pixels. Everything from opening it counts.

  Args:
    batch_size: images a batch.
    records: images an epoch.
    step: where to go on.

  Returns:
    A row each for a first start, which makes the index of the files, for the
    same step with that index kept, and for step 0.
  """
  from jepa_jax import config as config_lib

  rows = []
  with tempfile.TemporaryDirectory() as folder:
    _write_records(pathlib.Path(folder), records)
    config = config_lib.defaults()
    config.batch_size = batch_size
    config.data.name = "simulated"
    config.data.data_dir = folder
    with _cache_in(folder):  # the index goes with the records
      for what, start in (("first", step), ("again", step), ("step 0", 0)):
        began = time.perf_counter()
        dataset = _open(config, start)
        next(dataset.as_numpy_iterator())
        rows.append(
          {
            "start": what,
            "step": start,
            "first_batch_seconds": time.perf_counter() - began,
            "records": records,
            "batch_size": batch_size,
          }
        )
  return rows


def listing(files: int, *, folders: int = 1000) -> list[bench.Row]:
  """Time to open a folder of many images, in sub-folders, and again.

  The images are hard links to an empty file a sub-folder, for only names are
  read. The tree is fresh, so the kernel has it in its cache.

  Args:
    files: images in all, a multiple of folders.
    folders: sub-folders.

  Returns:
    A row each for the first start, which lists the files, and for the next,
    which looks at the folders alone (where listing took over a second, and so
    was kept).
  """
  from jepa_jax.data import folder as folder_lib

  rows = []
  with tempfile.TemporaryDirectory() as root:
    images = pathlib.Path(root, "images")
    for number in range(folders):
      folder = images / f"n{number:08}"
      folder.mkdir(parents=True)
      first = folder / "0.JPEG"
      first.touch()
      for i in range(1, files // folders):
        os.link(first, folder / f"n{number:08}_{i}.JPEG")
    with _cache_in(root):
      for what in ("first", "again"):
        began = time.perf_counter()
        found = len(folder_lib.FolderSource(str(images)))
        seconds = time.perf_counter() - began
        rows.append({"start": what, "files": found, "seconds": seconds})
  return rows


@contextlib.contextmanager
def _cache_in(folder: str) -> Iterator[None]:
  """Keeps indices and listings in a folder meanwhile."""
  before = os.environ.get("XDG_CACHE_HOME")
  os.environ["XDG_CACHE_HOME"] = folder
  try:
    yield
  finally:
    if before is None:
      del os.environ["XDG_CACHE_HOME"]
    else:
      os.environ["XDG_CACHE_HOME"] = before


def _time_pipeline(config: Any, batches: int) -> float:
  """Seconds of some batches of a pipeline that is opened for them alone."""

  iterator = _open(config).as_numpy_iterator()
  bench.seconds(iterator, _WARM_UP)
  taken = bench.seconds(iterator, batches)
  del iterator  # ends its threads before another's turn
  return taken


def _open(config: Any, start_step: int = 0) -> Any:
  """The pipeline of a config, from a step on."""
  from jepa_jax import objectives
  from jepa_jax.data import pipeline

  objective = objectives.load(config.objective).from_config(config)
  spec = objective.batch_spec(config.batch_size)
  return pipeline.train_dataset(config, spec, start_step=start_step)


def _decode_turn(
  config: Any, files: list[str], batches: int, cores: int
) -> Callable[[], float]:
  """Times the pipeline's first crops, decoded and nothing else."""
  import tensorflow as tf

  from jepa_jax.data import augment, order
  from jepa_jax.data import headers as headers_lib

  positions = np.arange(batches * config.batch_size)
  epoch, index = order.permuted(positions, len(files), config.seed)
  encoded = [pathlib.Path(files[i]).read_bytes() for i in index]
  headers = [headers_lib.read_header(x) for x in encoded]
  crops = augment.random_crops(
    config.data,
    np.asarray([(x.height, x.width) for x in headers]),
    np.ones(len(index), int),
    seed=config.seed,
    epoch=epoch,
    index=index,
  )

  def decode_one(data, box):
    return tf.image.decode_and_crop_jpeg(data, box, channels=3)[0, 0]

  options = tf.data.Options()
  options.threading.private_threadpool_size = cores
  options.threading.max_intra_op_parallelism = 1
  dataset = tf.data.Dataset.from_tensor_slices((encoded, crops.boxes))
  dataset = dataset.map(decode_one, num_parallel_calls=cores)
  dataset = dataset.batch(config.batch_size).with_options(options)
  return lambda: bench.seconds(iter(dataset), batches)


def write_jpegs(folder: pathlib.Path, count: int) -> list[str]:
  """Writes JPEGs that compress like photographs: 1/f noise over gradients."""
  import tensorflow as tf

  rng = np.random.default_rng(0)
  shape = (JPEG_HEIGHT, JPEG_WIDTH)
  rows = np.fft.fftfreq(shape[0])[:, None] * shape[0]
  columns = np.fft.rfftfreq(shape[1]) * shape[1]
  envelope = 1.0 / np.maximum(np.hypot(rows, columns), 1.0)
  fields = []
  for _ in range(8):
    spectrum = np.fft.rfft2(rng.normal(size=shape)) * envelope
    field = np.fft.irfft2(spectrum, shape)
    fields.append((field / field.std()).astype(np.float32))
  down, right = np.meshgrid(
    *(np.linspace(-1, 1, n) for n in shape), indexing="ij"
  )
  files = []
  for number in range(count):
    slope = rng.normal(size=(3, 2)) * 25
    image = np.empty((*shape, 3), np.float32)
    turn = rng.integers(0, shape)
    light = np.roll(fields[rng.integers(8)], turn, (0, 1)) * 45
    for i in range(3):  # channels share most of their structure
      tint = np.roll(fields[rng.integers(8)], turn, (0, 1)) * 10
      gradient = slope[i, 0] * down + slope[i, 1] * right
      image[..., i] = 120 + light + tint + gradient
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    path = folder / f"{number:06}.jpg"
    encoded = tf.io.encode_jpeg(pixels, quality=JPEG_QUALITY)
    path.write_bytes(encoded.numpy())
    files.append(str(path))
  return files


def _write_records(root: pathlib.Path, count: int) -> None:
  """Writes a TFDS data set "simulated" of small PNGs, in TFRecord files."""
  import tensorflow as tf
  import tensorflow_datasets as tfds

  features = tfds.features.FeaturesDict(
    {"image": tfds.features.Image(shape=(8, 8, 3), encoding_format="png")}
  )
  folder = root / "simulated" / "1.0.0"
  folder.mkdir(parents=True)
  example = features.serialize_example(
    {"image": np.arange(192, dtype=np.uint8).reshape(8, 8, 3)}
  )
  one = str(root / "one.tfrecord")
  with tf.io.TFRecordWriter(one) as writer:
    writer.write(example)
  record = pathlib.Path(one).read_bytes()
  edges = np.linspace(0, count, SHARDS + 1).astype(int)
  lengths = np.diff(edges).tolist()
  for number, length in enumerate(lengths):
    name = f"simulated-train.tfrecord-{number:05}-of-{SHARDS:05}"
    (folder / name).write_bytes(record * length)
  split = tfds.core.SplitInfo(
    name="train", shard_lengths=lengths, num_bytes=len(record) * count
  )
  tfds.folder_dataset.write_metadata(
    data_dir=str(folder),
    features=features,
    split_infos=[split],
    filename_template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
  )
