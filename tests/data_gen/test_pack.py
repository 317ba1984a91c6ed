# SPDX-License-Identifier: Apache-2.0
"""Import of the released layout and of parquet mirrors: nothing is lost in silence."""

import io
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_gen import pack as packing
from data_gen.pack import main, pack, plan
from ip2p_jax.config import Data
from ip2p_jax.data.loader import make_loader
from ip2p_jax.data.manifest import verify
from ip2p_jax.data.pairs import PairSource
from ip2p_jax.data.pictures import decode
from tests.data.released import Words, encode, identify, picture, write_released


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_released(tmp_path_factory.mktemp("data") / "released", 20)


@pytest.fixture
def damaged(released, tmp_path):
    """A copy to break things in."""
    return shutil.copytree(released, tmp_path / "released")


def pairs_of(folder):
    sources = [PairSource(folder, split) for split in verify(folder, hashes=True)]
    return [source[i] for source in sources for i in range(len(source))]


def content(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_released_layout_round_trip(released, tmp_path):
    summary = pack([released], tmp_path / "out", shard_size=7)
    assert summary.startswith("80 pairs of 20 prompts (train 18, validation 1, test 1)")
    pairs = pairs_of(tmp_path / "out")
    assert len(pairs) == 80
    for i, pair in enumerate(pairs):
        prompt, j = divmod(i, 4)
        assert pair.prompt == f"{prompt:07d}"
        assert pair[2:5] == (f"invert {prompt}", f"scene {prompt}", f"negative {prompt}")
        source = released / pair.prompt
        assert pair.input == (source / f"{pair.seed}_0.jpg").read_bytes()
        assert pair.output == (source / f"{pair.seed}_1.jpg").read_bytes()
        assert identify(np.asarray(decode(pair.input))) == (prompt, j)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("count", "train", "validation"), [(20, 18, 1), (999, 899, 50), (3, 2, 0)])
def test_splits_are_contiguous_and_as_the_authors_cut_them(count, train, validation, tmp_path):
    jobs = plan(count, 8, tmp_path)
    assert [job.start for job in jobs[1:]] == [job.stop for job in jobs[:-1]]
    assert (jobs[0].start, jobs[-1].stop) == (0, count)
    sizes = {s: 0 for s in ("train", "validation", "test")}
    for job in jobs:
        sizes[job.split] += job.stop - job.start
    assert list(sizes.values()) == [train, validation, count - train - validation]


def test_worker_processes_write_the_same_bytes(released, tmp_path):
    pack([released], tmp_path / "one", shard_size=5)
    pack([released], tmp_path / "two", shard_size=5, workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def break_it(folder):
    """One fault each in prompts 0 to 7; returns what the report must say."""

    def first(prompt, i=0):
        return folder / f"{prompt:07d}" / f"{1000 + 10 * prompt}_{i}.jpg"

    shutil.rmtree(folder / "0000000")
    first(1).unlink()
    first(2, 1).write_bytes(first(2, 1).read_bytes()[:300])
    first(3).write_bytes(b"<html>not found</html>")
    first(4).write_bytes(encode(picture(4, 0, (20, 32))))
    (folder / "0000005" / "prompt.json").write_text('{"input": "scene", "edit": " "}')
    (folder / "0000006" / "prompt.json").write_text("{")
    first(7).write_bytes(b"")
    reasons = {
        "missing folder": 4,
        "missing picture": 1,
        "broken picture": 3,
        "unequal sizes": 1,
        "no instruction": 4,
        "no prompt.json": 4,
    }
    named = {("0000001", "1010"), ("0000002", "1020"), ("0000003", "1030"), ("0000004", "1040")}
    return reasons, named


def test_bad_pairs_are_counted_named_and_skipped(damaged, tmp_path):
    reasons, named = break_it(damaged)
    summary = pack([damaged], tmp_path / "out", max_refused=0.3)
    assert summary.startswith("63 pairs of 17 prompts")
    assert "17 left out" in summary
    assert all(f"{reason} {count}" in summary for reason, count in reasons.items())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["pairs"], report["refused"], report["reasons"]) == (63, 17, reasons)
    listed = {(entry["prompt"], entry["seed"]) for entry in report["list"]}
    assert len(listed) == 17
    assert named <= listed
    assert not listed & {(pair.prompt, pair.seed) for pair in pairs_of(tmp_path / "out")}


def test_too_many_bad_pairs_is_an_error_that_can_be_mended(damaged, released, tmp_path, capsys):
    break_it(damaged)
    command = ["--input", str(damaged), "--output", str(tmp_path / "out"), "--workers", "1"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 17 of 80 pairs cannot be used (")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.incomplete" / "report.json").is_file()
    shutil.rmtree(damaged)
    shutil.copytree(released, damaged)
    assert main(command) == 0
    assert len(pairs_of(tmp_path / "out")) == 80


def test_unusual_pictures_and_texts_are_converted(damaged, tmp_path):
    folder = damaged / "0000000"
    rgba = np.dstack([picture(0, 1), np.full((32, 40), 255, np.uint8)])
    (folder / "1000_0.jpg").write_bytes(encode(rgba, "PNG"))
    (folder / "1000_1.jpg").write_bytes(encode(picture(0, 1)[..., 0].astype(np.uint16), "PNG"))
    (folder / "prompt.json").write_text(json.dumps({"caption": "a", "edit": "word " * 300}))
    pack([damaged], tmp_path / "out")
    pair = pairs_of(tmp_path / "out")[0]
    assert np.array_equal(np.asarray(decode(pair.input)), picture(0, 1))
    assert (pair.input_caption, pair.output_caption) == ("a", "")
    assert pair.instruction == "word " * 300


def test_a_stopped_run_goes_on_and_ends_the_same(released, tmp_path, monkeypatch):
    pack([released], tmp_path / "straight", shard_size=3)
    write, written = packing.write_shard, []

    def stop_after_three(source, job):
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(job)
        write(source, job)

    monkeypatch.setattr(packing, "write_shard", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        pack([released], tmp_path / "out", shard_size=3)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(packing, "write_shard", lambda s, j: (written.append(j), write(s, j)))
    pack([released], tmp_path / "out", shard_size=3)
    assert len({job.start for job in written}) == len(written) == 8
    assert content(tmp_path / "out") == content(tmp_path / "straight")


def test_the_same_command_again_changes_nothing(released, tmp_path):
    pack([released], tmp_path / "out")
    before = content(tmp_path / "out")
    assert pack([released], tmp_path / "out").endswith("is already there")
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        ({"inputs": "others"}, "inputs"),
        ({"columns": {"input": "a", "output": "b", "instruction": "c"}}, "columns None"),
        ({"shard_size": 7}, "shard_size 256, this command says 7"),
    ],
)
def test_another_input_is_refused(released, tmp_path, more, difference):
    """In one line that names the difference; nothing is changed. Control: the same one again."""
    write_released(tmp_path / "others", 20)
    out, inputs = tmp_path / "out", [tmp_path / more.pop("inputs", released)]
    pack([released], out)
    before = content(out)
    with pytest.raises(ValueError, match=f"^{out} was made with {difference}"):
        pack(inputs, out, **more)
    assert pack([released], out).endswith("is already there")
    assert content(out) == before


def test_pairs_that_were_added_later_are_no_silent_loss(released, damaged, tmp_path, capsys):
    """Nor are those that took the place of others. Control: the listing as it was."""
    command = ["--input", str(damaged), "--output", str(tmp_path / "out"), "--workers", "1"]
    listed = json.loads((released / "seeds.json").read_text())
    fewer, others = listed[:-1], [*listed[:-1], ["0000019", ["1", "2", "3", "4"]]]
    (damaged / "seeds.json").write_text(json.dumps(fewer))
    assert main(command) == 0
    before = content(tmp_path / "out")
    for now, words in ((listed, "pairs 76, this command says 80"), (others, "pairs 76")):
        (damaged / "seeds.json").write_text(json.dumps(now))
        assert main(command) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    (damaged / "seeds.json").write_text(json.dumps([*fewer[:-1], ["0000018", [*"1234"]]]))
    assert main(command) == 2
    assert "was made with seeds '" in capsys.readouterr().err
    (damaged / "seeds.json").write_text(json.dumps(fewer))
    assert main(command) == 0
    assert "is already there" in capsys.readouterr().out
    assert content(tmp_path / "out") == before


def test_what_was_packed_can_be_moved(released, tmp_path, capsys):
    """Training's loader reads it there, --verify finds it whole, and the same command knows it."""
    pack([released], tmp_path / "out")
    pairs, moved = pairs_of(tmp_path / "out"), tmp_path / "deep" / "moved"
    moved.parent.mkdir()
    (tmp_path / "out").rename(moved)
    assert pairs_of(moved) == pairs
    assert main(["--verify", "--output", str(moved)]) == 0
    assert pack([released], moved) == f"{moved} is already there"
    cfg = Data(path=str(moved), batch_size=6, resolution=16, resize_min=16, resize_max=20)
    loader = make_loader(cfg, Words())
    assert next(loader).input.shape == (6, 16, 16, 3)
    loader.close()


def test_a_folder_that_does_not_say_what_it_was_made_of_is_refused(released, tmp_path):
    pack([released], tmp_path / "out")
    (tmp_path / "out" / "settings.json").unlink()
    before = content(tmp_path / "out")
    with pytest.raises(ValueError, match=r"not a folder of packed pairs \(no settings.json\)"):
        pack([released], tmp_path / "out")
    assert content(tmp_path / "out") == before


def cell(data):
    return {"bytes": data, "path": None}


COLUMNS = {
    "five": ["original_image", "original_prompt", "edit_prompt", "edited_prompt", "edited_image"],
    "three": ["input_image", "edit_prompt", "edited_image"],
    "magicbrush": ["source_img", "instruction", "target_img", "mask_img"],
    "two images, no captions": ["original_image", "edit_prompt", "edited_image"],
    "mapped": ["a", "b", "c"],
}


def write_parquet(file, names, prompts, pairs=2, row_group_size=3):
    """Two rows a prompt, not neighbours, in small row groups."""
    rows = []
    for j in range(pairs):
        for i in range(prompts):
            before, after = encode(picture(i, j)), encode(255 - picture(i, j))
            row = {}
            for name in names:
                if name in ("original_image", "input_image", "source_img", "a"):
                    row[name] = cell(before)
                elif name in ("edited_image", "target_img", "b", "mask_img"):
                    row[name] = cell(after)
                else:
                    row[name] = f"{name} {i}"
            rows.append(row)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=row_group_size)


@pytest.mark.parametrize("name", COLUMNS)
def test_parquet_mirrors(name, tmp_path):
    write_parquet(tmp_path / "a.parquet", COLUMNS[name], 10)
    write_parquet(tmp_path / "b.parquet", COLUMNS[name], 12)
    columns = {"input": "a", "output": "b", "instruction": "c"} if name == "mapped" else None
    pack([tmp_path], tmp_path / "out", columns=columns, shard_size=4)
    pairs = pairs_of(tmp_path / "out")
    assert len(pairs) == 44
    for pair in pairs:
        prompt = identify(np.asarray(decode(pair.input)))[0]
        assert pair.instruction.endswith(f" {prompt}")
        after = np.asarray(decode(pair.output), int)
        assert np.abs(255 - after - np.asarray(decode(pair.input))).max() <= 4
    seeds = {(pair.prompt, pair.seed) for pair in pairs}
    assert len(seeds) == 44
    # With captions the four rows that say the same are one prompt; without, each stands alone.
    assert len({pair.prompt for pair in pairs}) == (12 if name == "five" else 44)
    if name == "five":
        assert pairs[0].input_caption == "original_prompt 0"
        assert [seed for prompt, seed in sorted(seeds)[:4]] == ["a:0", "a:10", "b:0", "b:12"]


def test_bad_parquet_rows_are_refused(tmp_path):
    names = COLUMNS["three"]
    good = [encode(picture(1, 1)), "invert it", encode(picture(1, 1))]
    rows = [good] * 8 + [[None, *good[1:]], [good[0], None, good[2]], [good[0], "x", b"no"]]
    table = pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])
    pq.write_table(table, tmp_path / "rows.parquet")
    summary = pack([tmp_path / "rows.parquet"], tmp_path / "out", max_refused=0.5)
    assert summary.startswith("8 pairs of 8 prompts")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["reasons"] == {"missing picture": 1, "no instruction": 1, "broken picture": 1}
    assert [entry["seed"] for entry in report["list"]] == ["rows:8", "rows:9", "rows:10"]


def not_a_folder(path):
    return ["--input", str(path / "nowhere")], "nowhere is not there"


def no_seeds(path):
    return ["--input", str(path)], "no seeds.json"


def broken_seeds(path):
    (path / "seeds.json").write_text('{"a": 1}')
    return ["--input", str(path)], "seeds.json: expected [[folder, [seed, ...]], ...]"


def sly_seeds(path):
    (path / "seeds.json").write_text('[["../../etc", ["1"]]]')
    return ["--input", str(path)], "'../../etc' is not a plain name"


def empty_seeds(path):
    (path / "seeds.json").write_text("[]")
    return ["--input", str(path)], "lists no pairs"


def broken_parquet(path):
    (path / "a.parquet").write_bytes(b"PAR1 nothing")
    return ["--input", str(path / "a.parquet")], "a.parquet: not a readable parquet file"


def unknown_columns(path):
    write_parquet(path / "a.parquet", ["a", "x"], 2)
    return ["--input", str(path / "a.parquet")], "found a, x; map them with --columns"


def wrong_columns(path):
    return ["--input", str(path), "--columns", "input=a"], "--columns input=a: expected input=NAME"


def remote_input(path):
    return ["--input", "gs://b/x"], "--input gs://b/x: expected a local folder, or local parquet"


def remote_output(path):
    return ["--input", str(path), "--output", "gs://b/x"], "--output gs://b/x: expected a local"


def remote_verify(path):
    return ["--verify", "--output", "gs://b/x"], "--output gs://b/x: expected a local folder"


def wrong_number(path):
    return ["--input", str(path), "--shard-size", "0"], "--shard-size must be at least 1"


@pytest.mark.parametrize(
    "case",
    [
        not_a_folder,
        no_seeds,
        broken_seeds,
        sly_seeds,
        empty_seeds,
        broken_parquet,
        unknown_columns,
        wrong_columns,
        wrong_number,
        remote_input,
        remote_output,
        remote_verify,
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    arguments, message = case(tmp_path / "in")
    assert main(["--output", str(tmp_path / "out"), "--workers", "1", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert message in error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_another_folder_is_not_overwritten(released, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="not an empty folder"):
        pack([released], tmp_path / "out")
    assert content(tmp_path / "out") == {"thesis.txt": b"precious"}


def test_nothing_is_announced_on_stdout_but_the_summary(released, tmp_path, capsys):
    main(["--input", str(released), "--output", str(tmp_path / "out"), "--workers", "1"])
    lines = io.StringIO(capsys.readouterr().out).read().splitlines()
    assert lines[-1].startswith("80 pairs of 20 prompts")
    assert not any("Downloading" in line for line in lines)
