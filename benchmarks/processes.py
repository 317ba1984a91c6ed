# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: each measurement in a process of its own, with its peak memory."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version


def measure(script: str, worker: str, *arguments: str, cache: str) -> dict:
    """Runs `script --worker worker arguments`; its last line of output is JSON."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": cache,
        "STARTED": str(time.time()),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, script, "--worker", worker, *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{worker} failed")
    return {**json.loads(output.splitlines()[-1]), "peak GiB": usage.ru_maxrss / 2**20}


def median(runs: list[dict]) -> dict:
    """Of each measured value."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def setting(runs: int) -> str:
    """A sentence on how and where it was measured."""
    return (
        f"Median of {runs} processes each, in turn, on {platform.machine()} with "
        f"{os.cpu_count()} cores; float32; jax {version('jax')}, torch {version('torch')}, "
        f"diffusers {version('diffusers')}."
    )
