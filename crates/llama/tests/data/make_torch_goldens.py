#!/usr/bin/env python3
"""Writes the files of torch/: the same tensors as the installed PyTorch saves them, in every form that it has.

    python3 make_torch_goldens.py

Run with torch 1.13.1 and with the torch of crates/xtask/parity/requirements.txt; expected.safetensors, by the newer one, has the
values. They are made without random numbers, so that both versions save the same.
"""

import collections
import pathlib

import torch

HERE = pathlib.Path(__file__).resolve().parent / "torch"


def ramp(*shape):
    count = torch.Size(shape).numel()
    return ((torch.arange(count, dtype=torch.float32) * 7 % 31 - 15) / 8).reshape(shape)


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(5, 3)
        self.register_buffer("count", torch.tensor(7))
        with torch.no_grad():
            self.inner.weight.copy_(ramp(3, 5))
            self.inner.bias.copy_(ramp(3))


def tensors():
    half = ramp(4, 6).half()
    return {
        "parameter": torch.nn.Parameter(ramp(3, 5)),
        "half": half,
        "columns": half[:, 2:4],  # a view: the whole matrix is stored, once
        "rows": half[1:3],
        "bfloat16": ramp(2, 3, 4).bfloat16(),
        "vector": ramp(7),
        "second": ramp(9)[1:],
        "double": ramp(2, 2).double(),
        "scalar": torch.tensor(42),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.empty(0, 3),
    }


def main():
    version = ".".join(torch.__version__.split(".")[:2])
    values = tensors()
    for protocol in (2, 3, 4, 5):
        torch.save(values, HERE / f"torch{version}-protocol{protocol}.pth", pickle_protocol=protocol)
    torch.save(collections.OrderedDict(values), HERE / f"torch{version}-legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(Small().state_dict(), HERE / f"torch{version}-state-dict.pth")
    torch.save({"turned": ramp(4, 6).t()}, HERE / f"torch{version}-turned.pth")
    if int(version.split(".")[0]) > 1:
        from safetensors.torch import save_file

        values |= {f"state.{name}": tensor for name, tensor in Small().state_dict().items()}
        save_file({name: t.detach().clone().contiguous() for name, t in values.items()}, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
