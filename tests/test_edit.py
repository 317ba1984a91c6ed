# SPDX-License-Identifier: Apache-2.0
"""Claims: the edit command does what the Editor does; several edits survive kills; bad models
and full disks are one line and code 2, and nothing half-written stays."""

import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from ip2p_jax import edit, jobs
from ip2p_jax.edit_requests import Request
from ip2p_jax.editor import Editor
from ip2p_jax.sizes import fit
from ip2p_jax.weights.load import load
from tests.edits import ONE, PICTURE, PIXELS, encoded, huge, tree, write_requests
from tests.kills import KILLS, write_row

FAST = ("--steps", "3")


def array(image: Image.Image | Path) -> np.ndarray:
    if isinstance(image, Path):
        with Image.open(image) as opened:
            return np.asarray(opened).astype(int)
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def model(tiny_ip2p) -> str:
    return str(tiny_ip2p)


@pytest.fixture(scope="module")
def editor(model) -> Editor:
    return Editor(load(model))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory with one picture, in.png."""
    monkeypatch.chdir(tmp_path)
    PICTURE.save("in.png")
    return tmp_path


@pytest.fixture
def command(model, editor, folder, monkeypatch):
    """The command with a model; its Editor is built once, so that its program is traced once."""
    monkeypatch.setattr(edit, "Editor", lambda *_, **__: editor)
    return lambda *args: edit.main(["--model", model, *FAST, *map(str, args)])


# What a picture becomes


def test_the_command_is_the_editor(command, editor, folder, capsys, model):
    """The same pixels; the settings in the metadata; a progress bar on stderr."""
    args = ("--input", "in.png", "--instruction", "make it blue", "--output", "new/a.PNG")
    more = ("--text-guidance", "5", "--image-guidance", "-0.5", "--seed", "7", "--negative", "red")
    more += ("--guidance-rescale", "0.5", "--guidance-interval", "0.5", "5")
    assert command(*args, *more) == 0
    out, err = capsys.readouterr()
    assert out == "" and "editing" in err and "1/1" in err
    [want] = editor(
        PICTURE,
        "make it blue",
        steps=3,
        text_guidance=5.0,
        image_guidance=-0.5,
        seed=7,
        negative="red",
        resolution=64,
        guidance_rescale=0.5,
        guidance_interval=(0.5, 5.0),
    )
    assert want.size == (64, 48)
    assert np.array_equal(array(folder / "new" / "a.PNG"), array(want))
    assert [x.name for x in (folder / "new").iterdir()] == ["a.PNG"]
    with Image.open("new/a.PNG") as image:
        assert image.format == "PNG"
        assert json.loads(image.info["ip2p_jax"]) == {
            "model": model,
            "revision": None,
            "variant": None,
            "vae": None,
            "lora": None,
            "dtype": None,
            "safety": False,
            "input": "in.png",
            "instruction": "make it blue",
            "output": "new/a.PNG",
            "steps": 3,
            "sampler": "euler_ancestral",
            "text_guidance": 5.0,
            "image_guidance": -0.5,
            "guidance_rescale": 0.5,
            "guidance_interval": [0.5, 5.0],
            "seed": 7,
            "negative": "red",
            "resolution": None,
        }


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a turn by 90 degrees clockwise
    return encoded(PICTURE.transpose(Image.Transpose.ROTATE_90), exif=exif)


def test_any_kind_of_picture(command, folder):
    """Rotated by EXIF, with transparency, WebP, of odd sizes: several at once, into a folder."""
    white = Image.new("RGB", PICTURE.size, "white")
    faint = PICTURE.copy()
    faint.putalpha(0)
    files = {
        "plain.png": encoded(PICTURE),
        "exif.png": rotated(),
        "opaque.png": encoded(PICTURE.convert("RGBA")),
        "webp.webp": encoded(PICTURE, "WEBP", lossless=True),
        "white.png": encoded(white),
        "transparent.png": encoded(faint),
        "odd.jpg": encoded(PICTURE.resize((71, 53)), "JPEG"),
        "odder.jpg": encoded(PICTURE.resize((67, 50)), "JPEG"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    assert command("--input", *files, "--instruction", "x", "--output", "out") == 0
    results = {Path(n).stem: array(folder / "out" / f"{Path(n).stem}.png") for n in files}
    assert {x.shape for x in results.values()} == {(48, 64, 3)}
    for name in ("exif", "opaque", "webp"):
        assert np.array_equal(results[name], results["plain"]), name
    assert np.array_equal(results["transparent"], results["white"])
    assert not np.array_equal(results["white"], results["plain"])


def test_the_editor_takes_what_pillow_opens(editor):
    """Upright and on white, as the command; latents for every picture."""
    faint = PICTURE.copy()
    faint.putalpha(0)
    with Image.open(io.BytesIO(rotated())) as opened:
        upright, white = editor([opened, faint], "", resolution=64)
    assert np.array_equal(array(upright), array(fit(PICTURE, (64, 48))))
    assert array(white).min() == 255
    with pytest.raises(ValueError, match="latents: 1 rows for 2 pictures"):
        editor([PICTURE, PICTURE], "x", latents=np.zeros((1, 12, 16, 4), np.float32), resolution=64)


def test_guidance_of_0_1_and_below(command, folder):
    """What the two scales mean, at 0, 1 and -2 (method: e(0,0) + s_I (...) + s_T (...))."""
    Image.fromarray(255 - PIXELS).resize(PICTURE.size).save("other.png")
    plain = {"input": "in.png", "instruction": "make it red", "output": "plain.png"}
    zero, one = {"text_guidance": 0}, {"text_guidance": 1, "image_guidance": 1}
    lines = {
        "plain": {},
        "no-text": zero,
        "no-text-other": zero | {"instruction": "make it green"},
        "nothing": zero | {"image_guidance": 0},
        "nothing-other": zero | {"image_guidance": 0, "input": "other.png", "instruction": "x"},
        "one": one,
        "one-negative": one | {"negative": "something else"},
        "nowhere": {"guidance_interval": [100, 1000]},
        "two-negative": {"negative": "something else"},
        "below": {"text_guidance": -2, "image_guidance": -2},
    }
    requests = [plain | {"output": f"{name}.png"} | x for name, x in lines.items()]
    assert command("--requests", write_requests(folder / "r.jsonl", *requests)) == 0
    got = {name: array(folder / f"{name}.png") for name in lines}

    def apart(a: str, b: str) -> int:
        return int(np.abs(got[a] - got[b]).max())

    assert apart("no-text", "no-text-other") <= 1  # s_T = 0: no instruction
    assert apart("nothing", "nothing-other") <= 1  # s_I = 0 as well: no picture
    assert apart("one", "nowhere") <= 1  # guided above all noise levels alone
    assert apart("one", "one-negative") <= 1  # s_T = s_I = 1: the conditional branch alone
    for a, b in (("plain", "no-text"), ("no-text", "nothing"), ("plain", "two-negative")):
        assert apart(a, b) > 5
    assert apart("below", "plain") > 5 and got["below"].std() > 5


@pytest.mark.parametrize(
    ("resolution", "size"),
    [((), (64, 48)), (("--resolution", "own"), (128, 96)), (("--resolution", "512"), (512, 368))],
)
def test_resolution(command, folder, resolution, size):
    """The model's by default; an empty instruction gives back the resized input."""
    image = PICTURE.resize((140, 100))
    image.save("in.png")
    args = ("--input", "in.png", "--instruction", " ", "--output", "out.png", *resolution)
    assert command(*args) == 0
    assert np.array_equal(array(folder / "out.png"), array(fit(image, size)))


def test_other_networks_are_asked_for(folder, monkeypatch, capsys):
    """--revision, --variant, --vae, --safety and --dtype reach those who know them."""
    asked = {}

    def checker(pretrained):
        raise ValueError("checked")

    def build(pretrained, *, dtype):
        raise ValueError(f"built as {np.dtype(dtype)}")

    def load(model, **more):
        asked.update(more, model=model)
        return object.__new__(jobs.Pretrained)

    monkeypatch.setattr(jobs, "load", load)
    monkeypatch.setattr(jobs.SafetyChecker, "from_pretrained", checker)
    monkeypatch.setattr(edit, "Editor", build)
    args = ["--input", "in.png", "--instruction", "x", "--output", "out.png", "--model", "[a]/[/b]"]
    more = ["--revision", "v2", "--variant", "fp16", "--vae", "b", "--dtype", "bfloat16"]
    more += ["--lora", "c", "--lora", "d:0.5"]
    assert edit.main([*args, *more]) == 2
    wanted = {"model": "[a]/[/b]", "revision": "v2", "variant": "fp16", "vae": "b"}
    assert asked == wanted | {"lora": ["c", "d:0.5"], "safety": False}
    assert capsys.readouterr().err == "error: built as bfloat16\n"
    assert edit.main([*args, "--safety"]) == 2
    assert capsys.readouterr().err == "error: checked\n"
    assert asked["safety"] is True


# Bad models


def change(folder: Path, file: str, **replaced: torch.Tensor | None) -> None:
    tensors = load_file(folder / file)
    for name, x in replaced.items():
        tensors.pop(name, None)
        if x is not None:
            tensors[name] = x
    (folder / file).unlink()
    save_file(tensors, folder / file, {"format": "pt"})


UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


def without_unet(folder: Path) -> Path:
    shutil.rmtree(folder / "unet")
    return folder


def missing_tensor(folder: Path) -> Path:
    change(folder, UNET, **{"conv_in.bias": None})
    return folder


def extra_tensor(folder: Path) -> Path:
    change(folder, VAE, **{"encoder.more.weight": torch.ones(2)})
    return folder


def misshaped_tensor(folder: Path) -> Path:
    change(folder, UNET, **{"conv_norm_out.weight": torch.ones(7)})
    return folder


def truncated(folder: Path) -> Path:
    data = (folder / UNET).read_bytes()
    (folder / UNET).unlink()
    (folder / UNET).write_bytes(data[: len(data) // 2])
    return folder


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def evil_ckpt(folder: Path) -> Path:
    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": Evil()}, folder / "evil.ckpt")
    return folder / "evil.ckpt"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_unet, ["not a diffusers folder (no unet/ inside)"]),
        (missing_tensor, [UNET, "conv_in.bias"]),
        (extra_tensor, [VAE, "encoder.more.weight"]),
        (misshaped_tensor, [UNET, "conv_norm_out.weight", "7", "32"]),
        (truncated, [UNET, "not a sound safetensors file"]),
        (evil_ckpt, ["evil.ckpt: asks for posix.system"]),
        (lambda folder: folder / "none", ["none: no such file or folder"]),
        (lambda folder: Path("no/model"), ["no/model: no such file", "hub"]),
    ],
)
def test_bad_models(model, folder, capsys, spoil, words):
    shutil.copytree(model, folder / "model")
    before = set(folder.iterdir())
    assert edit.main(["--model", str(spoil(folder / "model")), *ONE]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert set(folder.iterdir()) == before  # nothing written, nothing executed


def test_models_that_cannot_edit(model, tiny_sd, folder, capsys):
    """No image channels; no safety checker; a scheduler that asks for what is not built."""
    shutil.copytree(model, folder / "model")
    scheduler = folder / "model" / "scheduler" / "scheduler_config.json"
    settings = json.loads(scheduler.read_text()) | {
        "_class_name": "EulerDiscreteScheduler",
        "use_karras_sigmas": True,
    }
    scheduler.write_text(json.dumps(settings))
    line = {"input": "in.png", "instruction": "", "output": "a.png"}
    requests = write_requests(folder / "r.jsonl", line, line | {"output": "b.png", "steps": 2})
    before = set(folder.iterdir())
    for args, words in (
        (["--model", str(tiny_sd)], "conv_in.weight takes 4 channels"),
        (["--model", model, "--safety"], "--safety: the model has no safety_checker folder"),
        (["--model", "model", "--sampler", "euler"], "use_karras_sigmas is True"),
    ):
        assert edit.main([*args, "--requests", str(requests)]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert set(folder.iterdir()) == before


def test_pictures_that_cannot_be_edited(command, folder, capsys):
    """A size is refused by the model: alone it is an error, among several a failure."""
    Image.new("RGB", (600, 10)).save("long.png")
    args = ("--instruction", "", "--output", "out/")
    words = "long.png: a picture of 600x10 would be edited at 960x16, a side over 4 x 64: crop it"
    assert command("--input", "long.png", *args) == 2
    assert f"\nerror: {words}\n" in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert command("--input", "long.png", "none.png", "in.png", *args) == 1
    assert capsys.readouterr().err.endswith(f"\nfailed: {words}\nfailed: none.png is not there\n")
    assert [x.name for x in (folder / "out").iterdir()] == ["in.png"]


def test_a_disk_that_is_full(command, folder, capsys, monkeypatch):
    """One line; what was there stays, and nothing half-written beside it."""
    (folder / "out.png").write_bytes(b"before")
    save = Image.Image.save

    def half(self, path, *args, **options):
        save(self, path, *args, **options)
        Path(path).write_bytes(Path(path).read_bytes()[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    before = tree(folder)
    assert command("--input", "in.png", "--instruction", "", "--output", "out.png") == 2
    assert "error: output out.png: not written (No space left" in capsys.readouterr().err
    assert tree(folder) == before


# Several edits


def test_only_what_is_missing(command, folder, capsys, monkeypatch):
    """The same settings: left alone, the model not opened. Other settings: made anew."""
    line = {"input": "in.png", "instruction": "", "output": "a.png", "guidance_interval": [0, 1]}
    args = ("--requests", "r.jsonl")
    write_requests(folder / "r.jsonl", line, line | {"output": "b.png", "seed": 1})
    assert command(*args) == 0
    first = {name: os.stat(name).st_mtime_ns for name in ("a.png", "b.png")}
    (folder / "c.png").write_bytes(huge())  # there, but not ours
    write_requests(
        folder / "r.jsonl",
        line,
        line | {"output": "b.png", "seed": 2},
        line | {"output": "c.png"},
    )
    capsys.readouterr()
    assert command(*args) == 0
    assert "2/2" in capsys.readouterr().err
    assert os.stat("a.png").st_mtime_ns == first["a.png"]
    assert os.stat("b.png").st_mtime_ns != first["b.png"]
    again = tree(folder)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "load", None)  # calling it would be a traceback
        assert command(*args) == 0
    assert capsys.readouterr().err == "all 3 pictures are there\n"
    assert tree(folder) == again
    assert command(*args, "--dtype", "float32") == 0  # other settings of the model count too
    assert "3/3" in capsys.readouterr().err


def test_batches_do_not_depend_on_what_is_left():
    """Cut by place in the file; of a batch with anything due, all is computed."""
    names = "abcdefghij"
    requests = [Request("in.png", "x", f"{name}.png", steps=3 + (name in "de")) for name in names]
    due = [requests[0], requests[4], requests[9]]
    batches = jobs.units(requests, due, 3, lambda r: r.steps)
    got = ["".join(r.output[0] for r in batch) for batch in batches]
    assert got == ["abc", "ij", "de"]


def killed(command: list[str], folder: Path, moment: random.Random) -> tuple[int, bool]:
    """Starts the command and kills it at a random moment.

    Returns its exit code, and whether it left a file half-written.

    Half of the moments are some time after so many more pictures, half are when a file is being
    written.
    """
    there = len(os.listdir(folder))
    more, delay = moment.randrange(4), moment.choice([None, moment.random() * 0.05])
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.0002)
            names = os.listdir(folder)
            parts = sum(name.endswith(".part") for name in names)
            if len(names) - parts >= there + more and (parts or delay is not None):
                time.sleep(delay or 0)
                process.kill()
    half = f".{process.pid}.part"
    return process.returncode, any(name.endswith(half) for name in os.listdir(folder))


@pytest.mark.slow
def test_killed_and_restarted(model, editor, tmp_path, monkeypatch, capsys):
    """SIGKILL at random moments: in the end the same bytes as undisturbed, and nothing else.

    The undisturbed run is in this process; the others have the same (fake) devices.
    """
    requests = [
        {
            "input": f"../{'broken' if i == 5 else 'in'}.png",
            "instruction": "" if i == 8 else f"make it number {i}",
            "output": f"out/{i}.png",
            "seed": i,
            "text_guidance": 3.0 + i,
        }
        for i in range(12)
    ]
    PICTURE.save(tmp_path / "in.png")
    (tmp_path / "broken.png").write_bytes(encoded(PICTURE)[:-50])
    for name in ("undisturbed", "killed"):
        (tmp_path / name / "out").mkdir(parents=True)
        write_requests(tmp_path / name / "edits.jsonl", *requests)
    args = ["--model", model, *FAST, "--requests", "edits.jsonl"]
    listed = "failed: ../broken.png: image file is truncated\n"

    monkeypatch.chdir(tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        patch.setattr(edit, "Editor", lambda *_, **__: editor)
        assert edit.main(args) == 1
    assert listed in capsys.readouterr().err
    want = {x.name: x.read_bytes() for x in Path("out").iterdir()}
    assert sorted(want) == sorted(f"{i}.png" for i in range(12) if i != 5)

    monkeypatch.chdir(tmp_path / "killed")
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")
    command = [sys.executable, "-m", "ip2p_jax.edit", *args]
    out, moment, started, kills, halves = Path("out"), random.Random(KILLS), 0, 0, 0
    while kills < KILLS:
        code, half = killed(command, out, moment)
        assert code in (-signal.SIGKILL, 1) and started < 5 * KILLS
        started, kills, halves = started + 1, kills + (code != 1), halves + half
        got = {x.name: x.read_bytes() for x in out.glob("[0-9]*.png")}
        assert got.items() <= want.items()  # whole pictures, or none
        if code == 1:  # it came to its end first: the next starts anew
            assert got == want
            shutil.rmtree(out)
            out.mkdir()

    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.endswith(listed)
    assert {x.name: x.read_bytes() for x in out.iterdir()} == want  # and no temporary file
    times = {x: x.stat().st_mtime_ns for x in out.iterdir()}
    monkeypatch.setattr(edit, "edit", None)  # computing anything would be a traceback
    monkeypatch.setattr(edit, "Editor", lambda *_, **__: editor)
    assert edit.main(args) == 1
    assert {x: x.stat().st_mtime_ns for x in out.iterdir()} == times
    write_row("edits of 11 pictures", started, kills, halves)
