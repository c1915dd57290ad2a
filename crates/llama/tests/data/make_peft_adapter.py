#!/usr/bin/env python3
"""Writes `peft_adapter/`: an adapter of the model `untied/`, saved by PEFT, and weights that PEFT merged.

    python3 make_peft_adapter.py

Needs the packages of crates/xtask/parity/requirements.txt. With the same versions it writes the same values.
"""

import pathlib
import shutil

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

HERE = pathlib.Path(__file__).resolve().parent
OUT = HERE / "peft_adapter"


def main():
    torch.manual_seed(0)
    model = LlamaForCausalLM.from_pretrained(HERE / "untied", torch_dtype=torch.float32)
    # r differs from every size of the model; three of the seven linear layers, rsLoRA.
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "o_proj", "down_proj"],
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    # The base is given by name alone in what is saved; a path of this machine would not be right elsewhere.
    model.peft_config["default"].base_model_name_or_path = "untied"
    shutil.rmtree(OUT, ignore_errors=True)
    model.save_pretrained(OUT)
    (OUT / "README.md").unlink()
    merged = model.double().merge_and_unload().state_dict()
    kept = {f"model.layers.1.{module}.weight" for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")}
    save_file({name: merged[name].float().contiguous() for name in sorted(kept)}, OUT / "merged.safetensors")


if __name__ == "__main__":
    main()
