# SPDX-License-Identifier: Apache-2.0
"""Claims: one command turns triplets into a folder of pairs; killed at any moment and started again
it ends with the same bytes, and so do several hosts; wrong input is one line.
"""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from data_gen import pack, pairs
from data_gen.candidates import CandidateMaker
from data_gen.pair_filter import Thresholds
from data_gen.pair_folder import PairFolder
from data_gen.pair_run import Selection, make_pairs
from data_gen.triplet_file import read_triplets
from ip2p_jax import storage
from tests.kills import KILLS, write_row

TRIPLETS = [
    {"input": "a cat", "edit": "make it a dog", "output": "a dog"},
    {"caption": "a street", "edit": "make it winter", "output": "a street in snow"},
    {"input": "a house", "edit": "paint it red", "output": "a red house"},
    {"input": "a lake at noon", "edit": "make it night", "output": "a lake at night"},
    {"input": "a tree", "edit": "add a bird", "output": "a tree with a bird"},
]
LIMITS = ("--clip-threshold", "--clip-dir-threshold", "--clip-img-threshold")


@pytest.fixture(scope="module")
def triplets(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("triplets") / "triplets.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in TRIPLETS))
    return file


@pytest.fixture(scope="module")
def options(triplets, tiny_sd, tiny_clip) -> list[str]:
    """All but --output. Random networks score anything, so no threshold rejects by score."""
    named = {"--triplets": triplets, "--model": tiny_sd, "--clip": tiny_clip, "--resolution": 32}
    named |= {"--candidates": 5, "--keep": 2, "--steps": 3} | dict.fromkeys(LIMITS, -1)
    return [str(x) for item in named.items() for x in item]


@pytest.fixture(scope="module")
def made(options, tmp_path_factory) -> Path:
    """What an undisturbed run makes."""
    folder = tmp_path_factory.mktemp("made") / "pairs"
    assert pairs.main([*options, "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def straight(options, tmp_path_factory) -> Path:
    """From a process of one device: on the CPU, XLA divides sums by the threads of a process."""
    folder = tmp_path_factory.mktemp("straight") / "pairs"
    _, errors = (process := command(options, folder)).communicate()
    assert process.returncode == 0, errors.decode()
    return folder


ANY = Selection(candidates=5, keep=2, thresholds=Thresholds(-1, -1, -1))


def make(out: Path, maker: CandidateMaker, triplets: Path, selection=ANY, numbers=range(5)):
    """Makes prompts with the loop of the command; returns the folder."""
    folder = PairFolder.open(str(out), {})
    list(make_pairs(folder, read_triplets(triplets), numbers, maker, selection))
    return folder


def pairs_of(folder: Path) -> dict[str, bytes]:
    """What is written prompt by prompt."""
    return {name: data for name, data in content(folder).items() if name.startswith("0")}


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def is_png(path: Path) -> bool:
    with Image.open(path) as image:
        return image.format == "PNG"


def test_the_folder_has_the_released_layout(made):
    listed = json.loads((made / "seeds.json").read_text())
    assert [name for name, _ in listed] == [f"{i:07d}" for i in range(5)]
    for (name, seeds), triplet in zip(listed, TRIPLETS, strict=True):
        rows = [json.loads(x) for x in (made / name / "metadata.jsonl").read_text().splitlines()]
        assert [row["seed"] for row in rows] == list("01234")
        assert [row["seed"] for row in rows if not row["rejected"]] == seeds and len(seeds) == 2
        best = sorted(rows, key=lambda row: -row["clip_sim_dir"])[:2]
        assert {row["seed"] for row in best} == set(seeds)
        assert all(0.1 <= row["p2p_threshold"] <= 0.9 for row in rows)
        assert all(7.5 <= row["cfg_scale"] <= 15 for row in rows)
        prompt = json.loads((made / name / "prompt.json").read_text())
        assert prompt["edit"] == triplet["edit"]
        for file in (f"{seed}_{i}.jpg" for seed in seeds for i in (0, 1)):
            with Image.open(made / name / file) as image:
                assert (image.size, image.format) == ((32, 32), "JPEG")
    assert json.loads((made / "report.json").read_text())["kept"] == 10
    for name in ("report.png", "contact_sheet.png"):
        assert is_png(made / name)


def test_candidates_differ_and_so_do_the_two_pictures(made):
    rows = [json.loads(x) for x in (made / "0000000/metadata.jsonl").read_text().splitlines()]
    assert len({row["p2p_threshold"] for row in rows}) == len({row["cfg_scale"] for row in rows})
    assert len({row["clip_sim_0"] for row in rows}) == 5
    folder = PairFolder(epath.Path(made))
    kept = [row["seed"] for row in rows if not row["rejected"]]
    pictures = [np.asarray(x) for seed in kept for x in folder.pictures(0, seed)]
    for i, a in enumerate(pictures):
        assert all(np.any(a != b) for b in pictures[:i])


def test_it_packs_and_the_shards_pass_the_check(made, tmp_path, capsys):
    out = tmp_path / "shards"
    assert pack.main(["--input", str(made), "--output", str(out), "--workers", "1"]) == 0
    capsys.readouterr()
    assert pack.main(["--verify", "--output", str(out)]) == 0
    assert "10 pairs" in capsys.readouterr().out
    assert is_png(out / "contact_sheet.png")


def test_a_second_run_makes_nothing(options, made, monkeypatch):
    before = content(made)
    monkeypatch.setattr(PairFolder, "write", None)
    assert pairs.main([*options, "--output", str(made)]) == 0
    assert content(made) == before


def test_stopping_early_leaves_the_later_candidates(made, maker, triplets, tmp_path):
    """With 2 rows a unit and nothing rejected, 2 pairs have passed after the first unit."""
    folder = make(tmp_path, maker, triplets, ANY._replace(stop_early=True))
    for i in range(5):
        assert [row["seed"] for row in folder.rows(i)] == ["0", "1"]
    early, late = folder.rows(1), PairFolder(epath.Path(made)).rows(1)
    assert [row["clip_sim_dir"] for row in early] == [row["clip_sim_dir"] for row in late[:2]]


def test_thresholds_that_nothing_meets_leave_rows_and_no_pairs(maker, triplets, tmp_path):
    nothing = ANY._replace(thresholds=Thresholds(direction=1.0))
    folder = make(tmp_path, maker, triplets, nothing)
    assert pairs.finish(folder, read_triplets(triplets), nothing.thresholds) == 0
    assert json.loads((tmp_path / "seeds.json").read_text()) == []
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["candidates"] == 25 and report["prompts_with_pairs"] == 0
    assert not list(tmp_path.rglob("*.jpg"))


def test_what_the_safety_checker_flags_is_rejected(made, maker, triplets, tmp_path):
    """A checker that flags the second of two pictures; no flagged pair is kept."""
    folder, seen = PairFolder.open(str(tmp_path), {}), []

    def flagged(images):
        seen.extend(images)
        return [False, len(seen) == 2]

    list(make_pairs(folder, read_triplets(triplets), [0], maker, ANY, flagged))
    assert [row["rejected"] for row in folder.rows(0)].count("unsafe") == 1
    assert len(seen) == 10


def command(options: list[str], output: Path, *more: str, environment=None) -> subprocess.Popen:
    line = [sys.executable, "-m", "data_gen.pairs", *options, "--output", str(output), *more]
    environment = os.environ | (environment or {})
    return subprocess.Popen(
        line, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def begun(out: Path) -> int:
    return len(list(out.glob("*/prompt.json")))


@pytest.mark.slow
def test_killed_and_started_again(options, straight, tmp_path):
    """Kills at random moments after another prompt has been begun; whoever comes to the end begins
    anew."""
    out, moment = tmp_path / "0", random.Random(0)
    started = kills = writing = 0
    while kills < KILLS:
        process, before = command(options, out), begun(out)
        while process.poll() is None and begun(out) == before:
            time.sleep(0.002)
        time.sleep(moment.uniform(0, 0.3))
        process.kill()
        _, errors = process.communicate()
        started, killed = started + 1, process.returncode == -9
        kills += killed
        assert killed or process.returncode == 0, errors.decode()
        writing += len(list(out.glob("*/prompt.json"))) > len(list(out.glob("*/metadata.jsonl")))
        if not killed:
            assert content(out) == content(straight)
            out = tmp_path / str(started)
    process = command(options, out)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert content(out) == content(straight)
    write_row("making pairs", started, kills, writing)


def test_hosts_share_the_work(made, maker, triplets, tmp_path, capsys):
    """2 hosts, one after the other; who comes last writes the list."""
    texts = read_triplets(triplets)
    for host in (1, 0):
        assert not (tmp_path / "seeds.json").exists()
        folder = make(tmp_path, maker, triplets, numbers=range(host, 5, 2))
        assert pairs.finish(folder, texts, ANY.thresholds) == 0
    assert "3 prompts of other hosts are still to come" in capsys.readouterr().out
    assert pairs_of(tmp_path) == pairs_of(made)
    assert (tmp_path / "seeds.json").read_bytes() == (made / "seeds.json").read_bytes()


@pytest.mark.slow
def test_four_hosts_of_jax_distributed_give_the_same_set(options, straight, tmp_path):
    """As under Slurm, whose environment says who is who."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "4"}
    slurm |= {"SLURM_LOCALID": "0", "JAX_COORDINATOR_ADDRESS": address}
    out = tmp_path / "pairs"
    processes = [
        command(options, out, "--distributed", environment=slurm | {"SLURM_PROCID": str(host)})
        for host in range(4)
    ]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors
    assert content(out) == content(straight)


def test_storage_that_fails_for_a_while(made, maker, triplets, tmp_path, monkeypatch):
    """Every third whole write fails; the run waits, and ends with the same bytes."""
    waits, writes = [], [0]
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    write_whole = storage.write_whole

    def failing(path, data):
        writes[0] += 1
        if writes[0] % 3 == 0:
            raise OSError(5, "Input/output error")
        write_whole(path, data)

    monkeypatch.setattr("data_gen.pair_folder.write_whole", failing)
    make(tmp_path, maker, triplets)
    assert waits and pairs_of(tmp_path) == pairs_of(made)


def test_storage_that_fails_for_long_is_reported(options, tmp_path, monkeypatch, capsys):
    def failing(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("data_gen.pair_folder.write_whole", failing)
    assert pairs.main([*options, "--output", str(tmp_path / "pairs")]) == 1
    error = capsys.readouterr().err
    assert "failed 7 times" in error and "the same command goes on from there" in error


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--candidates", "0"], "--candidates 0: expected at least 1"),
        (["--clip-threshold", "1.5"], "--clip-threshold 1.5: expected a cosine, -1 to 1"),
        (["--clip-img-threshold", "nan"], "--clip-img-threshold nan: expected a cosine"),
        (["--min-p", "0.9", "--max-p", "0.1"], "--min-p 0.9: expected 0 <= --min-p <= --max-p"),
        (["--rows", "1"], "--rows 1: expected at least 2"),
        (["--sampler", "plms"], "--sampler plms: expected one of euler_ancestral"),
        (["--host", "2", "--hosts", "2"], "--host 2: expected 0 to 1"),
        (["--resolution", "40"], "--resolution 40: expected a multiple of 16 px"),
        (["--triplets", "none.jsonl"], "none.jsonl: no such file"),
        (["--seed", "1"], "was made with seed 0, this command says 1"),
    ],
)
def test_wrong_input_is_one_line(options, made, capsys, more, expected):
    assert pairs.main([*options, "--output", str(made), *more]) == 2
    error = capsys.readouterr().err.strip()
    assert expected in error and error.startswith("error: ") and "\n" not in error


def test_outputs_are_looked_at_before_anything_is_loaded(options, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pairs.jobs, "load_model", None)
    (tmp_path / "file").touch()
    for output, words in ((tmp_path, "not a folder of pairs"), (tmp_path / "file", "no file can")):
        assert pairs.main([*options, "--output", str(output)]) == 2
        assert words in capsys.readouterr().err


def test_other_weights_under_the_same_name_are_refused(options, made, tmp_path, capsys):
    """As after the model was trained on. Control: the weights it was begun with go on."""
    folder = shutil.copytree(made, tmp_path / "pairs")
    assert pairs.main([*options, "--output", str(folder)]) == 0
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps(settings | {"weights": "0" * 16}))
    assert pairs.main([*options, "--output", str(folder)]) == 2
    assert "was made with weights '0000000000000000', this" in capsys.readouterr().err


def test_a_model_that_is_not_text_to_image_is_refused(options, tiny_ip2p, tmp_path, capsys):
    more = ["--model", str(tiny_ip2p), "--output", str(tmp_path / "pairs")]
    assert pairs.main([*options, *more]) == 2
    assert "not text-to-image" in capsys.readouterr().err
    assert not (tmp_path / "pairs").exists()


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        pairs.main(["--help"])
    assert "python -m data_gen.pairs --triplets" in capsys.readouterr().out
