# SPDX-License-Identifier: Apache-2.0
"""Claims: one command measures a model on a set; killed at any moment and started again it ends
with the same bytes, and so do several hosts; more points and examples only add; wrong input is one
line.
"""

import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from ip2p_jax import evaluate, jobs, storage
from ip2p_jax.evaluation import evaluation_run, scorer
from ip2p_jax.evaluation.report import points, read_metrics
from tests import oracles
from tests.data.released import encode
from tests.evaluation.layouts import SESSIONS, write_lines, write_magicbrush
from tests.kills import KILLS, write_row

TURNS = 6  # of the sessions
FILES = {"settings.json", "metrics.jsonl", "table.md", "curve.png", "samples.png"}


def line_of(options: dict[str, Any]) -> list[str]:
    return [str(x) for item in options.items() for x in item]


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """8 of them would share the same cores, and have nothing to do for so few examples."""
    with pytest.MonkeyPatch.context() as patch:
        one = jax.local_devices()[:1]
        patch.setattr(jax, "local_devices", lambda: one)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_magicbrush(tmp_path_factory.mktemp("sessions") / "test")


@pytest.fixture(scope="module")
def options(data, tiny_ip2p, tiny_clip) -> list[str]:
    """All but --output and points."""
    named = {"--model": tiny_ip2p, "--clip": tiny_clip, "--data": data, "--resolution": 16}
    return line_of(named | {"--steps": 2, "--pictures": 2})


POINTS = ("--image-guidance", "1.0,1.6")


@pytest.fixture(scope="module")
def opened(options, tmp_path_factory):
    """What a first command evaluated, and the sweep that it compiled."""
    folder, sweeps = tmp_path_factory.mktemp("made") / "eval", []
    with pytest.MonkeyPatch.context() as patch:
        open_sweep = evaluate.open_sweep
        patch.setattr(evaluate, "open_sweep", lambda *a: sweeps.append(open_sweep(*a)) or sweeps[0])
        assert evaluate.main([*options, *POINTS, "--output", str(folder)]) == 0
    return folder, *sweeps[0]


@pytest.fixture(scope="module")
def made(opened) -> Path:
    return opened[0]


@pytest.fixture
def compiled(opened, monkeypatch) -> None:
    """Commands take the compiled sweep, with their own examples."""

    def open_sweep(args, examples, console):
        _, sweep, weights = opened
        sweep = copy.copy(sweep)
        sweep.examples = examples
        return sweep, weights

    monkeypatch.setattr(evaluate, "open_sweep", open_sweep)


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return image.size


def test_it_writes_what_it_says(made):
    units = {f"units/{n:06d}.jsonl" for n in range(3)}
    assert FILES | units < set(content(made))
    rows = read_metrics(made / "metrics.jsonl")
    lines = [row for row in rows if row["kind"] == "example"]
    assert [row["kind"] for row in rows] == ["example"] * 12 + ["point"] * 2
    assert {(x["image_guidance"], x["index"]) for x in lines} == {
        (i, n) for i in (1.0, 1.6) for n in range(TURNS)
    }
    of_points = rows[12:]
    assert of_points == points(lines)
    for point in of_points:
        values = [x["clip_image"] for x in lines if x["image_guidance"] == point["image_guidance"]]
        assert point["examples"] == TURNS and point["clip_image"] == pytest.approx(np.mean(values))
        assert point["clip_image_low"] < point["clip_image"] < point["clip_image_high"]
    table = (made / "table.md").read_text().splitlines()
    assert [line.split("|")[3].strip() for line in table[2:4]] == ["1", "1.6"]
    assert min(size(made / "curve.png")) > 500 and min(size(made / "samples.png")) > 100
    pictures = list((made / "pictures").iterdir())
    assert len(pictures) == 4 and {size(path) for path in pictures} == {(16, 16)}


def test_a_second_run_makes_nothing(options, made, compiled, monkeypatch, capsys):
    before = content(made)
    monkeypatch.setattr(evaluation_run, "absorb", None)
    assert evaluate.main([*options, *POINTS, "--output", str(made)]) == 0
    assert content(made) == before
    out = capsys.readouterr().out
    assert "CLIP image similarity" in out and str(made) in out


def test_more_points_and_samples_only_add(options, made, compiled, tmp_path):
    """Lines that were there stay byte by byte, and the end is what one command makes."""
    out, told = tmp_path / "eval", []
    first = ("--samples", "3", "--image-guidance", "1.6")
    for more in (first, (*first, "--pictures", "3"), ("--samples", "5", *POINTS), POINTS):
        assert evaluate.main([*options, *more, "--output", str(out)]) == 0
        units = (unit.read_text().splitlines() for unit in (out / "units").iterdir())
        now = [line for unit in units for line in unit]
        assert set(told) <= set(now) and len(set(now)) == len(now)
        told = now
    assert len(told) == 12
    assert (out / "metrics.jsonl").read_bytes() == (made / "metrics.jsonl").read_bytes()
    for name in ("table.md", "samples.png", "curve.png"):
        assert (out / name).read_bytes() == (made / name).read_bytes()


def test_points_that_are_half_done_are_left_out_and_named(options, compiled, tmp_path, capsys):
    """Of 6 examples an earlier command did 3 at 1.6; the command with that point does the rest."""
    out = tmp_path / "eval"
    line = [*options, "--pictures", "0", "--output", str(out), "--image-guidance"]
    assert evaluate.main([*line, "1.6", "--samples", "3"]) == 0
    capsys.readouterr()
    assert evaluate.main([*line, "1.0"]) == 0
    said = "Left out, for not all of the 6 examples are done there: text 7.5, image 1.6: 3."
    assert said in capsys.readouterr().out and said in (out / "table.md").read_text()
    assert evaluate.main([*line, "1.6"]) == 0
    assert "Left out" not in capsys.readouterr().out + (out / "table.md").read_text()


def test_a_grid_of_both_scales(options, compiled, tmp_path):
    out = tmp_path / "eval"
    more = ["--text-guidance", "5,7.5", *POINTS, "--samples", "2", "--output", str(out)]
    assert evaluate.main([*options, *more]) == 0
    assert min(size(out / "guidance.png")) > 100
    found = [x for x in read_metrics(out / "metrics.jsonl") if x["kind"] == "point"]
    assert len(found) == 4 and len({point["clip_image"] for point in found}) == 4


def test_sessions_have_points_by_turn(options, compiled, tmp_path):
    out = tmp_path / "eval"
    more = ["--turns", "multi", *POINTS, "--pictures", "3", "--output", str(out)]
    assert evaluate.main([*options, *more]) == 0
    found = [x for x in read_metrics(out / "metrics.jsonl") if x["kind"] == "point"]
    counts = {(x["turn"], x["examples"]) for x in found}
    assert len(found) == 6 and counts == {(1, 3), (2, 2), (3, 1)}
    assert len(list((out / "pictures").iterdir())) == 2 * sum(SESSIONS.values())
    assert "| turn" in (out / "table.md").read_text()


@pytest.mark.slow
def test_sdedit(options, tiny_sd, tmp_path):
    """The more noise, the less is kept."""
    out = tmp_path / "eval"
    more = {"--model": tiny_sd, "--method": "sdedit", "--steps": 4, "--strength": "0.25,1"}
    more |= {"--sampler": "ddim", "--output": out}
    assert evaluate.main([*options, *line_of(more)]) == 0
    rows = read_metrics(out / "metrics.jsonl")
    assert [row["strength"] for row in rows if row["kind"] == "point"] == [0.25, 1.0]
    for few, much in zip(rows[:TURNS], rows[TURNS : 2 * TURNS], strict=True):
        assert few["index"] == much["index"] and few["l1_input"] < much["l1_input"]
    assert FILES < set(content(out)) and "guidance.png" not in content(out)


@pytest.mark.parametrize("mode", ["set", "examples"])
def test_search(mode, options, compiled, tmp_path, capsys):
    out = tmp_path / "eval"
    more = ["--search", mode, "--budget", "2", "--floor", "0.9", "--output", str(out)]
    assert evaluate.main([*options, *more]) == 0
    found = [json.loads(x) for x in (out / "search.jsonl").read_text().splitlines()]
    assert [x["index"] for x in found] == list(range(TURNS))
    assert (len({x["text_guidance"] for x in found}) == 1) or mode == "examples"
    text = (out / "search.md").read_text()
    assert "| usual | 7.5 | 1.5 |" in text and text in capsys.readouterr().out


def alone(options: list[str], output: Path, *more: str) -> subprocess.Popen:
    """A process of one device: XLA divides sums among as many threads as there are devices."""
    line = [sys.executable, "-m", "ip2p_jax.evaluate", *options, *POINTS, "--output", str(output)]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    return subprocess.Popen(
        [*line, *more], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )


def end_well(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed") / "eval"
    end_well(alone(options, folder))
    return content(folder)


def begun(out: Path) -> set[tuple[str, int]]:
    """Files of results, with their sizes."""
    found = set()
    for path in [*out.glob("units/*.jsonl"), *out.glob("pictures/*.png")]:
        found.add((path.name, path.stat().st_size))
    return found


@pytest.mark.slow
def test_killed_and_started_again(options, undisturbed, tmp_path):
    """Kills at random moments after another file has been written; whoever comes to the end begins
    anew."""
    out, moment = tmp_path / "0", random.Random(0)
    started = kills = writing = 0
    while kills < KILLS:
        process, before = alone(options, out), begun(out)
        while process.poll() is None and begun(out) == before:
            time.sleep(0.002)
        time.sleep(moment.uniform(0, 0.1))
        process.kill()
        _, errors = process.communicate()
        started, killed = started + 1, process.returncode == -9
        kills += killed
        assert killed or process.returncode == 0, errors.decode()
        writing += any(out.rglob(".*.part"))
        if not killed:
            assert content(out) == undisturbed
            out = tmp_path / str(started)
    end_well(alone(options, out))
    assert content(out) == undisturbed
    write_row("an evaluation", started, kills, writing)


@pytest.mark.slow
def test_two_hosts_give_the_same_files(options, undisturbed, tmp_path):
    """Both at once, in one folder."""
    hosts = [alone(options, tmp_path / "eval", "--hosts", "2", "--host", h) for h in "01"]
    for host in hosts:
        end_well(host)
    assert content(tmp_path / "eval") == undisturbed


def test_who_comes_first_leaves_the_summary_to_the_other(options, made, compiled, tmp_path, capsys):
    out = tmp_path / "eval"
    for host, there in (("1", False), ("0", True)):
        more = ["--hosts", "2", "--host", host, "--output", str(out)]
        assert evaluate.main([*options, *POINTS, *more]) == 0
        assert (out / "metrics.jsonl").exists() == there
    assert "2 units of other hosts are still to come" in capsys.readouterr().out
    assert content(out) == content(made)


def test_storage_that_fails_for_a_while(options, made, compiled, tmp_path, monkeypatch):
    """Every third whole write fails; the run waits, and ends with the same bytes."""
    waits, writes = [], [0]
    monkeypatch.setattr(storage.time, "sleep", waits.append)
    write_whole = storage.write_whole

    def failing(path, data):
        writes[0] += 1
        if writes[0] % 3 == 0:
            raise OSError(5, "Input/output error")
        write_whole(path, data)

    monkeypatch.setattr("ip2p_jax.evaluation.evaluation_folder.write_whole", failing)
    assert evaluate.main([*options, *POINTS, "--output", str(tmp_path / "eval")]) == 0
    assert waits and content(tmp_path / "eval") == content(made)


def test_storage_that_fails_for_long_is_reported(options, compiled, tmp_path, monkeypatch, capsys):
    def failing(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    monkeypatch.setattr("ip2p_jax.evaluation.evaluation_folder.write_whole", failing)
    assert evaluate.main([*options, *POINTS, "--output", str(tmp_path / "eval")]) == 1
    error = capsys.readouterr().err
    assert "failed 7 times" in error and "the same command goes on from there" in error


def test_a_set_without_captions_says_which_scores_fall_out(options, compiled, tmp_path, capsys):
    """One without targets, too; and one that has them for a part."""
    bare = {"input": "a.png", "instruction": "x"}
    full = bare | {"target": "b.png", "input_caption": "a cat", "output_caption": "a dog"}
    for lines, count in (([bare, bare], "2 of 2"), ([bare, full], "1 of 2")):
        data = write_lines(tmp_path / "set.jsonl", lines)
        out = tmp_path / count
        line = ["--data", str(data), *POINTS, "--output", str(out)]
        assert evaluate.main([*options, *line]) == 0
        said = capsys.readouterr().err
        target = "clip_target, l1, l2, psnr, ssim, lpips, dino"
        assert f"no {target} for {count} edits: no target picture" in said
        assert f"no clip_text for {count} edits: no output caption" in said
        assert f"no clip_direction for {count} edits: no captions before and after" in said
        rows = read_metrics(out / "metrics.jsonl")
        assert all(row["kind"] != "point" or "clip_image" in row for row in rows)
        assert [row["index"] for row in rows if "clip_direction" in row and "index" in row] == (
            [1, 1] if count == "1 of 2" else []
        )
        assert (out / "curve.png").exists() == (count == "1 of 2")
        assert min(size(out / "samples.png")) > 100


def test_a_set_that_cannot_be_read_has_no_points(options, compiled, tmp_path):
    """Headers are right, and the rest is missing: each is skipped, and nothing else happens."""
    data = write_lines(tmp_path / "set.jsonl", [{"input": "a.png", "instruction": "x"}])
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    (tmp_path / "a.png").write_bytes(encode(noise, "PNG")[:2000])
    out = tmp_path / "eval"
    line = [*options, "--data", str(data), "--output", str(out), *POINTS]
    assert evaluate.main(line) == 0
    before = content(out)
    assert [row["kind"] for row in read_metrics(out / "metrics.jsonl")] == ["skipped"] * 2
    assert not {"curve.png", "samples.png"} & set(before)
    assert evaluate.main(line) == 0
    assert content(out) == before


def broken_set(folder: Path, broken: int) -> Path:
    """24 examples; the last so many have a header and nothing after it."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    whole = encode(noise, "PNG")
    for i in range(24):
        (folder / f"{i}.png").write_bytes(whole if i < 24 - broken else whole[:2000])
    lines = [{"input": f"{i}.png", "instruction": "x"} for i in range(24)]
    return write_lines(folder / "set.jsonl", lines)


def test_too_many_broken_pictures_are_an_error_in_every_start(options, compiled, tmp_path, capsys):
    """What earlier starts skipped counts; 20 may be skipped, however often it is started."""
    line = [*options, "--pictures", "0", "--image-guidance", "1.0"]
    for broken in (20, 22):
        data = broken_set(tmp_path / f"set{broken}", broken)
        out = tmp_path / f"eval{broken}"
        mine = [*line, "--data", str(data), "--output", str(out)]
        for _ in range(3):
            if broken == 20:
                assert evaluate.main(mine) == 0
            else:
                assert_refused(mine, "examples cannot be read, which is over 5%; the", capsys)
        assert (out / "metrics.jsonl").exists() == (broken == 20)


@pytest.mark.parametrize(("seed", "code"), [(0, 0), (1, 2)])
def test_another_clip_at_the_same_path(
    options, made, opened, compiled, seed, code, tmp_path, monkeypatch, capsys
):
    """Is refused; the same one, opened anew, goes on."""
    clip = oracles.tiny_clip(tmp_path / "clip", seed)
    there = scorer.open_scorer(str(clip), devices=jax.local_devices())
    monkeypatch.setattr(opened[1], "scorer", there)
    assert evaluate.main([*options, *POINTS, "--output", str(made)]) == code
    words = f"error: {made} was made with clip_weights "
    assert capsys.readouterr().err.splitlines()[-1].startswith(words) == bool(code)


def assert_refused(line: list[str], words: str, capsys) -> None:
    capsys.readouterr()
    assert evaluate.main(line) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and words in error


@pytest.fixture
def unopened(monkeypatch) -> None:
    """Wrong input is found before anything is loaded."""
    monkeypatch.setattr(evaluate, "open_sweep", None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--samples", "0"], "--samples 0: expected at least 1"),
        (["--steps", "0"], "--steps 0: expected 1 to 1000"),
        (["--sampler", "plms"], "--sampler plms: expected one of euler_ancestral"),
        (["--pictures", "-1"], "--pictures -1: expected 0 to 64"),
        (["--rows", "1"], "--rows 1: expected at least 2"),
        (["--seed", "-1"], "--seed -1: expected 0 to 2^32 - 1"),
        (["--search", "set", "--floor", "1.5"], "--floor 1.5: expected a cosine, -1 to 1"),
        (["--search", "set", "--budget", "41"], "--budget 41: expected 1 to 40"),
        (["--floor", "0.9"], "--floor 0.9: expected it with --search only"),
        (["--image-guidance", "1.0,x"], "'1.0,x', expected numbers like 1.0,1.2,1.5"),
        (["--image-guidance", "1.0,nan"], "--image-guidance nan: expected finite numbers"),
        (["--text-guidance", "inf"], "--text-guidance inf: expected finite numbers"),
        (["--strength", "0.5"], "--strength given: expected nothing with --method ip2p"),
        (["--host", "2", "--hosts", "2"], "--host 2: expected 0 to 1"),
        (["--legacy", "--clip", "none"], "--legacy given: expected a CLIP that scores"),
        (["--search", "set", "--hosts", "2"], "--search set: expected --method ip2p, CLIP, one"),
        (["--search", "set", *POINTS], "--search set: expected"),
        (["--search", "set", "--clip", "none"], "--search set: expected"),
        (["--data", "none"], "none is not there, expected an evaluation set"),
        (["--fit", "squeeze"], "--fit"),
        (["--layout", "parquet"], "parquet"),
        (["--output", "/dev/null"], "output folder /dev/null: no file can be made in /dev/null"),
    ],
)
def test_wrong_input_is_one_line(options, unopened, capsys, tmp_path, more, words):
    assert_refused([*options, "--output", str(tmp_path / "eval"), *more], words, capsys)
    assert not (tmp_path / "eval").exists()


def test_a_set_with_faults_is_refused_at_once(options, unopened, capsys, tmp_path):
    """Before anything is loaded: what is missing, what is not square, what has no captions."""
    out = ["--output", str(tmp_path / "eval")]
    bare = write_magicbrush(tmp_path / "bare", described=False)
    words = f"{bare}: no output captions, which --method sdedit is given"
    assert_refused([*options, *out, "--data", str(bare), "--method", "sdedit"], words, capsys)
    words = f"{bare}: no captions before and after, which --search goes by"
    assert_refused([*options, *out, "--data", str(bare), "--search", "set"], words, capsys)
    wide = write_lines(tmp_path / "wide.jsonl", [{"input": "a.png", "instruction": "x"}] * 2)
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    words = "48x32 px is not square: give --fit crop or --fit stretch"
    assert_refused([*options, *out, "--data", str(wide)], words, capsys)
    gone = bare / "images" / "139" / "139-output2.png"
    gone.unlink()
    words = f"{gone} is not there"
    assert_refused([*options, *out, "--data", str(bare)], words, capsys)


def test_no_clip_at_hand_is_said_before_the_model_is_loaded(options, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "load_model", None)
    clip = "nobody/no-such-clip"
    line = [*options, "--output", str(tmp_path / "eval"), "--clip", clip]
    assert_refused(line, f"--clip {clip}: {clip}: no such file or folder; as a hub id", capsys)


def test_a_model_of_the_wrong_kind_is_refused(options, tiny_sd, capsys, tmp_path):
    line = [*options, "--output", str(tmp_path / "eval"), "--clip", "none"]
    assert_refused([*line, "--model", str(tiny_sd)], "this is no InstructPix2Pix model", capsys)
    assert_refused([*line, "--method", "sdedit"], "not text-to-image", capsys)
    assert_refused([*line, "--resolution", "40"], "--resolution 40: expected a multiple", capsys)
    assert not (tmp_path / "eval").exists()


def test_other_settings_are_refused(options, made, compiled, capsys):
    for more, words in (
        (["--seed", "1"], "was made with seed 0, this command says 1"),
        (["--legacy"], "was made with legacy False, this command says True"),
        (["--search", "set"], "was made with floor None, this command says 0.8"),
        (["--turns", "multi"], "was made with examples 6, this command says 3"),
    ):
        points = [] if "--search" in more else POINTS
        assert_refused([*options, *points, "--output", str(made), *more], words, capsys)


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    assert "python -m ip2p_jax.evaluate --model" in capsys.readouterr().out
