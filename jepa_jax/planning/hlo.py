"""What a compiled program does, read from its HLO text.

XLA's own cost analysis counts the body of a loop once, says nothing of
communication, and takes what a TPU keeps on the chip for memory traffic. Here
every computation counts as often as it runs.

Reference: https://openxla.org/xla/operation_semantics.
"""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

KINDS = (
  "all-gather",
  "reduce-scatter",
  "all-reduce",
  "all-to-all",
  "collective-permute",
)

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLS = re.compile(
  r"(?:calls|body|condition|to_apply|true_computation|false_computation)="
  r"%?([\w.\-]+)|(?:branch|called)_computations=\{([^}]*)\}"
)
_OPERATION = re.compile(
  r"%?([\w.\-]+) = (.*?) (" + "|".join(KINDS) + r")(-start)?\("
)
_SHAPE = re.compile(r"([a-z]+[0-9]*)\[([0-9,]*)\]")
_LINE = re.compile(r"^ *(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)")
_ARRAY = re.compile(r"([a-z]+[0-9a-z]*)\[([0-9,]*)\](\{[^}]*\})?")
# Of cuBLAS and cuDNN, in which they may write or not.
_WORKSPACE = re.compile(r"[su]8\[\d+\]")
# They name what is there already, or count by the computations that they call.
_FREE = ("parameter", "get-tuple-element", "tuple", "bitcast", "constant")
_FREE += ("while", "conditional", "call", "optimization-barrier")


class Collective(NamedTuple):
  """One communication, as often as the program does it.

  Attributes:
    kind: of KINDS.
    dtypes: of what travels, such as ("bf16",).
    elements: of the whole array that is gathered, reduced or exchanged.
    bytes: that one device receives from others of its slice or host, over all
      times.
    network_bytes: that it receives from other hosts.
    times: how often.
    group: devices that take part together.
  """

  kind: str
  dtypes: tuple[str, ...]
  elements: int
  bytes: float
  network_bytes: float
  times: int
  group: int


def collectives(text: str, per_host: int | None = None) -> list[Collective]:
  """The communication of a program.

  On a ring of n devices each receives (n - 1) / n of the whole array in an
  all-gather, a reduce-scatter or an all-to-all, and twice that in an
  all-reduce. An all-reduce of which every device keeps a slice alone, as TPUs
  write it, is a reduce-scatter. Where a group has m devices on each of h hosts,
  a host receives (h - 1) / h of the array, each of the m devices an m-th of it,
  and they hand it on to each other.

  Args:
    text: of an optimized module, compiled.as_text().
    per_host: consecutive devices that a host has; None for a slice of TPUs.

  Returns:
    All of them, in the order of the text.
  """
  found = []
  computations = _computations(text)
  times = _times(text, computations)
  for name, lines in computations.items():
    if not times[name]:
      continue
    started = " ".join(line for line in lines if "AsyncCollectiveStart" in line)
    for line in lines:
      match = _OPERATION.search(line)
      if not match:
        continue
      label, _, kind, _ = match.groups()
      # A TPU spreads a gather over the fusions that it hides behind, and
      # writes it in each of them; it begins once.
      if "chain_id" in line and not re.search(rf"%{label}[,)]", started):
        continue
      members = _group(line)
      if len(members) == 1:
        continue
      arrays = _arrays(kind, line, len(members))
      if name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
      hosts = len({i // per_host for i in members}) if per_host else 1
      found.append(_collective(kind, arrays, len(members), hosts, times[name]))
  return found


def product_flops(text: str) -> float:
  """Operations of a program's matrix products and attention.

  For backends that have no cost analysis: products of XLA, of cuBLAS and of
  cuDNN's attention, whose backward pass computes the scores again.

  Args:
    text: of an optimized module, compiled.as_text().
  """
  computations = _computations(text)
  times = _times(text, computations)
  total = 0.0
  for name, lines in computations.items():
    shapes: dict[str, list[int]] = {}
    for line in lines if times[name] else ():
      match = _LINE.match(line)
      if not match:
        continue
      label, result, operation, rest = match.groups()
      array = _ARRAY.search(result)
      shapes[label] = (
        [int(n) for n in array[2].split(",") if n] if array else []
      )
      if operation == "dot" or "__cublas$" in rest:
        (left, *_) = re.findall(r"%([\w.\-]+)", rest)
        summed = re.search(r"lhs_contracting_dim[a-z]*\W+([\d,\"]+)", rest)
        axes = [int(n) for n in re.findall(r"\d+", summed[1])]
        depth = math.prod(shapes[left][axis] for axis in axes)
        total += times[name] * 2 * math.prod(shapes[label]) * depth
      elif "__cudnn$fmha" in rest:
        scores = re.search(
          r'intermediate_tensor_shape.*?"dimensions": ?(\[.*?\])', rest
        )
        size = math.prod(int(n) for n in re.findall(r"\d+", scores[1]))
        products = 5 if "Backward" in rest else 2
        total += times[name] * 2 * products * size * shapes[label][-1]
  return total


def memory_traffic(text: str) -> float:
  """Bytes that a program reads from and writes to a device's main memory.

  An operation reads its operands and writes its results once. What the
  compiler places elsewhere, in a TPU's VMEM (memory space 1), costs nothing,
  but for the copies between the two; of an operand of which a fusion takes
  slices alone, the slices count.

  Args:
    text: of an optimized module, compiled.as_text().
  """
  computations = _computations(text)
  times = _times(text, computations)
  # Counted with the operation that calls them: fusions, what is started to run
  # beside the rest, and sums of two numbers.
  inside = set(re.findall(r"call(?:s|ed_computations)=\{?%?([\w.\-]+)", text))
  for line in text.splitlines():
    if " call(" not in line:
      inside.update(re.findall(r"to_apply=%?([\w.\-]+)", line))
  total = 0.0
  for name, lines in computations.items():
    if name in inside or not times[name]:
      continue
    arrays: dict[str, list[tuple[float, bool]]] = {}
    for line in lines:
      match = _LINE.match(line)
      if not match:
        continue
      label, result, operation, rest = match.groups()
      if 'custom_call_target="__cu' in rest:
        result = _WORKSPACE.sub("", result)
      arrays[label] = _places(result)
      if operation in _FREE or operation.endswith("-done"):
        continue
      operands = re.findall(r"%([\w.\-]+)", rest.split("), ")[0])
      # libtpu's own files write slice-start as async-start.
      if operation in ("copy-start", "slice-start", "async-start"):
        ends = arrays[label][:2]  # one of them may be the whole of a slice
        moved = min((size for size, _ in ends), default=0)
        total += times[name] * moved * sum(main for _, main in ends)
        continue
      size = _in_main(arrays[label])
      if re.match(rf"({'|'.join(KINDS)})-start", operation):
        # The operands of most stand in their results as well.
        total += times[name] * size
        if operation != "all-reduce-start":
          continue
        size = 0.0
      callee = re.search(r"calls=%?([\w.\-]+)", rest)
      sliced = {}
      if operation == "fusion" and callee:
        sliced = _slices(computations.get(callee[1], []))
      for i, operand in enumerate(operands):
        whole = _in_main(arrays.get(operand, []))
        size += min(whole, sliced.get(i, whole))
      total += times[name] * size
  return total


def _places(types: str) -> list[tuple[float, bool]]:
  """(bytes, whether in main memory) of every array of a type."""
  return [
    (
      _bytes(dtype) * math.prod(int(n) for n in shape.split(",") if n),
      "S(" not in (layout or "") or "S(0)" in layout,
    )
    for dtype, shape, layout in _ARRAY.findall(types)
  ]


def _in_main(arrays: list[tuple[float, bool]]) -> float:
  return sum(size for size, main in arrays if main)


def _slices(lines: list[str]) -> dict[int, float]:
  """Number of a parameter that is used in slices alone -> their bytes."""
  numbers: dict[str, int] = {}
  taken: dict[int, float] = collections.defaultdict(float)
  for line in lines:
    match = _LINE.match(line)
    if not match:
      continue
    label, result, operation, rest = match.groups()
    if operation == "parameter":
      numbers[label] = int(rest.partition(")")[0])
      continue
    for operand in re.findall(r"%([\w.\-]+)", rest.split("), ")[0]):
      if operand not in numbers:
        continue
      if operation == "bitcast":
        numbers[label] = numbers[operand]
      elif operation in ("slice", "dynamic-slice"):
        taken[numbers[operand]] += sum(size for size, _ in _places(result))
      else:
        taken[numbers[operand]] = math.inf
  return taken


def _collective(
  kind: str,
  arrays: list[tuple[str, int]],
  group: int,
  hosts: int,
  times: int,
) -> Collective:
  size = sum(_bytes(dtype) * count for dtype, count in arrays)
  twice = 2 if kind == "all-reduce" else 1
  share, far = (group - 1) / group, (hosts - 1) / group
  if kind == "collective-permute":  # somewhere, between hosts
    share, far = (0, 1) if hosts > 1 else (1, 0)
  if group == hosts:  # nobody of the own host takes part
    share = 0
  return Collective(
    kind=kind,
    dtypes=tuple(sorted({dtype for dtype, _ in arrays})),
    elements=sum(count for _, count in arrays),
    bytes=twice * share * size * times,
    network_bytes=twice * far * size * times,
    times=times,
    group=group,
  )


def _computations(text: str) -> dict[str, list[str]]:
  """Name -> lines of every computation."""
  computations: dict[str, list[str]] = {}
  lines: list[str] = []
  for line in text.splitlines():
    match = _COMPUTATION.match(line)
    if match:
      lines = computations.setdefault(match[1], [])
    elif line.startswith("  "):
      lines.append(line)
  return computations


def _times(text: str, computations: dict[str, list[str]]) -> dict[str, int]:
  """How often each computation runs; a while loop of unknown length, once."""
  entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
  if entry is None:
    raise ValueError("the text has no ENTRY: it is not an HLO module.")
  times: dict[str, int] = collections.Counter({entry[1]: 1})
  # A computation stands before those that call it.
  for name in reversed(list(computations)):
    for line in computations[name]:
      trips = _trips(line, computations) if " while(" in line else 1
      for one, many in _CALLS.findall(line):
        for callee in [one] if one else re.findall(r"[\w.\-]+", many):
          times[callee] += times[name] * trips
  return times


def _trips(line: str, computations: dict[str, list[str]]) -> int:
  """Rounds of a while loop that counts up from zero to a constant."""
  known = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
  if known:
    return int(known[1])
  condition = re.search(r"condition=%?([\w.\-]+)", line)
  lines = computations.get(condition[1], []) if condition else []
  text = "\n".join(lines)
  limits = re.findall(r"s32\[\]\S* constant\((\d+)\)", text)
  if len(limits) == 1 and "direction=LT" in text:
    return int(limits[0])
  return 1


def _group(line: str) -> list[int]:
  """Devices of the first group; all listed forms of replica_groups."""
  numbers = lambda text: [int(n) for n in re.findall(r"\d+", text or "")]
  explicit = re.search(r"replica_groups=\{\{([0-9,]*)\}", line)
  if explicit:
    return numbers(explicit[1])
  iota = re.search(
    r"replica_groups=\[(\d+),\d+\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line
  )
  if iota:
    return _ids(iota[2], iota[3]).reshape(int(iota[1]), -1)[0].tolist()
  mesh = re.search(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}",
    line,
  )
  if mesh:
    sizes = {k: int(n) for k, n in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
    whole = str(math.prod(sizes.values()))
    ids = _ids(mesh[2] or whole, mesh[3]).reshape(*sizes.values())
    axes = re.findall(r"'([^']*)'", mesh[4])
    return (
      ids[tuple(slice(None) if name in axes else 0 for name in sizes)]
      .flatten()
      .tolist()
    )
  pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", line)
  return sorted(set(numbers(pairs[1]))) if pairs else [0]


def _ids(shape: str, order: str | None) -> np.ndarray:
  """Devices 0, 1, ... in an array of a shape, its axes then in an order."""
  sizes = [int(n) for n in shape.split(",")]
  ids = np.arange(math.prod(sizes)).reshape(sizes)
  return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _arrays(kind: str, line: str, group: int) -> list[tuple[str, int]]:
  """(type, elements) of the whole arrays that a collective works on."""
  result, _, start = _OPERATION.search(line).groups()[1:]
  arrays = [
    (dtype, math.prod(int(n) for n in shape.split(",") if n))
    for dtype, shape in _SHAPE.findall(result)
    if shape or kind == "all-reduce"
  ]
  if start and kind != "all-reduce":
    arrays = arrays[len(arrays) // 2 :]  # operands stand before results
  if kind == "reduce-scatter":
    arrays = [(dtype, count * group) for dtype, count in arrays]
  return arrays


def _bytes(dtype: str) -> float:
  if dtype in _BYTES:
    return _BYTES[dtype]
  bits = re.search(r"\d+", dtype)
  return int(bits[0]) / 8 if bits else 1
