"""Speed of the mask samplers in TensorFlow."""

from collections.abc import Callable
import itertools

from jepa_jax import bench

# What a sampler cannot do without beside the released settings.
_SETTINGS = {"rasterized": {"num_targets": 3}}


def measure(
  samplers: list[str],
  grids: list[tuple[int, int]],
  *,
  batch_size: int = 128,
  rounds: int = 7,
  batches: int = 100,
) -> list[bench.Row]:
  """Speed of mask samplers in TensorFlow, with one thread.

  Args:
    samplers: names; empty for all, with the released settings.
    grids: (H, W) each, in patches.
    batch_size: images a batch.
    rounds: how often each is timed.
    batches: timed a round.

  Returns:
    A row for each sampler and grid.

  Raises:
    ValueError: a sampler is unknown or finds no legal mask.
  """
  import tensorflow as tf

  from jepa_jax import config as config_lib
  from jepa_jax import masks as masks_lib
  from jepa_jax.data import tf_masks

  names = samplers or list(masks_lib.SAMPLERS)
  turns: dict[tuple[str, tuple[int, int]], Callable[[], float]] = {}
  num_targets = {}
  for name, grid in itertools.product(names, grids):
    here = config_lib.defaults().masks
    here.update(_SETTINGS.get(name, {}), name=name)
    num_targets[name] = masks_lib.mask_shapes(here, grid).num_targets

    def draw(step, here=here, grid=grid):
      index = step * batch_size + tf.range(batch_size, dtype=tf.int64)
      return tf_masks.sample(
        here, grid, seed=0, step=step, epoch=0, index=index
      )

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    # Nothing runs ahead, so that nothing runs in another sampler's turn.
    dataset = tf.data.Dataset.range(2**40).map(
      tf.autograph.experimental.do_not_convert(draw)
    )
    iterator = iter(dataset.with_options(options))
    turns[name, grid] = lambda i=iterator: bench.seconds(i, batches)
  seconds = bench.in_turns(turns, rounds)
  return [
    {
      "sampler": name,
      "grid": f"{grid[0]}x{grid[1]}",
      "images_per_second": batches * batch_size / seconds[name, grid],
      "cores": 1,
      "batch_size": batch_size,
      "num_targets": num_targets[name],
      "rounds": rounds,
    }
    for name, grid in turns
  ]
