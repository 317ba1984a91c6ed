# SPDX-License-Identifier: Apache-2.0
"""Claims: every kind of file gives the same rows; broken rows are passed over, not guessed; what
cannot be read, or has no such column, is named."""

import bz2
import gzip
import json
import shutil

import huggingface_hub.constants
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_gen.caption_files import Columns, find_files, rows

ROWS = [
    ("a cat", "http://x/1"),
    ('the "old" cat, asleep', "http://x/2"),
    ("猫 a\u2028b \x1c", "http://x/3"),
]
COMMIT = 40 * "b"


def write(folder, name, columns=("TEXT", "URL")):
    """ROWS as a file of the kind that its name says; with one more column in front."""
    first, second = columns
    ending = name.split(".")[1]
    if ending == "parquet":
        captions, urls = zip(*ROWS, strict=True)
        table = pa.table({"WIDTH": [1, 2, 3], first: captions, second: urls})
        pq.write_table(table, folder / name, row_group_size=2)
    else:
        lines = {
            "jsonl": [json.dumps({"WIDTH": 1, first: x, second: y}) for x, y in ROWS],
            "tsv": [f"WIDTH\t{first}\t{second}", *(f"1\t{x}\t{y}" for x, y in ROWS)],
            "csv": [f"WIDTH,{first},{second}"]
            + ['1,"{}",{}'.format(x.replace('"', '""'), y) for x, y in ROWS],
            "txt": [x for x, _ in ROWS],
        }[ending]
        data = "\ufeff".encode() + "\r\n".join(lines).encode()
        pack = {"gz": gzip.compress, "bz2": bz2.compress}.get(name.split(".")[-1], bytes)
        (folder / name).write_bytes(pack(data))
    return folder / name


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.jsonl", "a.csv", "a.tsv", "a.jsonl.gz", "a.csv.bz2"]
)
def test_kinds(tmp_path, name):
    assert list(rows(write(tmp_path, name), Columns())) == ROWS
    mine = write(tmp_path, f"m{name}", ("what it shows", "where"))
    assert list(rows(mine, Columns("what it shows", "where"))) == ROWS
    assert list(rows(mine, Columns("what it shows"))) == [(x, None) for x, _ in ROWS]
    with pytest.raises(ValueError, match="no column that is known.*WIDTH.*what it shows"):
        list(rows(mine, Columns()))
    with pytest.raises(ValueError, match=f"^{mine}: no column text; choose by --column"):
        list(rows(mine, Columns("text")))


def test_a_text_holds_a_caption_a_line(tmp_path):
    got = list(rows(write(tmp_path, "a.txt"), Columns()))
    assert got == [(x + end, None) for (x, _), end in zip(ROWS, ("\r\n", "\r\n", ""), strict=True)]


def test_without_a_header(tmp_path):
    """As Conceptual Captions come."""
    file = tmp_path / "a.tsv"
    file.write_text("".join(f"{x}\t{y}\n" for x, y in ROWS), "utf-8")
    assert list(rows(file, Columns("1", "2", header=False))) == ROWS


def test_broken_rows(tmp_path):
    """Cells too many or few, quotation marks that never close, lines that are no objects."""
    table = tmp_path / "a.csv"
    table.write_text('TEXT,URL\na cat,u\na, cat,u\none\n\na dog,v\n"open,' + "x\n" * 10, "utf-8")
    assert list(rows(table, Columns())) == [("a cat", "u"), None, None, ("a dog", "v"), None]
    objects = tmp_path / "a.jsonl"
    objects.write_bytes(b'{"text": "a \xff"}\n{"text": \n[1]\n\n{"url": "u"}\n' + b"[" * 99_999)
    assert list(rows(objects, Columns())) == [("a \ufffd", None), None, None, (None, "u"), None]
    endless = tmp_path / "b.csv"
    endless.write_text('TEXT\na cat\n"' + "x\n" * (1 << 19) + "y\na dog\n")
    assert list(rows(endless, Columns()))[0::2] == [("a cat", None), ("a dog", None)]


def test_each_line_of_json_is_read_for_itself(tmp_path):
    """A line may leave out its url, and the first may be broken, or hold the url alone."""
    file = tmp_path / "a.jsonl"
    file.write_text(
        '{"caption"\n{"url": "t"}\n{"caption": "a cat"}\n{"caption": "a dog", "url": "u"}\n'
    )
    got = [None, (None, "t"), ("a cat", None), ("a dog", "u")]
    assert list(rows(file, Columns())) == got == list(rows(file, Columns("caption", "url")))
    with pytest.raises(ValueError, match=r"no column where; .* of \['url', 'caption'\]"):
        list(rows(file, Columns(url="where")))


def test_unreadable(tmp_path):
    for name, words in [
        ("a.parquet", "not readable"),
        ("a.jsonl.gz", "not readable"),
        ("b.jsonl", "expected JSON lines"),
        ("c.csv", "no column"),
    ]:
        (tmp_path / name).write_bytes(b"" if name[0] != "a" else b"something else")
        with pytest.raises(ValueError, match=f"{name}: {words}"):
            list(rows(tmp_path / name, Columns()))


def test_find_files(tmp_path):
    """Folders give the files that are asked for, in order; names that are none are refused."""
    for name in ("b/2.parquet", "b/1.parquet", "a/3.parquet", "a/4.csv", "a/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [str(file.relative_to(tmp_path)) for file in find_files([str(tmp_path)], "*.p*", None)]
    assert names == ["a/3.parquet", "b/1.parquet", "b/2.parquet"]
    one = str(tmp_path / "a/4.csv")
    assert list(map(str, find_files([one, one], "*.parquet", None))) == [one, one]
    for inputs, pattern, words in [
        ([f"{tmp_path}/a"], "*.jsonl", r"holds no file called \*.jsonl; name others by --files"),
        ([f"{tmp_path}/a/notes.md"], "*", "expected a name that ends in .parquet"),
    ]:
        with pytest.raises(ValueError, match=words):
            find_files(inputs, pattern, None)
    with pytest.raises(FileNotFoundError, match="no such file or folder, and not a hub data set"):
        find_files(["nowhere/a.csv"], "*", None)


def test_a_hub_data_set_opens_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    root = tmp_path / "datasets--owner--captions"
    data = root / "snapshots" / COMMIT / "data"
    data.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    shutil.move(write(tmp_path, "train.parquet"), data / "train.parquet")
    (file,) = find_files(["owner/captions"], "*.parquet", None)
    assert list(rows(file, Columns())) == ROWS
    with pytest.raises(FileNotFoundError, match="^owner/other: .*the hub cannot be reached"):
        find_files(["owner/other"], "*.parquet", None)
