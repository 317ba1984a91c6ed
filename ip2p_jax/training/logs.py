# SPDX-License-Identifier: Apache-2.0
"""What a run tells: progress bar, metrics.jsonl, TensorBoard events, grids of samples.

The only place that asks which process this is: process 0 writes, every process computes.
"""

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jaxtyping import UInt8
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ip2p_jax import config
from ip2p_jax.storage import transient, write_whole
from ip2p_jax.training.events import Events
from ip2p_jax.training.state import Metrics


def writes() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def warn(text: str) -> None:
    """Prints a line, once for all hosts."""
    if writes():
        print(text, file=sys.stderr)


def write_bytes(path: str | os.PathLike, data: bytes) -> None:
    """Writes a file, whole or not at all, once for all hosts."""
    if writes():
        write_whole(epath.Path(path), data)


def write_json(path: str | os.PathLike, tree: dict) -> None:
    """Writes `tree` as indented JSON."""
    write_bytes(path, (json.dumps(tree, indent=2) + "\n").encode())


def append(path: epath.Path, text: str) -> None:
    """Appends to a file; of what cannot be written whole, nothing stays. A bucket's object does not
    grow: to open it for appending empties it."""
    if "://" in str(path):
        path.write_text((path.read_text() if path.exists() else "") + text)
        return
    size = path.stat().length if path.exists() else 0
    try:
        with path.open("a") as file:
            file.write(text)
    except OSError:
        if path.exists():
            os.truncate(path, size)
        raise


def drop_after(path: epath.Path, step: int) -> None:
    """Drops lines after `step` of this host's file: what a killed run logged beyond its last
    checkpoint."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if line.endswith("}")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_whole(path, "".join(line + "\n" for line in kept).encode())


def total(count: int) -> int:
    """The sum over all hosts, which all come here."""
    if jax.process_count() == 1:
        return count
    return int(np.sum(multihost_utils.process_allgather(np.int32(count))))


class Logs:
    """Collects metrics step by step and writes them out; see `open_logs`.

    What a full disk refuses is kept, and written with the next line.
    """

    def __init__(
        self, workdir: str, step: int, cfg: config.Config, beat: Callable[[], None], board: Any
    ):
        self.workdir, self.cfg, self.beat, self.board = workdir, cfg.log, beat, board
        self.max_skipped = cfg.optim.max_skipped
        self.skipping = 0  # steps in a row, the last among them, that were skipped
        self.path = epath.Path(workdir) / "metrics.jsonl"
        self.report = epath.Path(workdir) / f"broken-{jax.process_index()}.jsonl"
        self.reported = 0
        self.samples = epath.Path(workdir) / "samples"
        self.waiting: list[tuple[int, Metrics]] = []
        self.data_seconds = 0.0
        self.flops_share: float | None = None  # of the devices' a second, that an example now takes
        self.used = 0.0  # its sum over the steps that are timed
        self.profiling = False
        self.unwritten: list[dict[str, Any]] = []
        self.events: Events | None = None
        self.time: float | None = None
        self.timed = 0
        drop_after(self.report, step)
        if writes():
            drop_after(self.path, step)
            self.events = Events(workdir, step + 1)
            self.progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
                console=Console(stderr=True),
            )
            self.bar = self.progress.add_task("", total=cfg.steps, completed=step, line="")
            self.progress.start()

    def add(self, step: int, metrics: Metrics) -> None:
        """Keeps the metrics of a step, which may still be computing."""
        self.waiting.append((step, metrics))
        if self.time is None:  # the first step compiles: the clock starts after it
            jax.block_until_ready(metrics)
            self.time = time.monotonic()
        else:
            self.timed += 1
            self.used += self.flops_share or 0.0
        if writes():
            self.progress.update(self.bar, completed=step)

    def next(self, batches: Iterator[Any]) -> Any:
        """The next batch; how long that takes is logged."""
        start = time.monotonic()
        batch = next(batches)
        self.data_seconds += time.monotonic() - start
        return batch

    def profile(self, step: int) -> None:
        """Begins, or ends, the recording of DIR/profile before this step."""
        first = self.cfg.profile_at
        if first and step in (first, first + self.cfg.profile_steps):
            self.wait()
            if step == first and writes():
                jax.profiler.start_trace(f"{self.workdir}/profile")
                self.profiling = True
            else:
                self.end_profile()

    def end_profile(self) -> None:
        if self.profiling:
            self.profiling = False
            jax.profiler.stop_trace()

    def wait(self) -> None:
        """Waits for the kept metrics, step by step."""
        for _, metrics in self.waiting:
            jax.block_until_ready(metrics)
            self.beat()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock of `examples_per_second`: for saves and grids, which are no steps."""
        self.wait()
        start, runs = time.monotonic(), self.time is not None
        yield
        if runs and self.time is not None:  # else it was started within, by the first step
            self.time += time.monotonic() - start

    def flush(self, examples: int, broken: Sequence[str] = ()) -> None:
        """Waits for the kept metrics and writes their means as one line.

        `examples` is the number of rows a step, `broken` says why records were replaced, since the
        process began; each host reports its own in DIR/broken-HOST.jsonl. Raises FloatingPointError
        naming the steps, where too many in a row were skipped or parameters are not finite.
        """
        if self.time is None or not self.waiting:
            return
        self.wait()
        fetched = [(step, jax.device_get(metrics)) for step, metrics in self.waiting]
        skipped = self.skipped(fetched)
        seconds = time.monotonic() - self.time
        totals = {name: np.sum([m[name] for _, m in fetched], axis=0) for name in fetched[0][1]}
        line: dict[str, Any] = {"step": fetched[-1][0]}
        line |= {name: float(v / w) for name, (v, w) in totals.items() if w > 0}
        if self.timed:
            line["examples_per_second"] = examples * self.timed / seconds
            if self.used:
                line["model_flop_utilisation"] = examples * self.used / seconds
        if count := total(self.tell(line["step"], broken)):
            line["broken"] = count
        if skipped:
            line["skipped"] = len(skipped)
        line["data_seconds"] = self.data_seconds / len(fetched)
        self.waiting, self.timed, self.time = [], 0, time.monotonic()
        self.data_seconds = self.used = 0.0
        if writes():
            self.write(line)

    def skipped(self, fetched: list[tuple[int, Any]]) -> list[int]:
        """Warns of the steps that were skipped, takes them for no metric, and returns them."""
        skipped = []
        for step, metrics in fetched:
            if not math.isfinite(metrics["param_norm"][0]):
                raise FloatingPointError(f"step {step}: the parameters are not finite")
            bad = bool(metrics.pop("skipped")[0])
            skipped += [step] if bad else []
            self.skipping = self.skipping + 1 if bad else 0
            if self.skipping == self.max_skipped:
                raise FloatingPointError(
                    f"steps {step - self.skipping + 1} to {step}: their loss or gradient is not "
                    f"finite (config.optim.max_skipped={self.max_skipped})"
                )
        if skipped:
            steps = ", ".join(map(str, skipped))
            self.say(f"WARNING: skipped, for their loss or gradient is not finite: steps {steps}")
        return skipped

    def tell(self, step: int, broken: Sequence[str]) -> int:
        """Reports what is new of `broken`, and returns how many that are."""
        new, self.reported = broken[self.reported :], len(broken)
        if new:
            with self.storage_may_fail():
                rows = [{"step": step, "why": why} for why in new]
                append(self.report, "".join(json.dumps(row) + "\n" for row in rows))
        return len(new)

    def tell_of(self, step: int, values: dict[str, float]) -> None:
        """Writes a line of values that are no means over steps."""
        if writes():
            self.write({"step": step, **values})

    def write(self, line: dict[str, Any]) -> None:
        """Appends to metrics.jsonl, TensorBoard and the terminal."""
        line = {name: float(f"{v:.9g}") if isinstance(v, float) else v for name, v in line.items()}
        self.unwritten.append(line)
        with self.storage_may_fail():
            append(self.path, "".join(json.dumps(line) + "\n" for line in self.unwritten))
            lines, self.unwritten = self.unwritten, []
            self.events = self.events or Events(self.workdir, lines[0]["step"])
            for line in lines:
                self.events.scalars(line["step"], line)
        if self.board:
            self.board.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])
        if "loss" in line:
            self.progress.update(self.bar, line=f"loss {line['loss']:.4f}")
        self.say("  ".join(f"{name} {value:.4g}" for name, value in line.items()))

    @contextlib.contextmanager
    def storage_may_fail(self) -> Iterator[None]:
        """Says what the disk refuses. The event file may end in half a record: another is begun."""
        try:
            yield
        except transient() as error:
            self.say(f"WARNING: what is logged could not be written ({error})")
            self.close_events()

    def close_events(self) -> None:
        events, self.events = self.events, None
        try:
            if events:
                events.close()
        except transient() as error:
            self.say(f"WARNING: TensorBoard lacks some events ({error})")

    def say(self, text: str) -> None:
        """Prints a line above the progress bar, unless that goes to a disk that is full."""
        if writes():
            with contextlib.suppress(OSError):
                self.progress.console.print(text, highlight=False, soft_wrap=True)

    def grid(self, step: int, columns: list[UInt8[np.ndarray, "b h w 3"]]) -> None:
        """Writes samples/STEP.png: one row a picture, one column an array of `columns`."""
        if not writes():
            return
        rows = [np.concatenate(row, axis=1) for row in zip(*columns, strict=True)]
        picture = np.concatenate(rows)
        with self.storage_may_fail():
            encoded = io.BytesIO()
            Image.fromarray(picture).save(encoded, "PNG")
            write_whole(self.samples / f"{step:08d}.png", encoded.getvalue())
            if self.events:
                self.events.image(step, "samples", picture)

    def close(self) -> None:
        if writes():
            with contextlib.suppress(OSError):
                self.progress.stop()
            self.end_profile()
            self.close_events()
            if self.board:
                self.board.finish()


@contextlib.contextmanager
def open_logs(
    workdir: str,
    step: int,
    cfg: config.Config,
    beat: Callable[[], None] = lambda: None,
    board: Any = None,
) -> Iterator[Logs]:
    """Opens the logs of a run that stands at `step`; `beat` is called for each step that has ended,
    `board` gets each line too (a run of wandb)."""
    logs = Logs(workdir, step, cfg, beat, board)
    try:
        yield logs
    finally:
        logs.close()
