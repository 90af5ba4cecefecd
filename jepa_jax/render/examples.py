"""Scenes as examples of a data set, drawn by several processes at once."""

import collections.abc
import json
import os
import pickle
import struct
import subprocess
import sys

import numpy as np

from jepa_jax.render import sampling, shading, world

DEPTH_UNIT = 1 / 2048  # of the uint16 depth map, which thus ends at 32


def example(seed: int, split: str, index: int, image_size: int) -> dict:
  """One image with its annotations, in the features of TFDS's `clevr`.

  Args:
    seed, split, index: which scene.
    image_size: pixels a side. The scene does not depend on it.

  Returns:
    image [H, W, 3] uint8, depth [H, W, 1] uint16 in units of `DEPTH_UNIT`,
    file_name, and objects, a list of dictionaries.
  """
  scene = sampling.sample_scene(seed, split, index)
  image, depth, _ = shading.render(scene, image_size)
  depth = np.minimum(np.rint(depth / DEPTH_UNIT), 65535).astype(np.uint16)
  pixels = world.project(scene.centers, image_size)
  return {
    "image": image,
    "depth": depth[..., None],
    "file_name": f"scenes_{split}_{index:06d}.png",
    "objects": [
      {
        "color": list(world.COLORS)[scene.color[k]],
        "material": world.MATERIALS[scene.material[k]],
        "shape": world.SHAPES[scene.shape[k]],
        "size": list(world.SIZES)[scene.size[k]],
        "rotation": np.float32(scene.rotation[k]),
        "3d_coords": scene.centers[k].astype(np.float32),
        "pixel_coords": pixels[k].astype(np.float32),
      }
      for k in range(len(scene.shape))
    ],
  }


def stream(
  *, seed: int, split: str, count: int, image_size: int, workers: int
) -> collections.abc.Iterator[dict]:
  """Yields `example` 0, 1, ..., count - 1, drawn by other processes.

  The workers are new interpreters, not forks: forking is unsafe once TensorFlow
  has threads. A worker whose reader has ended stops at its next write.

  Args:
    seed, split, image_size: as for `example`.
    count: number of images.
    workers: number of processes; the result does not depend on it.

  Raises:
    RuntimeError: a worker ended early; its own message is on stderr.
  """
  workers = max(1, min(workers, count))
  environment = {
    **os.environ,
    "OPENBLAS_NUM_THREADS": "1",
    # Workers import from where this process does, "" being its folder.
    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
  }
  processes = []
  try:
    for first in range(workers):
      job = [seed, split, first, count, workers, image_size]
      processes.append(
        subprocess.Popen(
          [sys.executable, "-P", "-m", "jepa_jax.render", json.dumps(job)],
          stdin=subprocess.DEVNULL,
          stdout=subprocess.PIPE,
          env=environment,
        )
      )
    for index in range(count):
      process = processes[index % workers]
      header = process.stdout.read(8)
      size = struct.unpack("<Q", header)[0] if len(header) == 8 else -1
      payload = process.stdout.read(max(size, 0))
      if size < 0 or len(payload) != size:
        raise RuntimeError(
          f"the worker that draws scenes stopped at {split} image {index} of "
          f"{count} (exit status {process.wait()}); its message is above."
        )
      yield pickle.loads(payload)
  finally:
    for process in processes:
      process.kill()
      process.stdout.close()
      process.wait()
