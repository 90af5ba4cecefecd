"""What the compiler of TPUs makes of the code; needs libtpu and no TPU.

libtpu is opened in processes of their own, one at a time: all of these tests
are in this file.
"""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import test_program

from jepa_jax.planning import estimate

pytestmark = pytest.mark.tpu

_LEFT_OUT = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")

EXPERIMENT = """
from jepa_jax import config as config_lib
def get_config():
  c = config_lib.defaults()
  c.batch_size = 16
  c.total = "6 steps"
  c.optimizer.warmup = "2 steps"
  c.data.num_examples = 64
  c.data.image_size = 64
  c.masks.min_keep = 2
  c.encoder.update(width=512, depth=3, num_heads=4)
  c.encoder.patch_size = 8
  c.predictor.update(width=256, depth=4, num_heads=2)
  c.mesh.fsdp = 4
  return c
"""


OTHER_IMAGES = (  # wide ones, of a satellite
  "--config.data.image_size=(48, 96)",
  "--config.data.channels=5",
  "--config.data.mean=(0.1, 0.2, 0.3, 0.4, 0.5)",
  "--config.data.std=(0.2, 0.2, 0.2, 0.2, 0.2)",
)


def run_python(*arguments, **variables):
  return subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    text=True,
    # Nothing of what makes the other tests quick.
    env={k: v for k, v in os.environ.items() if k not in _LEFT_OUT} | variables,
  )


def run_plan(tmp_path, *flags, **variables):
  experiment = tmp_path / "small.py"
  experiment.write_text(EXPERIMENT)
  return run_python(
    "-m", "jepa_jax.plan", "--config", str(experiment), *flags, **variables
  )


@pytest.mark.parametrize(
  "objective, images, channels",
  [("pixel_ijepa", OTHER_IMAGES, 5), (test_program.OUTSIDE, (), 3)],
)
def test_every_objective_is_planned_with_all_that_its_state_holds(
  tmp_path, objective, images, channels
):
  flags = ["--topology", "v5e:2x2", "--json", *images]
  flags += [f"--config.objective={objective}"]
  paths = os.pathsep.join(p for p in ["tests", *sys.path] if p)
  done = run_plan(tmp_path, *flags, PYTHONPATH=paths)
  assert done.returncode == 0, done.stderr
  (row,) = json.loads(done.stdout)
  assert row["fits"] and row["bound_seconds"] > 0
  outside = objective == test_program.OUTSIDE
  assert (row["flops_ratio"] is None) == outside
  assert outside or 1 < row["flops_ratio"] < 1.3
  # Parameters and two moments of what is trained, and once what is frozen; a
  # chip has a quarter of each, and little beside.
  encoder = 4 * (3 * 12 * 512**2 + channels * 64 * 512)
  predictor = 4 * (4 * 12 * 256**2 + 512 * 256 + channels * 64 * 256)
  state = (3 + 1) * encoder if outside else 3 * (encoder + predictor)
  assert row["argument_bytes"] == pytest.approx(state / 4, rel=0.1)


@pytest.mark.parametrize("attention", ["xla", "pallas"])
def test_weights_travel_once_a_pass_in_bfloat16_and_nothing_else(
  tmp_path, attention
):
  flag = f"--config.compute.attention={attention}"
  dump = f"--xla_dump_to={tmp_path} --xla_dump_hlo_module_re=jit_step"
  options = "--topology", "v5e:2x2", "--json", flag
  done = run_plan(tmp_path, *options, XLA_FLAGS=dump)
  assert done.returncode == 0, done.stderr
  (row,) = json.loads(done.stdout)
  # What the compiler itself reports, of this step and of the shallow ones: main
  # memory, where gaps between buffers count, and the chip's own.
  main, own = (
    [
      int(re.search(rf"{space} .*\nTotal bytes: (\d+)", path.read_text())[1])
      for path in tmp_path.glob("*memory-usage-report.txt")
    ]
    for space in ("default", "vmem")
  )
  assert len(main) == 4
  assert 0.9 * max(main) < row["total_bytes"] < max(main) + max(own)
  # At the least, the state is read once.
  assert row["argument_bytes"] < row["memory_bytes"] < row["bytes_accessed"]
  assert row["fits"] and row["chips"] == 4 and row["note"] == estimate.NOTE
  moved = {(c["kind"], c["dtype"]): c["bytes"] for c in row["collectives"]}
  kernels = lambda width, depth: depth * 12 * width**2
  patches, joints = 8 * 8 * 3 * 512, 2 * 512 * 256
  # The target encoder's pass, the context's and the predictor's, and back. What
  # lies outside the loops is gathered once: the predictor's first and last
  # block, and what is no block.
  gathered = 3 * kernels(512, 3) + 2 * kernels(256, 2) + kernels(256, 2)
  gathered += 2 * patches + joints
  encoder = kernels(512, 3) + patches
  predictor = kernels(256, 4) + joints
  share = 2 * 3 / 4
  assert moved.pop(("all-gather", "bf16")) == pytest.approx(
    share * gathered, rel=0.02
  )
  assert moved.pop(("reduce-scatter", "bf16")) == pytest.approx(
    share * (encoder + predictor), rel=0.02
  )
  assert sum(moved.values()) < 0.02 * share * gathered


def test_the_compiler_knows_every_topology_that_search_may_try():
  code = """
import json
from jepa_jax.planning import topologies
print(json.dumps({
  f"{family}:{shape}": len(topologies.devices_of(f"{family}:{shape}"))
  for family, shapes in topologies.TOPOLOGIES.items()
  if family.startswith(("v", "tpu")) for shape in shapes
}))
"""
  done = run_python("-c", code)
  assert done.returncode == 0, done.stderr[-3000:]
  for topology, devices in json.loads(done.stdout).items():
    family, _, shape = topology.partition(":")
    chips_there = math.prod(int(n) for n in shape.split("x"))
    assert devices == chips_there * (2 if family == "tpu7x" else 1), topology


def test_programs_that_only_libtpu_can_read_are_planned(tmp_path):
  flags = "--topology", "v6e:2x2", "--topology", "tpu7x:2x2x1", "--json"
  done = run_plan(tmp_path, *flags)
  assert done.returncode == 0, done.stderr[-3000:]
  for row in json.loads(done.stdout):
    moved = {(c["kind"], c["dtype"]): c["bytes"] for c in row["collectives"]}
    kernels = 12 * (3 * 512**2 + 4 * 256**2)
    # Forward and backward, and forward through the target encoder.
    least = (3 / 4) * 2 * (2 * kernels + 12 * 3 * 512**2)
    assert row["fits"] and moved["all-gather", "bf16"] > 0.9 * least
    assert row["argument_bytes"] < row["memory_bytes"] < row["bytes_accessed"]


KERNELS = """
import jax, jax.numpy as jnp
from jepa_jax.models.kernels import tpu
from jepa_jax.planning import topologies

for topology in ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"):
  place = jax.sharding.SingleDeviceSharding(topologies.devices_of(topology)[0])
  # ViT-H/14's predictor, whole and its last block, context and target encoder,
  # whole and its last block; ViT-g/16's context encoder.
  for b, n, heads, width, queries in (
    (128, 123, 16, 384, None),
    (128, 123, 16, 384, 54),
    (32, 69, 16, 1280, None),
    (32, 256, 16, 1280, None),
    (32, 256, 16, 1280, 216),
    (32, 50, 16, 1408, None),
  ):
    spec = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
      shape, dtype, sharding=place
    )
    def both(qkv, valid, query, dy):
      y = tpu.fused_forward(qkv, valid, query, heads=heads)
      return y, tpu.fused_backward(qkv, valid, query, dy, heads=heads)
    valid = spec(b, n, dtype=bool)
    query = spec(b, queries, width) if queries else None
    qkv = spec(b, n, (2 if queries else 3) * width)
    dy = spec(b, queries or n, width)
    jax.jit(both).lower(qkv, valid, query, dy).compile()
  print(topology)
"""


def test_the_attention_kernel_compiles_for_every_generation():
  done = run_python("-c", KERNELS)
  assert done.returncode == 0, done.stderr[-3000:]
  assert done.stdout.split() == [
    "v4:2x2x1",
    "v5e:2x2",
    "v5p:2x2x1",
    "v6e:2x2",
    "tpu7x:2x2x1",
  ]


MESH = """
from jepa_jax import config as config_lib
from jepa_jax.planning import topologies
from jepa_jax.training import sharding

axes = config_lib.defaults().mesh
axes.fsdp = 8
mesh = sharding.make_mesh(axes, topologies.devices_of("v5p:4x4x4"))
chips = {tuple(device.coords) for device in mesh.devices.flat}
print(*mesh.shape.values(), len(chips))
"""


def test_a_mesh_may_split_the_axes_of_a_torus():
  done = run_python("-c", MESH)
  assert done.stdout.split() == ["8", "8", "64"], done.stderr[-3000:]


def test_an_unknown_topology_is_answered_with_the_known_ones(tmp_path):
  done = run_plan(tmp_path, "--topology", "v5e:3x5")
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1 and "v5e:8x8" in done.stderr


def test_what_does_not_fit_says_how_much_it_needs(tmp_path):
  done = run_plan(
    tmp_path,
    "--topology=v5e:2x2",
    "--config.batch_size=65536",
    "--json",
  )
  (row,) = json.loads(done.stdout)
  assert not row["fits"]
  assert row["total_bytes"] > row["hbm_bytes"] > 15 * 2**30
