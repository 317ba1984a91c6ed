# SPDX-License-Identifier: Apache-2.0
"""Runs of configs/tiny_cpu.py: how tests start them, and what they left."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from diffusers import AutoencoderKL

from ip2p_jax import train
from ip2p_jax.training import mesh
from ip2p_jax.types import Params
from tests.oracles import randomize, small_tokenizer
from tests.training.tiny import grid

CONFIG = str(Path(__file__).parent.parent / "configs" / "tiny_cpu.py")
STEPS = 20


@contextlib.contextmanager
def one_device_only() -> Iterator[None]:
    """One device, in the processes started here and in this one; its signal handler is restored.
    Those processes spend their time compiling, so they do it quickly."""
    before, flags = signal.getsignal(signal.SIGTERM), os.environ.get("XLA_FLAGS", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        patch.setenv("XLA_FLAGS", f"{flags} --xla_backend_optimization_level=0")
        patch.setattr(mesh, "make_mesh", lambda cfg: grid(1, 1))
        yield
    signal.signal(signal.SIGTERM, before)


def toy_options(packed: Path, folder: Path) -> list[str]:
    """Writes a very small frozen VAE and a tokenizer to `folder`; returns options that use them."""
    vae = AutoencoderKL(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    randomize(vae, 0).save_pretrained(folder / "vae")
    small_tokenizer().save_pretrained(folder / "tokenizer")
    return [
        f"--config={CONFIG}",
        f"--config.data.path={packed}",
        f"--config.model.vae={folder}",
        f"--config.model.tokenizer={folder / 'tokenizer'}",
    ]


def run(options: list[str], workdir: Path, *more: str) -> int:
    """Trains in this process."""
    return train.main([*options, f"--workdir={workdir}", *more])


def command(options: list[str], workdir: Path) -> list[str]:
    return [sys.executable, "-m", "ip2p_jax.train", *options, f"--workdir={workdir}"]


def run_apart(options: list[str], workdir: Path) -> None:
    """Trains in a process of its own. This one has more devices, and so more threads, among which
    sums are divided: results are not the same to the last bit."""
    done = subprocess.run(command(options, workdir), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def steps(workdir: Path) -> list[int]:
    """The committed steps of a run."""
    names = os.listdir(workdir / "checkpoints") if (workdir / "checkpoints").exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def lines(workdir: Path) -> list[dict]:
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def logged(workdir: Path) -> list[int]:
    return [line["step"] for line in lines(workdir)]


def curve(workdir: Path) -> list[dict]:
    """What was logged, without what depends on the clock; every digit of a float32 is there."""
    return [
        {n: x for n, x in line.items() if n not in ("examples_per_second", "data_seconds")}
        for line in lines(workdir)
    ]


def losses(workdir: Path) -> list[float]:
    return [line["loss"] for line in lines(workdir)]


def saved(workdir: Path, step: int = STEPS) -> dict[str, Params]:
    """Everything a checkpoint holds."""
    with ocp.CheckpointManager(workdir / "checkpoints", item_names=("train", "ema")) as manager:
        read = ocp.args.StandardRestore()
        restored = manager.restore(step, args=ocp.args.Composite(train=read, ema=read))
        return jax.tree.map(np.asarray, dict(restored))


def equal(a: object, b: object) -> bool:
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    return all(jax.tree.leaves(same))
