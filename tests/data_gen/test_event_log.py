# SPDX-License-Identifier: Apache-2.0
"""Claims: what was appended is there, whatever was said; a half last line is cut off or ended; one
process at a time; a disk that is full leaves whole lines.
"""

import json
import os
import resource
import signal

import pytest

from data_gen.event_log import BLOCK, EventLog
from ip2p_jax.storage import StorageError

EVENTS = [
    {"caption": "雪中的猫", "answer": 'a "quoted"\nline', "attempt": 1},
    {"caption": "half of a pair: \ud83d", "answer": "", "attempt": 2},
    {"batch": "1", "captions": ["0" * 16] * 10_000},  # longer than what is read at once
]


@pytest.fixture
def path(tmp_path):
    answers = EventLog(tmp_path / "answers.jsonl")
    for event in EVENTS:
        answers.append(event)
    answers.close()
    return answers.path


def read(path) -> list:
    answers = EventLog(path)
    try:
        return [event for _, event in answers.events()]
    finally:
        answers.close()


def test_everything_comes_back_from_where_it_begins(path):
    assert read(path) == EVENTS and path.stat().st_size > 2 * BLOCK
    answers, content = EventLog(path), path.read_bytes()
    begins = [begin for begin, _ in answers.events()]
    assert [json.loads(content[begin:].split(b"\n")[0]) for begin in begins] == EVENTS
    assert answers.append({"x": 1}) == len(content)
    answers.close()


@pytest.mark.parametrize("cut", [2, 100, BLOCK, 2 * BLOCK + 7])
def test_a_half_last_line_is_cut_off(path, cut):
    os.truncate(path, path.stat().st_size - cut)
    assert read(path) == EVENTS[:2]
    assert path.read_bytes().endswith(b"}\n")


def test_a_line_without_its_end_gets_it(path):
    os.truncate(path, path.stat().st_size - 1)
    assert read(path) == EVENTS
    assert path.read_bytes().endswith(b"}\n")


def test_what_was_not_on_the_disk_is_cut_off(path):
    """After a loss of power the end of a file may be zeros."""
    with path.open("ab") as file:
        file.write(bytes(5000))
    assert read(path) == EVENTS


def test_a_file_of_half_a_line(tmp_path):
    (tmp_path / "answers.jsonl").write_bytes(b'{"cap')
    assert read(tmp_path / "answers.jsonl") == []


def test_one_process_at_a_time(path):
    first = EventLog(path)
    with pytest.raises(ValueError, match="another process is writing it"):
        EventLog(path)
    first.close()
    EventLog(path).close()


def test_a_damaged_line_is_named(path):
    path.write_bytes(b"[]\n" + path.read_bytes())
    with pytest.raises(ValueError, match="answers.jsonl, line 1: damaged"):
        read(path)


def test_a_full_disk_leaves_whole_lines(tmp_path):
    """A limit on the size of files: the write that passes it is cut short, the next one fails."""
    old, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    answers = EventLog(tmp_path / "answers.jsonl")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1050, old[1]))
        with pytest.raises(StorageError, match="answers.jsonl: "):
            while True:
                answers.append({"x": "y" * 90})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert answers.path.stat().st_size == answers.size == 10 * 100
    answers.append({"x": "z"})
    answers.close()
    assert read(tmp_path / "answers.jsonl")[-1] == {"x": "z"}
