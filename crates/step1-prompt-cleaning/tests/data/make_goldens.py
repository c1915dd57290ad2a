#!/usr/bin/env python3
"""Write what Dromedary's stage-1 rules give, for the tests of --compat dromedary.

cleaning_goldens.json: tricky texts and what the cleaning rules make of them.
dummy_data_goldens.json: the rows of dummy_data/ behind each of the three commands.

A straight restatement of the rules in Python, independent of the Rust code, so that Python's own
meanings of \\d, \\s, $ and strip() decide. Needs pyarrow and tokenizers for the second file.
usage: make_goldens.py (writes beside itself)
"""

import json
import pathlib
import random
import re
import sys
import unicodedata

HERE = pathlib.Path(__file__).resolve().parent
# In tokens of the small vocabulary in crates/llama/tests/data/stories260k, which every checkout has.
MAX_PROMPT_LEN = 400

NAMES = (
    "Italian Polish Russian Slovak Portuguese Romanian Danish Swedish Norwegian English Spanish "
    "French Czech German Finnish Estonian Latvian Lithuanian Persian Hungarian Hebrew Greek Arabic "
    "Korean Japanese Chinese"
).split() + ["Chinese (Traditional)", "Chinese (Simplified)", "Thai", "Vietnamese"]
KOREAN = "지금 번역하기"
BLOCK = "\n \n Language: "
BANNER = "~The following is a conversation with Bing, not ChatGPT.~"


def cut_end(text, end):
    return text[: len(text) - len(end)].strip() if text.endswith(end) else text


def clean(text):
    text = re.sub(r"^\d+\s*/\s*\d+", "", text)
    text = re.sub(r"\d+\s*/\s*\d+$", "", text)
    if "1 / 1" in text:
        text = text[text.index("1 / 1") + len("1 / 1"):]
    for mark in (KOREAN, BLOCK):
        if mark in text:
            text = text[: text.index(mark)]
    text = text.strip()
    text = cut_end(text, "Share Prompt")
    text = cut_end(text, "Translate now")
    for name in NAMES:
        text = cut_end(text, "Language: " + name)
    if text.startswith(BANNER):
        text = text[len(BANNER):].strip()
    return text


def by_hand():
    yield from ["", " ", "\n", "plain", "  two  words\t", "a\nb", "1", "/", "1/", "/1"]
    yield from ["24/7 support: what is it?", "Simplify 6/8", "Simplify 6/8\n", "Simplify 6/8\n\n", "6/8"]
    yield from ["1/2/3", "1/2/3/4", "a 1/2/3", "1 / 2 text 3 / 4", "12/34", "x12/34", "1 /\n2 rest", "rest 1\n/\n2"]
    yield from ["1 / 1", "1 / 1 text", "text 1 / 1", "head 1 / 1 tail", "a 1 / 1 b 1 / 1 c", "page 11 / 12 foo", "1 / 11 x", "y 1 / 1\n"]
    yield from ["1\u001c/\u001f2 x", "x 1\u0085/\u00a02", "x 1\u2003/\u30002\n", "x 1\u200b/2", "\u001c\u001dx\u001e\u001f", "\ufeffx\ufeff", "\u180ex"]
    yield from ["\u0661\u0662 / \u0663 arabic digits", "\uff11/\uff12 full width", "end \u0967/\u0968", "\u00b2/\u00b3 superscripts", "\u2160/\u2161 roman", "x \u0664/4\n", "\U0001d7ce/\U0001d7d9 bold"]
    yield from [KOREAN, "before" + KOREAN + "after", "a " + KOREAN + " b " + KOREAN, KOREAN[:-1], "1 / 1" + KOREAN]
    yield from ["text" + BLOCK + "Korean", "text" + BLOCK, BLOCK + "Thai", "text\n\n Language: Thai", "text\n \n Language:", "a" + BLOCK + "b" + BLOCK + "c"]
    yield from ["x Share Prompt", "Share Prompt", "xShare Prompt", "x Share Prompt ", "x share prompt", "x Share Prompt Share Prompt", "Share Prompt x"]
    yield from ["x Translate now", "x Translate now Share Prompt", "x Share Prompt Translate now", "Translate now"]
    for name in NAMES:
        yield from ["x Language: " + name, "x\nLanguage: " + name + "\n", "x Language:" + name, "Language: " + name]
        yield "x Language: " + name + " Translate now Share Prompt"
    for one, other in zip(NAMES, reversed(NAMES)):
        yield "x Language: " + one + " Language: " + other
    yield from ["x Language: Klingon", "x Language: Chinese (Traditional) ", "x Language: Chinese (traditional)", "x Language: english"]
    yield from [BANNER, BANNER + " hi", " " + BANNER + " hi ", "hi " + BANNER, BANNER + BANNER + " hi", "1/1" + BANNER + " hi", BANNER + " 1/2 hi"]
    yield from ["e\u0301 1/2", "\U0001f9d1\u200d\U0001f52c 3/4", "\u202e1/2\u202c", "1/2\r\n", "\r\n1/2", "x\r\n1/2\r\n", "null\u0000 1/2", "x 1/2\u2028", "x 1/2\u000b"]


def by_chance(count):
    rng = random.Random(20240229)
    pieces = ["1", "2", "24", "/", " / ", "1 / 1", " ", "\n", "\u001c", "\u00a0", "\u0663", "text", "why?", KOREAN, BLOCK]
    pieces += ["Share Prompt", "Translate now", "Language: ", "Thai", "Chinese", "Chinese (Simplified)", "Language: Korean", BANNER, "é", "語"]
    for _ in range(count):
        yield "".join(rng.choice(pieces) for _ in range(rng.randint(1, 9)))


def decimal_digit_zeros():
    """The first digit of each script: scripts younger than Unicode 13 depend on the Python that runs."""
    return [chr(c) for c in range(sys.maxunicode + 1)
            if unicodedata.ucd_3_2_0.category(chr(c)) == "Nd" and unicodedata.digit(chr(c)) == 0]


def write_cleaning_goldens():
    texts = list(dict.fromkeys([*by_hand(), *by_chance(600)]))
    texts += [zero + "/" + zero + " of its script" for zero in decimal_digit_zeros()]
    spaces = json.dumps([c for c in range(sys.maxunicode + 1) if chr(c).isspace()])
    lines = ",\n".join(json.dumps([text, clean(text)]) for text in texts)
    (HERE / "cleaning_goldens.json").write_text('{"spaces": %s,\n"cleaned": [\n%s\n]}\n' % (spaces, lines))


def openorca_prompts(rows, count):
    seen, kept = set(), []
    strata = {"niv": [], "flan": [], "t0": [], "cot": []}
    for row in rows:
        strata[next(name for name in strata if name in row["id"])].append(row["question"].strip())
    for question in (question for questions in strata.values() for question in questions):
        if question in seen:
            continue
        seen.add(question)
        if count(question + "\n\n") > MAX_PROMPT_LEN:
            continue
        marks = ["it is not possible to tell", "Premise", "premise", "Hypothesis", "hypothesis"]
        if not any(mark in question for mark in marks):
            kept.append(question)
    return kept


def sharegpt_prompts(conversations):
    turns = [c["conversations"] for c in conversations]
    return list(dict.fromkeys(t[0]["value"] for t in turns if len(t) >= 2 and t[0]["from"] == "human"))


def merged_prompts(dolly, oasst, sharegpt, openorca, count):
    prompts = []
    for category in ("creative_writing", "brainstorming", "open_qa", "general_qa", "classification"):
        prompts += [r["instruction"] for r in dolly if r["category"] == category and not r["context"]]
    parents = {message["parent_id"] for message in oasst}
    prompts += [m["text"] for m in oasst if m["parent_id"] is None and m["message_id"] in parents]
    cleaned = dict.fromkeys(clean(prompt) for prompt in prompts + sharegpt + openorca)
    return [prompt for prompt in cleaned if 2 <= count(prompt) <= MAX_PROMPT_LEN]


def write_dummy_data_goldens():
    import pyarrow.parquet
    import tokenizers

    checkout = HERE.parents[3]
    dummy = checkout / "dummy_data"
    vocabulary = checkout / "crates/llama/tests/data/stories260k/tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(vocabulary))

    def count(text):
        return len(tokenizer.encode(text).ids)

    def lines(name):
        return [json.loads(line) for line in (dummy / name).read_text(encoding="utf-8").splitlines()]

    openorca = openorca_prompts(pyarrow.parquet.read_table(dummy / "openorca.parquet").to_pylist(), count)
    sharegpt = sharegpt_prompts(json.loads((dummy / "sharegpt.json").read_text(encoding="utf-8")))
    merged = merged_prompts(lines("dolly.jsonl"), lines("oasst1.jsonl"), sharegpt, openorca, count)
    goldens = {"max_prompt_len": MAX_PROMPT_LEN, "openorca": openorca, "sharegpt": sharegpt, "prompts": merged}
    (HERE / "dummy_data_goldens.json").write_text(json.dumps(goldens, indent=0) + "\n")


write_cleaning_goldens()
write_dummy_data_goldens()
