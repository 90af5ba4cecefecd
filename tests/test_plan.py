"""Planning's arithmetic: reading HLO text, the roofline, the search."""

import math
import types

import pytest

from jepa_jax import config as config_lib
from jepa_jax import objectives, plan
from jepa_jax.planning import chips, estimate, hlo, topologies

# As compilers write it: a loop of five rounds that gathers [8, 6] in bfloat16
# twice (once spread over two fusions), scatters a gradient while it adds it
# up, and, outside, a sum over pairs.
MODULE = """
HloModule jit_step, entry_computation_layout={()->f32[]}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%begin (p: bf16[2,6]) -> (bf16[2,6], bf16[8,6]) {
  %p = bf16[2,6]{1,0} parameter(0)
  %all-gather.9 = bf16[8,6]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=3, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="2"}
  ROOT %s = (bf16[2,6], bf16[8,6]) custom-call(%all-gather.9), custom_call_target="AsyncCollectiveStart"
}

%middle (p: bf16[2,6]) -> bf16[8,6] {
  %p = bf16[2,6]{1,0} parameter(0)
  ROOT %all-gather.91 = bf16[8,6]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['axis_0'=4] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="2"}
}

%all-reduce-scatter.1 (g: bf16[8,6]) -> bf16[2,6] {
  %g = bf16[8,6]{1,0} parameter(0)
  %all-reduce.3 = bf16[8,6]{1,0} all-reduce(%g), channel_id=5, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %slice = bf16[2,6]{1,0} dynamic-slice(%all-reduce.3), dynamic_slice_sizes={2,6}
}

%body (t: (s32[], bf16[2,6])) -> (s32[], bf16[2,6]) {
  %t = (s32[], bf16[2,6]{1,0}) parameter(0)
  %all-gather.1 = bf16[8,6]{1,0:T(8,128)(2,1)S(1)} all-gather(%t), channel_id=1, replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, dimensions={0}
  %f = (bf16[2,6], bf16[8,6]) fusion(%t), kind=kCustom, calls=%begin
  %h = bf16[8,6]{1,0} fusion(%f), kind=kCustom, calls=%middle
  %r = bf16[2,6]{1,0} fusion(%h), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[], bf16[2,6]{1,0}) tuple(%t, %r)
}

%condition (t: (s32[], bf16[2,6])) -> pred[] {
  %t = (s32[], bf16[2,6]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: (s32[], bf16[2,6])) -> f32[] {
  %a = (s32[], bf16[2,6]{1,0}) parameter(0)
  %loop = (s32[], bf16[2,6]{1,0}) while(%a), condition=%condition, body=%body
  %all-reduce.7 = (f32[10]{0}, f32[]{:T(128)}) all-reduce(%loop), channel_id=7, replica_groups={{0,1},{2,3}}, to_apply=%add
  %permute = f32[3]{0} collective-permute(%loop), channel_id=8, source_target_pairs={{0,1},{1,0}}
  ROOT %alone = f32[] all-reduce(%loop), channel_id=9, replica_groups={{0},{1},{2},{3}}, to_apply=%add
}
"""  # noqa: E501


def test_collectives_are_counted_as_often_as_they_run():
  found = [tuple(c) for c in hlo.collectives(MODULE)]
  array = 8 * 6 * 2 * 3 / 4  # bytes, three quarters of which come from others
  assert sorted(found) == sorted(
    [
      ("all-gather", ("bf16",), 48, 5 * array, 0, 5, 4),
      ("all-gather", ("bf16",), 48, 5 * array, 0, 5, 4),
      ("reduce-scatter", ("bf16",), 48, 5 * array, 0, 5, 4),
      ("all-reduce", ("f32",), 11, 2 * 0.5 * 44, 0, 1, 2),
      ("collective-permute", ("f32",), 3, 12, 0, 1, 2),
    ]
  )


def test_a_scattered_result_is_counted_whole():
  text = """
ENTRY %main (a: f32[16]) -> f32[4] {
  %a = f32[16]{0} parameter(0)
  ROOT %r = f32[4]{0} reduce-scatter(%a), replica_groups=[2,4]<=[8], dimensions={0}
}
"""  # noqa: E501
  (found,) = hlo.collectives(text)
  assert found == ("reduce-scatter", ("f32",), 16, 48, 0, 1, 4)


def test_what_runs_beside_the_rest_counts_once():
  """As libtpu hands communication to a TPU's other cores."""
  text = """
%called (p: f32[4]) -> f32[16] {
  %p = f32[4]{0} parameter(0)
  ROOT %all-gather.7 = f32[16]{0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

%beside (p: f32[4]) -> f32[16] {
  %p = f32[4]{0} parameter(0)
  ROOT %custom-call.4 = f32[16]{0} custom-call(%p), custom_call_target="x", called_computations={%called}
}

%slice (p: f32[4]) -> f32[2] {
  %p = f32[4]{0} parameter(0)
  ROOT %slice.1 = f32[2]{0:S(1)} slice(%p), slice={[0:2]}
}

ENTRY %main (a: f32[4]) -> f32[16] {
  %a = f32[4]{0} parameter(0)
  %begun = ((), ()) async-start(), async_execution_thread="sparsecore", calls=%beside
  %given = ((f32[4]{0}), f32[16]{0}) async-update(%begun, %a)
  %part = ((f32[4]{0}), f32[2]{0:S(1)}) async-start(%a), calls=%slice
  ROOT %done = f32[16]{0} async-done(%given)
}
"""  # noqa: E501
  (found,) = hlo.collectives(text)
  assert found == ("all-gather", ("f32",), 16, 48, 0, 1, 4)
  operand, result, part = 16, 64, 8
  assert hlo.memory_traffic(text) == operand + (operand + result) + part


def test_memory_traffic_leaves_out_what_stays_on_the_chip():
  text = """
%take (p: f32[8,4]) -> f32[1,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %b = f32[32]{0} bitcast(%p)
  %s = f32[4]{0} slice(%b), slice={[0:4]}
  ROOT %n = f32[1,4]{1,0} negate(%s)
}

%use (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %s = f32[1,4]{1,0} slice(%p), slice={[0:1], [0:4]}
  ROOT %n = f32[8,4]{1,0} add(%p, %s)
}

%body (t: f32[8,4]) -> f32[8,4] {
  %t = f32[8,4]{1,0} parameter(0)
  ROOT %u = f32[8,4]{1,0} negate(%t)
}

%callee (t: f32[8,4]) -> f32[8,4] {
  %t = f32[8,4]{1,0} parameter(0)
  ROOT %u = f32[8,4]{1,0} negate(%t)
}

ENTRY %main (a: f32[8,4]) -> f32[8,4] {
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  %called = f32[8,4]{1,0:T(8,128)} call(%a), to_apply=%callee
  %taken = f32[1,4]{1,0:T(8,128)} fusion(%a), kind=kLoop, calls=%take
  %used = f32[8,4]{1,0:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%use
  %near = f32[8,4]{1,0:T(8,128)S(1)} negate(%used)
  %out = (f32[8,4]{1,0:T(8,128)}, f32[8,4]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%near)
  %done = f32[8,4]{1,0:T(8,128)} copy-done(%out)
  %part = ((f32[8,4]{1,0:T(8,128)}), f32[2,4]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%done), slice={[0:2], [0:4]}
  %got = f32[2,4]{1,0:T(8,128)S(1)} slice-done(%part)
  ROOT %loop = f32[8,4]{1,0} while(%done), condition=%none, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501
  whole, row = 8 * 4 * 4, 4 * 4
  taken, used, near, out, part = 2 * row, whole, 0, whole, 2 * row
  called, rounds = 2 * whole, 5 * 2 * whole
  assert hlo.memory_traffic(text) == (
    called + taken + used + near + out + part + rounds
  )


def test_what_is_no_module_is_refused():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo.collectives("nothing")


CHIP = chips.Chip(
  "test",
  "test",
  bfloat16_flops=100.0,
  source="",
  hbm_bytes=1.0,
  hbm_bandwidth=10.0,
  link_bandwidth=2.0,
  network_bandwidth=4.0,
)


def test_each_part_of_a_step_takes_the_longer_of_its_times():
  parts = {
    "encoder": estimate.Cost(
      flops=300, accessed=90, memory=10
    ),  # 3 s of operations
    "predictor": estimate.Cost(
      flops=100, accessed=90, memory=40
    ),  # 4 s of bytes
  }
  assert estimate.bound(parts, 0, 0, CHIP) == (7.0, "memory")
  parts["rest"] = estimate.Cost(flops=250, accessed=90, memory=1)
  assert estimate.bound(parts, 18, 30, CHIP) == (9.5, "compute")
  assert estimate.bound(parts, 20, 30, CHIP) == (10.0, "links")
  assert estimate.bound(parts, 20, 48, CHIP) == (12.0, "network")


@pytest.mark.parametrize(
  "objective",
  ["ijepa", "pixel_ijepa", "data2vec", "outside_objective:Outside"],
)
def test_costs_grow_with_the_blocks_and_the_slices(monkeypatch, objective):
  predicts = objective.endswith("ijepa")

  class Executable:
    def __init__(self, encoder, predictor):
      self.flops = 7 + 10 * encoder + 3 * predictor

    def cost_analysis(self):
      return {"flops": self.flops, "bytes accessed": 2 * self.flops}

  def compile_step(config, devices):
    config_lib.check(config)
    objectives.load(objective).from_config(config)  # as deep as it needs
    assert not config.compute.scan and config.batch_size == 8 and not devices
    blocks = config.encoder.depth, predicts * config.predictor.depth
    array = f"f32[{sum(blocks)}]{{0}}"
    text = (
      f"ENTRY %main (a: {array}) -> {array} {{\n"
      f"  %a = {array} parameter(0)\n"
      f"  ROOT %b = {array} negate(%a)\n}}"
    )
    return estimate.Compiled(None, Executable(*blocks), text)

  monkeypatch.setattr(estimate, "compile_step", compile_step)
  config = config_lib.defaults()
  config.objective = objective
  config_lib.fill_method(config)
  config.evaluations.imagenet = config_lib.evaluation("label")
  config.encoder.depth, config.predictor.depth = 32, 12
  config.batch_size, config.accumulate_steps = 16, 2
  config.compute.update(remat="full", remat_every=2)
  parts = estimate.costs(config, [])
  cost = lambda flops, memory: estimate.Cost(2 * flops, 4 * flops, memory)
  expected = {"encoder": cost(10 * 32, 2 * 8 * 32), "rest": cost(7, 0)}
  if predicts:
    expected["predictor"] = cost(3 * 10, 2 * 8 * 10)
    # Two of the predictor's blocks, first and last, stay in the rest.
    expected["rest"] = cost(7 + 3 * 2, 2 * 8 * 2)
  assert parts == expected


@pytest.mark.parametrize(
  "message, needs, has",
  [
    (
      "RESOURCE_EXHAUSTED: total memory required for HLO temporaries (26.5G) "
      "exceeds available HBM (15.75G).",
      26.5 * 2**30,
      15.75 * 2**30,
    ),
    ("Used 900.25M of 512M hbm.", 900.25 * 2**20, 512 * 2**20),
    ("RESOURCE_EXHAUSTED: no figures", None, None),
  ],
)
def test_the_compilers_figures_of_memory(message, needs, has):
  assert estimate.needed_and_available(message) == [needs, has]


def test_memory_is_what_is_alive_at_once():
  held = estimate.held(
    types.SimpleNamespace(
      argument_size_in_bytes=20,
      output_size_in_bytes=19,
      alias_size_in_bytes=18,
      temp_size_in_bytes=50,  # more than there is
      peak_memory_in_bytes=53,
    )
  )
  assert held["total_bytes"] == 53 and held["temporary_bytes"] == 32
  assert (held["argument_bytes"], held["output_bytes"]) == (20, 19)
  assert held["donated_bytes"] == 18


def test_what_does_not_fit_is_a_row_of_the_table():
  row = {
    "topology": "v5e:2x2",
    "mesh": {"data": 1, "fsdp": 4},
    "remat": "full",
    "remat_every": 2,
    "fits": False,
    "total_bytes": 17.25 * 2**30,
    "hbm_bytes": 15.75 * 2**30,
  }
  head, line = plan.show([row]).splitlines()
  assert "does not fit" in line and "full/2" in line and "1x4" in line
  assert line.split()[line.split().index("17.25") + 1] == "15.75"
  assert plan.best([row]) is None


def test_search_stops_at_the_smallest_slice_that_fits(monkeypatch):
  tried = []

  def step(config, topology, say):
    mesh, remat = config.mesh.fsdp, config.compute.remat
    tried.append((topology, mesh, remat, config.compute.remat_every))
    fits = topology == "v5e:4x4" and mesh == 16 and remat != "none"
    return {
      "fits": fits,
      "images_per_second_per_chip": len(remat),
      "chips": 16,
      "remat": remat,
    }

  count = lambda t: (
    [None] * math.prod(int(n) for n in t.partition(":")[2].split("x"))
  )
  monkeypatch.setattr(estimate, "step", step)
  monkeypatch.setattr(topologies, "devices_of", count)
  config = config_lib.defaults()
  config.batch_size = 32  # of which 4 x 8 chips get one each
  rows = list(plan.search(config, "v5e:8x8"))
  assert tried == [
    ("v5e:1x1", 1, "full", 1),
    ("v5e:2x2", 4, "full", 1),
    ("v5e:2x4", 8, "full", 1),
    ("v5e:4x4", 8, "full", 1),
    ("v5e:4x4", 16, "full", 1),
    ("v5e:4x4", 16, "full", 2),
    ("v5e:4x4", 16, "dots", 1),
    ("v5e:4x4", 16, "products", 1),
    ("v5e:4x4", 16, "none", 1),
    ("v5e:4x4", 1, "full", 1),
  ]
  assert plan.best(rows)["remat"] == "products"
  with pytest.raises(ValueError, match="v5e:8x8"):
    list(plan.search(config, "v5e:3x3"))


@pytest.mark.parametrize(
  "topology, message",
  [
    ("v5e:2x2", r"libtpu; pip install -e '\.\[tpu\]'"),
    ("h100:8", r"CUDA plugin; pip install -e '\.\[gpu-plan\]'"),
    ("h100:8y2", "GPUs a host.*h100:8x4"),
  ],
)
def test_a_missing_compiler_says_what_to_install(
  monkeypatch, topology, message
):
  monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=message):
    topologies.devices_of(topology)


@pytest.mark.parametrize(
  "kind, name",
  [
    ("TPU v4", "TPU v4"),
    ("TPU v5 lite", "TPU v5e"),
    ("TPU v5", "TPU v5p"),
    ("TPU v6 lite", "TPU v6e"),
    ("TPU7x", "TPU7x"),
    ("NVIDIA H100 80GB HBM3", "H100 SXM"),
    ("NVIDIA H100 PCIe", "H100 PCIe"),
    ("NVIDIA A100-SXM4-80GB", "A100"),
    ("NVIDIA H200", "H200 SXM"),
    ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ("cpu", None),
    ("NVIDIA L40", None),
  ],
)
def test_chips_are_known_by_their_kind(kind, name):
  chip = chips.find(type("Device", (), {"device_kind": kind}))
  assert (chip and chip.name) == name


KINDS = ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"]
KINDS += [gpu.kind for gpu in topologies._GPUS.values()]


@pytest.mark.parametrize(
  "family, kind", list(zip(topologies.TOPOLOGIES, KINDS, strict=True))
)
def test_every_family_of_topologies_has_a_chip_with_its_figures(family, kind):
  chip = chips.find(types.SimpleNamespace(device_kind=kind))
  assert chip.hbm_bytes and chip.hbm_bandwidth and chip.link_bandwidth
  shapes = topologies.TOPOLOGIES[family]
  sizes = [math.prod(int(n) for n in shape.split("x")) for shape in shapes]
  assert sizes == sorted(sizes)
  several = topologies.per_host(f"{family}:8") and any("x" in s for s in shapes)
  assert bool(chip.network_bandwidth) == bool(several)


# As the compiler of GPUs writes it: products of cuBLAS with its workspace, one
# of XLA's own in a loop, cuDNN's attention, and communication that is started.
GPU_MODULE = """
%body (t: f32[3,4]) -> f32[3,4] {
  %t = f32[3,4]{1,0} parameter(0)
  %w = f32[4,4]{1,0} constant({...})
  ROOT %d = f32[3,4]{1,0} dot(%t, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

ENTRY %main (a: bf16[6,8], b: bf16[8,5], q: bf16[2,7,3,16]) -> f32[3,4] {
  %a = bf16[6,8]{1,0} parameter(0)
  %b = bf16[8,5]{1,0} parameter(1)
  %q = bf16[2,7,3,16]{3,2,1,0} parameter(2)
  %product = (bf16[6,5]{1,0}, s8[33554432]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %forward = (bf16[2,3,7,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","3","7","7"]}}}
  %backward = (bf16[2,3,7,16]{3,1,2,0}, bf16[2,3,7,16]{3,1,2,0}, bf16[2,3,7,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmaxBackward", backend_config={"cudnn_fmha_backend_config": {"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "7", "7"]}}}
  %gather = (bf16[6,8]{1,0}, bf16[24,8]{1,0}) all-gather-start(%a), replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, dimensions={0}
  %gathered = bf16[24,8]{1,0} all-gather-done(%gather)
  %scatter = ((bf16[8,5]{1,0}), (bf16[2,5]{1,0})) reduce-scatter-start(%b), replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
  %scattered = bf16[2,5]{1,0} reduce-scatter-done(%scatter)
  %sum = f32[10]{0} all-reduce-start(%b), replica_groups=[1,8]<=[8]
  %summed = f32[10]{0} all-reduce-done(%sum)
  %pair = f32[10]{0} all-reduce(%b), replica_groups={{0,4},{1,5},{2,6},{3,7}}
  ROOT %loop = f32[3,4]{1,0} while(%a), condition=%none, body=%body, backend_config={"known_trip_count":{"n":"5"}}
}
"""  # noqa: E501


def test_products_of_every_library_are_counted():
  scores = 2 * 3 * 7 * 7 * 16
  expected = 2 * 6 * 5 * 8 + 2 * (2 + 5) * scores + 5 * 2 * 3 * 4 * 4
  assert hlo.product_flops(GPU_MODULE) == expected


def test_traffic_of_gpus_has_no_workspace_and_each_operand_once():
  product, qkv = 2 * (6 * 8 + 8 * 5 + 6 * 5), 2 * 2 * 7 * 3 * 16
  attention = (3 + 1) * qkv + (3 + 3) * qkv
  gather, scatter = 2 * (6 * 8 + 24 * 8), 2 * (8 * 5 + 2 * 5)
  sums, loop = 2 * (2 * 8 * 5 + 4 * 10), 5 * 4 * (2 * 12 + 16)
  assert hlo.memory_traffic(GPU_MODULE) == (
    product + attention + gather + scatter + sums + loop
  )


def test_what_comes_from_other_hosts_is_apart():
  """Eight devices, four a host: groups in a host, over both, one a host."""
  found = [
    (c.kind, c.elements, c.bytes, c.network_bytes, c.group)
    for c in hlo.collectives(GPU_MODULE, per_host=4)
  ]
  assert found == [
    ("all-gather", 24 * 8, 24 * 8 * 2 * 3 / 4, 0, 4),
    # Of 0, 2, 4 and 6 two are on each host.
    ("reduce-scatter", 40, 40 * 2 * 3 / 4, 40 * 2 * 1 / 2 / 2, 4),
    ("all-reduce", 10, 2 * 40 * 7 / 8, 2 * 40 * 1 / 2 / 4, 8),
    ("all-reduce", 10, 0, 2 * 40 / 2, 2),
  ]


def test_a_state_that_does_not_fit_is_said_before_a_compilation(monkeypatch):
  known = {"state_bytes": 9, "hbm_bytes": 8}
  monkeypatch.setattr(estimate, "known", lambda config, topology: dict(known))
  said = []
  row = estimate.step(None, "h100:8", said.append)
  assert said == [known] and not row["fits"] and row["total_bytes"] == 9


def test_what_needs_no_compiler_is_said_in_one_line(capsys):
  plan.announce(
    {
      "topology": "h100:8x2",
      "chips": 16,
      "mesh": {"data": 2, "fsdp": 8},
      "state_bytes": 1.25 * 2**30,
      "hbm_bytes": 71.2 * 2**30,
      "least_seconds": 0.1702,
    }
  )
  assert capsys.readouterr().err == (
    "h100:8x2: 16 chips, mesh 2x8, 1.25 GiB of state a device of 71.2, at "
    "least 0.17 s a step; compiling for minutes\n"
  )
