# SPDX-License-Identifier: Apache-2.0
"""Claims: the command ends with each caption once, sampled and shared out as the seed says; killed
and started again it ends with the same bytes; its memory does not grow with the input; wrong
options are one line and code 2."""

import json
import random
import shutil
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_gen.captions import main
from ip2p_jax.cli import alone
from tests.kills import KILLS, write_row

WORDS = "red blue old house lake cat dog painting of in the a sunset forest girl boy city".split()


def write_parquet(path, count, *, seed=0):
    """Captions and urls as LAION-Aesthetics has them: some of each come twice, some are HTML."""
    draw = random.Random(seed)
    schema = pa.schema([("URL", pa.string()), ("TEXT", pa.string())])
    with pq.ParquetWriter(path, schema) as file:
        for begin in range(0, count, 10_000):
            n = min(10_000, count - begin)
            texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 12))) for _ in range(n)]
            texts = [f"<b>{x}</b> {draw.randint(0, 999)}" if len(x) > 20 else x for x in texts]
            urls = [f"http://x.org/{draw.randint(0, 20 * count)}.jpg" for _ in range(n)]
            file.write_table(pa.table({"URL": urls, "TEXT": texts}, schema))
    return path


def lines(folder):
    """All that is written, file by file."""
    files = sorted(folder.glob("captions-*.jsonl"))
    return [[json.loads(x) for x in file.read_text("utf-8").splitlines()] for file in files]


def contents(folder):
    return {str(x.relative_to(folder)): x.read_bytes() for x in folder.rglob("*") if x.is_file()}


def test_captions(tmp_path, capsys):
    source = write_parquet(tmp_path / "a.parquet", 3000)
    out = tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", "--min-length=8"]) == 0
    said = capsys.readouterr().out
    report = json.loads((out / "captions.json").read_text())
    (got,) = lines(out)
    captions, urls = [x["caption"] for x in got], [x["url"] for x in got]
    assert len(set(captions)) == len(set(urls)) == len(got) == report["written"]
    assert report["read"] == 3000 == report["written"] + sum(report["left out"].values())
    assert set(report["left out"]) == {"same caption", "same url", "too short"}
    assert all(1 <= len(x) <= 5 for x in report["examples"].values())
    assert all("<" not in x and 8 <= len(x) for x in captions)
    assert said.startswith("3000 read, left out: same caption ") and str(out) in said
    assert sorted(x.name for x in out.iterdir()) == sorted(
        [*report["files"], "captions.json", "settings.json"]
    )

    before = contents(out)
    assert main([f"--input={source}", f"--output={out}", "--min-length=8"]) == 0
    assert contents(out) == before and capsys.readouterr().out == said


def test_sample_and_partitions(tmp_path):
    """A sample is the first of the whole order; files are dealt out; another seed, another one."""
    files = [str(write_parquet(tmp_path / f"{i}.parquet", 800, seed=i)) for i in range(2)]

    def run(name, *options):
        assert main(["--input", *files, f"--output={tmp_path / name}", *options]) == 0
        return lines(tmp_path / name)

    (whole,) = run("whole")
    shared = run("shared", "--count=300", "--partitions=7")
    assert [len(x) for x in shared] == [43] * 6 + [42]
    assert [shared[i % 7][i // 7] for i in range(300)] == whole[:300]
    (other,) = run("other", "--seed=1")
    assert other != whole
    assert {x["caption"].lower() for x in other} == {x["caption"].lower() for x in whole}
    assert run("more", "--count=100000") == [whole]


def test_captions_without_urls(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\nA cat.\na dog\n1234\n")
    assert main([f"--input={tmp_path}", "--files=*.txt", f"--output={tmp_path / 'out'}"]) == 0
    (got,) = lines(tmp_path / "out")
    assert sorted(x["caption"] for x in got) == ["a cat", "a dog"]
    assert not any("url" in x for x in got)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--count=0"], "--count 0: expected at least 1"),
        (["--partitions=0"], "--partitions 0: expected 1 to 512"),
        (["--min-length=9", "--max-length=8"], "--min-length 9: expected 1 to --max-length"),
        (["--seed=-1"], "--seed -1: expected 0 to 2^32 - 1"),
        (["--column=nothing"], "no column nothing; choose by --column and --url-column of ['U"),
        (["--min-length=299"], "no caption is left ({'too short': 50})"),
        (["--sample=3"], "unrecognized arguments: --sample=3"),
        (["--input=nowhere.csv"], "nowhere.csv: no such file or folder"),
        (["--output=gs://bucket/x"], "--output gs://bucket/x: expected a local folder"),
    ],
)
def test_wrong_options(tmp_path, capsys, options, message):
    source = write_parquet(tmp_path / "a.parquet", 50)
    assert main([f"--input={source}", f"--output={tmp_path / 'out'}", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out/captions*"))


@pytest.mark.parametrize("wrong", ["--column=nothing", "--min-length=299"])
def test_a_command_that_came_to_nothing_may_be_given_anew(tmp_path, capsys, wrong):
    """Its settings are not those of the folder: nothing was made by them."""
    source, out = write_parquet(tmp_path / "a.parquet", 50), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}", wrong]) == 2
    assert main([f"--input={source}", f"--output={out}", "--column=TEXT"]) == 0
    report = json.loads((out / "captions.json").read_text())
    assert report["read"] == 50 and report["written"] == len(lines(out)[0]) > 0


def test_what_was_written_can_be_read(tmp_path):
    """Lines without a url leave it out, and those that have one keep it."""
    source = tmp_path / "a.csv"
    urls = [f"u{i}" if i % 2 else "" for i in range(8)]
    source.write_text("TEXT,URL\n" + "".join(f"a cat {i},{url}\n" for i, url in enumerate(urls)))
    assert main([f"--input={source}", f"--output={tmp_path / 'a'}"]) == 0
    assert (
        main(["--input", str(tmp_path / "a"), "--files=c*.jsonl", f"--output={tmp_path / 'b'}"])
        == 0
    )
    expected = {f"a cat {i}": url or None for i, url in enumerate(urls)}
    for name in "ab":
        assert {x["caption"]: x.get("url") for x in lines(tmp_path / name)[0]} == expected


def test_another_command_in_the_same_folder_is_refused(tmp_path, capsys):
    source, out = write_parquet(tmp_path / "a.parquet", 50), tmp_path / "out"
    assert main([f"--input={source}", f"--output={out}"]) == 0
    before = contents(out)
    write_parquet(tmp_path / "b.parquet", 50)
    for options, name in [
        ([f"--input={source}", "--seed=3"], "seed"),
        ([f"--input={tmp_path / 'b.parquet'}"], "files"),
    ]:
        assert main([*options, f"--output={out}"]) == 2
        assert f"was made with {name} " in capsys.readouterr().err
    assert contents(out) == before


def test_a_second_process_is_refused(tmp_path, capsys):
    source, out = write_parquet(tmp_path / "a.parquet", 50), tmp_path / "out"
    out.mkdir()
    with alone(out):
        assert main([f"--input={source}", f"--output={out}"]) == 2
    assert capsys.readouterr().err == f"error: {out}: another process is writing there\n"
    assert main([f"--input={source}", f"--output={out}"]) == 0


RUN = """
import sys
from data_gen import caption_shuffle, captions
caption_shuffle.CHUNK = 200
sys.exit(captions.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """SIGKILL at random moments: the same bytes in the end."""
    files = [str(write_parquet(tmp_path / f"{i}.parquet", 2000, seed=i)) for i in range(2)]

    def command(output):
        return [sys.executable, "-c", RUN, "--input", *files, f"--output={output}"]

    apart, killed, draw = tmp_path / "apart", tmp_path / "killed", random.Random(KILLS)
    subprocess.run(command(apart), check=True, capture_output=True)
    started = kills = writing = 0
    while kills < KILLS:
        with subprocess.Popen(command(killed), stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not (killed / "settings.json").exists():
                time.sleep(0.002)
            if started:  # else the folder is new
                time.sleep(0.5)
            time.sleep(0.8 * draw.random())
            process.kill()
        assert process.returncode in (0, -9) and started < 20 * KILLS
        started, kills = started + 1, kills + (process.returncode == -9)
        writing += bool(list(killed.rglob(".*.part")))
        if process.returncode == 0:
            assert contents(killed) == contents(apart)
            shutil.rmtree(killed)
    subprocess.run(command(killed), check=True, capture_output=True)
    assert contents(killed) == contents(apart)
    write_row("4000 captions", started, kills, writing)


PEAK = """
import sys
from pathlib import Path
from data_gen.captions import main
assert main(sys.argv[1:]) == 0
(line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x]
print(int(line.split()[1]) // 1024)
"""
"""Prints the most memory in MiB that the process ever held; ru_maxrss would count the parent's."""


@pytest.mark.slow
def test_memory(tmp_path):
    """A million captions take less than 300 MB, and hardly more than a hundred thousand."""

    def peak(count):
        source = write_parquet(tmp_path / f"{count}.parquet", count)
        options = [f"--input={source}", f"--output={tmp_path / str(count)}"]
        command = [sys.executable, "-c", PEAK, *options]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return int(done.stdout.splitlines()[-1])

    few, many = peak(100_000), peak(1_000_000)
    assert many < 300 and many < few + 60
