# SPDX-License-Identifier: Apache-2.0
"""Claims: `ip2p_jax.convert` converts both ways exactly; bad input is one line and code 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from ip2p_jax.convert import main
from ip2p_jax.weights.load import load_vae
from tests.weights.folders import FILES, same, tensors


def run(*args: object) -> int:
    return main([str(arg) for arg in args])


def test_there_and_back(tiny_ip2p, tmp_path, capsys):
    file, back = tmp_path / "new" / "a.safetensors", tmp_path / "back"
    assert run("--from", tiny_ip2p, "--to", file, "--format", "ldm") == 0
    assert run("--from", file, "--to", back, "--format", "diffusers") == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [str(file), str(back)]
    assert "writing" in err  # the progress bar
    want = tensors(tiny_ip2p)
    for part, got in tensors(back).items():
        names = {n.removeprefix("text_model."): x for n, x in got.items()}
        assert same(names, want[part])


def test_half_precision(tiny_ip2p, tmp_path):
    out = tmp_path / "half"
    assert run("--from", tiny_ip2p, "--to", out, "--format", "diffusers", "--dtype", "float16") == 0
    assert {x.dtype for part in tensors(out).values() for x in part.values()} == {torch.float16}


def test_another_vae(tiny_ip2p, tiny_sd, tmp_path):
    vae = tiny_ip2p / "vae"
    args = ("--to", tmp_path / "out", "--format", "diffusers", "--vae", vae)
    assert run("--from", tiny_sd, *args) == 0
    got, want = tensors(tmp_path / "out"), tensors(tiny_sd)
    assert same(got["unet"], want["unet"])
    assert same(got["vae"], tensors(tiny_ip2p)["vae"])


def test_a_vae_alone(tiny_ip2p, tmp_path):
    """diffusers opens it, tensor by tensor the model's."""
    out = tmp_path / "vae"
    assert run("--from", tiny_ip2p, "--to", out, "--format", "vae") == 0
    assert same(AutoencoderKL.from_pretrained(out).state_dict(), tensors(tiny_ip2p)["vae"])
    assert load_vae(str(out))[0] == load_vae(str(tiny_ip2p))[0]


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert out.count("python -m ip2p_jax.convert --from") == 7


def evil(path: Path) -> Path:
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {path.parent / 'executed'}",)

    torch.save({"state_dict": {"a": torch.ones(2)}, "hyper": Evil()}, path)
    return path


@pytest.mark.parametrize(
    ("source", "target", "more", "line"),
    [
        ("nothing", "out", [], "nothing: no such file or folder"),
        ("folder", "folder", [], "folder: is already there"),
        ("nothing", "cut.safetensors/out", [], "no file can be made in"),
        ("folder", "out.ckpt", ["--format", "ldm"], "a name that ends in .safetensors"),
        ("folder", "out", ["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ("folder", "out", ["--variant", "fp16"], "model.fp16.safetensors: no such file"),
        ("empty", "out", [], r"not a diffusers folder (no unet/ inside)"),
        ("evil.ckpt", "out", [], "asks for posix.system, which no checkpoint needs: not loaded"),
        ("cut.safetensors", "out", [], "cut.safetensors: not a sound safetensors file"),
    ],
)
def test_bad_input(tiny_ip2p, tmp_path, capsys, source, target, more, line):
    (tmp_path / "folder").symlink_to(tiny_ip2p)
    (tmp_path / "empty").mkdir()
    evil(tmp_path / "evil.ckpt")
    (tmp_path / "cut.safetensors").write_bytes((tiny_ip2p / FILES["vae"]).read_bytes()[:5000])
    before = sorted(tmp_path.iterdir())
    args = ["--from", tmp_path / source, "--to", tmp_path / target, "--format", "diffusers", *more]
    assert run(*args) == 2
    err = capsys.readouterr().err
    assert line in err and err.startswith("error: ") and err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before  # nothing written, nothing executed


@pytest.mark.slow
def test_as_a_process_without_torch(tiny_ip2p, tmp_path):
    """The library needs neither torch nor diffusers at run time: importing them fails here."""
    script = (
        "import sys; sys.modules.update(torch=None, diffusers=None)\n"
        "from ip2p_jax.convert import main; sys.exit(main())"
    )
    args = ["--from", tiny_ip2p, "--to", tmp_path / "a.safetensors", "--format", "ldm"]
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
