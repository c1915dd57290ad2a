#!/usr/bin/env python3
"""Writes qlora/: a tiny model, an adapter, and loss, gradients and a few steps of the model under the adapter with its linear
layers in NF4 (double quantisation), by Hugging Face transformers, bitsandbytes and PEFT.

    python3 make_qlora_goldens.py

Needs the packages of crates/xtask/parity/requirements.txt; the rows are those of make_goldens.py. All is computed in f32. The
sizes are multiples of 64: where blocks straddle rows, bitsandbytes 0.50.2 dequantises on a CPU what its own scales do not say.
"""

import json
import pathlib
import runpy
import shutil

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

HERE = pathlib.Path(__file__).resolve().parent
# By its path: it imports another module of its own name.
BASE = runpy.run_path(str(HERE / "make_goldens.py"))
LEARNING_RATE, MAX_GRAD_NORM = BASE["LEARNING_RATE"], BASE["MAX_GRAD_NORM"]
lora_parameters, loss_of, rows = BASE["lora_parameters"], BASE["loss_of"], BASE["rows"]
MODULES, llama = BASE["MODULES"], BASE["llama"]
OUT = HERE / "qlora"
CONFIG = llama.sizes(64, 128, 1, 4, 2, 97, rope_theta=1e4)
STEPS = 5


def quantised():
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        OUT / "model", quantization_config=config, dtype=torch.float32, attn_implementation="eager", device_map="cpu")
    linears = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(linears) == 7 * model.config.num_hidden_layers
    assert all(m.weight.quant_state.nested for m in linears)
    model = get_peft_model(model, LoraConfig(
        r=4, lora_alpha=16, lora_dropout=0.0, target_modules=MODULES, bias="none", task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        if "lora_" in name:
            scale = 0.1 if "lora_B" in name else parameter.shape[1] ** -0.5
            parameter.data = torch.randn(parameter.shape, generator=generator) * scale
    # In eval() bitsandbytes packs the weights anew for its CPU kernel; nothing here drops out.
    return model.train()


def main():
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    llama.write_model(OUT / "model", CONFIG, shards=1, seed=5)
    model, data = quantised(), list(rows())
    model.save_pretrained(OUT / "adapter")
    (OUT / "adapter" / "README.md").unlink(missing_ok=True)
    path = OUT / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "model", "target_modules": MODULES}
    llama.write_json(path, config)
    loss, count, _ = loss_of(model, data)
    loss.backward()
    tensors, squares = {}, 0.0
    for name, parameter in lora_parameters(model).items():
        squares += float(parameter.grad.double().pow(2).sum())
        tensors[f"grad.{name}"] = parameter.grad.clone()
    golden = {"loss": loss.item(), "target_tokens": count, "grad_norm": squares**0.5, "losses": [], "grad_norms": []}
    parameters = list(lora_parameters(model).values())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss, _, _ = loss_of(model, data)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        golden["losses"].append(loss.item())
        golden["grad_norms"].append(norm.item())
        optimizer.step()
    (OUT / "golden.json").write_text(json.dumps(golden, indent=1) + "\n")
    save_file(tensors, OUT / "golden.safetensors")


if __name__ == "__main__":
    main()
