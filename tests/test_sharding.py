"""One run on any mesh: eight virtual devices in a process of their own."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from jepa_jax.models.kernels import cpu
from jepa_jax.training import sharding

# Sizes that eight devices divide, or parameters would not be split at all.
SCRIPT = """
import json, sys
sys.path.insert(0, "tests")
import jax, numpy as np
import conftest, test_probes, test_program
from jepa_jax.evaluation import bank, protocols
from jepa_jax.planning import hlo
from jepa_jax.training import checkpoints, program as program_lib, sharding

folder, results = sys.argv[1], {}
config = conftest.small_config()
config.batch_size = 8
config.encoder.update(width=32, num_heads=4)
config.optimizer.clip_norm = 1.0

def build(data, fsdp):
  config.mesh.data, config.mesh.fsdp = data, fsdp
  # Unrolled, XLA on a CPU keeps what is gathered instead of gathering again.
  config.compute.scan = fsdp > 1
  mesh = sharding.make_mesh(config.mesh, jax.devices()[: data * fsdp])
  return program_lib.build(config, mesh)

def flat(state):
  return [np.asarray(x).tolist() for x in jax.tree.leaves(state)]

for data, fsdp in (1, 1), (8, 1), (1, 8), (2, 4):
  program = build(data, fsdp)
  lowered = program.step.lower(program.state_spec, program.batch_spec)
  compiled = lowered.compile()
  state, losses = program.init(0), []
  for step in range(3):
    batch = test_program.make_batch(program, step)
    batch = {
      k: jax.device_put(v, program.batch_spec[k].sharding)
      for k, v in batch.items()
    }
    state, metrics, _ = compiled(state, batch)
    losses.append(float(metrics["loss"]))
  kernel = state.params["encoder"]["transformer"]["blocks"]["fc1"]["kernel"]
  moment = jax.tree.leaves(state.opt_state, is_leaf=lambda x: False)
  traffic = {}
  for c in hlo.collectives(compiled.as_text()):
    traffic[c.kind] = traffic.get(c.kind, 0) + c.elements * c.times
  results[f"{data}x{fsdp}"] = dict(
    traffic=traffic,
    kernels={
      name: sum(
        x.size for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if "kernel" in jax.tree_util.keystr(path)
      )
      for name, tree in state.params.items()
    },
    all=sum(x.size for x in jax.tree.leaves(state.params)),
    losses=losses,
    params=[float(np.linalg.norm(x)) for x in jax.tree.leaves(state.params)],
    share=kernel.addressable_shards[0].data.size / kernel.size,
    target_share=state.target_params["encoder"]["transformer"]["blocks"]["fc1"][
      "kernel"
    ].addressable_shards[0].data.size / kernel.size,
    largest=max(
      x.addressable_shards[0].data.size / x.size
      for x in moment if x.size >= kernel.size
    ),
  )

# The attention's kernels stay whole where a rule says so, and all of theirs.
config.sharding = (("qkv/kernel", "replicate"),) + config.sharding
spec = build(1, 8).state_spec
results["by rule"] = sorted({
  (jax.tree_util.keystr(path, simple=True, separator="/").split("/")[-2],
   leaf.sharding.is_fully_replicated)
  for path, leaf in jax.tree_util.tree_leaves_with_path(spec)
  if "blocks" in jax.tree_util.keystr(path)
  and "kernel" in jax.tree_util.keystr(path)
})
config.sharding = config.sharding[1:]

# A checkpoint of the last mesh, 2 x 4, on the others.
with checkpoints.Checkpoints(folder, config.checkpoint) as saved:
  saved.save(state)
  saved.wait()
  for data, fsdp in ((1, 1), (8, 1), (1, 8)):
    other = saved.restore(build(data, fsdp).state_spec)
    results[f"restored {data}x{fsdp}"] = flat(other) == flat(state)

# A bank of features on four devices, in chunks of some rows.
train = test_probes.blobs(211, 13, 4, 2.0, seed=1)
test = test_probes.blobs(67, 13, 4, 2.0, seed=2)
for name, chunk, used in ("one", bank.CHUNK, 1), ("four", 100, 4):
  bank.CHUNK, bank._devices = chunk, lambda size: jax.devices()[:used]
  made = bank.Bank(train["features"])
  assert len(made.rows.sharding.device_set) == used
  results[f"bank {name}"] = [made.host(made.rows)[:211].tolist()] + [
    protocols.find(row).run(train, test, seed=0)
    for row in ("knn", "knn_grid", "linear")
  ]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
  flags = os.environ.get("XLA_FLAGS", "")
  flags += " --xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT, str(tmp_path_factory.mktemp("mesh"))],
    capture_output=True,
    text=True,
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("mesh", ["8x1", "1x8", "2x4"])
def test_a_mesh_changes_nothing_but_the_rounding(results, mesh):
  np.testing.assert_allclose(
    results[mesh]["losses"], results["1x1"]["losses"], rtol=1e-5
  )
  np.testing.assert_allclose(
    results[mesh]["params"], results["1x1"]["params"], rtol=1e-4, atol=1e-5
  )


def test_probes_of_a_bank_on_four_devices_give_the_values_of_one(results):
  (rows, *one), (spread, *four) = results["bank one"], results["bank four"]
  assert spread == rows
  assert four[:2] == one[:2]  # k-NN
  assert 50 < one[2]["top1"] < 100
  for name, value in one[2].items():
    if isinstance(value, dict):  # what each class is taken for
      assert four[2][name] == value, name
    elif name not in ("iterations", "converged"):
      assert four[2][name] == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("mesh", ["1x8", "2x4"])
def test_weights_are_gathered_once_a_pass(results, mesh):
  traffic = results[mesh]["traffic"]
  kernels, everything = results[mesh]["kernels"], results[mesh]["all"]
  # Passes: the target encoder's, the networks' own, and theirs back. What
  # lies outside the blocks is kept, and gathered once less.
  most = 3 * kernels["encoder"] + 2 * kernels["predictor"]
  assert 0.85 * most < traffic.pop("all-gather") <= most
  # The gradients are summed once, and beside them a few scalars; a CPU has no
  # reduce-scatter. With two groups each sums again what is left to it.
  summed = sum(traffic.values())
  assert everything <= summed <= (1 + 1 / 4) * everything + 200


def test_fsdp_splits_parameters_their_average_and_their_moments(results):
  for mesh, parts in (("8x1", 1), ("1x8", 8), ("2x4", 4)):
    for name in ("share", "target_share", "largest"):
      assert results[mesh][name] == pytest.approx(1 / parts), (mesh, name)


@pytest.mark.parametrize("mesh", ["1x1", "8x1", "1x8"])
def test_checkpoints_restore_on_any_mesh(results, mesh):
  assert results[f"restored {mesh}"] is True


def test_rules_of_the_config_say_what_is_split(results):
  assert results["by rule"] == [
    ["fc1", False],
    ["fc2", False],
    ["out", False],
    ["qkv", True],
  ]


def test_equal_meshes_and_settings_give_equal_kernels(config):
  make = lambda: sharding.make_kernels(
    config.compute, sharding.make_mesh(config.mesh, jax.devices()[:1])
  )
  assert make() == make() == cpu.KERNELS
  # What only a TPU has gives way.
  config.compute.attention = "pallas"
  assert make() == cpu.KERNELS
