#!/usr/bin/env python3
"""Writes golden.json.gz: ids that Hugging Face's tokenizers (its Python package, with its own regex engine) gives.

    python3 make_goldens.py TOKENIZERS

TOKENIZERS is a folder with llama.json, mistral.json and smollm2.json, each a tokenizer.json. small_byte_level.json, the first
merges of SmolLM2's vocabulary, is written as well. Needs the package tokenizers.
"""

import gzip
import json
import pathlib
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


def golden(path):
    tokenizer = Tokenizer.from_file(str(path))
    out = {"texts": [[t, tokenizer.encode(t, add_special_tokens=False).ids] for t in TEXTS]}
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
    text = json.dumps({name: golden(path) for name, path in files.items()}, separators=(",", ":"))
    # No name and time in the header: the same input gives the same bytes.
    with open(HERE / "golden.json.gz", "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write(text.encode())


if __name__ == "__main__":
    main()
