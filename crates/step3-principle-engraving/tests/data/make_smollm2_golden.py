#!/usr/bin/env python3
"""Writes smollm2_golden.json: losses of five steps of LoRA training on SmolLM2-135M-Instruct with Hugging Face transformers
and PEFT, computed in f64.

    python3 make_smollm2_golden.py MODEL_DIR

Needs the packages of crates/xtask/parity/requirements.txt. The initial adapter is a formula, so that no file has to hold it:
with modules numbered in the order of the forward pass, A[i, j] of module m is 0.03 sin(1 + 37 i + 11 j + 101 m) rounded to
f32, and B is 0.
"""

import json
import math
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
R, ALPHA, STEPS, LEARNING_RATE, MAX_GRAD_NORM, WEIGHT_DECAY = 8, 16, 5, 2e-3, 0.3, 0.01
ROWS = [
    ("User: Why does bread rise?\n\nDromedary:",
     " Yeast eats the sugars in the dough and gives off carbon dioxide. The gluten holds the gas in small bubbles, so the"
     " loaf grows until the heat of the oven sets its shape."),
    ("User: I have two meetings at nine. Which one should I move?\n\nDromedary:",
     " I do not know your calendar, so I cannot say which of them matters more. Ask who else has to come: the meeting with"
     " fewer people is easier to move."),
]


def main():
    folder = pathlib.Path(sys.argv[1])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    rows = []
    for source, target in ROWS:
        source, target = (tokenizer.encode(text, add_special_tokens=False).ids for text in (source, target))
        rows.append({"ids": [1, *source, *target], "learn_from": 1 + len(source)})
    base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    model = get_peft_model(base, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=MODULES, task_type="CAUSAL_LM"))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for index, (name, parameter) in enumerate(trained):
        assert ("lora_A" in name) == (index % 2 == 0) and MODULES[index // 2 % 7] in name, name
        if "lora_A" in name:
            m, (rows_, columns) = index // 2, parameter.shape
            angles = [[1 + 37 * i + 11 * j + 101 * m for j in range(columns)] for i in range(rows_)]
            values = torch.tensor([[0.03 * math.sin(a) for a in row] for row in angles], dtype=torch.float32)
            parameter.data = values.double()
    parameters = [p for _, p in trained]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    count = sum(len(row["ids"]) - row["learn_from"] for row in rows)
    losses, norms = [], []
    for _ in range(STEPS):
        loss = 0
        for row in rows:
            ids = torch.tensor(row["ids"])
            logits = model(ids[None]).logits[0, row["learn_from"] - 1:-1]
            loss = loss + torch.nn.functional.cross_entropy(logits, ids[row["learn_from"]:], reduction="sum") / count
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)))
        optimizer.step()
        losses.append(loss.item())
    (HERE / "smollm2_golden.json").write_text(json.dumps({
        "rows": rows, "r": R, "lora_alpha": ALPHA, "learning_rate": LEARNING_RATE, "max_grad_norm": MAX_GRAD_NORM,
        "weight_decay": WEIGHT_DECAY, "losses": losses, "grad_norms": norms}) + "\n")
    print(losses, norms)


if __name__ == "__main__":
    main()
