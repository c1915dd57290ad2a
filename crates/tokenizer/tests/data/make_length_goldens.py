#!/usr/bin/env python3
"""Writes lengths.json.gz: how many ids Hugging Face's tokenizers gives for hard texts and for all texts of real samples.

    python3 make_length_goldens.py TOKENIZERS SAMPLES

TOKENIZERS is as in make_goldens.py; SAMPLES is the folder that DROMEDARY_TEST_DATA names. Of the samples, lengths alone are
written: of every text that stands anywhere in their JSON, each once, in the order of the bytes. BOS is counted where the file
adds it, and names of control tokens are text. Needs the package tokenizers.
"""

import gzip
import json
import pathlib
import random
import sys

from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).resolve().parent
STORIES = HERE.parents[2] / "llama" / "tests" / "data" / "stories260k" / "tokenizer.json"
SOURCES = ["dolly", "hhh", "oasst1", "openorca", "self_instruct", "sharegpt", "truthfulqa"]

HARD_TEXTS = 4_000
RANDOM = random.Random(6)
# First and last code point of what has no spaces, of what combines, of pictures of several code points.
RANGES = [(0x4E00, 0x4FFF), (0x3042, 0x30FF), (0xAC00, 0xAD00), (0x20000, 0x20100), (0x0E01, 0x0E4E), (0x0905, 0x094D), (0x0627, 0x0652),
          (0x0430, 0x044F), (0x1F600, 0x1F64F), (0x1F3FB, 0x1F3FF), (0x1F1E6, 0x1F1FF), (0x2700, 0x27BF)]
JOINTS = ["", "", " ", " ", "  ", "\n", ", ", "\u200d", "\ufe0f"]
RUNS = [" ", "  ", "\n", "\t", "\u00a0", "\u3000", "\u2581", "a", "1", "=", "-", "\u4f60", "\U0001f42a", "\u0301", "ab", " a", "\r\n"]
NAMES = ["</s>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<0x0A>", "<0xE4>"]
# A megabyte of one thing: the text is so many times the unit.
LARGE = ["a", " ", "\u4f60", "\U0001f42a", "\u0301", "1", "e\u0301", "</s>", " a"]
LARGE_BYTES = 1_000_000


def part():
    kind = RANDOM.randrange(8)
    if kind < 2:
        return "".join(RANDOM.choices("etaoinshrdluETAOIN", k=RANDOM.randrange(1, 13)))
    if kind < 4:
        first, last = RANDOM.choice(RANGES)
        return "".join(chr(RANDOM.randint(first, last)) for _ in range(RANDOM.randrange(1, 13)))
    if kind == 4:
        return "".join(RANDOM.choice("aeiouAE\u0438") + chr(RANDOM.randint(0x300, 0x36F)) for _ in range(RANDOM.randrange(1, 5)))
    if kind == 5:
        return RANDOM.choice(RUNS) * RANDOM.choice([1, 2, 3, 7, 16, 65, 300])
    if kind == 6:
        return RANDOM.choice(NAMES)
    return str(RANDOM.randrange(10 ** RANDOM.randrange(1, 12)))


def hard_text():
    return "".join(part() + RANDOM.choice(JOINTS) for _ in range(RANDOM.randrange(1, 24)))


def texts_in(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def values_of(file):
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line.strip()] if file.suffix == ".jsonl" else [json.loads(text)]


def real_texts(folder):
    files = sorted(f for source in SOURCES for f in (folder / source).rglob("*") if f.is_file())
    return sorted({t for f in files for value in values_of(f) for t in texts_in(value)}, key=str.encode)


def main():
    folder, samples = map(pathlib.Path, sys.argv[1:])
    files = {"stories260k": STORIES, "small_byte_level": HERE / "small_byte_level.json"}
    files |= {name: folder / f"{name}.json" for name in ("llama", "mistral", "smollm2")}
    hard, real = [hard_text() for _ in range(HARD_TEXTS)], real_texts(samples)
    large = [[unit, LARGE_BYTES // len(unit.encode())] for unit in LARGE]
    lengths = {}
    for name, path in files.items():
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.encode_special_tokens = True
        count = lambda texts: [len(tokenizer.encode(text).ids) for text in texts]
        lengths[name] = {"hard": count(hard), "real": count(real), "large": count(unit * times for unit, times in large)}
    golden = json.dumps({"hard": hard, "large": large, "lengths": lengths}, separators=(",", ":"))
    # No time and no name in the header: the same bytes every time.
    with open(HERE / "lengths.json.gz", "wb") as raw, gzip.GzipFile("", "wb", 9, raw, 0) as file:
        file.write(golden.encode())


main()
