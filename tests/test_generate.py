# SPDX-License-Identifier: Apache-2.0
"""Claims: the generate command does what the Generator does, and only what is missing; what cannot
be done is one line and code 2, and nothing half-written stays."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ip2p_jax import generate, jobs
from ip2p_jax.generator import Generator
from ip2p_jax.weights.load import load
from tests.edits import tree

FAST = ("--steps", "3")


def array(path: str | Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.fixture(scope="module")
def generator(tiny_sd) -> Generator:
    return Generator(load(str(tiny_sd)))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(tiny_sd, generator, folder, monkeypatch):
    """The command with a model; its Generator is built once, so that its program is traced once."""
    monkeypatch.setattr(generate, "Generator", lambda *_, **__: generator)
    return lambda *args: generate.main(["--model", str(tiny_sd), *FAST, *map(str, args)])


def test_the_command_is_the_generator(command, generator, folder, capsys, tiny_sd):
    """The same pixels; the settings in the metadata; a progress bar on stderr."""
    args = ("--prompt", "a blue cat", "--output", "new/a.png", "--text-guidance", "5")
    assert command(*args, "--seed", "7", "--negative", "red", "--size", "64x64") == 0
    out, err = capsys.readouterr()
    assert out == "" and "generating" in err and "1/1" in err
    [want] = generator("a blue cat", steps=3, text_guidance=5.0, seed=7, negative="red")
    assert want.size == (64, 64)
    np.testing.assert_array_equal(array("new/a.png"), np.asarray(want))
    assert [x.name for x in (folder / "new").iterdir()] == ["a.png"]
    with Image.open("new/a.png") as image:
        assert json.loads(image.info["ip2p_jax"]) == {
            "model": str(tiny_sd),
            "revision": None,
            "variant": None,
            "vae": None,
            "lora": None,
            "dtype": None,
            "safety": False,
            "prompt": "a blue cat",
            "output": "new/a.png",
            "steps": 3,
            "sampler": "euler_ancestral",
            "text_guidance": 5.0,
            "guidance_rescale": 0.0,
            "guidance_interval": None,
            "seed": 7,
            "negative": "red",
            "size": "64x64",
        }


def test_width_comes_first(generator):
    assert generate.size_of("80x48", generator) == (80, 48)
    assert generate.size_of(None, generator) is None  # the model's own


def test_only_what_is_missing(command, generator, folder, capsys, monkeypatch):
    """Prompts by number, seeds upwards; what is there with the same settings is left alone."""
    args = ["--prompt", "a cat", "--prompt", "a dog", "--count", "2", "--seed", "4"]
    assert command(*args, "--output", "out") == 0
    names = ["1_4.png", "1_5.png", "2_4.png", "2_5.png"]
    assert sorted(os.listdir("out")) == names
    [want] = generator("a dog", steps=3, seed=5)
    np.testing.assert_array_equal(array("out/2_5.png"), np.asarray(want))

    first = tree(folder)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "load", None)  # calling it would be a traceback
        assert command(*args, "--output", "out") == 0
    assert capsys.readouterr().err == "all 4 pictures are there\n" and tree(folder) == first

    times = {name: os.stat(f"out/{name}").st_mtime_ns for name in names}
    (folder / "out" / "1_5.png").unlink()
    args[3] = "a duck"  # another second prompt
    assert command(*args, "--output", "out") == 0
    assert "3/3" in capsys.readouterr().err
    again = {name: os.stat(f"out/{name}").st_mtime_ns for name in names}
    assert [name for name in names if again[name] != times[name]] == names[1:]
    np.testing.assert_array_equal(array("out/1_5.png"), first_pixels(first, "1_5.png"))


def first_pixels(files: dict[Path, bytes | None], name: str) -> np.ndarray:
    """The picture of this name among files that were read before."""
    data = next(x for path, x in files.items() if path.name == name)
    Path("before.png").write_bytes(data or b"")
    return array("before.png")


def test_safety(command, folder, capsys, monkeypatch):
    """--safety blacks out what is flagged; a model without a checker is refused."""
    args = ("--prompt", "x", "--output", "a.png", "--safety")
    assert command(*args) == 2
    assert "error: --safety: the model has no safety_checker" in capsys.readouterr().err

    def black_out(self, images):
        return [Image.new("RGB", x.size) for x in images]

    strict = object.__new__(jobs.SafetyChecker)
    monkeypatch.setattr(jobs.SafetyChecker, "black_out", black_out)
    monkeypatch.setattr(jobs.SafetyChecker, "from_pretrained", lambda pretrained: strict)
    assert command(*args) == 0
    assert array("a.png").shape == (64, 64, 3) and not array("a.png").any()


# What is refused


@pytest.fixture
def refused(folder, monkeypatch, capsys):
    """Runs the command on what it has to refuse without opening a model; returns the line."""

    def run(*args: object) -> str:
        monkeypatch.setattr(jobs, "load", None)  # calling it would be a traceback
        before = tree(folder)
        assert generate.main([*map(str, args)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1
        assert tree(folder) == before
        return err

    return run


ONE = ("--model", "some/model", "--prompt", "x", "--output", "out.png")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (("--steps", "0"), "steps: 0, expected 1 to 1000"),
        (("--steps", "ten"), "argument --steps: invalid int value: 'ten'"),
        (("--sampler", "plms"), "sampler: 'plms', expected one of euler_ancestral, euler, heun"),
        (("--text-guidance", "nan"), "text_guidance: nan, expected a finite number"),
        (("--seed", "-1"), "seed: -1, expected an integer from 0 to 2^32 - 1"),
        (("--seed", "4294967295", "--count", "2", "--output", "o"), "seed: 4294967296, expected"),
        (("--count", "0"), "--count: 0, expected 1 to 10000"),
        (("--count", "2"), "--output: out.png, expected a folder for several pictures"),
        (("--prompt", "y"), "--output: out.png, expected a folder for several pictures"),
        (("--size", "512"), "size: '512', expected WxH in pixels, such as 768x512"),
        (("--size", "-64x64"), "argument --size: expected one argument"),
        (("--size", "64x64x3"), "size: '64x64x3', expected WxH"),
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("--image-guidance", "2"), "unrecognized arguments: --image-guidance 2"),
        (("--output", "out.jpg"), "output: 'out.jpg', expected a .png file"),
        (("--output", "text/out.png"), "text: no file can be made in"),
        (("--output", "folder.png"), "x/1_0.png: is a folder"),
    ],
)
def test_bad_arguments(refused, folder, args, line):
    (folder / "text").write_text("hello")
    (folder / "folder.png" / "1_0.png").mkdir(parents=True)
    assert line.removeprefix("x/") in refused(*ONE, *args)


@pytest.mark.parametrize("missing", ["--model", "--prompt", "--output"])
def test_incomplete_arguments(refused, missing):
    i = ONE.index(missing)
    assert f"the following arguments are required: {missing}" in refused(*ONE[:i], *ONE[i + 2 :])


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        generate.main(["--help"])
    out = capsys.readouterr().out
    assert out.count("python -m ip2p_jax.generate --model") == 2
    for option in ("--negative", "--size", "--count", "--vae", "--safety", "dpmpp_2m", "(100)"):
        assert option in out


def without_weights(folder: Path) -> Path:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    return folder / "vae"


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def truncated(folder: Path) -> Path:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return folder / "vae"


def wider(folder: Path) -> Path:
    from tests.oracles import tiny_folder

    return tiny_folder(folder / "wider", 4, vae={"latent_channels": 8}) / "vae"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: folder / "none", ["none: no such file or folder"]),
        (empty, ["empty: no VAE (neither vae/ nor a VAE's config.json inside)"]),
        (lambda folder: folder / "unet", ["unet/config.json: _class_name 'UNet2DConditionModel'"]),
        (without_weights, ["vae/diffusion_pytorch_model.safetensors: no such file"]),
        (truncated, ["vae/diffusion_pytorch_model.safetensors: not a sound safetensors file"]),
        (wider, ["wider/vae: the UNet's conv_out.weight", "makes 4", "takes 8"]),
    ],
)
def test_bad_vaes(tiny_sd, folder, capsys, spoil, words):
    shutil.copytree(tiny_sd, folder / "model")
    vae = spoil(folder / "model")
    before, _ = tree(folder), capsys.readouterr()
    assert generate.main([*ONE[2:], "--model", str(tiny_sd), "--vae", str(vae)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    for word in words:
        assert word in err
    assert tree(folder) == before


def test_models_that_cannot_generate(tiny_sd, tiny_ip2p, folder, capsys):
    """An editing model; a size and a number of steps that this model cannot have."""
    for args, words in (
        (["--model", str(tiny_ip2p)], "takes 8 channels, not the 4 of a latent: this model is not"),
        (["--model", str(tiny_sd), "--size", "64x50"], "size: 64x50, expected multiples of 16 px"),
        (
            ["--model", str(tiny_sd), "--sampler", "dpmpp_2m", "--steps", "1000"],
            "steps: 1000 are too many for dpmpp_2m",
        ),
    ):
        assert generate.main([*ONE[2:], *args]) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    assert not list(folder.iterdir())
