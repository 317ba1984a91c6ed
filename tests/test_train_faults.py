# SPDX-License-Identifier: Apache-2.0
"""Claims: faults of disks, data and hosts while a run goes on, and between two commands, cost no
more than the steps since the newest checkpoint that is whole, and none of them is silent.

docs/reliability.md says which row of its table each test is. Hosts are processes here.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ip2p_jax import storage
from ip2p_jax.training import saving
from ip2p_jax.weights.load import load
from ip2p_jax.weights.port import to_torch
from tests.data.test_broken import rewrite
from tests.storage_faults import empty, fill
from tests.toy_runs import (
    command,
    curve,
    equal,
    lines,
    logged,
    losses,
    one_device_only,
    run,
    saved,
    steps,
    toy_options,
)

FEW = ("--config.steps=6", "--config.checkpoint.every=2", "--config.checkpoint.keep=9")
LONG = ("--config.steps=100000", "--config.checkpoint.every=100000")


pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:")
"""Of writes that end after one beside them has failed; orbax no longer waits for them."""


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with one_device_only():
        yield


@pytest.fixture(scope="module")
def options(packed, tmp_path_factory) -> list[str]:
    return toy_options(packed, tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory) -> Path:
    """6 steps, of which 0, 2, 4 and 6 are saved."""
    workdir = tmp_path_factory.mktemp("run") / "undisturbed"
    assert run(options, workdir, *FEW) == 0
    return workdir


@pytest.fixture
def copy(undisturbed, tmp_path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "copy"))


def flip(workdir: Path, step: int, item: str = "train") -> str:
    """Flips a bit of the largest file of an item; returns the file's name in the step."""
    folder = workdir / "checkpoints" / str(step)
    path = max(
        (x for x in (folder / item).rglob("*") if x.is_file()), key=lambda x: x.stat().st_size
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path.relative_to(folder).as_posix()


@pytest.mark.slow
def test_damaged_checkpoints(options, undisturbed, copy, capsys):
    """The newest that is whole is used, by training and by whoever opens the run."""
    files = [flip(copy, step) for step in (4, 6)]
    files.append(flip(copy, 6, "ema"))
    shutil.copytree(copy / "checkpoints/6", copy / "checkpoints/7.orbax-checkpoint-tmp")
    used = saved(copy, 4)["ema"]["unet"]
    assert equal(to_torch(load(str(copy)).params["unet"]), to_torch(used))
    assert f"step 6 is damaged ({files[2]} is not what was written" in capsys.readouterr().err
    assert run(options, copy, *FEW) == 0
    err = capsys.readouterr().err
    assert f"step 4 is damaged ({files[0]} is not what was written" in err
    assert "step 6 is damaged (" in err and "going on from step 2\n" in err
    assert steps(copy) == [0, 2, 4, 6] and sorted(os.listdir(copy / "damaged")) == ["4", "6"]
    assert curve(copy) == curve(undisturbed) and equal(saved(copy, 6), saved(undisturbed, 6))


def test_no_checkpoint_is_whole(options, copy, capsys):
    for step in steps(copy):
        flip(copy, step)
        flip(copy, step, "ema")
    assert run(options, copy, *FEW) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and "no checkpoint is whole" in err
    assert steps(copy) == [0, 2, 4, 6]  # nothing is moved that may still be looked at
    with pytest.raises(ValueError, match="no checkpoint is whole: in step 6 ema/"):
        load(str(copy))


@pytest.mark.slow
def test_the_last_step_cannot_be_saved(options, copy, capsys, monkeypatch):
    """After tries for a minute: one line, and exit code 1; the next command goes on."""
    spent: list[float] = []
    monkeypatch.setattr(saving.time, "sleep", spent.append)
    finish = saving.Saver.finish

    def on_a_full_disk(*args):
        fill(0)
        try:
            finish(*args)
        finally:
            empty(0)

    monkeypatch.setattr(saving.Saver, "finish", on_a_full_disk)
    assert run(options, copy, "--config.steps=8") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last == "error: step 8 could not be saved in 7 tries; the newest there is 6"
    assert spent == list(storage.WAITS) and steps(copy)[-1] == 6
    monkeypatch.undo()


@pytest.mark.slow
def test_broken_records(options, packed, tmp_path, capsys):
    """Counted in metrics.jsonl and named in a file; too many end the run in one line."""
    broken = rewrite(packed, tmp_path / "some", lambda i, p: p if i % 3 else p._replace(input=b""))
    some = [*options, f"--config.data.path={broken}", "--config.data.broken=0.5"]
    workdir = tmp_path / "run"
    assert run(some, workdir, "--config.steps=4") == 0
    names = [json.loads(x)["why"] for x in (workdir / "broken-0.jsonl").read_text().splitlines()]
    assert sum(line.get("broken", 0) for line in lines(workdir)) == len(names) > 0
    assert all(name.startswith("prompt ") for name in names)
    empty = rewrite(packed, tmp_path / "all", lambda i, p: p._replace(instruction=""))
    everything = [*options, f"--config.data.path={empty}", "--config.data.broken=0"]
    assert run(everything, tmp_path / "other", "--config.steps=100") == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and "cannot be used" in last and "is empty" in last


def test_damaged_shards(options, packed, tmp_path, capsys):
    """Truncated, missing, doubled: named before anything is trained."""
    for change in ("truncated", "missing", "doubled"):
        folder = Path(shutil.copytree(packed, tmp_path / change))
        shard = sorted(folder.rglob("*.array_record*"))[0]
        if change == "doubled":
            shutil.copy(shard, shard.with_name(f"{shard.name}-copy"))
        data = shard.read_bytes()
        shard.unlink()
        if change != "missing":
            shard.write_bytes(data[:-1] if change == "truncated" else data)
        assert run([*options, f"--config.data.path={folder}"], tmp_path / "run") == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: shard {folder}") and err.count("\n") == 1
    assert steps(tmp_path / "run") == []


def test_hosts_that_do_not_fit_together(options, tmp_path, capsys):
    for wrong, line in (
        (["--hosts=2"], "--coordinator ADDRESS:PORT and --hosts: expected together"),
        (["--coordinator=here:1"], "--coordinator ADDRESS:PORT and --hosts: expected together"),
        (["--coordinator=here", "--hosts=2"], "--coordinator here: expected ADDRESS:PORT"),
        (["--coordinator=here:1", "--hosts=2", "--host=2"], "--host 2 of --hosts 2: expected 0 to"),
        (["--coordinator=here:1", "--hosts=2", "--distributed"], "--distributed: expected without"),
    ):
        assert run(options, tmp_path, *wrong) == 2
        assert capsys.readouterr().err.startswith(f"error: {line}")


class Process:
    """A command that runs, and what it has said so far."""

    def __init__(self, options: list[str], workdir: Path, *more: str, devices: int = 1):
        self.process = subprocess.Popen(
            [*command(options, workdir), *more],
            env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid, self.said = self.process.pid, ""
        self.listener = threading.Thread(target=self.listen, daemon=True)
        self.listener.start()

    def listen(self) -> None:
        assert self.process.stderr
        with self.process.stderr as lines:
            for line in lines:
                self.said += line

    def wait(self, seconds: float) -> int:
        """The exit code; that of a process that a test wants to end, and that it does in time."""
        code = self.process.wait(seconds)
        self.listener.join(5)  # for the rest of what it said; its children may hold the pipe
        return code


@contextlib.contextmanager
def started(*processes: Process) -> Iterator[None]:
    """Ends them at the end, whatever has become of them."""
    try:
        yield
    finally:
        for process in processes:
            process.process.kill()
            process.process.wait()


def hosts(options: list[str], workdir: Path, *more: str, count: int = 2, devices: int = 1):
    """The processes of a run on several hosts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    shared = (address, f"--hosts={count}")
    return [
        Process(options, workdir, *shared, f"--host={i}", *more, devices=devices)
        for i in range(count)
    ]


def until(condition: Callable[[], bool], *alive: Process, seconds: float = 500) -> None:
    """Waits for it, as long as all these processes run."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, [process.said for process in alive]
        assert all(process.process.poll() is None for process in alive), [x.said for x in alive]
        time.sleep(0.05)


def trains(workdir: Path, n: int = 3) -> Callable[[], bool]:
    """Whether n steps have been logged."""
    return lambda: (workdir / "metrics.jsonl").exists() and len(logged(workdir)) >= n


@pytest.mark.slow
def test_a_disk_that_is_full_for_a_while(options, tmp_path):
    """Training and its log go on; when there is room again, the next try succeeds."""
    workdir = tmp_path / "run"
    often = ("--config.steps=100000", "--config.checkpoint.every=5")
    one = Process(options, workdir, *often)
    with started(one):
        until(lambda: len(steps(workdir)) > 1, one)
        fill(one.pid)
        until(lambda: "saves have failed in a row" in one.said, one)
        good = steps(workdir)
        before = one.said.count("\nstep ")
        until(lambda: one.said.count("\nstep ") > before + 5, one)
        assert steps(workdir) == good
        empty(one.pid)
        until(lambda: steps(workdir)[-1] > good[-1], one)
        one.process.terminate()
        assert one.wait(60) == 0
    end = steps(workdir)[-1]
    assert logged(workdir) == list(range(1, end + 1))


@pytest.mark.slow
@pytest.mark.parametrize(("blow", "seconds"), [(signal.SIGKILL, 60), (signal.SIGSTOP, 60)])
def test_a_data_worker_dies_or_stalls(options, tmp_path, blow, seconds):
    """An error, or the watchdog's stacks, but no hang; the same command goes on."""
    worker = ("--config.data.workers=1", "--config.watchdog=30", *LONG)
    one = Process(options, tmp_path, *worker)
    with started(one):
        until(trains(tmp_path), one)
        readers = workers(one.pid)
        assert readers
        for pid in readers:
            os.kill(pid, blow)
        try:
            assert one.wait(seconds) == 1
        finally:
            for pid in readers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
    if blow == signal.SIGSTOP:
        assert "Timeout (0:00:30)!" in one.said and "loader.py" in one.said
    else:
        assert "Worker process was terminated" in one.said
    assert steps(tmp_path) == [0]


def workers(pid: int) -> list[int]:
    """The processes that any thread of a process has started to read data."""
    threads = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for thread in threads for child in thread.read_text().split()]
    return [x for x in children if "spawn_main" in Path(f"/proc/{x}/cmdline").read_text()]


@pytest.mark.slow
def test_sigterm_to_one_of_two_hosts(options, tmp_path):
    """Both save the same step and exit 0 within 30 s; the next run goes on there."""
    one, other = hosts(options, tmp_path, *LONG)
    with started(one, other):
        until(trains(tmp_path), one, other)
        other.process.terminate()
        assert [x.wait(30) for x in (one, other)] == [0, 0], (one.said, other.said)
    at = steps(tmp_path)[-1]
    assert at > 0 and f"SIGTERM: saved step {at}" in one.said
    assert run(options, tmp_path, f"--config.steps={at + 2}") == 0
    assert logged(tmp_path) == list(range(1, at + 3))


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_one_of_two_hosts_is_killed(options, tmp_path, dies):
    """The other does not wait for it longer than the heartbeat and 5 s; a restart goes on."""
    heartbeat = 10
    both = hosts(options, tmp_path, *LONG, f"--config.heartbeat={heartbeat}")
    with started(*both):
        until(trains(tmp_path), *both)
        both[dies].process.kill()
        assert both[1 - dies].wait(heartbeat + 5) != 0
    assert steps(tmp_path) == [0]
    assert run(options, tmp_path, "--config.steps=2") == 0
    assert steps(tmp_path) == [0, 2]


@pytest.mark.slow
def test_a_collective_stalls(options, tmp_path):
    """One of two hosts stands still: the other ends with its stacks."""
    one, other = hosts(options, tmp_path, *LONG, "--config.watchdog=10")
    with started(one, other):
        until(trains(tmp_path), one, other)
        os.kill(other.pid, signal.SIGSTOP)
        assert one.wait(30) == 1
    assert "Timeout (0:00:10)!" in one.said and "train.py" in one.said


MESHES = [(1, 8, "data=8", "fsdp=1"), (2, 4, "data=1", "fsdp=8"), (4, 2, "data=2", "fsdp=4")]


@pytest.mark.slow
def test_hosts_devices_and_meshes_train_alike(options, tmp_path):
    """20 steps on 1 x 8, 2 x 4 and 4 x 2 devices, split by data, by parameters and by both; then
    two of them go on as others."""
    wide = [*options, "--config.data.batch_size=16", "--config.optim.accumulate=1"]
    curves, ends = [], []
    for count, devices, *axes in MESHES:
        workdir = tmp_path / f"{count}x{devices}"
        more = [f"--config.mesh.{axis}" for axis in axes]
        processes = (
            hosts(wide, workdir, *more, count=count, devices=devices)
            if count > 1
            else [Process(wide, workdir, *more, devices=devices)]
        )
        with started(*processes):
            assert [x.wait(560) for x in processes] == [0] * count, [x.said for x in processes]
        curves.append(losses(workdir))
        ends.append(workdir)
    assert len(curves[0]) == 20 and np.abs(np.diff(curves[0])).min() > 1e-4
    for other in curves[1:]:
        np.testing.assert_allclose(other, curves[0], rtol=1e-5)
    goes_on = [(ends[1], 8), (ends[2], 4)]
    for workdir, devices in goes_on:
        one = Process(wide, workdir, "--config.mesh.data=2", "--config.steps=24", devices=devices)
        with started(one):
            assert one.wait(240) == 0, one.said
    np.testing.assert_allclose(losses(ends[1]), losses(ends[2]), rtol=1e-5)
    assert len(losses(ends[1])) == 24
