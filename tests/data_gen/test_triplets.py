# SPDX-License-Identifier: Apache-2.0
"""Claims: one command ends with exactly the triplets that the server's good answers imply, whatever
fails on the way, with none asked for twice; started again it asks for what is missing only; the key
gets into no file; wrong input is one line.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from data_gen import triplets
from data_gen.event_log import EventLog
from data_gen.prompt import SCHEMA, SYSTEM
from data_gen.server import Refused, Server
from data_gen.triplet_file import read_triplets
from tests.data_gen.triplet_cases import (
    ANSWERS,
    TRANSPORT,
    captions,
    check,
    lines,
    options,
    write_captions,
)
from tests.kills import KILLS, write_row
from tests.openai_server import FLAGGED, KEY, serve

TEXTS = captions(200)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with every fault: its folder, and its server, whose faults are over."""
    folder = tmp_path_factory.mktemp("run")
    file = write_captions(folder / "captions.jsonl", TEXTS)
    with serve(folder, seed=1, timeout=0.005, **TRANSPORT, **ANSWERS) as server:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENAI_API_KEY", KEY)
            assert triplets.main(options(file, folder / "run", server)) == 0
        server.change(**dict.fromkeys([*TRANSPORT, *ANSWERS, "timeout"], 0.0))
        yield folder / "run", server, file


def command(arguments: list[str]) -> subprocess.Popen:
    line = [sys.executable, "-m", "data_gen.triplets", *arguments]
    env = os.environ | {"OPENAI_API_KEY": KEY}
    return subprocess.Popen(line, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)


def test_every_fault_at_once(run):
    folder, server, _ = run
    check(folder, server, TEXTS)
    faults = server.stats()["faults"]
    assert set(faults) == {*TRANSPORT, "timeout"}, "all have happened"
    read = read_triplets(folder / "triplets.jsonl")
    assert 170 < len(read) < 196 and any(triplet.url for triplet in read)


def test_a_second_run_asks_nothing_and_writes_the_same(run):
    folder, server, file = run
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    asked = server.stats()["requests"]
    assert triplets.main(options(file, folder, server)) == 0
    assert server.stats()["requests"] == asked
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def copied(run: Path, output: Path) -> Path:
    """The files of a run that say all there is to say."""
    output.mkdir()
    for name in ("answers.jsonl", "settings.json"):
        (output / name).write_bytes((run / name).read_bytes())
    return output


def test_more_captions_are_asked_alone_and_another_server_is_the_same(run, tmp_path):
    folder, _, file = run
    more, output = tmp_path / "more.jsonl", copied(folder, tmp_path / "run")
    new = [{"caption": "a new caption"}, {"caption": TEXTS[0]}]
    more.write_text("".join(json.dumps(line) + "\n" for line in new))
    with serve(tmp_path) as server:
        arguments = [*options(file, output, server), "--captions", str(file), str(more)]
        assert triplets.main(arguments) == 0
        assert set(server.paid()) == {"a new caption"}
    before, after = ((x / "triplets.jsonl").read_text() for x in (folder, output))
    assert after.startswith(before) and "a new caption" in after.removeprefix(before)
    assert "| repeated | 1 |" in (output / "report.md").read_text()


def test_captions_may_not_be_taken_away(run, tmp_path, capsys):
    folder, server, _ = run
    fewer = write_captions(tmp_path / "fewer.jsonl", TEXTS[:100])
    assert triplets.main(options(fewer, folder, server)) == 2
    assert "captions may be added at the end, not taken away" in capsys.readouterr().err


def test_limits_may_change(run, capsys):
    """Answers are judged again, not asked for; under the old limits they are what they were."""
    folder, server, file = run
    assert (
        triplets.main(options(file, folder, server) + ["--report", "--output-length", "2", "40"])
        == 1
    )
    assert "captions are not settled" in capsys.readouterr().err
    read = read_triplets(folder / "triplets.jsonl")
    assert 10 < len(read) < 170 and max(len(triplet.output) for triplet in read) <= 40
    asked = server.stats()["requests"]
    assert triplets.main(options(file, folder, server)) == 0
    assert server.stats()["requests"] == asked
    check(folder, server, TEXTS)


def test_other_settings_are_refused_by_name(run, capsys):
    folder, server, file = run
    for more, name in {
        ("--model", "other"): "model 'tiny-chat', this command says 'other'",
        ("--few-shot", "2"): "few_shot 'none', this command says '2 of ",
        ("--moderation", "off"): "moderation 'omni-moderation-latest', this command says 'off'",
        ("--request", '{"temperature": 1}'): "request ",
    }.items():
        if more[0] == "--few-shot":
            more += ("--examples", str(folder / "triplets.jsonl"))
        assert triplets.main([*options(file, folder, server), *more]) == 2
        assert name in capsys.readouterr().err


def test_the_report_counts_what_the_server_did(run):
    folder, server, _ = run
    text = (folder / "report.md").read_text()
    answered = [said for answers in server.paid().values() for said in answers]
    for kind, words in {
        "good": "accepted",
        "malformed": "not JSON",
        "schema": "JSON of another form",
        "cut": "cut off at the limit of tokens",
        "same": "the caption did not change",
        "unsafe": "flagged by moderation",
        "refusal": "refused by the model",
    }.items():
        count = sum(said.kind == kind for said in answered)
        assert count and f"| {words} | {count} |" in text
        assert kind == "good" or f"{words[0].upper()}{words[1:]} ({count}):" in text
    assert "| caption flagged by moderation, not asked | 4 |" in text
    assert f"Of {len(answered)} answers" in text and "| turn |" in text and "| balloon |" in text
    for name in ("answers.png", "instructions.png", "lengths.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and f"]({name})" in text


def test_the_key_is_in_no_file(run):
    folder, _, _ = run
    for path in folder.iterdir():
        assert KEY.encode() not in path.read_bytes(), path


def test_requests_are_what_is_documented(run, tmp_path):
    """Few-shot: the examples are turns of the conversation, others for another caption."""
    _, server, _ = run
    examples = tmp_path / "examples.jsonl"
    rows = [{"input": f"a{i}", "edit": f"b{i}", "output": f"c{i}"} for i in range(20)]
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = options(tmp_path, tmp_path, server) + [
        "--few-shot",
        "3",
        "--examples",
        str(examples),
    ]
    arguments += ["--request", '{"max_tokens": null, "max_completion_tokens": 99, "seed": 3}']
    question = triplets.question_of(triplets.parser().parse_args(arguments))
    body, other = question.body("a cat", 1), question.body("a cat", 2)
    assert question.body("a cat", 1) == body != other
    assert body["model"] == "tiny-chat" and body["temperature"] == 0.7
    assert body["frequency_penalty"] == 0.1 and body["top_p"] == 1
    assert body["max_completion_tokens"] == 99 and body["seed"] == 3 and "max_tokens" not in body
    assert body["response_format"]["json_schema"]["schema"] == SCHEMA
    first, *turns, last = body["messages"]
    assert first == {"role": "system", "content": SYSTEM}
    assert last == {"role": "user", "content": "a cat"}
    shown = {row["input"]: row for row in rows}
    for asked, said in zip(turns[::2], turns[1::2], strict=True):
        row = shown.pop(asked["content"])
        assert json.loads(said["content"]) == {"edit": row["edit"], "output": row["output"]}
    assert len(shown) == 17


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--base-url", "http://me:secret@x/v1"], "--base-url: expected http(s)://host/path"),
        (["--base-url", "http://x:abc/v1"], "--base-url: expected http(s)://host/path"),
        (["--moderation-url", "localhost:8000"], "--moderation-url: expected http(s)://host"),
        (["--concurrency", "0"], "--concurrency 0: expected 1 to 1000"),
        (["--near-duplicates", "0"], "--near-duplicates 0.0: expected above 0, to 1"),
        (["--edit-length", "9", "3"], "--edit-length [9, 3]: expected 1 <= MIN <= MAX"),
        (["--request", "[1]"], "--request [1]: expected a JSON object"),
        (
            ["--request", '{"model": "x"}'],
            "--request: model and messages have options of their own",
        ),
        (["--captions", "nowhere.jsonl"], "nowhere.jsonl: no such file, expected captions"),
        (["--output", "gs://bucket/x"], "--output gs://bucket/x: expected a local folder"),
    ],
)
def test_wrong_options_are_one_line(run, more, error, capsys, tmp_path):
    _, server, file = run
    assert triplets.main([*options(file, tmp_path / "run", server), *more]) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")
    assert not (tmp_path / "run").exists()


def test_a_command_that_was_answered_nothing_may_be_given_anew(run, capsys, tmp_path):
    """With other settings: nothing was made by the first ones. With answers it may not."""
    _, server, file = run
    output = tmp_path / "run"
    file = write_captions(tmp_path / "captions.jsonl", TEXTS[48:52])
    broken = '{"response_format": {"type": "json_schema", "json_schema": {}}}'
    few = [*options(file, output, server), "--model", "typo"]
    assert triplets.main([*few, "--request", broken]) != 0
    assert not any("answer" in line for line in lines(output))
    assert triplets.main(options(file, output, server)) == 0
    assert len(read_triplets(output / "triplets.jsonl")) == 3
    before = (output / "answers.jsonl").read_bytes()
    assert triplets.main(few) == 2
    assert "was made with model 'tiny-chat', this command says 'typo'" in capsys.readouterr().err
    assert (output / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("events", "empty"),
    [
        ([], True),
        ([{"run": "1"}, {"caption": "a cat", "attempt": 0, "flagged": ["x"]}], True),
        ([{"batch": "1", "captions": []}, {"batch": "1", "ended": "failed"}], True),
        ([{"batch": "1", "captions": []}, {"batch": "1", "id": "batch"}], False),
        ([{"caption": "a cat", "attempt": 1, "refused": "400"}], False),
        ([{"caption": "a cat", "attempt": 1, "answer": "", "finish": "stop"}], False),
    ],
)
def test_what_may_be_begun_anew(tmp_path, events, empty):
    """What a server has answered, or still may, is never removed."""
    settings = tmp_path / "settings.json"
    settings.write_text('{"model": "typo"}')
    assert not triplets.forgotten(tmp_path), "a folder of another kind"
    with closing(EventLog(tmp_path / "answers.jsonl")) as answers:
        for event in events:
            answers.append(event)
    assert triplets.forgotten(tmp_path) == empty != settings.exists()


def test_tokens_that_are_not_counted_are_none(run, tmp_path):
    """As files have them in which null was kept."""
    folder, server, file = run
    output = copied(folder, tmp_path / "run")
    text = (output / "answers.jsonl").read_text()
    (output / "answers.jsonl").write_text(
        text.replace('"tokens": [50, 20]', '"tokens": [null, 20]')
    )
    assert triplets.main([*options(file, output, server), "--report"]) == 0
    assert "which read 0 tokens and wrote" in (output / "report.md").read_text()


def test_near_duplicates_are_left_out(tmp_path):
    """Of long captions that differ in a word, those that get the same edit make one triplet, the
    first; the report counts the others and shows some."""
    months = ("January", "February", "March", "April", "May", "June", "July", "August")
    house = "an old red house with a blue door and two white windows by the quiet sea in "
    file, output = tmp_path / "captions.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps({"caption": house + month}) + "\n" for month in months))
    with serve(tmp_path) as server:
        arguments = options(file, output, server)
        assert triplets.main(arguments) == 0
        whole = read_triplets(output / "triplets.jsonl")
        assert triplets.main([*arguments, "--near-duplicates", "0.8"]) == 0
    firsts = {triplet.edit: triplet for triplet in reversed(whole)}
    kept = [triplet for triplet in whole if firsts[triplet.edit] == triplet]
    assert len(whole) == 8 and 1 < len(kept) < 8
    assert read_triplets(output / "triplets.jsonl") == kept
    report, near = (output / "report.md").read_text(), 8 - len(kept)
    assert f"{len(kept)} triplets of 8 captions" in report
    assert f"Of these {near} ({near / 8:.2%}) are left out because they are nearly" in report
    assert f"Accepted, but nearly the same as an earlier triplet ({near}):\n\n- {house}" in report


def test_a_wrong_key_is_one_line_without_it(run, capsys, tmp_path, monkeypatch):
    _, server, file = run
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    assert triplets.main(options(file, tmp_path / "run", server)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "401" in error and "sk-wrong" not in error


def test_a_server_that_is_not_there_is_exit_code_1(run, capsys, tmp_path, monkeypatch):
    _, server, _ = run
    monkeypatch.setattr("data_gen.asking.TRIES", 2)
    file = write_captions(tmp_path / "captions.jsonl", TEXTS[:3])
    arguments = [*options(file, tmp_path / "run", server), "--base-url", "http://127.0.0.1:9/v1"]
    assert triplets.main(arguments) == 1
    assert "http://127.0.0.1:9/v1 does not answer" in capsys.readouterr().err


def test_a_request_that_is_always_refused_is_the_commands_fault(run, capsys, tmp_path):
    _, server, file = run
    broken = json.dumps(
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"required": []}}}}
    )
    assert triplets.main([*options(file, tmp_path / "run", server), "--request", broken]) == 2
    assert "refuses every request: 400" in capsys.readouterr().err
    assert not any("refused" in line for line in lines(tmp_path / "run"))


def test_another_server_that_refuses_everything_costs_no_captions(
    run, capsys, tmp_path, monkeypatch
):
    """The answers that a run has are not those of the server that it goes on with."""
    folder, server, file = run
    more, output = tmp_path / "more.jsonl", copied(folder, tmp_path / "run")
    write_captions(more, [f"a new caption {number}" for number in range(20)])

    async def refuses(*_):
        raise Refused("400, no such field")

    arguments = [*options(file, output, server), "--captions", str(file), str(more)]
    with monkeypatch.context() as patch:
        patch.setattr(Server, "chat", refuses)
        assert triplets.main(arguments) == 2
    assert "refuses every request: 400, no such field" in capsys.readouterr().err
    assert (output / "answers.jsonl").read_bytes() == (folder / "answers.jsonl").read_bytes()
    assert triplets.main(arguments) == 0
    triplets_of = [(x / "triplets.jsonl").read_text() for x in (folder, output)]
    assert triplets_of[1].removeprefix(triplets_of[0]).count("a new caption") > 20


def test_a_half_line_is_repaired_and_a_damaged_one_named(run, tmp_path, capsys):
    folder, server, file = run
    output = copied(folder, tmp_path / "run")
    whole = (output / "answers.jsonl").read_bytes()
    (output / "answers.jsonl").write_bytes(whole[:-40])
    assert triplets.main(options(file, output, server)) == 0
    assert (output / "triplets.jsonl").read_text() == (folder / "triplets.jsonl").read_text()
    damaged = whole.splitlines(keepends=True)
    damaged[5] = b"\0" * len(damaged[5]) + b"\n"
    (output / "answers.jsonl").write_bytes(b"".join(damaged))
    assert triplets.main(options(file, output, server)) == 2
    assert "answers.jsonl, line 6: damaged" in capsys.readouterr().err


def test_two_commands_in_one_folder(run, capsys):
    folder, server, file = run
    answers = EventLog(folder / "answers.jsonl")
    assert triplets.main(options(file, folder, server)) == 2
    assert "another process is writing it" in capsys.readouterr().err
    answers.close()


def goes_on(process: subprocess.Popen, errors: bytes) -> bool:
    """Whether a command gave up on a server whose faults, drawn at random, came in a row; it says
    so, and is started again as a user would."""
    return process.returncode == 1 and b"the same command goes on from there" in errors


def killed_again_and_again(arguments: list[str], output: Path, patience: float) -> tuple[int, int]:
    """Starts and kills a command at random moments after it has written more; then lets it end.

    Returns how often it was started and how often it was killed.
    """
    moment, started, kills, file = random.Random(KILLS), 0, 0, output / "answers.jsonl"
    while kills < KILLS:
        size = file.stat().st_size if file.exists() else 0
        process = command(arguments)
        while process.poll() is None and (not file.exists() or file.stat().st_size <= size):
            time.sleep(0.002)
        time.sleep(moment.uniform(0, patience))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate()
        started += 1
        assert process.returncode in (0, -signal.SIGKILL) or goes_on(process, errors), errors
        kills += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break  # all is done: kill no more
    for _ in range(50):
        process = command(arguments)
        _, errors = process.communicate()
        if process.returncode == 0:
            return started, kills
        assert goes_on(process, errors), errors.decode()
    raise AssertionError("the command gives up again and again")


@pytest.mark.slow
def test_ten_thousand_captions(tmp_path):
    """Every fault but those that moderation finds, which would double the requests."""
    texts = [text.removesuffix(f", {FLAGGED}") for text in captions(10_000)]
    file, output = write_captions(tmp_path / "captions.jsonl", texts), tmp_path / "run"
    wrong = {**ANSWERS, "unsafe": 0.0}
    with serve(tmp_path, seed=2, timeout=0.002, **TRANSPORT, **wrong) as server:
        process = command([*options(file, output, server), "--moderation", "off"])
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
        check(output, server, texts)
        assert set(server.stats()["faults"]) == {*TRANSPORT, "timeout"}


@pytest.mark.slow
def test_killed_and_started_again(tmp_path):
    """SIGKILL at random moments, and faults besides: nothing is lost, asked or paid twice."""
    texts = captions(400 * (KILLS + 1))
    file = write_captions(tmp_path / "captions.jsonl", texts)
    with serve(tmp_path, seed=3, latency=0.1, **TRANSPORT, **ANSWERS) as server:
        arguments = [*options(file, tmp_path / "run", server), "--concurrency", "48"]
        started, kills = killed_again_and_again(arguments, tmp_path / "run", 1.5)
        check(tmp_path / "run", server, texts)
        assert kills == KILLS
        repeated = len(server.log()) - len({said.id for said in server.log()})
        assert repeated, "answers that were on their way are given again, not made again"
    write_row("triplets of texts", started, kills, 0)
