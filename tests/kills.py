# SPDX-License-Identifier: Apache-2.0
"""How often the kill tests kill, and the page on which `make soak` writes down what they saw."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

KILLS = int(os.environ.get("IP2P_KILLS", "5"))
PAGE = Path(os.environ.get("IP2P_SOAK", "")).absolute()  # some tests change the folder
HEAD = """# The kill tests, many times

Written by `make soak` on {machine}.
Each row is a test that starts a command, kills it with SIGKILL at a random moment and starts it
again. In the end every byte of the result was what an undisturbed run makes.

| test | started | killed | of these while a file was being written | came to their end |
|---|---|---|---|---|
"""


def write_row(test: str, started: int, killed: int, writing: int) -> None:
    """Adds a row to the page, if there is to be one."""
    if PAGE.is_dir():  # none is named
        return
    if not PAGE.exists():
        parts = f"{os.cpu_count()} CPU cores, Python {platform.python_version()}"
        PAGE.write_text(HEAD.format(machine=f"{parts}, jax {version('jax')}"))
    with PAGE.open("a") as file:
        file.write(f"| {test} | {started} | {killed} | {writing} | {started - killed} |\n")
