"""What the compiler of NVIDIA GPUs makes of the code; needs no GPU."""

import math
import os
import re
import subprocess
import sys

import conftest
import jax
import jax.numpy as jnp
import PIL.Image
import pytest

from jepa_jax import command
from jepa_jax.models.kernels import gpu
from jepa_jax.planning import estimate, hlo, topologies
from jepa_jax.training import program as training
from jepa_jax.training import sharding

pytestmark = pytest.mark.gpu

FORWARD, BACKWARD = "__cudnn$fmha", "Backward"


@pytest.fixture(scope="module", autouse=True)
def without_a_cache():
  """What is compiled for a GPU is compiled once here, and not to be run."""
  jax.config.update("jax_enable_compilation_cache", False)
  yield
  jax.config.update("jax_enable_compilation_cache", True)


def load(experiment, *flags):
  """An experiment, cut in batch and depth, with a few flags."""
  file, _, variant = experiment.partition(":")
  path = str(conftest.EXPERIMENTS / file)
  cut = ["batch_size=64", "encoder.depth=2", "predictor.depth=3"]
  flags = [*cut, "total=6 steps", "optimizer.warmup=2 steps", *flags]
  return command.load_config(
    f"{path}:{variant}" if variant else path,
    ["--config." + flag for flag in flags],
  )


def compiled(config, topology):
  return estimate.compile_step(config, topologies.devices_of(topology))


def calls(text, *parts):
  """Custom calls whose target has all parts of a name in it."""
  targets = re.findall(r'custom_call_target="([^"]*)"', text)
  return sum(all(part in target for part in parts) for target in targets)


# Every experiment, GPU, attention and policy of remat; one GPU, data parallel,
# split parameters, both, and several hosts.
STEPS = {
  "quickstart.py": ("rtx4090:1", ()),
  "ijepa_fashion_mnist.py": ("l40s:4", ()),
  "folder.py:PATH": (
    "l40s:1",
    ("compute.dtype=bfloat16", "compute.attention=cudnn"),
  ),
  "ijepa_in1k.py:vitb16": ("h100:1", ("compute.attention=cudnn",)),
  "ijepa_in1k.py:vitl16": (
    "a100:8",
    ("mesh.fsdp=8", "compute.remat=products", "accumulate_steps=2"),
  ),
  "ijepa_in1k.py:vith14": (
    "h100:8",
    ("mesh.fsdp=4", "compute.remat=full", "compute.attention=cudnn"),
  ),
  "ijepa_in1k.py:vith16_448": (
    "h100:8x2",
    ("mesh.fsdp=8", "compute.remat=none", "compute.attention=cudnn"),
  ),
  "ijepa_in22k.py:vith14": (
    "b200:8",
    ("compute.remat=full", "compute.remat_every=2", "compute.attention=pallas"),
  ),
  "ijepa_in22k.py:vitg16": (
    "h200:8",
    ("mesh.fsdp=8", "compute.attention=cudnn"),
  ),
  "cae_in1k.py:vitb16": ("a100:4", ("compute.attention=cudnn",)),
  "ibot_in1k.py:vits16": ("a100:4", ("method.local_views=1",)),
  "lejepa_in1k.py:vitb16": ("a100:4", ("method.local_views=1",)),
  "rivals.py:mae,scenes": ("l40s:4", ()),
  "decoder.py:scenes": ("l40s:1", ()),
  "small.py:scenes": ("rtx4090:1", ()),
  "finetune_small.py:scenes": ("rtx4090:1", ()),
  "transfer.py": ("h100:8", ("mesh.fsdp=8",)),
  "finetune_in1k.py:vitl16_1pct": ("h100:8", ("mesh.fsdp=8",)),
  "mae_in1k.py:vith14": ("h100:8", ("mesh.fsdp=8",)),
  "data2vec_in1k.py:vitb16": (
    "a100:4",
    ("method.layers=2", "compute.attention=cudnn"),
  ),
}


@pytest.mark.parametrize("experiment", STEPS)
def test_the_step_of_every_experiment_compiles(experiment, tmp_path):
  topology, flags = STEPS[experiment]
  for i in range(64):
    PIL.Image.new("RGB", (70, 50), (i, 0, 0)).save(tmp_path / f"{i}.png")
  config = load(experiment.replace("PATH", str(tmp_path)), *flags)
  text = compiled(config, topology).text
  fused = calls(text, FORWARD)
  if config.compute.attention == "cudnn":
    # The target encoder's passes have no gradient.
    backward = calls(text, FORWARD, BACKWARD)
    assert 0 < backward < fused - backward
  else:
    assert fused == 0
  talk = hlo.collectives(text)
  gathered = [c for c in talk if c.kind == "all-gather" and c.elements > 2**16]
  assert bool(gathered) == (config.mesh.fsdp > 1)
  assert {c.dtypes for c in gathered} <= {("bf16",)}
  assert bool(talk) == (not topology.endswith(":1"))


def test_the_table_has_every_experiment():
  files = {path.name for path in conftest.EXPERIMENTS.glob("*.py")}
  assert {name.partition(":")[0] for name in STEPS} == files


@pytest.mark.parametrize("topology", ["a100:1", "h100:1", "b200:1", "l40s:1"])
@pytest.mark.parametrize(
  "sequences, tokens, width, queries",
  [
    (4, 123, 24, None),  # ViT-H/14's predictor
    (4, 123, 24, 54),  # its last block
    (4, 69, 80, None),  # its context encoder
    (4, 257, 88, 215),  # ViT-g's head, odd numbers
    (4, 30, 12, None),  # a head of no eights
  ],
)
def test_attention_by_cudnn_compiles(
  topology, sequences, tokens, width, queries
):
  place = jax.sharding.SingleDeviceSharding(topologies.devices_of(topology)[0])
  spec = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(
    shape, dtype, sharding=place
  )

  def total(qkv, valid, query):
    return gpu.attention(qkv, valid, query).astype(jnp.float32).sum()

  qkv = spec(sequences, tokens, 2 if queries else 3, 16, width)
  query = spec(sequences, queries, 16, width) if queries else None
  for valid in (None, spec(sequences, tokens, dtype=bool)):
    step = jax.jit(jax.value_and_grad(total)).lower(qkv, valid, query)
    options = topologies.compiler_options(topologies.devices_of(topology)[0])
    text = step.compile(compiler_options=options).as_text()
    assert calls(text, FORWARD, BACKWARD) == 1 and calls(text, FORWARD) == 2


def test_an_encoder_by_cudnn_is_evaluated():
  config = load("ijepa_in1k.py:vitb16", "compute.attention=cudnn")
  devices = topologies.devices_of("h100:4")
  program = training.build(config, sharding.make_mesh(config.mesh, devices))
  network = program.objective.networks["encoder"]
  images = jax.ShapeDtypeStruct(
    (8, 224, 224, 3),
    jnp.float32,
    sharding=sharding.batch_sharding(program.mesh),
  )
  encode = jax.jit(lambda p, x: network.apply({"params": p}, x, layers=2))
  lowered = encode.lower(program.state_spec.target_params["encoder"], images)
  options = topologies.compiler_options(devices[0])
  text = lowered.compile(compiler_options=options).as_text()
  assert calls(text, FORWARD) == 2
  assert "bf16[2,12,196,64]" in text  # of a device's own images


SMALL = (
  *("batch_size=16", "data.image_size=64", "masks.min_keep=2"),
  *("encoder.width=512", "encoder.depth=3", "encoder.num_heads=4"),
  *("encoder.patch_size=8", "predictor.width=256", "predictor.depth=4"),
  *("predictor.num_heads=2", "compute.remat=none"),
)


def test_weights_travel_once_a_pass_in_bfloat16_and_are_planned():
  """On two hosts of two GPUs: parameters over one, sums over both."""
  config = load("ijepa_in1k.py:vitb16", *SMALL, "mesh.fsdp=2")
  said = []
  row = estimate.step(config, "h100:2x2", said.append)
  assert row["fits"] and row["chips"] == 4 and row["note"] == estimate.NOTE
  assert row["argument_bytes"] == pytest.approx(said[0]["state_bytes"], rel=0.1)
  assert 1 <= row["flops_ratio"] < 1.2
  # At the least, the state is read once.
  assert row["argument_bytes"] < row["memory_bytes"]
  assert row["bound_seconds"] > said[0]["least_seconds"]
  moved = {(c["kind"], c["dtype"]): c for c in row["collectives"]}
  kernels = lambda width, depth: depth * 12 * width**2
  patches, joints = 8 * 8 * 3 * 512, 2 * 512 * 256
  # The target encoder's pass, the context's and the predictor's, and back; of
  # what lies outside the loops some is gathered once.
  passes = 3 * kernels(512, 3) + 2 * kernels(256, 4)
  once = kernels(256, 2)
  most = 2 / 2 * (passes + 2 * patches + 2 * joints)
  gathered = moved["all-gather", "bf16"]
  assert most - once - patches - joints < gathered["bytes"] < 1.02 * most
  assert gathered["network_bytes"] == 0
  # A share of the gradients from the other host, once.
  far = sum(c["network_bytes"] for c in row["collectives"])
  gradients = kernels(512, 3) + kernels(256, 4) + patches + joints
  assert far == pytest.approx(2 * gradients / 2, rel=0.1)


def test_the_compiler_knows_every_topology_that_search_may_try():
  for family in topologies._GPUS:
    for shape in topologies.TOPOLOGIES[family]:
      devices = topologies.devices_of(f"{family}:{shape}")
      assert len(devices) == math.prod(int(n) for n in shape.split("x"))
      assert devices[0].device_kind == topologies._GPUS[family].kind


COMPILE = """
import jax
from jepa_jax.planning import topologies
(device,) = topologies.devices_of("h100:1")
place = jax.sharding.SingleDeviceSharding(device)
x = jax.ShapeDtypeStruct((3,), "float32", sharding=place)
options = topologies.compiler_options(device)
jax.jit(lambda x: x + 1).lower(x).compile(compiler_options=options)
"""


@pytest.mark.parametrize("page", ["gpu.md", None])
def test_flags_that_are_advised_are_known(page):
  flags = "--xla_gpu_of_another_version=1"
  if page:
    text = (conftest.ROOT / "docs" / page).read_text()
    flags = re.search(r'XLA_FLAGS="([^"]*)"', text)[1]
  done = subprocess.run(
    [sys.executable, "-c", COMPILE],
    env=os.environ | {"XLA_FLAGS": flags},
    capture_output=True,
    text=True,
  )
  assert (done.returncode == 0) == bool(page), done.stderr[-3000:]
