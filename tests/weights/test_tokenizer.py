# SPDX-License-Identifier: Apache-2.0
"""Claim: the vocabulary in the package tokenizes as the reference implementation of CLIP does.

The golden ids were computed by open_clip's SimpleTokenizer (a copy of OpenAI's).
"""

import json
from dataclasses import replace

import pytest

from ip2p_jax.models.presets import SD15, SD21
from ip2p_jax.weights.hub import ASSETS
from ip2p_jax.weights.load import ldm_tokenizer, open_tokenizer

START, END = 49406, 49407
GOLDEN = {
    "": [],
    "make it black and white": [1078, 585, 1449, 537, 1579],
    'Turn the  sky into Van Gogh\'s "Starry Night", 1889!': [
        *(2105, 518, 2390, 1095, 2451, 19697, 568, 257),
        *(30963, 930, 4332, 272, 279, 279, 280, 256),
    ],
    "größer, naïve café — 日本語 😀": [
        *(709, 7255, 127, 253, 528, 267, 1097, 35689),
        *(563, 15304, 2005, 39121, 44353, 34002, 508, 7334),
    ],
    "it's we'll 12345 don't\n\ttabs": [
        *(585, 568, 649, 1342, 272, 273, 274, 275, 276, 847, 713, 29163),
    ],
    "a" * 100: [23126] * 12 + [19336],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_golden_ids(text):
    tokenizer = ldm_tokenizer(SD15.text, None, "")
    assert tokenizer(text).input_ids == [START, *GOLDEN[text], END]


@pytest.mark.parametrize(("preset", "pad"), [(SD15, END), (SD21, 0)], ids=["sd1", "sd2"])
def test_padding(preset, pad):
    tokenizer = ldm_tokenizer(preset.text, None, "")
    assert tokenizer.model_max_length == 77
    ids = tokenizer("make it black and white", padding="max_length", truncation=True).input_ids
    assert ids == [START, *GOLDEN["make it black and white"], END] + [pad] * 70
    cut = tokenizer("cat " * 300, padding="max_length", truncation=True).input_ids
    assert len(cut) == 77 and cut[-1] == END


def test_both_generations_of_files_and_their_padding(tmp_path):
    """vocab.json + merges.txt beside SD 2's special_tokens_map.json; tokenizer.json of today."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (old / name).symlink_to(ASSETS / "clip_tokenizer" / name)

    def token(text: str) -> dict:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"content": text, **flags}

    start, end = token("<|startoftext|>"), token("<|endoftext|>")
    special = {"bos_token": start, "eos_token": end, "pad_token": "!", "unk_token": end}
    (old / "special_tokens_map.json").write_text(json.dumps(special))
    config = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (old / "tokenizer_config.json").write_text(json.dumps(config))
    ldm_tokenizer(SD21.text, None, "").save_pretrained(new)
    assert not (new / "vocab.json").exists()
    for folder in (old, new):
        ids = open_tokenizer(folder)("make it black and white", padding="max_length").input_ids
        assert ids == [START, *GOLDEN["make it black and white"], END] + [0] * 70


def test_faults_take_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        open_tokenizer(tmp_path)
    with pytest.raises(
        ValueError, match="a.ckpt: a vocabulary of 1000 entries is not CLIP's 49408"
    ):
        ldm_tokenizer(replace(SD15.text, vocab_size=1000), None, "a.ckpt")
