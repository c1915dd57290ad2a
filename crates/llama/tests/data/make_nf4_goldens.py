#!/usr/bin/env python3
"""Writes nf4/golden.safetensors: weights, and what bitsandbytes makes of them in NF4 with double quantisation.

    python3 make_nf4_goldens.py

Needs the packages of crates/xtask/parity/requirements.txt. Weights are multiples of 1/256 and few enough that the mean of their
scales is exact in f32 in whichever order it is summed; their codes and scales do not depend on the machine then.
"""

import pathlib

import torch
import bitsandbytes.functional as F
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent / "nf4"


def weights(rows, columns, dtype, generator, spread):
    values = torch.randn(rows, columns, generator=generator) * spread
    # Rows of different size, so that scales spread over their whole range.
    values *= torch.logspace(-1, 0, rows)[:, None]
    return ((values * 256).round() / 256).clamp(-16, 16).to(dtype)


def main():
    HERE.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(11)
    cases = {
        "float32": weights(300, 192, torch.float32, generator, 2.0),
        "float16": weights(64, 128, torch.float16, generator, 2.0),
        "bfloat16": weights(96, 64, torch.bfloat16, generator, 2.0),
        # Blocks that straddle rows, and a short one at the end; an odd number of elements.
        "short": weights(11, 23, torch.float32, generator, 2.0),
        "zeros": torch.zeros(4, 64),
        # One block is zero, and the values of another lie half-way between levels.
        "edges": weights(4, 64, torch.float32, generator, 2.0),
        # All scales are equal to their mean.
        "equal": (torch.arange(256).reshape(4, 64) % 64 - 31.0) / 8,
    }
    cases["edges"][1] = 0
    code = F.get_4bit_type("nf4", device="cpu")
    cases["edges"][2, :15] = (code[:-1] + code[1:]) / 2
    cases["edges"][2, 15] = 1
    out = {}
    for name, weight in cases.items():
        codes, state = F.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        out[f"{name}.weight"] = weight
        out[f"{name}.codes"] = codes
        out[f"{name}.absmax"] = state.absmax
        out[f"{name}.nested_absmax"] = state.state2.absmax
        out[f"{name}.offset"] = state.offset.reshape(1)
        out[f"{name}.dequantised"] = F.dequantize_4bit(codes, state)
    out["quant_map"], out["nested_quant_map"] = state.code, state.state2.code
    save_file({name: t.clone().contiguous() for name, t in out.items()}, HERE / "golden.safetensors")


if __name__ == "__main__":
    main()
