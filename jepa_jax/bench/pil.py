"""What the pipeline is compared with: PIL in worker processes."""

import multiprocessing
from typing import Any

import numpy as np

from jepa_jax import bench

_WARM_UP = 4  # batches a round, untimed


class Workers:
  """The usual way: worker processes that open, crop and resize with PIL.

  A task is a batch, as with PyTorch's DataLoader; its images go to the parent
  through shared memory.
  """

  def __init__(self, config: Any, files: list[str], processes: int):
    context = multiprocessing.get_context("spawn")
    size, self._batch_size = config.data.image_size, config.batch_size
    self._processes, self._slots = processes, 2 * processes + 2
    self._files = files
    shape = (self._slots, self._batch_size, size, size, 3)
    self._pool = context.Pool(
      processes,
      _start_worker,
      (
        context.RawArray("B", int(np.prod(shape))),
        shape,
        tuple(config.data.crop_scale),
        tuple(config.data.crop_ratio),
      ),
    )

  def __enter__(self) -> "Workers":
    return self

  def __exit__(self, *unused: Any) -> None:
    self._pool.terminate()
    self._pool.join()

  def time(self, batches: int) -> float:
    """Seconds of some batches while all processes are busy."""
    count = _WARM_UP + batches + self._processes
    order = np.random.default_rng(0).permutation(count * self._batch_size)
    order = order.reshape(count, -1) % len(self._files)
    tasks = [
      (number % self._slots, [self._files[i] for i in row], number)
      for number, row in enumerate(order)
    ]
    results = self._pool.imap(_read_batch, tasks)
    bench.seconds(results, _WARM_UP)
    taken = bench.seconds(results, batches)
    bench.seconds(results, self._processes)
    return taken


_worker: dict[str, Any] = {}  # of one worker process


def _start_worker(
  memory: Any,
  shape: tuple[int, ...],
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> None:
  out = np.frombuffer(memory, np.uint8).reshape(shape)
  _worker.update(out=out, scale=scale, ratio=ratio)


def _read_batch(task: tuple[int, list[str], int]) -> None:
  from PIL import Image

  slot, files, seed = task
  rng = np.random.default_rng(seed)
  out = _worker["out"][slot]
  size = out.shape[1:3]
  for place, file in enumerate(files):
    with Image.open(file) as image:
      image = image.convert("RGB")
      left, top, width, height = random_crop(
        rng, *image.size, _worker["scale"], _worker["ratio"]
      )
      image = image.crop((left, top, left + width, top + height))
      out[place] = np.asarray(image.resize(size, Image.Resampling.BILINEAR))


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


def has_pillow() -> bool:
  try:
    import PIL.Image  # noqa: F401
  except ImportError:
    return False
  return True
