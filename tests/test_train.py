# SPDX-License-Identifier: Apache-2.0
"""Claims: a killed run, started again, ends with what an undisturbed one makes, bit for bit;
SIGTERM saves; a loss that is not finite ends the run and leaves good checkpoints; two hosts train
as one does; a run is a model that opens, edits and converts."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from einops import rearrange
from flax import nnx
from PIL import Image

from data_gen.pack import pack
from ip2p_jax import convert, publish, train
from ip2p_jax.config import Config, Objective
from ip2p_jax.editor import Editor
from ip2p_jax.models.layers import abstract
from ip2p_jax.models.vae import ENCODER, VAE
from ip2p_jax.training import logs, mesh, state
from ip2p_jax.weights.load import load, load_vae
from tests.data.released import write_released
from tests.edits import PICTURE
from tests.kills import KILLS, write_row
from tests.oracles import tiny_folder
from tests.toy_runs import (
    CONFIG,
    STEPS,
    command,
    curve,
    equal,
    lines,
    logged,
    losses,
    one_device_only,
    run,
    run_apart,
    saved,
    steps,
    toy_options,
)
from tests.training.tiny import grid


@pytest.fixture(scope="module", autouse=True)
def one_device():
    with one_device_only():
        yield


@pytest.fixture(scope="module")
def options(packed, tmp_path_factory) -> list[str]:
    return toy_options(packed, tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory) -> Path:
    """20 steps straight."""
    workdir = tmp_path_factory.mktemp("run") / "undisturbed"
    run_apart(options, workdir)
    return workdir


@pytest.fixture
def finished(undisturbed, tmp_path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(undisturbed, tmp_path / "finished"))


def test_what_a_run_leaves(undisturbed):
    assert logged(undisturbed) == list(range(1, STEPS + 1))
    assert steps(undisturbed) == [0, 10, 20]
    assert list(undisturbed.glob("events.out.tfevents.*"))
    assert not (undisturbed / "samples").exists()
    names = {"checkpoints", "base", "config.json", "metrics.jsonl"}
    assert names == {x.name for x in undisturbed.iterdir() if "tfevents" not in x.name}
    end = saved(undisturbed)
    assert not equal(end["ema"], end["train"]["params"])
    assert not equal(end, saved(undisturbed, 10))  # control of every comparison below


def half_written(workdir: Path) -> set[tuple[str, int]]:
    """Checkpoints that are not complete: names and times. What a kill leaves is removed by the next
    command, which may begin one of the same name."""
    folder, found = workdir / "checkpoints", set()
    for path in folder.glob("*tmp*"):
        with contextlib.suppress(FileNotFoundError):  # complete by now
            found.add((path.name, path.stat().st_ctime_ns))
    return found


def killed(options: list[str], workdir: Path, moment: random.Random) -> tuple[int, bool]:
    """Starts a run and kills it at a random moment.

    Returns its exit code, and whether it left a checkpoint half-written.
    A third each: any time, some time after training began, and while a checkpoint is being written.
    """
    log = workdir / "metrics.jsonl"
    before, left = log.stat().st_mtime_ns if log.exists() else 0, half_written(workdir)
    kind, delay = moment.choice(["any time", "training", "saving"]), moment.random()
    start = time.monotonic()
    with subprocess.Popen(command(options, workdir), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.005)
            trains = log.exists() and log.stat().st_mtime_ns != before
            due = {
                "any time": time.monotonic() - start > 10 * delay,
                "training": trains,
                "saving": half_written(workdir) - left,
            }
            if due[kind]:
                time.sleep({"any time": 0.0, "training": delay, "saving": 0.05 * delay}[kind])
                process.kill()
                break
    return process.returncode, bool(half_written(workdir) - left)


@pytest.mark.slow
def test_killed_and_started_again(options, undisturbed, tmp_path):
    """SIGKILL at random moments: the same parameters, EMA and optimizer state in the end."""
    want, workdir = saved(undisturbed), tmp_path / "killed"
    started, kills, halves, moment = 0, 0, 0, random.Random(KILLS)
    while kills < KILLS:
        code, half = killed(options, workdir, moment)
        assert code in (-signal.SIGKILL, 0) and started < 5 * KILLS
        started, kills, halves = started + 1, kills + (code != 0), halves + half
        if code == 0:  # it came to its end first: the next starts anew
            assert curve(workdir) == curve(undisturbed) and equal(saved(workdir), want)
            shutil.rmtree(workdir)
    run_apart(options, workdir)
    assert curve(workdir) == curve(undisturbed)
    assert equal(saved(workdir), want)
    write_row("20 steps of training", started, kills, halves)


MISTAKES = [
    ("data.path=nowhere", "nowhere"),
    ("model.vae=nowhere", "nowhere: no such file or folder"),
    ("model.tokenizer=nowhere", "nowhere"),
    ("data.resolution=17", "config.data.resolution is 17, expected a multiple of 2"),
    ("model.train_text=False", "config.model.train_text=True"),
]


def mistaken(options: list[str], workdir: Path, capsys) -> None:
    """No data, no model, sizes that do not fit: one line each, and code 2."""
    begun = workdir.parent / "begun"
    (begun / "checkpoints").mkdir(parents=True)
    unfinished = (f"model.vae={begun}", f"{begun}: a training run that has not finished")
    for option, line in [*MISTAKES, unfinished]:
        assert run(options, workdir, f"--config.{option}") == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and line in err
    assert steps(workdir) == []


@pytest.mark.slow
def test_sigterm_saves_and_the_run_goes_on(options, tmp_path, capsys):
    """In a folder where the first commands had mistakes, which is no obstacle."""
    workdir = tmp_path / "stopped"
    mistaken(options, workdir, capsys)
    log = workdir / "metrics.jsonl"
    more = ["--config.steps=100000", "--config.log.samples_every=99999"]
    with subprocess.Popen(
        [*command(options, workdir), *more], stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not (log.exists() and len(logged(workdir)) > 1):
            time.sleep(0.05)
        process.terminate()
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    at = steps(workdir)[-1]
    assert f"SIGTERM: saved step {at}" in err and logged(workdir) == list(range(1, at + 1))
    assert at > 0 and not (workdir / "samples").exists()  # what takes long is left out
    end = at + 2 + at % 2
    assert run(options, workdir, f"--config.steps={end}") == 0
    assert steps(workdir)[-1] == end and logged(workdir) == list(range(1, end + 1))


@pytest.mark.slow
def test_not_finite(options, finished, capsys):
    """The step is named, and the last good checkpoint is the newest."""
    more = ("--config.steps=30", "--config.optim.lr=1e30", "--override=optim.lr")
    assert run(options, finished, *more) == 1
    err = capsys.readouterr().err
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: step 2") and "is kept" in last and "Traceback" not in err
    assert steps(finished) == [0, 10, 20]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved(finished)))


@pytest.mark.slow
def test_steps_that_are_not_finite(options, finished, capsys, monkeypatch):
    """Step 22 is skipped; from step 25 on all are, and the run ends after ten of them, at which no
    checkpoint is made. What was kept is finite."""
    make_step = state.make_step

    def spoilt(*args):
        made = make_step(*args)

        def call(state, frozen, *rest):
            bad = (state.step == 21) | (state.step >= 24)
            vae = jax.tree.map(lambda x: jnp.where(bad, np.nan, x), frozen["vae"])
            return made(state, {**frozen, "vae": vae}, *rest)

        return call

    monkeypatch.setattr(state, "make_step", spoilt)
    assert run(options, finished, "--config.steps=23") == 0
    assert {x["step"]: x["skipped"] for x in lines(finished) if "skipped" in x} == {22: 1}
    assert run(options, finished, "--config.steps=60") == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: steps 25 to 34: ") and err.endswith("before it is kept")
    assert steps(finished) == [10, 20, 23]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(saved(finished, 23)))
    assert not equal(saved(finished, 23)["ema"], saved(finished)["ema"])


@pytest.mark.slow
def test_pure_noise_and_other_options(options, tmp_path):
    """Zero terminal SNR, offset noise, Adafactor, recomputation: trained, sampled, exported, opened
    by diffusers as what it is. Other samplers are refused."""
    more = (
        "model.prediction=v_prediction",
        "model.zero_terminal_snr=True",
        "objective.timestep_shift=3.0",
        "objective.offset_noise=0.1",
        "optim.name=adafactor",
        "optim.clip=1.0",
        "optim.cosine_steps=10",
        "remat=full",
        "log.samples_every=2",
        "steps=2",
    )
    workdir, exported = tmp_path / "run", tmp_path / "exported"
    assert run(options, workdir, *(f"--config.{option}" for option in more)) == 0
    assert (workdir / "samples/00000002.png").exists()
    editor, picture = Editor.from_pretrained(str(workdir)), PICTURE.resize((16, 16))
    edited, rescaled = (
        np.asarray(editor(picture, "red", 4, "ddim", guidance_rescale=x)[0]).astype(int)
        for x in (0.0, 1.0)
    )
    assert np.abs(edited - rescaled).max() > 1
    with pytest.raises(ValueError, match="expected 'ddim' with 'trailing'"):
        editor(picture, "red", 4)
    args = ["--from", str(workdir), "--to", str(exported), "--format", "diffusers"]
    assert convert.main(args) == 0
    scheduler = DDIMScheduler.from_pretrained(exported, subfolder="scheduler")
    assert scheduler.config["rescale_betas_zero_snr"] and scheduler.alphas_cumprod[-1] == 0
    assert scheduler.config["timestep_spacing"] == "trailing"


@pytest.mark.slow
def test_resolution_buckets(options, tmp_path):
    """Batches of two shapes, of which one compiles in the middle of the run: trained, validated,
    and the same when the run goes on."""
    write_released(tmp_path / "released", 40, 1, sizes=((40, 40), (60, 40)))
    pack([tmp_path / "released"], tmp_path / "packed")
    more = (
        f"--config.data.path={tmp_path / 'packed'}",
        "--config.data.buckets=16x16,24x16",
        "--config.log.validation_every=3",
        "--config.log.validation_batches=1",
    )
    assert run(options, tmp_path / "straight", *more, "--config.steps=6") == 0
    assert run(options, tmp_path / "halved", *more, "--config.steps=3") == 0
    assert run(options, tmp_path / "halved", *more, "--config.steps=6") == 0
    assert curve(tmp_path / "straight") == curve(tmp_path / "halved")
    assert sum("validation_loss" in line for line in lines(tmp_path / "straight")) == 2
    assert run(options, tmp_path / "odd", *more, "--config.data.buckets=17x16") == 2


def test_faults_of_the_training_keep_their_traceback(options, finished, monkeypatch):
    """A fault in the middle is no wrong input."""

    def broken(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(logs.Logs, "add", broken)
    with pytest.raises(RuntimeError, match="the training failed") as caught:
        run(options, finished, "--config.steps=22")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_dry_run_leaves_nothing(options, tmp_path, capsys):
    assert run(options, tmp_path / "run", "--dry-run") == 0
    text = capsys.readouterr().out
    assert "1 devices (cpu): data 1, fsdp 1; 1 hosts" in text
    assert "unet.conv_in.kernel  float32[3, 3, 8, 32]  P()" in text
    assert "GiB a device, and activations" in text
    assert not list(tmp_path.iterdir())
    assert run(options, tmp_path / "run", "--dry-run", "--config.data.batch_size=7") == 2
    assert "config.data.batch_size is 7" in capsys.readouterr().err


def test_validation_and_what_is_published(options, finished, tmp_path, monkeypatch, capsys):
    """A finished run goes to the hub as a diffusers folder, with a card of its settings and last
    metrics; what is no name there, or not ours, is refused before anything is trained, and what
    fails to be sent is sent by the same command. Hosts wait for the one that uploads."""
    sent, waited = {}, []
    monkeypatch.setattr(train, "sync_global_devices", lambda name: waited.append(len(sent)))

    class Hub:
        endpoint = "https://hub"

        def create_repo(self, name, exist_ok):
            assert exist_ok and name not in sent
            if name == "you/edits":
                raise RuntimeError("403 Forbidden: not yours\nRequest ID: 1")

        def upload_folder(self, *, repo_id, folder_path, commit_message):
            if repo_id == "we/edits":
                raise RuntimeError("503: later")
            sent[repo_id] = shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr(publish, "HfApi", Hub)
    more = ("--config.log.validation_every=2", "--config.log.validation_batches=1")
    assert run(options, finished, "--config.steps=22", *more, "--push=edits") == 2
    assert capsys.readouterr().err == "error: --push edits: expected USER/NAME\n"
    assert run(options, finished, "--config.steps=22", *more, "--push=you/edits") == 2
    assert capsys.readouterr().err == "error: --push you/edits: 403 Forbidden: not yours\n"
    assert steps(finished) == [0, 10, 20]
    assert run(options, finished, "--config.steps=22", *more, "--push=we/edits") == 1
    later = "error: --push we/edits: 503: later; the same command uploads it\n"
    assert capsys.readouterr().err.endswith(later) and 22 in steps(finished)
    assert run(options, finished, "--config.steps=22", *more, "--push=me/edits") == 0
    assert capsys.readouterr().out == "https://hub/me/edits\n" and waited == [0, 1]
    with pytest.raises(ValueError, match="objective.kind=vae is no model"):
        publish.check_push("me/edits", Config(objective=Objective(kind="vae")))
    *_, trained, validation = lines(finished)
    assert trained["step"] == validation["step"] == 22
    assert 0.1 < validation["validation_loss"] < 10 and trained["update_norm"] > 0
    assert load(str(sent["me/edits"])).config.unet.in_channels == 8
    card = (sent["me/edits"] / "README.md").read_text()
    assert "| optim.lr | 0.001 |" in card and "| steps | 22 |" in card
    assert f"| validation_loss | {validation['validation_loss']:.4g} |" in card
    assert f"| loss | {trained['loss']:.4g} |" in card and "data.mix" not in card
    assert "data.path" not in card and 'from_pretrained("me/edits")' in card


def test_other_options_are_refused_by_name(options, undisturbed, capsys):
    before = (undisturbed / "config.json").read_bytes()
    for option, key in (("data.batch_size=16", "data.batch_size"), ("seed=3", "seed")):
        assert run(options, undisturbed, f"--config.{option}") == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: config.{key}: ") and err.count("\n") == 1
        assert f"--override={key}" in err
    assert (undisturbed / "config.json").read_bytes() == before


@pytest.mark.slow
def test_start_from_a_model_with_4_channels(packed, tmp_path, caplog):
    """Widened, its text tower frozen, trained a step in bfloat16; then opened, without warnings,
    edited with and converted."""
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
        "--config.dtype=bfloat16",
        "--config.steps=1",
    ]
    assert run(options, workdir) == 0
    caplog.clear()
    p, base = load(str(workdir)), load(str(source))
    assert caplog.text == ""
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
    cfg.log.every, cfg.log.samples, cfg.log.samples_every = 1, 2, 2
    return cfg
"""


@pytest.fixture(scope="module")
def vae_options(packed, tmp_path_factory) -> list[str]:
    config = tmp_path_factory.mktemp("vae") / "vae.py"
    config.write_text(VAE_CONFIG)
    return [f"--config={config}", f"--config.data.path={packed}"]


@pytest.fixture(scope="module")
def trained_vae(vae_options, tmp_path_factory) -> Path:
    """Two steps of a VAE."""
    workdir = tmp_path_factory.mktemp("run") / "vae"
    assert run(vae_options, workdir) == 0
    return workdir


def scaling(workdir: Path) -> float:
    return json.loads((workdir / "base/vae/config.json").read_text())["scaling_factor"]


def samples(workdir: Path) -> np.ndarray:
    with Image.open(workdir / "samples/00000002.png") as image:
        return np.asarray(image).astype(int)


@pytest.mark.slow
def test_training_a_vae(trained_vae):
    """Its latents' scale is known in the end, and an editor may be built on it."""
    cfg, params = load_vae(str(trained_vae))
    assert scaling(trained_vae) == cfg.scaling_factor > 0
    assert cfg.scaling_factor != 0.18215 and "decoder" in params
    assert samples(trained_vae).shape == (2 * 16, 3 * 16, 3)


@pytest.mark.slow
def test_training_the_decoder_on(trained_vae, vae_options, tmp_path):
    """All of the decoder moves, nothing of the encoder does; the run goes on, and diffusers opens
    what it made."""
    options = [*vae_options, f"--config.model.vae={trained_vae}"]
    start_cfg, start = load_vae(str(trained_vae))
    for total in (2, 3):  # the first is of rate 0
        assert run([*options, f"--config.steps={total}", "--override=steps"], tmp_path / "run") == 0
        cfg, params = load_vae(str(tmp_path / "run"))
        assert cfg == start_cfg and params.keys() == start.keys()
        for part in ENCODER:
            assert equal(params[part], start[part])
        for part in params.keys() - set(ENCODER):
            moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params[part], start[part])
            assert all(jax.tree.leaves(moved))
    assert logged(tmp_path / "run") == [1, 2, 3]
    convert.main(["--from", str(tmp_path / "run"), "--to", str(tmp_path / "out"), "--format=vae"])
    theirs = AutoencoderKL.from_pretrained(tmp_path / "out")
    x = np.random.default_rng(0).uniform(-1, 1, (1, 16, 16, 3)).astype(np.float32)
    ours = nnx.merge(abstract(VAE, cfg)[0], jax.tree.map(jnp.asarray, params))
    with torch.no_grad():
        want = theirs(rearrange(torch.tensor(x), "b h w c -> b c h w")).sample.numpy()
    got = ours.decode(ours.encode(jnp.asarray(x)).mean)
    np.testing.assert_allclose(got, rearrange(want, "b c h w -> b h w c"), atol=1e-5)


def on_two_hosts(options: list[str], workdir: Path) -> list[str]:
    """Trains in two processes of one device, as under Slurm; returns what each one said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_LOCALID": "0", "JAX_COORDINATOR_ADDRESS": address}
    processes = [
        subprocess.Popen(
            [*command(options, workdir), "--distributed"],
            env=os.environ | slurm | {"SLURM_PROCID": str(host)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return said


def hosts_agree(options: list[str], workdir: Path, alone: Path, n: int) -> None:
    """Two hosts have the losses of the run `alone` for n steps; one of them writes."""
    said = on_two_hosts([*options, f"--config.steps={n}"], workdir)
    assert f"step {n}" in said[0] and "step" not in said[1]
    assert logged(workdir) == list(range(1, n + 1)) and steps(workdir) == [0, n]
    assert len(list(workdir.glob("events.out.tfevents.*"))) == 1
    want = losses(alone)[:n]
    np.testing.assert_allclose(losses(workdir), want, rtol=1e-5)
    assert np.abs(np.diff(want)).min() > 1e-3  # control: other rows, or other draws


@pytest.mark.slow
def test_two_hosts_train_as_one(vae_options, trained_vae, tmp_path):
    """A VAE, whose latents are measured by both."""
    hosts_agree(vae_options, tmp_path, trained_vae, 2)
    assert scaling(tmp_path) == pytest.approx(scaling(trained_vae), abs=2e-5)
    difference = samples(tmp_path) - samples(trained_vae)
    assert np.abs(difference).max() <= 1


@pytest.mark.slow
def test_two_hosts_train_an_editor(options, undisturbed, tmp_path):
    """Frozen parameters are on both; what they saved opens on one."""
    hosts_agree(options, tmp_path, undisturbed, 6)
    assert load(str(tmp_path)).params.keys() == {"unet", "text", "vae"}


def test_batch_that_no_mesh_can_split(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mesh, "make_mesh", lambda cfg: grid(1, 8))
    assert run(options, tmp_path, "--config.data.batch_size=4") == 2
    line = "error: config.data.batch_size is 4, expected a multiple of 16: 8 devices x "
    assert capsys.readouterr().err == line + "config.optim.accumulate=2\n"
