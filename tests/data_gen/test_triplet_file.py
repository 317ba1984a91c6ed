# SPDX-License-Identifier: Apache-2.0
"""Claims: both spellings of triplets and the format of completion models are read and written; a
wrong line is named with what was expected."""

import json

import pytest

from data_gen.triplet_file import Triplet, read_triplet, read_triplets, scan, to_line, to_old_line

GOOD = '{"input": "a cat", "edit": "make it a dog", "output": "a dog"}\n'


def test_both_spellings_are_read(tmp_path):
    file = tmp_path / "triplets.jsonl"
    generated = '{"caption": "a cat", "edit": "swap", "output": "a dog", "url": "http://x/1.jpg"}\n'
    file.write_text("\ufeff" + GOOD + "\n" + generated, "utf-8")
    first, second = read_triplets(file)
    assert first == Triplet("a cat", "make it a dog", "a dog")
    assert first.prompt() == {"input": "a cat", "edit": "make it a dog", "output": "a dog"}
    assert second.prompt()["url"] == "http://x/1.jpg"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"input": "a", "output": "b"}', 'line 2: no "edit"; expected input, edit and output'),
        ('{"edit": "a", "output": "b"}', 'line 2: no "input" (or "caption")'),
        ('{"input": " ", "edit": "a", "output": "b"}', "line 2: \"input\" is ' ', expected a text"),
        ('{"input": "a", "edit": 3, "output": "b"}', 'line 2: "edit" is 3, expected a text'),
        ('{"input": "a", "edit": ', "line 2: not JSON"),
        ('["a", "b", "c"]', "line 2: expected a JSON object"),
        ("[" * 100_000, "line 2: not JSON (nested too deeply)"),
        (
            '{"input": "a", "edit": "b \\ud83d", "output": "c"}',
            "line 2: \"edit\" is 'b \\ud83d', wh",
        ),
        (
            '{"prompt": "a", "completion": "b\\n%%\\nc\\nEND"}',
            "line 2: \"prompt\" is 'a', expected it",
        ),
        ('{"prompt": "a\\n##\\n", "completion": "b\\n%%\\nc"}', 'line 2: "completion" is '),
        ('{"prompt": "a\\n##\\n", "completion": "b c\\nEND"}', 'line 2: "completion" is '),
        ('{"prompt": "\\n##\\n", "completion": "b\\n%%\\nc\\nEND"}', "line 2: \"input\" is ''"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, line, expected):
    file = tmp_path / "triplets.jsonl"
    file.write_text(GOOD + line + "\n")
    with pytest.raises(ValueError) as raised:
        read_triplets(file)
    assert str(raised.value).startswith(f"{file}, {expected}")


def test_no_file_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_triplets(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no triplet"):
        read_triplets(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text in UTF-8"):
        read_triplets(tmp_path / "binary.jsonl")


OLD = (
    r'{"prompt": "a caf\u00e9 at dawn\n##\n", "completion": "make it Paris\n%%\na caf\u00e9 in'
    r' Paris at dawn\nEND"}'
)
"""As the released `prepare_for_gpt` writes CAFE's line."""

CAFE = Triplet("a café at dawn", "make it Paris", "a café in Paris at dawn")


def test_files_written_for_the_released_scripts_are_read():
    assert read_triplet(OLD) == CAFE
    spaced = OLD.replace("make it", " make it")  # as OpenAI's own tool prepared completions
    assert read_triplet(spaced) == CAFE


def test_the_released_scripts_read_what_we_write():
    """They fine-tuned on the two fields, split an answer at the middle, and read input, edit and
    output of hand-written lines, caption and url of generated ones."""
    values = json.loads(to_old_line(CAFE))
    assert values == json.loads(OLD)
    answer = values["completion"].removesuffix("\nEND")  # the server stops there
    assert answer.split("\n%%\n") == [CAFE.edit, CAFE.output]
    prompt = json.loads(to_line(CAFE))
    assert [prompt["input"], prompt["edit"], prompt["output"]] == list(CAFE[:3])
    generated = CAFE._replace(url="http://x/1.jpg")
    assert json.loads(to_line(generated)) == {
        "caption": CAFE.input,
        "edit": CAFE.edit,
        "output": CAFE.output,
        "url": "http://x/1.jpg",
    }


def test_round_trips(tmp_path):
    """Whatever the texts hold: quotes, line separators, any script."""
    texts = ['"', "a\u2028b", "\\n%%", "猫", "😀", "tab\there", "a\x1cb", "two\nlines", "x "]
    made = [Triplet(x, y, x + y) for x in texts for y in texts]
    for write in (to_line, to_old_line):
        file = tmp_path / "triplets.jsonl"
        file.write_text("".join(map(write, made)), "utf-8")
        assert read_triplets(file) == made
        assert [number for number, _ in scan(file)] == list(range(1, len(made) + 1))
    with_urls = [triplet._replace(url="http://x") for triplet in made]
    assert [read_triplet(to_line(triplet)) for triplet in with_urls] == with_urls
