# SPDX-License-Identifier: Apache-2.0
"""Texts become tokens of fixed length, with the padding of the tokenizer's own files."""

import numpy as np
import pytest
from transformers import CLIPTokenizer

from ip2p_jax.data.tokens import tokenize
from ip2p_jax.weights.hub import ASSETS

FOLDER = ASSETS / "clip_tokenizer"


def test_texts_are_cut_and_padded_to_77():
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER)
    tokens = tokenize(tokenizer, ["make it blue", "", "word " * 300])
    assert tokens.shape == (3, 77)
    assert tokens.dtype == np.int32
    start, end = 49406, 49407
    assert tokens[0, :5].tolist() == [start, 1078, 585, 1746, end]
    assert (tokens[:, 0] == start).all()
    assert tokens[1, 1:].tolist() == [end] * 76  # SD 1.x pads with the end token
    assert tokens[2, 76] == end
    assert (tokens[2, 1:76] == tokens[2, 1]).all()


def test_the_pad_token_is_the_tokenizers_own():
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER, pad_token="!", model_max_length=16)
    tokens = tokenize(tokenizer, ["make it blue"])
    assert tokens.shape == (1, 16)
    assert (tokens[0, 5:] == 0).all()  # SD 2.x pads with id 0


def test_a_shorter_text_tower():
    tokens = tokenize(CLIPTokenizer.from_pretrained(FOLDER), ["word " * 300], 20)
    assert tokens.shape == (1, 20)
    assert tokens[0, 19] == 49407


def test_no_texts_are_one_line():
    with pytest.raises(ValueError, match="^no texts to tokenize"):
        tokenize(CLIPTokenizer.from_pretrained(FOLDER), [])
