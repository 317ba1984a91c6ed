# SPDX-License-Identifier: Apache-2.0
"""Compiles a program for a slice, and says what the compiler expects it to take there."""

import re
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import jax

from ip2p_jax.programs import compiled_anew
from ip2p_jax.tpu import hlo
from ip2p_jax.tpu.flops import model_flops
from ip2p_jax.tpu.programs import Plan
from ip2p_jax.tpu.topologies import Chip, Topology


@dataclass
class Report:
    """One program on one slice; bytes, FLOPs and cycles are a chip's."""

    name: str
    topology: str
    chips: int
    unit: str  # what `seconds` are for
    runs: int  # how many layers of the network are like this one
    compile_seconds: float
    model_flops: int
    fits: bool | None = None  # None: it was lowered only
    problem: str = ""  # what the compiler says that is wrong
    memory: int = 0  # that there is
    peak_bytes: int = 0
    argument_bytes: int = 0
    temporary_bytes: int = 0
    flops: int = 0  # of the compiled program's products and convolutions
    cycles: dict[str, int] = field(default_factory=dict)  # by kind of operation
    collectives: dict[str, list[int]] = field(default_factory=dict)  # kind: how many, bytes
    kernels: int = 0  # whose time is what the chip could do at best
    kernel_seconds: float = 0.0
    custom_calls: dict[str, int] = field(default_factory=dict)  # of which nothing is known
    copies: int = 0
    float32_convolutions: int = 0
    loops: dict[str, int] = field(default_factory=dict)
    seconds: float | None = None
    utilisation: float | None = None
    left_out: str = ""  # what the estimate does not know

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def lower(plan: Plan, topology: Topology) -> tuple[Report, jax.stages.Lowered]:
    """Traces and lowers a program, which shows what is wrong with its shapes."""
    begin = time.perf_counter()
    lowered = plan.jitted.lower(*plan.args)
    work = round(plan.share * model_flops(plan.work, *plan.work_args))
    report = Report(
        name=plan.name,
        topology=topology.name,
        chips=len(topology.devices),
        unit=plan.unit,
        runs=plan.runs,
        compile_seconds=time.perf_counter() - begin,
        model_flops=work,
        memory=topology.chip.memory,
    )
    return report, lowered


def compile_plan(plan: Plan, topology: Topology) -> tuple[Report, jax.stages.Compiled | None]:
    """Compiles a program; None in place of it where the chip's memory does not hold it.

    Raises ValueError for a loop that runs no known number of times.
    """
    report, lowered = lower(plan, topology)
    begin = time.perf_counter()
    try:
        with compiled_anew():  # what JAX's cache holds cannot be read without the chip
            compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        report.fits, report.problem = False, out_of_memory(str(error))
        return report, None
    finally:
        report.compile_seconds += time.perf_counter() - begin
    fill(report, compiled, topology.chip)
    return report, compiled


ADVICE = (
    "less is needed with --config.remat=blocks or full, a larger --config.optim.accumulate, "
    "--config.mesh.fsdp=-1 --config.mesh.data=1, or a smaller batch; when editing, fewer --rows"
)


def out_of_memory(message: str) -> str:
    """The compiler's words for how much there is and how much is needed, with advice."""
    line = re.sub(r"\s+", " ", message.removeprefix("RESOURCE_EXHAUSTED:")).strip()
    end = re.search(r"\. (?=[A-Z]|$)|$", line)
    return f"{line[: end.start() if end else None]}: {ADVICE}"


def fill(report: Report, compiled: jax.stages.Compiled, chip: Chip) -> None:
    """Reads memory, cycles and FLOPs off a compiled program."""
    stats: Any = compiled.memory_analysis()
    report.fits = True
    report.peak_bytes = stats.peak_memory_in_bytes
    report.argument_bytes = stats.argument_size_in_bytes
    report.temporary_bytes = stats.temp_size_in_bytes
    cost = hlo.cost(str(compiled.as_text()))
    report.flops = cost.flops + sum(x.flops * n for x, n in cost.kernels.items())
    report.cycles = dict(cost.cycles.most_common())
    report.collectives = {kind: [n, cost.bytes[kind]] for kind, n in cost.calls.items()}
    report.kernels, report.custom_calls = cost.kernels.total(), dict(cost.custom)
    bounds = (
        n * max(x.padded / chip.peak, x.bytes / chip.bandwidth) for x, n in cost.kernels.items()
    )
    report.kernel_seconds = sum(bounds, 0.0)
    report.copies, report.loops = cost.copies, cost.loops
    report.float32_convolutions = cost.float32_convolutions
    report.seconds = cost.cycles.total() / chip.clock + report.kernel_seconds
    if report.seconds:
        report.utilisation = report.model_flops / report.seconds / chip.peak
    report.left_out = left_out(report)


def left_out(report: Report) -> str:
    """What the sum of cycles does not hold, in a sentence."""
    parts = []
    if report.kernels and report.seconds:
        share = report.kernel_seconds / report.seconds
        parts.append(
            f"what {report.kernels} kernels take beyond the chip's bounds on their products and "
            f"bytes ({share:.0%} of the estimate)"
        )
    if report.custom_calls:
        names = ", ".join(f"{n} {name}" for name, n in report.custom_calls.items())
        share = max(0.0, 1 - report.flops / max(report.model_flops, 1))
        parts.append(f"custom calls ({names}; {share:.0%} of the model's FLOPs)")
    if report.collectives:
        moved = sum(size for _, size in report.collectives.values())
        parts.append(f"{moved / 2**20:,.1f} MiB among chips, but for what runs meanwhile")
    parts.append("the host")
    return f"Not in the estimate: {', '.join(parts)}."
