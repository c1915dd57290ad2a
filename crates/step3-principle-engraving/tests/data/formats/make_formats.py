#!/usr/bin/env python3
"""Writes formats.json: rows of every format as the tokens that Hugging Face's libraries make of them, and which of them are
learned.

    python3 make_formats.py SMOLLM2_DIR LLAMA_TOKENIZER_JSON

Needs the packages of crates/xtask/parity/requirements.txt. Texts of chat templates come from transformers'
apply_chat_template, and so do their masks where the template has {% generation %} blocks; else a turn is what the text of the
messages up to it has beyond the text of those before it with the generation prompt. Transcripts are found by splitting at their
marks. A token is learned if its characters and a turn's overlap.
"""

import json
import pathlib
import re
import sys
import warnings

from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[4]
STORIES = ROOT / "crates" / "llama" / "tests" / "data" / "stories260k"

SYSTEM = "You answer sailors. Keep it short."
TALK = [
    ("system", SYSTEM),
    ("user", "Why is the sea salty?"),
    ("assistant", "Rivers carry minerals into it; the water leaves as vapour,\n\nthe salt stays."),
    ("user", "  And lakes? \n"),
    ("assistant", "Most have an outlet. Where there is none, they are salty too: 死海 🌊"),
]
SHORT = [("user", "Port or starboard?"), ("assistant", "Port is left.\n")]
UNANSWERED = [*TALK[1:3], ("user", "Thanks, that is all.")]
TOOLS = [{"type": "function", "function": {"name": "tide", "description": "Height of the tide <in m> \u00e0 \"port\"",
                                            "parameters": {"type": "object", "properties": {"port": {"type": "string"}}}}},
         {"name": "wind", "limits": [0.5, 12, True, None], "nothing": {}}, {"name": "never written"}]
CALL = [
    {"role": "system", "content": "Left out by the template."},
    {"role": "user", "content": "How high is the tide at Brest?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"function": {"name": "tide", "arguments": {"port": "Brest", "units": ["m"], "exact": False}}},
        {"function": {"name": "wind", "arguments": {}}}]},
    {"role": "tool", "content": " 5.2 "},
    {"role": "assistant", "content": "<think>It says 5.2.</think>\n  5.2 m.", "thinking": "The tool knows.", "note": None},
]


def messages(talk):
    return [{"role": role, "content": text} for role, text in talk]


def sharegpt(talk, system=None):
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    row = {"id": "a1", "conversations": [{"from": names[role], "value": text} for role, text in talk]}
    return row | ({"system": system} if system else {})


def transcript(talk, human, assistant, between):
    marks = {"user": human, "assistant": assistant}
    return between.join(f"{marks[role]} {text}" for role, text in talk if role != "system")


class Model:
    """A tokenizer, and what stands before and behind a text."""

    def __init__(self, name, tokenizer, bos, eos, newline_trick):
        self.name, self.tokenizer, self.bos, self.eos, self.newline_trick = name, tokenizer, bos, eos, newline_trick

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def continued(self, text):
        """As Dromedary: behind a newline, whose tokens are dropped; byte-level vocabularies need no such trick."""
        return self.encode("\n" + text)[len(self.encode("\n")):] if self.newline_trick else self.encode(text)


def masked(offsets, spans):
    return [any(start < b and a < end for start, end in spans) for a, b in offsets]


def stretches(mask):
    """Ranges of the learned positions; a first token has nothing that it could be predicted from."""
    ranges = []
    for position, learned in enumerate(mask):
        if learned and position > 0:
            if ranges and ranges[-1][1] == position:
                ranges[-1][1] += 1
            else:
                ranges.append([position, position + 1])
    return ranges


def cut_sides(model, case, source, target, eos, ids_learned=None):
    kept = source[len(model.bos):]
    room = max(case["source_max_len"] - len(model.bos), 0)
    source = source[:len(model.bos)] + (kept[-room:] if room else [])
    target = (target + eos)[:case["target_max_len"]]
    learned = len(target) if ids_learned is None or eos else min(ids_learned, len(target))
    mask = [False] * len(source) + [True] * learned + [False] * (len(target) - learned)
    return source + target, stretches([True] * len(mask) if case["train_on_source"] else mask)


def pair(model, case, source, target):
    eos = model.eos if case["add_eos_to_target"] else []
    continued = model.continued(target) if source else model.encode(target)
    return cut_sides(model, case, model.bos + model.encode(source), continued, eos)


def conversation(model, case, ids, mask, turns, eos):
    """Ids with BOS, the mask of all of the assistant's turns, each turn's range of positions, EOS if it is to follow."""
    if case["learned_turns"] == "last":
        start, end = turns[-1]
        return cut_sides(model, case, ids[:start], ids[start:], eos, end - start)
    most = case["source_max_len"] + case["target_max_len"]
    ids, mask = (ids + eos)[:most], (mask + [True] * len(eos))[:most]
    return ids, stretches([True] * len(ids) if case["learned_turns"] == "all" else mask)


def ranges_of(mask_by_turn):
    return [(mask.index(True), len(mask) - mask[::-1].index(True)) for mask in mask_by_turn]


def marked(model, case, text, human, assistant):
    """A transcript. An answer ends with the human's mark, where there is one."""
    parts, spans, at = re.split(f"({re.escape(human)}|{re.escape(assistant)})", text), [], 0
    for index, part in enumerate(parts):
        if index >= 2 and parts[index - 1] == assistant:
            behind = human if parts[index + 1:index + 2] == [human] else ""
            spans.append((at, at + len(part) + len(behind)))
        at += len(part)
    out = model.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    before = [False] * len(model.bos)
    by_turn = [before + masked(out["offset_mapping"], [span]) for span in spans]
    ends_in_answer = bool(spans) and parts[-2] == assistant
    eos = model.eos if case["add_eos_to_target"] and ends_in_answer else []
    mask = [any(column) for column in zip(*by_turn)]
    return conversation(model, case, model.bos + out["input_ids"], mask, ranges_of(by_turn), eos)


def templated(model, case, chat, tools):
    tokenizer, template = model.tokenizer, case["source"]
    given = {"chat_template": template} if template else {}
    given |= {"tools": tools} if tools else {}
    if case["chat_date"] is None:
        # transformers always defines strftime_now; templates then use their own day.
        given |= {"date_string": "no day"}
    else:
        given |= {"date_string": case["day"]}
    text = tokenizer.apply_chat_template(chat, tokenize=False, **given)
    source = template or tokenizer.chat_template
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True, **given)
    assert out["input_ids"] == whole["input_ids"]
    assistants = [index for index, message in enumerate(chat) if message["role"] == "assistant"]
    spans = []
    if re.search(r"\{%-?\s*generation", source):
        mask = [bool(learned) for learned in out["assistant_masks"]]
        # Each block is a turn; transformers tells the mask only, so turns are where it has gaps.
        edges = [0, *[i for i in range(1, len(mask)) if mask[i] != mask[i - 1]], len(mask)]
        turns = [(a, b) for a, b in zip(edges, edges[1:]) if mask[a]]
        assert len(turns) == len(assistants)
    else:
        for index in assistants:
            prefix = tokenizer.apply_chat_template(chat[:index], tokenize=False, add_generation_prompt=True, **given) if index else ""
            through = tokenizer.apply_chat_template(chat[:index + 1], tokenize=False, **given)
            assert text.startswith(prefix) and text.startswith(through)
            spans.append((len(prefix), len(through)))
        by_turn = [masked(whole["offset_mapping"], [span]) for span in spans]
        mask, turns = [any(column) for column in zip(*by_turn)], ranges_of(by_turn)
    return conversation(model, case, out["input_ids"], mask, turns, [])


TASK = "Below is an instruction that describes a task"
REQUEST = "Write a response that appropriately completes the request."


def alpaca(row):
    if row.get("input"):
        return (f"{TASK}, paired with an input that provides further context. {REQUEST}\n\n### Instruction:\n{row['instruction']}"
                f"\n\n### Input:\n{row['input']}\n\n### Response: ")
    return f"{TASK}. {REQUEST}\n\n### Instruction:\n{row['instruction']}\n\n### Response: "


def chip2(row):
    source, target = row["text"].split("\n<bot>: ")
    return source.replace("<human>: ", ""), target


def golden(model, case, row):
    name = case["format"]
    if name == "alpaca":
        return pair(model, case, alpaca(row), row["output"])
    if name == "chip2":
        return pair(model, case, *chip2(row))
    if name == "self-instruct":
        return pair(model, case, row["prompt"], row["completion"])
    if name == "input-output":
        return pair(model, case, row["input"], row["output"])
    if name == "oasst1":
        return marked(model, case, row["text"], "### Human:", "### Assistant:")
    if name == "hh-rlhf":
        return marked(model, case, row["chosen"], "\n\nHuman:", "\n\nAssistant:")
    if name == "sharegpt":
        roles = {"system": "system", "human": "user", "gpt": "assistant"}
        chat = [{"role": "system", "content": row["system"]}] if "system" in row else []
        for turn in row["conversations"]:
            role = roles[turn["from"]]
            if role != "assistant" or any(message["role"] == "user" for message in chat):
                chat.append({"role": role, "content": turn["value"]})
        return templated(model, case, chat, None)
    return templated(model, case, row["messages"], row.get("tools"))


ALPACA = [
    {"instruction": "Name two knots.", "input": "", "output": "Bowline and reef knot."},
    {"instruction": "Sort by length.", "input": "mast, oar\nbowsprit", "output": " 1. oar\n2. mast\n\n3. bowsprit 🪢"},
    {"instruction": "No field for an input.", "output": "\n\nNone."},
]
CHIP2 = [{"text": "<human>: What is a fathom?\n<bot>: Six feet,\nas the arms reach."}, {"text": "Who?\n<bot>: 我"}]
SELF_INSTRUCT = [{"prompt": "Task: greet the crew\nOutput:", "completion": " Ahoy!"}, {"prompt": "", "completion": "Alone."}]
INPUT_OUTPUT = [{"input": "Count to three: ", "output": "1 2 3"}]
OASST1 = [{"text": transcript(talk, "### Human:", "### Assistant:", "")} for talk in (TALK, SHORT, UNANSWERED)]
HH_RLHF = [{"chosen": "\n\n" + transcript(talk, "Human:", "Assistant:", "\n\n"), "rejected": "\n\nHuman: no"} for talk in (TALK, UNANSWERED)]
CHAT = [{"messages": messages(talk)} for talk in (TALK, SHORT, UNANSWERED)]
SHAREGPT = [sharegpt(TALK), sharegpt(SHORT), sharegpt(TALK[1:], SYSTEM), sharegpt([("assistant", "Before all."), *SHORT])]
TOOL_ROWS = [{"messages": CALL, "tools": TOOLS}, {"messages": messages(TALK)}]
PAIRS = [("alpaca", ALPACA), ("chip2", CHIP2), ("self-instruct", SELF_INSTRUCT), ("input-output", INPUT_OUTPUT)]
TRANSCRIPTS = [("oasst1", OASST1), ("hh-rlhf", HH_RLHF)]
DROMEDARY = "prompts/dromedary_chat_template.jinja"
TEMPLATES = "crates/step3-principle-engraving/tests/data/formats/templates/"


def cases():
    """Model, format, rows and settings."""
    for model in ("stories260k", "smollm2", "llama"):
        for name, rows in PAIRS:
            yield model, name, rows, {}
            yield model, name, rows, {"add_eos_to_target": False, "train_on_source": True}
            yield model, name, rows, {"source_max_len": 9, "target_max_len": 4}
        for name, rows in TRANSCRIPTS:
            for turns in ("assistant", "last", "all"):
                yield model, name, rows, {"learned_turns": turns}
            yield model, name, rows, {"add_eos_to_target": False}
            yield model, name, rows[:1], {"source_max_len": 40, "target_max_len": 20}
            yield model, name, rows[:1], {"learned_turns": "last", "source_max_len": 11, "target_max_len": 5}
        for template in ("llama2", "zephyr"):
            if model != "smollm2":
                yield model, "chat", CHAT, {"chat_template": f"{TEMPLATES}{template}.jinja"}
                yield model, "chat", CHAT, {"chat_template": f"{TEMPLATES}{template}.jinja", "learned_turns": "last"}
                yield model, "sharegpt", SHAREGPT, {"chat_template": f"{TEMPLATES}{template}.jinja"}
        yield model, "chat", CHAT, {"chat_template": DROMEDARY}
        yield model, "chat", TOOL_ROWS, {"chat_template": f"{TEMPLATES}tools.jinja"}
        yield model, "chat", TOOL_ROWS, {"chat_template": f"{TEMPLATES}tools.jinja", "chat_date": "2024-07-06", "day": "06 Jul 2024"}
    for template in (None, f"{TEMPLATES}chatml_generation.jinja"):
        for turns in ("assistant", "last", "all"):
            yield "smollm2", "chat", CHAT, {"chat_template": template, "learned_turns": turns}
        yield "smollm2", "chat", CHAT, {"chat_template": template, "source_max_len": 40, "target_max_len": 30}
        yield "smollm2", "sharegpt", SHAREGPT, {"chat_template": template}


def open_folder(folder):
    """The file itself: transformers' own classes rebuild some tokenizers without the pre-tokenizer that the file names."""
    config = json.loads((folder / "tokenizer_config.json").read_text())
    names = ("bos_token", "eos_token", "unk_token", "chat_template")
    known = {name: config[name] for name in names if name in config}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **known)


def main():
    smollm2, llama = map(pathlib.Path, sys.argv[1:])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    models = {
        "stories260k": Model("stories260k", open_folder(STORIES), [1], [2], True),
        "smollm2": Model("smollm2", open_folder(smollm2), [], [2], False),
        "llama": Model("llama", PreTrainedTokenizerFast(tokenizer_file=str(llama), **special), [1], [2], True),
    }
    written = []
    for name, data_format, rows, settings in cases():
        case = {"format": data_format, "learned_turns": "assistant", "add_eos_to_target": True, "train_on_source": False,
                "source_max_len": 1024, "target_max_len": 256, "chat_template": None, "chat_date": None} | settings
        case["source"] = (ROOT / case["chat_template"]).read_text() if case["chat_template"] else None
        results = [golden(models[name], case, row) for row in rows]
        assert any(learned for _, learned in results)
        case = {key: value for key, value in case.items() if key not in ("source", "day")}
        written.append({"model": name, **case, "rows": json.dumps(rows, ensure_ascii=False), "golden": [{"ids": ids, "learned": learned} for ids, learned in results]})
    path = HERE / "formats.json"
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in written)
    path.write_text(f"[\n{lines}\n]\n")
    print(f"{len(written)} cases, {sum(len(case['golden']) for case in written)} rows, {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
