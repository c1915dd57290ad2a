#!/usr/bin/env python3
"""Writes schedules.json: the learning rates that Hugging Face transformers gives each step of a short run.

    python3 make_schedules.py

Needs the packages of crates/xtask/parity/requirements.txt.
"""

import json
import pathlib

import torch
from transformers import get_scheduler

HERE = pathlib.Path(__file__).resolve().parent
LEARNING_RATE, STEPS = 1e-3, 24
# Our name, theirs, warm-up, decay
CASES = [
    ("cosine", "cosine", 0, 0),
    ("cosine", "cosine", 5, 0),
    ("linear", "linear", 5, 0),
    ("linear", "linear", 1, 0),
    ("constant", "constant", 0, 0),
    ("constant", "constant_with_warmup", 5, 0),
    ("wsd", "warmup_stable_decay", 5, 7),
    ("wsd", "warmup_stable_decay", 0, 24),
    ("wsd", "warmup_stable_decay", 20, 4),
]


def rates(name, warmup, decay):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LEARNING_RATE)
    special = {"num_decay_steps": decay} if name == "warmup_stable_decay" else {}
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=STEPS, scheduler_specific_kwargs=special)
    for _ in range(STEPS):
        yield schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


def main():
    cases = [
        {"schedule_type": ours, "learning_rate": LEARNING_RATE, "warmup_steps": warmup, "decay_steps": decay,
         "rates": list(rates(theirs, warmup, decay))}
        for ours, theirs, warmup, decay in CASES
    ]
    (HERE / "schedules.json").write_text(json.dumps(cases, indent=1) + "\n")


if __name__ == "__main__":
    main()
