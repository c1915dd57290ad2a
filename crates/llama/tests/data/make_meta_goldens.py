#!/usr/bin/env python3
"""Writes the models of meta/ in the layout of Meta's releases and of Dromedary's padded checkpoints, with golden logits.

    python3 make_meta_goldens.py

Needs the packages of crates/xtask/parity/requirements.txt. The logits are computed here in f64 from the whole, unpadded weights,
with the rotation as a product of complex numbers over neighbouring features; no code of Hugging Face takes part.
"""

import json
import math
import pathlib
import shutil

import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent / "meta"
TOKENS = 24


def ffn_width(params):
    width = int(2 * 4 * params["dim"] / 3)
    width = int(params.get("ffn_dim_multiplier", 1) * width)
    return math.ceil(width / params["multiple_of"]) * params["multiple_of"]


def random_weights(params, vocab, dtype, generator):
    """The whole model in Meta's names and order."""
    dim, heads = params["dim"], params["n_heads"]
    kv, head_dim, ffn = params.get("n_kv_heads", heads), dim // heads, ffn_width(params)

    def matrix(rows, columns, gain=1.0):
        return (torch.randn(rows, columns, generator=generator) * gain / columns**0.5).to(dtype)

    def norm():
        return (0.5 + torch.rand(dim, generator=generator)).to(dtype)

    weights = {"tok_embeddings.weight": torch.randn(vocab, dim, generator=generator).to(dtype)}
    for layer in range(params["n_layers"]):
        prefix = f"layers.{layer}."
        weights |= {
            prefix + "attention.wq.weight": matrix(heads * head_dim, dim, 1.6),
            prefix + "attention.wk.weight": matrix(kv * head_dim, dim, 1.6),
            prefix + "attention.wv.weight": matrix(kv * head_dim, dim),
            prefix + "attention.wo.weight": matrix(dim, heads * head_dim, 2.0),
            prefix + "feed_forward.w1.weight": matrix(ffn, dim, 1.5),
            prefix + "feed_forward.w2.weight": matrix(dim, ffn),
            prefix + "feed_forward.w3.weight": matrix(ffn, dim, 1.5),
            prefix + "attention_norm.weight": norm(),
            prefix + "ffn_norm.weight": norm(),
        }
    return weights | {"norm.weight": norm(), "output.weight": matrix(vocab, dim, 2.0)}


def scaled(frequencies):
    """LLaMA 3.1's: low frequencies by 8, those between blended."""
    out = []
    for frequency in frequencies.tolist():
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            out.append(frequency)
        elif wavelength > 8192:
            out.append(frequency / 8)
        else:
            smooth = (8192 / wavelength - 1) / 3
            out.append((1 - smooth) * frequency / 8 + smooth * frequency)
    return torch.tensor(out, dtype=torch.float64)


def logits(params, weights, ids):
    weights = {name: tensor.double() for name, tensor in weights.items()}
    heads = params["n_heads"]
    kv, head_dim = params.get("n_kv_heads", heads), params["dim"] // heads
    frequencies = params.get("rope_theta", 10000.0) ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    if params.get("use_scaled_rope"):
        frequencies = scaled(frequencies)
    angles = torch.arange(len(ids)).double()[:, None] * frequencies
    turns = torch.polar(torch.ones_like(angles), angles)[:, None]

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + params["norm_eps"]).rsqrt() * weights[name]

    def turned(x):
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    hidden = torch.full((len(ids), len(ids)), -math.inf, dtype=torch.float64).triu(1)
    x = weights["tok_embeddings.weight"][ids]
    for layer in range(params["n_layers"]):
        w = lambda name: weights[f"layers.{layer}.{name}.weight"]
        y = norm(x, f"layers.{layer}.attention_norm.weight")
        q = turned((y @ w("attention.wq").T).view(-1, heads, head_dim))
        k = turned((y @ w("attention.wk").T).view(-1, kv, head_dim)).repeat_interleave(heads // kv, dim=1)
        v = (y @ w("attention.wv").T).view(-1, kv, head_dim).repeat_interleave(heads // kv, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / head_dim**0.5 + hidden
        y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + y @ w("attention.wo").T
        y = norm(x, f"layers.{layer}.ffn_norm.weight")
        gate = y @ w("feed_forward.w1").T
        x = x + (gate * gate.sigmoid() * (y @ w("feed_forward.w3").T)) @ w("feed_forward.w2").T
    return norm(x, "norm.weight") @ weights["output.weight"].T


def grown(tensor, rows, columns):
    """Zeros behind the rows and columns."""
    return torch.nn.functional.pad(tensor, (0, columns - tensor.shape[1], 0, rows - tensor.shape[0]))


def padded(params, weights, qkv_dim, ffn_dim, vocab):
    """As Dromedary's converter pads: K/V heads repeated, then zero heads; zero columns and rows behind widths and vocabulary."""
    dim, head_dim = params["dim"], params["dim"] // params["n_heads"]
    repeats = params["n_heads"] // params["n_kv_heads"]
    out = {}
    for name, tensor in weights.items():
        if ".wk." in name or ".wv." in name:
            tensor = tensor.view(-1, head_dim, dim).repeat_interleave(repeats, dim=0).reshape(-1, dim)
        if any(part in name for part in (".wq.", ".wk.", ".wv.")):
            tensor = grown(tensor, qkv_dim, dim)
        elif ".wo." in name:
            tensor = grown(tensor, dim, qkv_dim)
        elif ".w1." in name or ".w3." in name:
            tensor = grown(tensor, ffn_dim, dim)
        elif ".w2." in name:
            tensor = grown(tensor, dim, ffn_dim)
        elif tensor.dim() == 2:
            tensor = grown(tensor, vocab, dim)
        out[name] = tensor
    return out


def cut(tensor, dim, count, unit):
    """Slices of equal size, rounded up to the unit; the last one may be shorter."""
    size = math.ceil(math.ceil(tensor.shape[dim] / count) / unit) * unit
    return [part.clone() for part in tensor.split(size, dim)]


def dimension(name, embedding):
    if ".wo." in name or ".w2." in name:
        return 1
    return embedding if name.startswith("tok_embeddings") else 0


def write(name, params, vocab, dtype, shards, embedding, seed, pad=None, extra=None):
    folder = HERE / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(params, vocab, dtype, generator)
    ids = torch.randint(0, vocab, (TOKENS,), generator=generator)
    save_file({"ids": ids, "logits": logits(params, weights, ids).float()}, folder / "golden.safetensors")
    unit = 1
    if pad:
        weights, unit = padded(params, weights, **pad), 8
        params = {key: value for key, value in params.items() if key != "n_kv_heads"}
        params |= {"qkv_dim": pad["qkv_dim"], "ffn_dim": pad["ffn_dim"], "model_vocab_size": pad["vocab"]}
    files = [dict(extra or {}) for _ in range(shards)]
    for tensor_name, tensor in weights.items():
        if tensor.dim() == 1:
            parts = [tensor] * shards
        else:
            head_unit = params["dim"] // params["n_heads"] if "attention.w" in tensor_name else unit
            parts = cut(tensor, dimension(tensor_name, embedding), shards, head_unit)
        assert len(parts) == shards, (tensor_name, tensor.shape)
        for file, part in zip(files, parts):
            file[tensor_name] = part
    for number, file in enumerate(files):
        torch.save(file, folder / f"consolidated.{number:02}.pth")
    (folder / "params.json").write_text(json.dumps(params) + "\n")


def main():
    freqs = {"rope.freqs": torch.ones(4).half()}
    write("grouped", {"dim": 48, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 90, "multiple_of": 8, "norm_eps": 1e-5},
          90, torch.float16, 2, 1, 1, extra=freqs)
    write("vocabulary_rows", {"dim": 40, "n_layers": 2, "n_heads": 5, "vocab_size": -1, "multiple_of": 10, "ffn_dim_multiplier": 1.3,
                              "norm_eps": 1e-6, "rope_theta": 500000.0, "use_scaled_rope": True},
          105, torch.bfloat16, 5, 0, 2)
    write("single", {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 61, "multiple_of": 32, "norm_eps": 1e-6, "max_batch_size": 32},
          61, torch.float32, 1, 1, 3)
    write("padded", {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 50, "multiple_of": 8, "norm_eps": 1e-5},
          50, torch.float16, 3, 0, 4, pad={"qkv_dim": 48, "ffn_dim": 104, "vocab": 64})


if __name__ == "__main__":
    main()
