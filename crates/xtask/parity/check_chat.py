"""Conversations that our program reads through a chat template, against transformers: the loss of a step on all of them is
that of the ids and assistant masks of apply_chat_template. check_parity.py calls it."""

import json
import pathlib
import sys

import torch
from transformers import LlamaForCausalLM

from check_results import LOSS_TOLERANCE, metrics_of

ROOT = pathlib.Path(__file__).resolve().parents[3]
FORMATS = ROOT / "crates" / "step3-principle-engraving" / "tests" / "data" / "formats"
sys.path.insert(0, str(FORMATS))
import make_formats  # noqa: E402  (the rows of the golden values)

TEMPLATES = [ROOT / "prompts" / "dromedary_chat_template.jinja", FORMATS / "templates" / "zephyr.jinja"]


def loss_of(model, rows):
    """`rows` are ids and stretches of them that are learned."""
    total, count = 0.0, 0
    for ids, learned in rows:
        labels = torch.full((len(ids),), -100)
        for start, end in learned:
            labels[start:end] = torch.tensor(ids[start:end])
        logits = model(torch.tensor([ids])).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum"))
        count += int((labels[1:] != -100).sum())
    return total / count


def check(checks, run, name, checkpoint, folder):
    tokenizer = make_formats.open_folder(checkpoint)
    base = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    reference = make_formats.Model(name, tokenizer, [], [], False)
    dataset = folder / "chat.json"
    dataset.write_text(json.dumps(make_formats.CHAT))
    for template in [*TEMPLATES, *([None] if tokenizer.chat_template else [])]:
        for turns in ("assistant", "last"):
            case = {"learned_turns": turns, "source_max_len": 1024, "target_max_len": 256, "train_on_source": False,
                    "chat_date": None, "source": template.read_text() if template else None}
            rows = [make_formats.templated(reference, case, row["messages"], None) for row in make_formats.CHAT]
            what = template.stem if template else "its own"
            output = folder / f"chat {what} {turns}"
            run("step3-principle-engraving", "train", "--checkpoint", checkpoint, "--dataset", dataset, "--output-dir", output,
                "--learned-turns", turns, *(["--chat-template", template] if template else []), "--lora-r", 2, "--learning-rate", 0,
                "--max-steps", 1, "--gradient-accumulation-steps", len(rows))
            got, want = metrics_of(output)[0]["loss"], loss_of(base, rows)
            checks.within(f"{name}, chat template {what}, turns {turns}: our loss {got:.6f} on transformers' tokens and masks",
                          abs(got - want) / want, LOSS_TOLERANCE)
