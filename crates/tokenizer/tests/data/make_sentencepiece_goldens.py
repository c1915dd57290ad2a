#!/usr/bin/env python3
"""Writes sentencepiece.json.gz: what the sentencepiece library gives for random texts.

    python3 make_sentencepiece_goldens.py MISTRAL

MISTRAL is Mistral's tokenizer.model (tokenizer.model.v1 of the PyPI package mistral-common). Needs the package sentencepiece.
"""

import gzip
import json
import pathlib
import random
import sys

import sentencepiece

HERE = pathlib.Path(__file__).resolve().parent

TEXTS = 10_000
RANDOM = random.Random(8)
# Spaces and their like are frequent, because conversions differ there first.
COMMON = [" ", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\u2581", " \u2581", "\u00a0", "\u3000", "the", " the", "ing", "s", "a", "aa",
          "Once", " upon", "inter", "nation", "ization", "1", "42", "2026", ".", ",", "...", "!?", "--", "==", "((", "))", "##", "'s", "n't",
          "http://", ".org/", "_x_", "def ", "\u4f60", "\u597d", "\uc548\ub155", "\u041f\u0440\u0438", "\u0661", "e\u0301", "\u00e9", "\ufb01",
          "\u00bd", "\u200b", "\ufeff", "\0", "\x7f", "\u2028", "\U0001f42a", "\U0001f468\u200d\U0001f469", "<s>", "</s>", "<unk>", "<0x0A>",
          "\U0010ffff", "\ufffd"]
ALPHABETS = ["abcdefghijklmnopqrstuvwxyz", "ETAOIN SHRDLU", "0123456789.,", "{}[]()<>;:=+-*/&|!?'\"", "\u00e4\u00f6\u00fc\u00df\u00e9\u00e8\u00f1"]


def part():
    kind = RANDOM.randrange(10)
    if kind < 6:
        return RANDOM.choice(COMMON)
    if kind < 9:
        return "".join(RANDOM.choices(RANDOM.choice(ALPHABETS), k=RANDOM.randrange(1, 9)))
    while True:
        code = RANDOM.randrange(0x110000 if RANDOM.random() < 0.3 else 0x3000)
        if not 0xD800 <= code < 0xE000:
            return chr(code)


def hash_of(ids):
    value = 0
    for i in ids:
        value = (value * 31 + i + 1) % (2**61 - 1)
    return value


def main():
    texts = ["".join(part() for _ in range(RANDOM.randrange(1, 16))) for _ in range(TEXTS)]
    model = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
    ids = [model.encode(text) for text in texts]
    golden = {
        "pieces": model.vocab_size(),
        "bos": model.bos_id(),
        "eos": model.eos_id(),
        "texts": texts,
        "ids": [[len(of_text), hash_of(of_text)] for of_text in ids],
    }
    golden = json.dumps(golden, separators=(",", ":"))
    # No time and no name in the header: the same bytes every time.
    with open(HERE / "sentencepiece.json.gz", "wb") as raw, gzip.GzipFile("", "wb", 9, raw, 0) as file:
        file.write(golden.encode())


main()
