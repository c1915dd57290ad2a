#!/usr/bin/env python3
"""Writes the models and golden values of this folder with Hugging Face transformers (README.md has the layout).

    python3 make_goldens.py [--only NAME ...] [--smollm2 DIR]

Needs the packages of crates/xtask/parity/requirements.txt. With the same versions it writes the same bytes.

transformers computes norms and softmax in f32 whatever the model's dtype is; here both are replaced by plain f64
versions. Rotary angles stay as transformers makes them (f32 products of f32 frequencies and positions): that rounding
is a part of the model, and at position 600 it moves logits by more than the tests allow.
"""

import argparse
import json
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama import modeling_llama

HERE = pathlib.Path(__file__).resolve().parent
SHORT, LONG, GREEDY = 12, 600, 64
# Greedy ids are only worth comparing where no two logits come near each other, relative to the largest one.
LEAST_MARGIN = 1e-3


class Float64Norm(nn.Module):
    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))


def float64_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    repeats = module.num_key_value_groups
    key, value = (modeling_llama.repeat_kv(t, repeats) for t in (key, value))
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def load(folder):
    """The model in f64, with nothing computed in less but the rotary angles."""
    modeling_llama.LlamaRMSNorm.forward = Float64Norm.forward
    modeling_llama.eager_attention_forward = float64_attention
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    assert all(p.dtype == torch.float64 for p in model.parameters())
    return model.eval()


# ---- random models ----

BASE = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02,
    "max_position_embeddings": 1024, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "float32",
    "use_cache": True,
}


def sizes(hidden, intermediate, layers, heads, kv_heads, vocab, **more):
    return BASE | {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocab,
    } | more


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


def newer(config, **rope):
    """The same configuration as transformers 5 writes it."""
    config = dict(config)
    for key in ("rope_scaling", "pretraining_tp"):
        del config[key]
    config["dtype"] = config.pop("torch_dtype")
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), **rope}
    return config


MODELS = {
    # name: (configuration, number of shards)
    "untied": (sizes(42, 90, 2, 6, 2, 101, head_dim=10, rms_norm_eps=1e-6, rope_theta=1e5), 1),
    "sharded": (sizes(40, 108, 3, 5, 5, 131), 3),
    "bf16": (sizes(64, 136, 2, 4, 2, 96, torch_dtype="bfloat16"), 1),
    "llama3_rope": (newer(sizes(54, 72, 2, 6, 3, 97, head_dim=16, tie_word_embeddings=True), **LLAMA3), 1),
    "linear_rope": (sizes(48, 80, 2, 4, 1, 103, rope_scaling={"type": "linear", "factor": 4.0}), 1),
}


def random_tensors(config, generator):
    """Weights large enough that attention is sharp and every layer matters; norms are not all ones."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim", hidden // heads)

    def matrix(rows, columns, gain=1.0):
        return torch.randn(rows, columns, generator=generator) * (gain / columns**0.5)

    def norm():
        return 0.5 + torch.rand(hidden, generator=generator)

    tensors = {"model.embed_tokens.weight": torch.randn(config["vocab_size"], hidden, generator=generator)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": norm(),
            prefix + "self_attn.q_proj.weight": matrix(heads * head_dim, hidden, 1.6),
            prefix + "self_attn.k_proj.weight": matrix(kv_heads * head_dim, hidden, 1.6),
            prefix + "self_attn.v_proj.weight": matrix(kv_heads * head_dim, hidden),
            prefix + "self_attn.o_proj.weight": matrix(hidden, heads * head_dim, 2.0),
            prefix + "post_attention_layernorm.weight": norm(),
            prefix + "mlp.gate_proj.weight": matrix(inner, hidden, 1.5),
            prefix + "mlp.up_proj.weight": matrix(inner, hidden, 1.5),
            prefix + "mlp.down_proj.weight": matrix(hidden, inner),
        }
    tensors["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = matrix(config["vocab_size"], hidden, 2.0)
    return tensors


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_model(folder, config, shards, seed):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2})
    tensors = random_tensors(config, torch.Generator().manual_seed(seed))
    if "bfloat16" in (config.get("torch_dtype"), config.get("dtype")):
        tensors = {name: t.bfloat16() for name, t in tensors.items()}
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        # Dealt out in turn, so that no layer lies in one file.
        part = {name: tensors[name] for name in names[shard::shards]}
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= {name: file for name in part}
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


# ---- golden values ----

def greedy(model, prompt):
    """Greedy ids without stop at EOS, and the least difference between the two best logits over the largest."""
    ids, cache, fed, margin = [], None, prompt, float("inf")
    for _ in range(GREEDY):
        out = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        logits = out.logits[0, -1]
        best = logits.topk(2)
        margin = min(margin, float((best.values[0] - best.values[1]) / logits.abs().max()))
        fed = [int(best.indices[0])]
        ids += fed
    return ids, margin


def sampled(folder, prompt, length, seed):
    """The prompt and what the model itself goes on with: a long prompt of its own kind."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(seed)
    ids = model.generate(torch.tensor([prompt]), do_sample=True, max_length=length, min_length=length, top_k=0)
    return ids[0].tolist()


def long_positions(length):
    return sorted({0, 1, length // 4, length // 2, length - 2, length - 1})


def golden(model, short, long, full_logits):
    """The tensors of golden.safetensors. With `full_logits` every position of the short prompt and some of the long
    one are stored; else (a large vocabulary) the last positions, and the best of some others."""
    logits = {"short": model(torch.tensor([short])).logits[0], "long": model(torch.tensor([long])).logits[0]}
    if full_logits:
        positions = {"short": list(range(len(short))), "long": long_positions(len(long))}
    else:
        positions = {"short": [len(short) - 1], "long": [len(long) - 1]}
    out = {}
    for name, ids in (("short", short), ("long", long)):
        out[f"{name}.ids"] = torch.tensor(ids)
        out[f"{name}.positions"] = torch.tensor(positions[name])
        out[f"{name}.logits"] = logits[name][positions[name]].float()
        if not full_logits:
            at = list(range(len(ids) - 1)) if name == "short" else long_positions(len(ids))[:-1]
            best = logits[name][at].topk(32)
            out[f"{name}.top_positions"] = torch.tensor(at)
            out[f"{name}.top_ids"] = best.indices
            out[f"{name}.top_logits"] = best.values.float()
    ids, margin = greedy(model, short)
    out["greedy.ids"] = torch.tensor(ids)
    return out, margin


def check_sensitivity(folder, config, long, logits):
    """The scaling must show in the golden values by far more than a test's tolerance."""
    model = load(folder)
    plain = {"rope_type": "default", "rope_theta": model.config.rope_parameters["rope_theta"]}
    if model.config.rope_parameters["rope_type"] == "default":
        return
    model.config.rope_parameters = plain
    model.model.rotary_emb = modeling_llama.LlamaRotaryEmbedding(model.config)
    other = model(torch.tensor([long])).logits[0, -1].float()
    assert (other - logits[-1]).abs().max() > 0.05 * logits.abs().max(), folder


def report(name, tensors, margin, model):
    ids = tensors["long.ids"].tolist()
    f32 = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa")
    got = f32(torch.tensor([ids])).logits[0][tensors["long.positions"]]
    want = tensors["long.logits"]
    error = float((got - want).abs().max() / want.abs().max())
    print(f"{name}: prompts of {len(tensors['short.ids'])} and {len(ids)} tokens, greedy margin {margin:.1e}, "
          f"transformers in f32 is off by {error:.1e} x max|logit|")


def make_random(name):
    config, shards = MODELS[name]
    folder = HERE / name
    for seed in range(1000):
        write_model(folder, config, shards, seed)
        model = load(folder)
        generator = torch.Generator().manual_seed(seed)
        short, long = (torch.randint(3, config["vocab_size"], (n,), generator=generator).tolist() for n in (SHORT, LONG))
        tensors, margin = golden(model, short, long, full_logits=True)
        if margin > LEAST_MARGIN and len(set(tensors["greedy.ids"].tolist())) > 8:
            break
    else:
        raise SystemExit(f"{name}: no seed has clear greedy ids")
    check_sensitivity(folder, config, long, tensors["long.logits"])
    save_file(tensors, folder / "golden.safetensors")
    report(name, tensors, margin, folder)
    size = sum(f.stat().st_size for f in folder.glob("model*"))
    assert size < 300_000, (name, size)


def make_real(name, model_folder, prompts, length, full_logits):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model_folder / "tokenizer.json"))
    model = load(model_folder)
    for prompt in prompts:
        short = tokenizer.encode(prompt).ids
        long = sampled(model_folder, short, length, seed=7)
        assert len(long) == length
        tensors, margin = golden(model, short, long, full_logits)
        if margin > LEAST_MARGIN:
            break
    else:
        raise SystemExit(f"{name}: no prompt has clear greedy ids")
    (HERE / name).mkdir(exist_ok=True)
    save_file(tensors, HERE / name / "golden.safetensors")
    report(name, tensors, margin, model_folder)


STORIES = ["Once upon a time, a small red boat", "Tom had a dog. One day the dog", "The sun was hot and Lily"]
QUESTIONS = [
    "The three longest rivers of the world are the",
    "A simple recipe for bread needs flour, water, salt and",
    "In 1969 two men walked on the moon. Their names were",
]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[*MODELS, "stories260k", "smollm2"])
    parser.add_argument("--smollm2", type=pathlib.Path, help="HF folder of SmolLM2-135M-Instruct in f32; without it, left out")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    for name in MODELS:
        if name in args.only:
            make_random(name)
    if "stories260k" in args.only:
        make_real("stories260k", HERE / "stories260k", STORIES, 512, full_logits=True)
    if "smollm2" in args.only and args.smollm2:
        make_real("smollm2", args.smollm2, QUESTIONS, LONG, full_logits=False)


if __name__ == "__main__":
    main()
