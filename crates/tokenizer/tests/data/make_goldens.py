#!/usr/bin/env python3
"""Writes golden.json.gz: ids that Hugging Face's tokenizers (its Python package, with its own regex engine) gives.

    python3 make_goldens.py TOKENIZERS

TOKENIZERS is a folder with llama.json, mistral.json and smollm2.json, each a tokenizer.json. small_byte_level.json, the first
merges of SmolLM2's vocabulary, is written as well. Needs the package tokenizers.
"""

import gzip
import json
import pathlib
import random
import sys

from tokenizers import Tokenizer

HERE = pathlib.Path(__file__).resolve().parent
STORIES = HERE.parents[2] / "llama" / "tests" / "data" / "stories260k" / "tokenizer.json"
SMALL_MERGES = 900  # the merge of two newlines is among them

TEXTS = [
    "", " ", "  ", "\n", "\n\n", "\t", "a", " a", "a ", "  a  b   c ", "Hello world!", "Once upon a time, there was a cat.",
    "It's they'll I'd we've I'm you're don't 'tis", "1", "42", "3.14159", "1,000,000", " 7 8", "2026-11-22T10:02:48Z",
    "line one\nline two\r\nline three\n\n\n- item\n  1. nested\n", "\n\n1. first", "\n  leading", "tail   \n", "\u00a0no-break",
    "\u3000wide space", "tab\tand\x0bvertical\x0cform", "\u4f60\u597d\uff0c\u4e16\u754c", "\uc548\ub155\ud558\uc138\uc694", "\u3053\u3093\u306b\u3061\u306f",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440", "\u0645\u0631\u062d\u0628\u0627 \u0661\u0662\u0663", "e\u0301 and \u00e9", "\ufb01 \u00bd \u2460 \u2167",
    "\U0001f42a\U0001f42b", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0010ffff\ufffd", "a\u0000b", "\u200b\u200c\ufeff", "\u2581", "a\u2581 \u2581b",
    "<0x0A>", "def f(x):\n    return x ** 2  # squares\n", "if (a && b) { c[0] -= 1; }", "http://example.org/a_b?c=d&e=%20",
    "________________", "-" * 100, "=" * 33, " " * 65, "\n" * 17, "ab" * 50, "UPPER lower MiXeD", "\u0130stanbul stra\u00dfe",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\u0928\u092e\u0938\u094d\u0924\u0947", "x\u0301\u0302\u0303y", "\u2028\u2029\u0085", "''''s", "'S 'LL", "\u2019s",
]
# Put together at random, from the same seed every time.
PIECES = [
    " ", "  ", "\n", "\n\n", "\t", "\r\n", " \n ", "a", "ab", "abc", "The", "once", "upon", "Quick", "internationalization", "12", "2026", "7",
    ".", "!?", "...", " - ", "**", "#", "'s", "'ll", " I'm", "\u00a0", "\u3000", "<0x0A>", "\u4f60", "\u597d", "\U0001f42a", "e\u0301", "\u00e9",
    "\ufb01", "\0", "\u200b", "\u0664\u0665", "\uc548\ub155", "  1. ", "\n\n- ", "\u00bd", "\u2028", "\u0085", "\u2581", "\U0001f468\u200d\U0001f469",
]
RANDOM = random.Random(1)
TEXTS += ["".join(RANDOM.choices(PIECES, k=RANDOM.randrange(4, 24))) for _ in range(60)]
# Left to be text: no control token may come of them.
CONTROL = ["</s>", "<s>", "<unk>", "a</s>b", " <s> ", "<|im_start|>user\nhi<|im_end|>\n", "<|endoftext|>", "<|im_end|", "</s></s>"]
# Repeated to about a megabyte.
LARGE = ["a", " ", "\n", "\u4f60", "\u0000", " a", "ab ", "=", "\u2581", "1", "\U0001f42a", "</s>"]
LARGE_BYTES = 1_000_000


def small_byte_level(source):
    """SmolLM2's vocabulary, cut to its first merges."""
    file = json.loads(source.read_text(encoding="utf-8"))
    model = file["model"]
    merges = model["merges"][:SMALL_MERGES]
    made = {m.replace(" ", "") for m in merges}
    special = {t["content"] for t in file["added_tokens"]}
    kept = [p for p in sorted(model["vocab"], key=model["vocab"].get) if len(p) == 1 or p in made or p in special]
    model["vocab"], model["merges"] = {p: i for i, p in enumerate(kept)}, merges
    for token in file["added_tokens"]:
        token["id"] = model["vocab"][token["content"]]
    path = HERE / "small_byte_level.json"
    path.write_text(json.dumps(file, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    return path


def hash_of(ids):
    value = 0
    for i in ids:
        value = (value * 31 + i + 1) % (2**61 - 1)
    return value


def texts(tokenizer):
    return [[t, tokenizer.encode(t, add_special_tokens=False).ids] for t in TEXTS]


def changed(path, change):
    """Ids of a file with a change; tests/it/files.rs makes the same changes."""
    file = json.loads(path.read_text(encoding="utf-8"))
    change(file)
    return texts(Tokenizer.from_str(json.dumps(file)))


def metaspace(scheme, split):
    def change(file):
        file["normalizer"] = None
        file["pre_tokenizer"] = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": split}
    return change


def llama3(file):
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
               r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    mapping = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, mapping]}
    file["model"]["ignore_merges"] = True
    file["model"]["vocab"]["zqzqzq"] = 5000


def prefix_space(file):
    file["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


def added_words(file):
    vocab = file["model"]["vocab"]
    new = len(vocab)
    for content in ["\n\n", "ab", "abc", "\u4f60", "Quick"]:
        if content not in vocab:
            new += 1
        file["added_tokens"].append({"id": vocab.get(content, new - 1), "content": content, "special": False,
                                     "normalized": content == "Quick", "single_word": False, "lstrip": False, "rstrip": False})


def merge_across_words(file):
    file["model"]["vocab"]["a\u2581"] = 512
    file["model"]["merges"].insert(0, "a \u2581")


def golden(path):
    tokenizer = Tokenizer.from_file(str(path))
    out = {"texts": texts(tokenizer)}
    out["with_bos"] = [[t, tokenizer.encode(t).ids] for t in TEXTS[:12]]
    tokenizer.encode_special_tokens = True
    out["control"] = [[t, tokenizer.encode(t, add_special_tokens=False).ids] for t in CONTROL]
    out["large"] = []
    for unit in LARGE:
        times = LARGE_BYTES // len(unit.encode())
        ids = tokenizer.encode(unit * times, add_special_tokens=False).ids
        out["large"].append({"unit": unit, "times": times, "count": len(ids), "hash": hash_of(ids)})
    return out


def main():
    folder = pathlib.Path(sys.argv[1])
    files = {"stories260k": STORIES, "small_byte_level": small_byte_level(folder / "smollm2.json")}
    files |= {name: folder / f"{name}.json" for name in ("llama", "mistral", "smollm2")}
    changes = {
        "metaspace first": ("stories260k", metaspace("first", False)),
        "metaspace always": ("stories260k", metaspace("always", False)),
        "metaspace never": ("stories260k", metaspace("never", False)),
        "metaspace split": ("stories260k", metaspace("always", True)),
        "llama3": ("small_byte_level", llama3),
        "prefix space": ("small_byte_level", prefix_space),
        "added words of stories260k": ("stories260k", added_words),
        "added words of small_byte_level": ("small_byte_level", added_words),
        "merge across words": ("stories260k", merge_across_words),
    }
    out = {
        "vocabularies": {name: golden(path) for name, path in files.items()},
        "changed": {name: changed(files[of], change) for name, (of, change) in changes.items()},
    }
    text = json.dumps(out, separators=(",", ":"))
    # No name and time in the header: the same input gives the same bytes.
    with open(HERE / "golden.json.gz", "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write(text.encode())


if __name__ == "__main__":
    main()
