# SPDX-License-Identifier: Apache-2.0
"""Makes the vocabulary of a small model: byte-level BPE, as CLIP's, learned from the texts of data.

python -m data_gen.tokenizer --data data/shapes --output data/shapes_tokenizer [--size 1024]
python -m data_gen.tokenizer --output DIR     from the wordings of the photographs' edits

DIR then holds CLIPTokenizer's files: vocab.json, merges.txt, and those of today's libraries.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from data_gen.edits import EDITS
from ip2p_jax.cli import Parser, one_line_errors
from ip2p_jax.data.files import atomic_folder
from ip2p_jax.data.pairs import PairSource

END_OF_WORD = "</w>"
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def learn(texts: Sequence[str], size: int) -> CLIPTokenizer:
    """Learns merges until the vocabulary has at most `size` entries.

    As in CLIP's, every byte is an entry, within a word and at its end, so any text has tokens.
    Raises ValueError where `size` leaves no room for merges.
    """
    alphabet = sorted(ByteLevel.alphabet())
    alphabet += [byte + END_OF_WORD for byte in alphabet]
    least = len(alphabet) + len(SPECIAL)
    if size < least:
        raise ValueError(f"size {size}: expected at least {least}, the bytes alone")
    rules = CLIPTokenizer().backend_tokenizer  # how CLIP normalises texts and cuts them into words
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = rules.normalizer, rules.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(SPECIAL),
        special_tokens=alphabet,  # fixes their order, and with it which of equal merges comes first
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    vocabulary = learned["vocab"]
    vocabulary |= {word: len(vocabulary) + i for i, word in enumerate(SPECIAL)}
    merges: Any = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocabulary, merges, model_max_length=77)


def wordings() -> list[str]:
    """The training wordings of the photographs' edits."""
    return [text for e in EDITS.values() for text in e.wordings]


def texts(folder: Path) -> list[str]:
    """Instructions and captions of a data folder's training split, each as often as it is there."""
    source = PairSource(folder, "train")
    pairs = (source[i] for i in range(len(source)))
    return [x for p in pairs for x in (p.instruction, p.input_caption, p.output_caption)]


@one_line_errors
def main(argv: list[str] | None = None) -> int:
    """Learns from training texts and writes the folder in one rename."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="new folder to write")
    parser.add_argument("--data", type=Path, help="data folder, of whose training texts to learn")
    parser.add_argument("--size", type=int, default=1024, help="most entries (default 1024)")
    args = parser.parse_args(argv)
    if (args.output / "vocab.json").is_file():
        print(f"{args.output} is already there")
        return 0
    tokenizer = learn(texts(args.data) if args.data else wordings(), args.size)
    with atomic_folder(args.output) as folder:
        tokenizer.save_pretrained(folder)
        tokenizer.backend_tokenizer.model.save(str(folder))
    print(f"{len(tokenizer)} entries in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
