# SPDX-License-Identifier: Apache-2.0
"""What a run tells: progress bar, metrics.jsonl, TensorBoard events, grids of samples.

The only place that asks which process this is: process 0 writes, every process computes.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import UInt8
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from ip2p_jax.training.state import Metrics


def writes() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file under a temporary name and renames it."""
    if writes():
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        part.write_bytes(data)
        part.replace(path)


def write_json(path: str | os.PathLike, tree: dict) -> None:
    """Writes `tree` as indented JSON."""
    write_bytes(path, (json.dumps(tree, indent=2) + "\n").encode())


class Logs:
    """Collects metrics step by step and writes them out; see `open_logs`."""

    def __init__(self, workdir: str, step: int, steps: int):
        self.path = epath.Path(workdir) / "metrics.jsonl"
        self.samples = epath.Path(workdir) / "samples"
        self.waiting: list[tuple[int, Metrics]] = []
        self.time: float | None = None
        self.timed = 0
        if writes():
            self.drop_after(step)
            self.events = SummaryWriter(workdir, purge_step=step + 1)
            self.progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
                console=Console(stderr=True),
            )
            self.bar = self.progress.add_task("", total=steps, completed=step, line="")
            self.progress.start()

    def drop_after(self, step: int) -> None:
        """Drops lines after `step`: what a killed run logged beyond its last checkpoint."""
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            write_bytes(self.path, "".join(line + "\n" for line in kept).encode())

    def add(self, step: int, metrics: Metrics) -> None:
        """Keeps the metrics of a step, which may still be computing."""
        self.waiting.append((step, metrics))
        if self.time is None:  # the first step compiles: the clock starts after it
            jax.block_until_ready(metrics)
            self.time = time.monotonic()
        else:
            self.timed += 1
        if writes():
            self.progress.update(self.bar, completed=step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock of `examples_per_second`: for saves and grids, which are no steps."""
        jax.block_until_ready(self.waiting)
        start = time.monotonic()
        yield
        if self.time is not None:
            self.time += time.monotonic() - start

    def flush(self, examples: int) -> None:
        """Waits for the kept metrics and writes their means as one line.

        `examples` is the number of rows a step. Raises FloatingPointError naming the first step
        whose loss, gradient or parameters are not finite.
        """
        if self.time is None or not self.waiting:
            return
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self.waiting]
        for step, metrics in fetched:
            for name in ("loss", "grad_norm", "param_norm"):
                if not math.isfinite(metrics[name][0]):
                    raise FloatingPointError(f"step {step}: {name} is {metrics[name][0]}")
        seconds = time.monotonic() - self.time
        totals = {name: np.sum([m[name] for _, m in fetched], axis=0) for name in fetched[0][1]}
        line: dict[str, Any] = {"step": fetched[-1][0]}
        line |= {name: float(v / w) for name, (v, w) in totals.items() if w > 0}
        if self.timed:
            line["examples_per_second"] = examples * self.timed / seconds
        self.waiting, self.timed, self.time = [], 0, time.monotonic()
        if writes():
            self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Appends to metrics.jsonl, TensorBoard and the terminal."""
        line = {name: float(f"{v:.9g}") if isinstance(v, float) else v for name, v in line.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in line.items():
            self.events.add_scalar(name, value, line["step"])
        self.progress.update(self.bar, line=f"loss {line['loss']:.4f}")
        self.say("  ".join(f"{name} {value:.4g}" for name, value in line.items()))

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        if writes():
            self.progress.console.print(text, highlight=False, soft_wrap=True)

    def grid(self, step: int, columns: list[UInt8[np.ndarray, "b h w 3"]]) -> None:
        """Writes samples/STEP.png: one row a picture, one column an array of `columns`."""
        if not writes():
            return
        rows = [np.concatenate(row, axis=1) for row in zip(*columns, strict=True)]
        picture = np.concatenate(rows)
        self.samples.mkdir(parents=True, exist_ok=True)
        part = self.samples / f".{step:08d}.png.part"
        with part.open("wb") as file:
            Image.fromarray(picture).save(file, format="PNG")
        part.replace(self.samples / f"{step:08d}.png")
        self.events.add_image("samples", picture, step, dataformats="HWC")

    def close(self) -> None:
        if writes():
            self.progress.stop()
            self.events.close()


@contextlib.contextmanager
def open_logs(workdir: str, step: int, steps: int) -> Iterator[Logs]:
    """Opens the logs of a run that stands at `step` of `steps`."""
    logs = Logs(workdir, step, steps)
    try:
        yield logs
    finally:
        logs.close()
