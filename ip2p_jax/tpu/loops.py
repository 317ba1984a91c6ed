# SPDX-License-Identifier: Apache-2.0
"""How often the loops of a compiled program run, which its text no longer says: a counter from a
constant, by a constant, while it is below a constant."""

import re
from typing import Any, NamedTuple


class Scope(NamedTuple):
    """A computation; if it is a loop's body, where the loop is (`around`) and its instruction."""

    instructions: dict[str, Any]
    around: "Scope | None" = None
    loop: Any = None

    @property
    def root(self) -> Any:
        return next(x for x in self.instructions.values() if x.root)


SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start", "optimization-barrier")
"""Operations whose result is their operand."""


def trips(loop: Any, body: Scope, condition: dict[str, Any]) -> int:
    """How often a loop runs; ValueError, with its name, where that cannot be said."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
    if known:
        return int(known[1])
    test = Scope(condition, body.around, loop)
    compare = source(test, test.root.name)
    if compare.opcode == "compare" and "direction=LT" in compare.rest:
        counter = carried(test, compare.operands[0])
        if counter is not None:
            bound = value_in_loop(test, body, compare.operands[1])
            first = initial(body, counter)
            step = step_of(body, counter)
            if bound is not None and first is not None and step:
                return max(0, -(-(bound - first) // step))
    raise ValueError(f"the loop %{loop.name} of the compiled program runs no known number of times")


def source(scope: Scope, name: str) -> Any:
    """The instruction that computes a value, past copies of it."""
    at = scope.instructions[name]
    while at.opcode in SAME:
        at = scope.instructions[at.operands[0]]
    if at.opcode == "get-tuple-element":
        made = source(scope, at.operands[0])
        if made.opcode == "tuple":
            return source(scope, made.operands[index(at)])
    return at


def index(at: Any) -> int:
    """Which element of a tuple is taken."""
    return int(re.search(r"index=(\d+)", at.rest)[1])  # pyright: ignore[reportOptionalSubscript]


def carried(scope: Scope, name: str) -> int | None:
    """Which element of what the loop carries a value is; None if it is none."""
    at = source(scope, name)
    if at.opcode == "get-tuple-element":
        return index(at) if source(scope, at.operands[0]).opcode == "parameter" else None
    return None


def constant(scope: Scope, name: str) -> int | None:
    """A value that does not change while the computation runs, if the text says it."""
    at = source(scope, name)
    if at.opcode == "constant":
        return int(at.operands[0]) if re.fullmatch(r"-?\d+", at.operands[0]) else None
    i = carried(scope, name)
    if i is None or scope.loop is None or not is_kept(scope, i):
        return None
    return initial(scope, i)


def value_in_loop(test: Scope, body: Scope, name: str) -> int | None:
    """The same of a value that a loop's condition sees."""
    i = carried(test, name)
    if i is None:
        return constant(test, name)
    return initial(body, i) if is_kept(body, i) else None


def is_kept(body: Scope, i: int) -> bool:
    """Whether a loop's body hands on the i-th element as it got it."""
    made = source(body, body.root.name)
    return made.opcode == "tuple" and carried(body, made.operands[i]) == i


def initial(body: Scope, i: int) -> int | None:
    """The i-th element of what a loop starts with."""
    if body.around is None:
        return None
    made = source(body.around, body.loop.operands[0])
    return constant(body.around, made.operands[i]) if made.opcode == "tuple" else None


def step_of(body: Scope, i: int) -> int | None:
    """By how much a loop's body raises the i-th element."""
    made = source(body, body.root.name)
    if made.opcode != "tuple":
        return None
    add = source(body, made.operands[i])
    if add.opcode != "add":
        return None
    for one, other in (add.operands, add.operands[::-1]):
        if carried(body, one) == i:
            return constant(body, other)
    return None
