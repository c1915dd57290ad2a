#!/usr/bin/env python3
"""Writes the tiny model, the LoRA adapter and the golden values of this folder with Hugging Face transformers and PEFT
(README.md has the layout).

    python3 make_goldens.py

Needs the packages of crates/xtask/parity/requirements.txt. All is computed in f64 but for the rotary angles, which stay
the f32 numbers that transformers makes.
"""

import json
import pathlib
import shutil
import sys

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import get_cosine_schedule_with_warmup

HERE = pathlib.Path(__file__).resolve().parent
LLAMA_DATA = HERE.parents[2] / "llama" / "tests" / "data"
sys.path.insert(0, str(LLAMA_DATA))
import make_goldens as llama  # noqa: E402  (the same model and the same f64 arithmetic as the llama crate's goldens)

CONFIG = llama.sizes(48, 88, 2, 6, 2, 97, rope_theta=1e4)
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS, LEARNING_RATE, WARMUP_RATIO, MAX_GRAD_NORM = 20, 1e-3, 0.03, 0.3
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.999), 1e-8, 0.0
# (tokens, masked tokens) of each row
ROWS = [(23, 9), (37, 16)]


def adapted():
    """The model with a LoRA whose A and B are both random; every value is an f32 number, so that the saved adapter is
    exactly what was computed with."""
    model = get_peft_model(llama.load(HERE / "model"), LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.0, target_modules=MODULES, bias="none", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            scale = 0.1 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data = (torch.randn(parameter.shape, generator=generator) * scale).double()
            parameter.requires_grad_(True)
        assert parameter.requires_grad == ("lora_" in name) and parameter.dtype == torch.float64, name
    return model


def module_name(parameter):
    """base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight -> model.layers.0.self_attn.q_proj.lora_A"""
    return parameter.removeprefix("base_model.model.").removesuffix(".default.weight")


def lora_parameters(model):
    return {module_name(name): p for name, p in model.named_parameters() if p.requires_grad}


def rows():
    generator = torch.Generator().manual_seed(11)
    for tokens, masked in ROWS:
        ids = torch.randint(3, CONFIG["vocab_size"], (tokens,), generator=generator)
        labels = ids.clone()
        labels[:masked] = -100
        yield ids, labels


def loss_of(model, data):
    """Summed cross entropy over the target tokens of all rows, by their number. A row's first label predicts nothing."""
    total, count, logits = 0.0, 0, []
    for ids, labels in data:
        out = model(input_ids=ids[None]).logits[0]
        total = total + torch.nn.functional.cross_entropy(out[:-1], labels[1:], ignore_index=-100, reduction="sum")
        count += int((labels[1:] != -100).sum())
        logits.append(out.detach())
    return total / count, count, logits


def train(model, data):
    parameters = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    warmup = -int(-STEPS * WARMUP_RATIO // 1)
    schedule = get_cosine_schedule_with_warmup(optimizer, warmup, STEPS)
    log = {"learning_rates": [], "losses": [], "grad_norms": []}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, _, _ = loss_of(model, data)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        log["learning_rates"].append(schedule.get_last_lr()[0])
        log["losses"].append(loss.item())
        log["grad_norms"].append(norm.item())
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        log["loss_after"] = loss_of(model, data)[0].item()
    return log


def main():
    llama.write_model(HERE / "model", CONFIG, shards=1, seed=5)
    model, data, tensors = adapted(), list(rows()), {}

    loss, count, logits = loss_of(model, data)
    loss.backward()
    for row, ((ids, labels), out) in enumerate(zip(data, logits)):
        tensors |= {f"row{row}.ids": ids, f"row{row}.labels": labels, f"row{row}.logits": out.float()}
    squares = 0.0
    for name, parameter in lora_parameters(model).items():
        assert parameter.grad.abs().max() > 1e-6, name
        squares += float(parameter.grad.pow(2).sum())
        tensors[f"grad.{name}"] = parameter.grad.float()

    shutil.rmtree(HERE / "adapter", ignore_errors=True)
    model.float().save_pretrained(HERE / "adapter")
    (HERE / "adapter" / "README.md").unlink(missing_ok=True)
    path = HERE / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "model", "target_modules": MODULES}
    llama.write_json(path, config)
    model.double()

    training = train(model, data)
    for name, parameter in lora_parameters(model).items():
        tensors[f"trained.{name}"] = parameter.detach().float()
    assert training["losses"][0] == loss.item() and training["loss_after"] < 0.9 * loss.item()
    save_file(tensors, HERE / "golden.safetensors")
    llama.write_json(HERE / "golden.json", {
        "loss": loss.item(), "target_tokens": count, "grad_norm": squares**0.5,
        "training": {
            "steps": STEPS, "learning_rate": LEARNING_RATE, "warmup_ratio": WARMUP_RATIO, "betas": BETAS, "eps": EPS,
            "weight_decay": WEIGHT_DECAY, "max_grad_norm": MAX_GRAD_NORM, **training,
        },
    })
    for file in HERE.rglob("*.safetensors"):
        file.chmod(0o644)
    print(f"loss {loss.item():.6f} over {count} tokens, after {STEPS} steps {training['loss_after']:.6f}")


if __name__ == "__main__":
    main()
