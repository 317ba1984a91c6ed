# SPDX-License-Identifier: Apache-2.0
"""Reads the program that XLA made for a TPU: what each operation is estimated to take.

The text names, for most operations that take time, the cycles that the compiler's own cost model
expects. Here they are summed along the program as it runs: bodies of loops as often as they run.
"""

import re
from collections import Counter
from typing import Any, NamedTuple

from ip2p_jax.tpu.flops import Axis, convolution_flops
from ip2p_jax.tpu.loops import Scope, trips

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
"""Of an element, where they are not 4."""

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
LAYOUT = {
    *("copy", "transpose", "reshape", "bitcast", "concatenate", "pad", "slice", "dynamic-slice"),
    *("dynamic-update-slice", "broadcast", "iota", "constant", "parameter", "tuple", "reverse"),
    *("get-tuple-element", "convert", "copy-start", "copy-done", "fusion"),
}
"""Operations that compute nothing."""

NO_TIME = {"AllocateBuffer", "ConcatBitcast", "Sharding"}
"""Custom calls that are none."""


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names; of a constant or a parameter what is in the brackets
    rest: str
    root: bool

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute names."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.rest)
        return found and found[1]

    @property
    def cycles(self) -> int:
        """What the compiler expects it to take."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0


Computation = dict[str, Instruction]


class Kernel(NamedTuple):
    """What a kernel has to do, whose cycles the compiler does not know."""

    flops: int  # of its products, what it computes again included
    padded: int  # the same, heads widened to what the product units take
    bytes: int  # of operands and results


KERNELS = {"splash_mha_fwd": 2, "splash_mha_dkv": 5}
"""Kernels that are known, by how their names begin, with the products of queries and keys in
each: the scores and their use; the scores again, and four gradients."""
LANES = 128
"""Width that the product units take."""


class Module(NamedTuple):
    """A program: computations by name, and the one that it begins with."""

    computations: dict[str, Computation]
    entry: str


class Cost(NamedTuple):
    """What a program, or a part of it, takes on one chip."""

    cycles: Counter  # by kind of operation
    flops: int  # of products and convolutions
    calls: Counter  # collectives by kind: how often
    bytes: Counter  # and the bytes of their operands or results, whichever are more
    custom: Counter  # custom calls without known cycles, by target
    kernels: Counter  # those of them that are a known `Kernel`, by that
    copies: int
    float32_convolutions: int
    loops: dict[str, int]  # how often the body of each runs

    def plus(self, other: "Cost", times: int = 1) -> "Cost":
        """This and `times` the other."""
        many = [Counter({k: times * v for k, v in x.items()}) for x in counters(other)]
        sums = (a + b for a, b in zip(counters(self), many, strict=True))
        cycles, calls, moved, custom, kernels = sums
        return Cost(
            cycles,
            self.flops + times * other.flops,
            calls,
            moved,
            custom,
            kernels,
            self.copies + times * other.copies,
            self.float32_convolutions + times * other.float32_convolutions,
            self.loops | other.loops,
        )


def counters(cost: Cost) -> tuple[Counter, ...]:
    return cost.cycles, cost.calls, cost.bytes, cost.custom, cost.kernels


def nothing() -> Cost:
    """The cost of no operation."""
    return Cost(Counter(), 0, Counter(), Counter(), Counter(), Counter(), 0, 0, {})


def parse(text: str) -> Module:
    """Reads `compiled.as_text()`."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in re.sub(r'\n(?="|\}\})', " ", text).splitlines():  # kernels have attributes of lines
        head = re.match(r"(ENTRY )?%([\w.\-]+) \(.*\{$", line)
        if head:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif line == "}":
            current = None
        elif current is not None and " = " in line:
            instruction = read(line)
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("the compiled program's text has no ENTRY")
    return Module(computations, entry)


def read(line: str) -> Instruction:
    """Reads `[ROOT] %name = shape opcode(operands), rest`."""
    left, right = line.strip().split(" = ", 1)
    end = closing(right, 0) if right.startswith("(") else right.index(" ") - 1
    shape, right = right[: end + 1], right[end + 1 :].strip()
    begin = right.index("(")
    end = closing(right, begin)
    opcode, inside = right[:begin], right[begin + 1 : end]
    operands = re.findall(r"%([\w.\-]+)", inside) or [inside]
    name = left.removeprefix("ROOT ").removeprefix("%")
    return Instruction(
        name, shape, opcode, tuple(operands), right[end + 1 :], left.startswith("ROOT ")
    )


def closing(text: str, begin: int) -> int:
    """Where the bracket that opens at `begin` closes."""
    depth = 0
    for i in range(begin, len(text)):
        depth += {"(": 1, ")": -1}.get(text[i], 0)
        if depth == 0:
            return i
    raise ValueError(f"a bracket does not close: {text[:80]}")


def cost(text: str) -> Cost:
    """What a compiled program takes; ValueError names a loop that runs no known number of times."""
    module = parse(text)
    return of_scope(module, Scope(module.computations[module.entry]))


def of_scope(module: Module, scope: Scope) -> Cost:
    """What one run of a computation takes, with all that it calls."""
    total = nothing()
    for at in scope.instructions.values():
        if at.opcode == "while":
            body, condition = (at.called(name) for name in ("body", "condition"))
            inside = Scope(module.computations[str(body)], scope, at)
            many = trips(at, inside, module.computations[str(condition)])
            total = total.plus(of_scope(module, inside), many)
            total.loops[at.name] = many
        elif at.opcode == "conditional":
            names = re.findall(r"%([\w.\-]+)", at.rest.split("metadata=")[0])
            branches = [of_scope(module, Scope(module.computations[name])) for name in names]
            total = total.plus(max(branches, key=lambda cost: sum(cost.cycles.values())))
        elif at.opcode in ("call", "async-start"):
            name = at.called("to_apply") or at.called("calls")
            total = total.plus(of_scope(module, Scope(module.computations[str(name)])))
            total.cycles.update({"async": at.cycles} if at.cycles else {})
        else:
            total = total.plus(of_instruction(module, scope.instructions, at))
    return total


def of_instruction(module: Module, around: Computation, at: Instruction) -> Cost:
    """What one operation takes, with those that are fused in it."""
    parts = [(around, at), *fused(module, at)]
    collective = next((found for _, x in parts if (found := collective_of(x.opcode))), None)
    products = [(c, x) for c, x in parts if x.opcode in ("convolution", "dot")]
    is_custom = at.opcode == "custom-call" and not at.cycles
    target = re.search(r'custom_call_target="([^"]+)"', at.rest)
    known = kernel(around, at) if is_custom else None
    custom = target[1] if is_custom and target and target[1] not in NO_TIME else None
    moved = max((size(module, c, x) for c, x in parts if collective_of(x.opcode)), default=0)
    return Cost(
        Counter({kind(parts, collective): at.cycles} if at.cycles else {}),
        sum(flops(c, x) for c, x in products),
        Counter([collective] if collective else []),
        Counter({collective: moved} if collective else {}),
        Counter([custom] if custom and not known else []),
        Counter([known] if known else []),
        int(at.opcode in ("copy", "copy-start")),
        sum(c[x.operands[0]].shape.startswith("f32") for c, x in products),
        {},
    )


def kernel(around: Computation, at: Instruction) -> Kernel | None:
    """The work of a known kernel."""
    products = next((n for name, n in KERNELS.items() if at.name.startswith(name)), None)
    if products is None:
        return None
    shapes = [around[name].shape for name in at.operands if name in around]
    q, k = [x for x in map(sides, shapes) if len(x) == 4][:2]
    rows, heads, *plane = q
    width, positions = sorted(plane)  # heads are narrower than the pictures that take kernels
    each = 2 * products * rows * heads * positions * max(k[2:])
    moved = sum(map(bytes_of, [*shapes, at.shape]))
    return Kernel(each * width, each * -(-width // LANES) * LANES, moved)


def fused(module: Module, at: Instruction) -> list[tuple[Computation, Instruction]]:
    """All operations of a fusion, those of fusions in it too, each with its computation."""
    name = at.called("calls") if at.opcode == "fusion" else None
    if name is None:
        return []
    inside = module.computations[name]
    return [part for x in inside.values() for part in ((inside, x), *fused(module, x))]


def collective_of(opcode: str) -> str | None:
    """ "all-gather-start" -> "all-gather"; None for what moves nothing among chips."""
    return next((c for c in COLLECTIVES if opcode in (c, f"{c}-start")), None)


def kind(parts: list[tuple[Computation, Instruction]], collective: str | None) -> str:
    """What sort of work an operation is, by the dearest that is fused in it."""
    opcodes = {x.opcode for _, x in parts}
    if collective:
        return "collective"
    if opcodes & {"convolution", "dot"}:
        names = [x.rest for _, x in parts if x.opcode in ("convolution", "dot")]
        return "convolution" if any("conv_general" in name for name in names) else "product"
    if "custom-call" in opcodes:
        return "custom call"
    for name, members in (
        ("reduction", {"reduce", "reduce-window"}),
        ("gather, scatter", {"gather", "scatter"}),
        ("random numbers", {"rng-bit-generator", "xor"}),
    ):
        if opcodes & members:
            return name
    return "copies, layouts and types" if opcodes <= LAYOUT else "elementwise"


def size(module: Module, around: Computation, at: Instruction) -> int:
    """Bytes of a collective's operands, or of its result if these are more."""
    operands = sum(bytes_of(around[name].shape) for name in at.operands if name in around)
    result = bytes_of(at.shape) - (operands if at.opcode.endswith("-start") else 0)
    return max(operands, result)


def bytes_of(shape: str) -> int:
    """ "(bf16[8,128]{1,0}, f32[])" -> 2052."""
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape):
        total += BYTES.get(dtype, 4) * elements(dims)
    return total


def elements(dims: str) -> int:
    n = 1
    for side in dims.split(",") if dims else ():
        n *= int(side)
    return n


def sides(shape: str) -> list[int]:
    """ "bf16[8,128]{1,0}" -> [8, 128]."""
    found = re.match(r"\w+\[([\d,]*)\]", shape)
    return [int(side) for side in found[1].split(",")] if found and found[1] else []


def flops(around: Computation, at: Instruction) -> int:
    """FLOPs of a product or a convolution."""
    x, kernel, out = (sides(shape) for shape in (*(around[n].shape for n in at.operands), at.shape))
    if at.opcode == "dot":
        found: Any = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", at.rest)
        return 2 * elements(",".join(map(str, out))) * product_of(x, found[1])
    labels: Any = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", at.rest)
    lhs, rhs, result = labels.groups()
    window = (
        dict(re.findall(r"(\w+)=([\dx_\-]+)", found[1]))
        if (found := re.search(r"window=\{([^}]*)\}", at.rest))
        else {}
    )
    axes = []
    for i in range(len(lhs) - 2):
        at_i = {name: value.split("x")[i] for name, value in window.items()}
        axes.append(
            Axis(
                size=x[lhs.index(str(i))],
                window=kernel[rhs.index(str(i))],
                output=out[result.index(str(i))],
                stride=int(at_i.get("stride", 1)),
                low=int(at_i.get("pad", "0_0").split("_")[0]),
                dilation=int(at_i.get("lhs_dilate", 1)),
                spread=int(at_i.get("rhs_dilate", 1)),
            )
        )
    rows, c_out = out[result.index("b")], out[result.index("f")]
    return convolution_flops(rows, kernel[rhs.index("i")], c_out, axes)


def product_of(shape: list[int], dims: str) -> int:
    n = 1
    for i in dims.split(",") if dims else ():
        n *= shape[int(i)]
    return n
