# SPDX-License-Identifier: Apache-2.0
"""Claim: every test that docs/reliability.md names is there, and is slow where it is in italics."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = (TESTS.parent / "docs" / "reliability.md").read_text().splitlines()
ROWS = {int(x[1]): line for line in TABLE if (x := re.match(r"\| (\d+) \|", line))}


def in_module(module: str) -> dict[str, bool]:
    """The tests of a module by name, and whether each is slow. Of two modules of that name it is
    the one nearer to the top."""
    path = min(TESTS.rglob(f"{module}.py"), key=lambda path: len(path.parts))
    functions = [x for x in ast.parse(path.read_text()).body if isinstance(x, ast.FunctionDef)]
    return {x.name: "pytest.mark.slow" in map(ast.unparse, x.decorator_list) for x in functions}


def test_what_the_table_names_is_there():
    """`test_module`, or `folder/test_module: `test_a`, *`test_slow`*, with semicolons between."""
    assert sorted(ROWS) == [*range(1, 18), 19, 20]
    for number, line in ROWS.items():
        *_, cell, _ = line.split(" |")
        named = 0
        for part in cell.split("; "):
            module, *names = re.findall(r"\*?`?(?:data_gen/)?test_\w+`?\*?", part)
            there = in_module(module)
            for name in names:
                assert there[name.strip("*`")] == name.startswith("*"), (number, name)
            named += len(names) or len(there)
        assert named, number
