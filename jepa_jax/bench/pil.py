"""What the pipeline is compared with: PIL in worker processes."""

import multiprocessing
from typing import Any

import numpy as np

from jepa_jax import bench, models

_WARM_UP = 4  # batches a round, untimed


class Workers:
  """The usual way: worker processes that open, crop and resize with PIL.

  A task is a batch, as with PyTorch's DataLoader; its images go to the parent
  through shared memory. The chain is RandomResizedCrop, ToTensor, Normalize and
  the collation, each in the fewest passes that NumPy needs for it. It draws no
  masks, which the pipeline does.

  Args:
    config: reads batch_size and data.
    files: JPEGs.
    processes: how many.
  """

  def __init__(self, config: Any, files: list[str], processes: int):
    context = multiprocessing.get_context("spawn")
    size = models.height_and_width(config.data.image_size)
    self._batch_size = config.batch_size
    self._processes, self._slots = processes, 2 * processes + 2
    self._files = files
    shape = (self._slots, self._batch_size, 3, *size)
    self._pool = context.Pool(
      processes,
      _start_worker,
      (context.RawArray("f", int(np.prod(shape))), shape, _plain(config.data)),
    )

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._pool.terminate()
    self._pool.join()

  def time(self, batches: int, *, tensors: bool = True) -> float:
    """Seconds of some batches while all processes are busy.

    Args:
      batches: how many.
      tensors: normalised float32 [B, C, H, W], as the usual chain ends; else
        uint8 [B, H, W, C], as the pipeline does, which leaves ToTensor and
        Normalize out.
    """
    count = _WARM_UP + batches + self._processes
    order = np.random.default_rng(0).permutation(count * self._batch_size)
    order = order.reshape(count, -1) % len(self._files)
    tasks = [
      (number % self._slots, [self._files[i] for i in row], number, tensors)
      for number, row in enumerate(order)
    ]
    results = self._pool.imap(_read_batch, tasks)
    bench.seconds(results, _WARM_UP)
    taken = bench.seconds(results, batches)
    bench.seconds(results, self._processes)
    return taken


def _plain(data: Any) -> dict[str, tuple[float, ...]]:
  keys = ("crop_scale", "crop_ratio", "mean", "std")
  return {key: tuple(data[key]) for key in keys}


_worker: dict[str, Any] = {}  # of one worker process


def _start_worker(
  memory: Any, shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
  out = np.frombuffer(memory, np.float32).reshape(shape)
  _worker.update(out=out, **settings)


def _read_batch(task: tuple[int, list[str], int, bool]) -> None:
  from PIL import Image

  slot, files, seed, tensors = task
  rng = np.random.default_rng(seed)
  out = _worker["out"][slot]
  size = out.shape[2:]
  pixels = out.view(np.uint8).reshape(-1)[: out.size].reshape(-1, *size, 3)
  mean, std = (
    np.asarray(_worker[key], np.float32)[:, None, None]
    for key in ("mean", "std")
  )
  images = []
  for place, file in enumerate(files):
    with Image.open(file) as image:
      image = image.convert("RGB")
      left, top, width, height = random_crop(
        rng, *image.size, _worker["crop_scale"], _worker["crop_ratio"]
      )
      image = image.crop((left, top, left + width, top + height))
      image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    if tensors:
      tensor = np.asarray(image).transpose(2, 0, 1).astype(np.float32, "C")
      tensor /= 255
      tensor -= mean
      tensor /= std
      images.append(tensor)
    else:
      pixels[place] = np.asarray(image)
  if tensors:
    np.stack(images, out=out)


def random_crop(
  rng: np.random.Generator,
  width: int,
  height: int,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Left, top, width and height of a crop, drawn as torchvision draws it.

  One image at a time, in Python, for the comparison alone; the pipeline's is
  data.augment.random_crops.
  """
  for _ in range(10):
    area = width * height * rng.uniform(*scale)
    aspect = np.exp(rng.uniform(*np.log(ratio)))
    w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      left = int(rng.integers(width - w + 1))
      return left, int(rng.integers(height - h + 1)), w, h
  w = min(width, round(height * ratio[1]))
  h = min(height, round(width / ratio[0]))
  return (width - w) // 2, (height - h) // 2, w, h
