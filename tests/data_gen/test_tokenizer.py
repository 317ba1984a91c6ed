# SPDX-License-Identifier: Apache-2.0
"""The small vocabulary: at most 1,024 entries in CLIPTokenizer's files, for any text."""

import pytest
from transformers import CLIPTokenizer

from data_gen import tokenizer
from data_gen.edits import EDITS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "small"
    assert tokenizer.main(["--output", str(path)]) == 0
    return path


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.json",)])
def test_reopens_from_either_generation_of_files(folder, tmp_path, files):
    for name in (*files, "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    reopened, whole = (CLIPTokenizer.from_pretrained(p) for p in (tmp_path, folder))
    assert len(reopened) <= 1024
    for text in ("make it black and white", "Ünïcödé, 写真!", ""):
        assert reopened(text).input_ids == whole(text).input_ids


def test_held_out_wordings_need_no_new_words(folder):
    """Every word of every instruction is one token, of the held-out ones too."""
    opened = CLIPTokenizer.from_pretrained(folder)
    for edit in EDITS.values():
        for text in (*edit.wordings, *edit.held_out):
            assert len(opened.tokenize(text)) == len(text.replace(",", " ,").split()), text


def test_any_text_has_tokens_and_comes_back(folder):
    opened = CLIPTokenizer.from_pretrained(folder)
    for text in ("zebra in the snow", "写真", "naïve"):
        ids = opened(text).input_ids
        assert opened.decode(ids, skip_special_tokens=True).strip() == text


def test_same_files_each_time(folder, tmp_path):
    again = tmp_path / "again"
    tokenizer.main(["--output", str(again)])
    assert (again / "merges.txt").read_bytes() == (folder / "merges.txt").read_bytes()
    assert (again / "vocab.json").read_bytes() == (folder / "vocab.json").read_bytes()


def test_learns_from_the_texts_of_a_data_folder(packed, tmp_path):
    """Captions too: no word of them is cut, which those of the photographs' edits do not know."""
    path = tmp_path / "learned"
    assert tokenizer.main(["--data", str(packed), "--output", str(path)]) == 0
    opened = CLIPTokenizer.from_pretrained(path)
    for text in tokenizer.texts(packed):
        words = opened.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert len(opened.tokenize(text)) == len(words), text
