# SPDX-License-Identifier: Apache-2.0
"""Claims: a killed run, started again, ends with what an undisturbed one makes, bit for bit;
SIGTERM saves; a loss that is not finite ends the run and leaves good checkpoints; a run is a model
that opens, edits and converts."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from diffusers import AutoencoderKL
from PIL import Image

from ip2p_jax import convert, train
from ip2p_jax.editor import Editor
from ip2p_jax.types import Params
from ip2p_jax.weights.load import load, load_vae
from tests.edits import PICTURE
from tests.oracles import randomize, small_tokenizer, tiny_folder
from tests.training.tiny import grid

KILLS = int(os.environ.get("IP2P_KILLS", "3"))
CONFIG = str(Path(__file__).parent.parent / "configs" / "tiny_cpu.py")
STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """One device, in the processes started here and in this one; its signal handler is restored."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_NUM_CPU_DEVICES", "1")
        patch.setattr(train.mesh, "make_mesh", lambda cfg: grid(1, 1))
        yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """A very small frozen VAE and a tokenizer: what a start from scratch needs."""
    folder = tmp_path_factory.mktemp("sources")
    vae = AutoencoderKL(
        sample_size=16,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
    )
    randomize(vae, 0).save_pretrained(folder / "vae")
    small_tokenizer().save_pretrained(folder / "tokenizer")
    return folder


@pytest.fixture(scope="module")
def options(sources, packed) -> list[str]:
    return [
        f"--config={CONFIG}",
        f"--config.data.path={packed}",
        f"--config.model.vae={sources}",
        f"--config.model.tokenizer={sources / 'tokenizer'}",
    ]


def run(options: list[str], workdir: Path, *more: str) -> int:
    """Trains in this process."""
    return train.main([*options, f"--workdir={workdir}", *more])


def command(options: list[str], workdir: Path) -> list[str]:
    return [sys.executable, "-m", "ip2p_jax.train", *options, f"--workdir={workdir}"]


def steps(workdir: Path) -> list[int]:
    """The committed steps of a run."""
    names = os.listdir(workdir / "checkpoints") if (workdir / "checkpoints").exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def logged(workdir: Path) -> list[int]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def saved(workdir: Path, step: int = STEPS) -> dict[str, Params]:
    """Everything a checkpoint holds."""
    with ocp.CheckpointManager(workdir / "checkpoints", item_names=("train", "ema")) as manager:
        read = ocp.args.StandardRestore()
        restored = manager.restore(step, args=ocp.args.Composite(train=read, ema=read))
        return jax.tree.map(np.asarray, dict(restored))


def equal(a: object, b: object) -> bool:
    same = jax.tree.map(lambda x, y: bool(np.array_equal(x, y)), a, b)
    return all(jax.tree.leaves(same))


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory) -> Path:
    """20 steps straight, in this process."""
    workdir = tmp_path_factory.mktemp("run") / "undisturbed"
    assert run(options, workdir) == 0
    return workdir


@pytest.fixture
def finished(undisturbed, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(undisturbed, tmp_path / "finished"))


def test_what_a_run_leaves(undisturbed):
    assert logged(undisturbed) == list(range(1, STEPS + 1))
    assert steps(undisturbed) == [10, 15, 20]
    assert list(undisturbed.glob("events.out.tfevents.*"))
    assert not (undisturbed / "samples").exists()
    names = {"checkpoints", "base", "config.json", "metrics.jsonl"}
    assert names == {x.name for x in undisturbed.iterdir() if "tfevents" not in x.name}
    end = saved(undisturbed)
    assert not equal(end["ema"], end["train"]["params"])
    assert not equal(end, saved(undisturbed, 15))  # control of every comparison below


def killed(options: list[str], workdir: Path, moment: random.Random) -> int:
    """Starts a run and kills it at a random moment; returns its exit code.

    A third each: any time, some time after training began, and while a checkpoint is being written.
    """
    log, folder = workdir / "metrics.jsonl", workdir / "checkpoints"
    before = log.stat().st_mtime_ns if log.exists() else 0
    kind, delay = moment.choice(["any time", "training", "saving"]), moment.random()
    start = time.monotonic()
    with subprocess.Popen(command(options, workdir), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.001)
            trains = log.exists() and log.stat().st_mtime_ns != before
            saves = trains and any("tmp" in name for name in os.listdir(folder))
            due = {
                "any time": time.monotonic() - start > 20 * delay,
                "training": trains,
                "saving": saves,
            }
            if due[kind]:
                time.sleep({"any time": 0.0, "training": delay, "saving": 0.05 * delay}[kind])
                process.kill()
                break
        return process.wait()


def test_killed_and_started_again(options, undisturbed, tmp_path):
    """SIGKILL at random moments: the same parameters, EMA and optimizer state in the end."""
    want, workdir = saved(undisturbed), tmp_path / "killed"
    codes, moment = [], random.Random(KILLS)
    for _ in range(KILLS):
        codes.append(killed(options, workdir, moment))
        if codes[-1] == 0:  # it came to its end first: the next starts anew
            assert equal(saved(workdir), want) and logged(workdir) == logged(undisturbed)
            shutil.rmtree(workdir)
    assert set(codes) <= {-signal.SIGKILL, 0} and -signal.SIGKILL in codes
    assert run(options, workdir) == 0
    assert equal(saved(workdir), want)
    assert logged(workdir) == logged(undisturbed)


MISTAKES = [
    ("data.path=nowhere", "nowhere"),
    ("model.vae=nowhere", "nowhere: no such file or folder"),
    ("model.tokenizer=nowhere", "nowhere"),
    ("data.resolution=18", "config.data.resolution is 18, expected a multiple of 4"),
    ("model.train_text=False", "config.model.train_text=True"),
]


def mistaken(options: list[str], workdir: Path, capsys) -> None:
    """No data, no model, sizes that do not fit: one line each, and code 2."""
    for option, line in MISTAKES:
        assert run(options, workdir, f"--config.{option}") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and line in err
    assert steps(workdir) == []


def test_sigterm_saves_and_the_run_goes_on(options, tmp_path, capsys):
    """In a folder where the first commands had mistakes, which is no obstacle."""
    workdir = tmp_path / "stopped"
    mistaken(options, workdir, capsys)
    log = workdir / "metrics.jsonl"
    with subprocess.Popen(
        [*command(options, workdir), "--config.steps=100000"], stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (log.exists() and len(logged(workdir)) > 1):
            time.sleep(0.002)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    at = steps(workdir)[-1]
    assert f"SIGTERM: saved step {at}" in err and logged(workdir) == list(range(1, at + 1))
    assert at > 0
    assert run(options, workdir, f"--config.steps={at + 2}") == 0
    assert steps(workdir)[-1] == at + 2 and logged(workdir) == list(range(1, at + 3))


def test_not_finite(options, finished, capsys):
    """The step is named, and the last good checkpoint is the newest."""
    more = ("--config.steps=30", "--config.optim.lr=1e30", "--override=optim.lr")
    assert run(options, finished, *more) == 1
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: step 2") and "is kept" in last and "Traceback" not in err
    assert steps(finished) == [10, 15, 20]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved(finished)))


def test_other_options_are_refused_by_name(options, undisturbed, capsys):
    before = (undisturbed / "config.json").read_bytes()
    for option, key in (("data.batch_size=16", "data.batch_size"), ("seed=3", "seed")):
        assert run(options, undisturbed, f"--config.{option}") == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: config.{key}: ") and err.count("\n") == 1
        assert f"--override={key}" in err
    assert (undisturbed / "config.json").read_bytes() == before


def test_start_from_a_model_with_4_channels(packed, tmp_path):
    """Widened, its text tower frozen, trained a step; then opened, edited with and converted."""
    levels = dict(block_out_channels=(16, 32), norm_num_groups=8)
    vae = dict(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2
    )
    unet = dict(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    source = tiny_folder(tmp_path / "sd", 4, unet=unet | levels, vae=vae | levels)
    workdir, exported = tmp_path / "run", tmp_path / "exported"
    options = [
        f"--config={CONFIG}",
        f"--config.model.base={source}",
        "--config.model.vae=",
        "--config.model.tokenizer=",
        "--config.model.train_text=False",
        "--config.optim.warmup=0",
        "--config.optim.accumulate=1",
        f"--config.data.path={packed}",
        "--config.data.resolution=16",
        "--config.steps=1",
    ]
    assert run(options, workdir) == 0
    p, base = load(str(workdir)), load(str(source))
    assert p.config == base.config.widened()
    for part in ("vae", "text"):
        assert equal(p.params[part], base.params[part])
    kernel = p.params["unet"]["conv_in"]["kernel"]
    assert kernel.shape[2] == 8
    old = base.params["unet"]["conv_in"]["kernel"]
    assert 0 < np.abs(kernel[:, :, :4] - old).max() < 1e-2
    assert 0 < np.abs(kernel[:, :, 4:]).max() < 1e-2  # they began as zeros
    (edited,) = Editor(p)(PICTURE.resize((16, 16)), "make it red", steps=2, resolution=16)
    assert edited.size == (16, 16)
    args = ["--from", str(workdir), "--to", str(exported), "--format", "diffusers"]
    assert convert.main(args) == 0
    assert equal(load(str(exported)).params, p.params)


VAE_CONFIG = """
from configs import vae_cpu
from ip2p_jax.models.presets import ModelConfig, VAEConfig

def get_config():
    cfg = vae_cpu.get_config()
    cfg.model.dims = ModelConfig(vae=VAEConfig(channels=(8, 16), layers_per_block=1, norm_groups=8))
    cfg.data.resolution, cfg.steps = 16, 2
    cfg.log.samples, cfg.log.samples_every = 2, 2
    return cfg
"""


def test_training_a_vae(packed, tmp_path):
    """Two steps; then its latents' scale is known, and an editor may be built on it."""
    config = tmp_path / "vae.py"
    config.write_text(VAE_CONFIG)
    assert run([f"--config={config}", f"--config.data.path={packed}"], tmp_path) == 0
    cfg, params = load_vae(str(tmp_path))
    stored = json.loads((tmp_path / "base/vae/config.json").read_text())
    assert stored["scaling_factor"] == cfg.scaling_factor > 0
    assert cfg.scaling_factor != 0.18215 and "decoder" in params
    with Image.open(tmp_path / "samples/00000002.png") as image:
        assert image.size == (3 * 16, 2 * 16)


def test_batch_that_no_mesh_can_split(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.mesh, "make_mesh", lambda cfg: grid(1, 8))
    assert run(options, tmp_path, "--config.data.batch_size=4") == 2
    line = "error: config.data.batch_size is 4, expected a multiple of the 8 devices\n"
    assert capsys.readouterr().err == line
