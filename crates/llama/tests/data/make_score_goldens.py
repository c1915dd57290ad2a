#!/usr/bin/env python3
"""Writes summed log-probabilities of texts behind prompts, as Hugging Face transformers gives them in f64.

    python3 make_score_goldens.py --smollm2 DIR

Writes `score.json` to stories260k/ and smollm2/: a list of prompt and target (text and token ids) with the sum.
Tokens are split as Dromedary's `Llama.score` does: those of prompt and target together, behind the number of tokens
that the prompt has alone.
"""

import argparse
import json
import pathlib

import torch
from make_goldens import HERE, load
from tokenizers import Tokenizer

STORIES = "Once upon a time, there was a little girl named Lily. She had a red ball. One day,"
ANSWERS = "You are asked a question and answer in one word.\n\nQuestion: What is the largest ocean?\nAnswer: Pacific\n\n"

ROWS = {
    "stories260k": [
        (STORIES, " she went to the park."),
        (STORIES, " her mom said no, and Lily was very sad about the ball."),
        (STORIES, " qx zz"),
        (STORIES + " Tim", " saw a dog"),
        ("The dog", " was big"),
        ("A", " cat"),
    ],
    "smollm2": [
        (ANSWERS + "Question: What is the capital of France?\nAnswer:", " Paris"),
        (ANSWERS + "Question: What is the capital of France?\nAnswer:", " Lyon"),
        (ANSWERS + "Question: How many legs does a spider have?\nAnswer:", " It has eight legs, and no wings at all."),
        (ANSWERS, "Question: Who wrote it?"),
        ("Hello", ", world! \u4f60\u597d \U0001f642"),
    ],
}


def score(model, tokenizer, prompt, target):
    ids = tokenizer.encode(prompt + target).ids
    length = len(tokenizer.encode(prompt).ids)
    logits = model(torch.tensor([ids])).logits[0]
    log_probs = logits.log_softmax(-1)
    total = sum(float(log_probs[at - 1, ids[at]]) for at in range(length, len(ids)))
    return {"prompt": prompt, "target": target, "prompt_ids": ids[:length], "target_ids": ids[length:], "score": total}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=pathlib.Path, required=True, help="HF folder of SmolLM2-135M-Instruct in f32")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    for name, folder in (("stories260k", HERE / "stories260k"), ("smollm2", args.smollm2)):
        model, tokenizer = load(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
        rows = [score(model, tokenizer, *row) for row in ROWS[name]]
        (HERE / name / "score.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(name, [round(row["score"], 3) for row in rows])


if __name__ == "__main__":
    main()
