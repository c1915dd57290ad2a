#!/usr/bin/env python3
"""Our files and numbers against Hugging Face's libraries.

    check_parity.py --base DIR --adapter DIR --merged DIR --ids FILE [--tolerance X]
        loads the adapter in PEFT and the merged checkpoint in transformers, and compares weights and logits

    check_parity.py
        trains, merges and completes with our programs (on the PATH) and compares what they wrote: over stories260k, and
        over the model in the folder DROMEDARY_SMOLLM2; converts and quantises them, and reads the results with PyTorch and
        bitsandbytes; trains on conversations through chat templates

Prints a line per check, and exits 1 if one fails. FILE is a JSON array of arrays of token ids. Differences are given as
shares of the largest logit, or of the largest element of the tensor.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

import torch
from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

import check_chat
import check_results

ROOT = pathlib.Path(__file__).resolve().parents[3]
STORIES = ROOT / "crates" / "llama" / "tests" / "data" / "stories260k"
META_PROMPTS = ROOT / "prompts" / "dromedary_*prompt_distill.txt"
TOLERANCE = 1e-5
# Training must have changed the logits by more than this, else the comparison would say nothing.
LEAST_CHANGE = 1e-3
# Greedy ids may differ from the first token on whose two best logits are closer than this.
TIE = 1e-4


class Checks:
    def __init__(self):
        self.failed = 0

    def line(self, ok, text):
        self.failed += not ok
        print(f"{'ok    ' if ok else 'FAILED'}  {text}", flush=True)

    def within(self, what, difference, tolerance):
        # `not >`: NaN fails.
        self.line(difference <= tolerance, f"{what}: off by {difference:.1e}, allowed {tolerance:.0e}")


def load(folder):
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits_of(model, rows):
    return [model(torch.tensor([row])).logits[0] for row in rows]


def difference(ours, theirs):
    """The largest difference over all rows, as a share of the largest logit."""
    largest = max(float(t.abs().max()) for t in theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)) / largest


def worst_weight(ours, theirs):
    """The tensor that differs most, as a share of its largest element."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    shares = {n: float((ours[n] - t).abs().max() / t.abs().max().clamp(min=1e-30)) for n, t in theirs.items()}
    return max(shares.items(), key=lambda item: item[1])


def compare(checks, name, base, adapter, merged, rows, tolerance):
    """Our adapter in PEFT, and our merged checkpoint in transformers."""
    model = load(base)
    plain = logits_of(model, rows)
    model = PeftModel.from_pretrained(model, adapter).eval()
    unused = [n for n, p in model.named_parameters() if "lora_B" in n and float(p.abs().max()) == 0]
    checks.line(not unused, f"{name}: PEFT finds every lora_B of the adapter, none of them zero {unused[:3] or ''}")
    adapted = logits_of(model, rows)
    change = difference(plain, adapted)
    checks.line(change > LEAST_CHANGE, f"{name}: the adapter changes the logits by {change:.1e}")
    weights = {n: t.clone() for n, t in model.merge_and_unload().state_dict().items()}
    del model
    ours = load(merged)
    worst, share = worst_weight(ours.state_dict(), weights)
    checks.within(f"{name}: merged weights against PEFT's, the worst is {worst}", share, tolerance)
    got = logits_of(ours, rows)
    checks.within(f"{name}: logits of the merged checkpoint against base and adapter in PEFT", difference(got, adapted), tolerance)


def run(*command):
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, encoding="utf-8")
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} {command[1]}: exit code {done.returncode}")
    return done.stdout


QUESTIONS = ["Why is the sky dark at night?", "Name three uses of a brick.", "How do I boil an egg?", "What is seven times eight?"]
ANSWER = "Here is a short answer to \"{}\": it depends, but one can begin with what is known and go on from there."


def train_and_merge(checkpoint, folder):
    rows = [{"example_id": i + 1, "instruction": q, "input": "", "output": ANSWER.format(q)} for i, q in enumerate(QUESTIONS)]
    dataset = folder / "sft.json"
    dataset.write_text(json.dumps(rows))
    run("step3-principle-engraving", "train", "--checkpoint", checkpoint, "--dataset", dataset, "--output-dir", folder / "train",
        "--meta-prompt-pattern", META_PROMPTS, "--source-max-len", 192, "--target-max-len", 64, "--lora-r", 8,
        "--learning-rate", "5e-3", "--per-device-train-batch-size", 2, "--gradient-accumulation-steps", 1, "--max-steps", 4)
    adapter, merged = folder / "train" / "adapter", folder / "merged"
    run("llama", "merge", "--checkpoint", checkpoint, "--adapter", adapter, "--output", merged)
    return adapter, merged


def open_tokenizer(folder):
    """The file itself: transformers' own classes rebuild some tokenizers from their vocabulary, without the
    pre-tokenizer that the file names."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def greedy(model, ids, length):
    """Greedy ids, and how far the two best logits are apart at each, as a share of the largest."""
    out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=length, output_logits=True, return_dict_in_generate=True)
    margins = []
    for logits in out.logits:
        best = logits[0].topk(2).values
        margins.append(float((best[0] - best[1]) / logits.abs().max()))
    return out.sequences[0, len(ids):].tolist(), margins


def check_completion(checks, name, checkpoint, prompt, length):
    """What `llama complete` prints, against transformers' greedy text."""
    tokenizer = open_tokenizer(checkpoint)
    ids = tokenizer.encode(prompt).ids
    new, margins = greedy(load(checkpoint), ids, length)
    tie = next((i for i, margin in enumerate(margins) if margin < TIE), len(new))
    text = tokenizer.decode(ids + new)
    certain = tokenizer.decode(ids + new[:tie])
    start = len(tokenizer.decode(ids))
    want, certain = text[start:], certain[start:]
    got = run("llama", "complete", "--checkpoint", checkpoint, "--temperature", 0, "--max-gen-len", length, "--prompt", prompt)
    same = got.strip() == want.strip() if tie == len(new) else got.strip().startswith(certain.strip())
    checks.line(same, f"{name}: greedy completion, {len(new)} tokens{'' if same else f': {got!r} instead of {want!r}'}")


def in_hf_order(weight, heads):
    """Meta's rows of query or key heads, whose neighbours turn, as transformers wants them."""
    rows, columns = weight.shape
    return weight.view(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


META_NAMES = {
    "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
}
COLUMNS = ("attention.wo", "feed_forward.w2", "tok_embeddings")


def joined(parts, name):
    if parts[0].dim() == 1:
        assert all(torch.equal(part, parts[0]) for part in parts), name
        return parts[0]
    return torch.cat(parts, dim=1 if any(key in name for key in COLUMNS) else 0)


def check_meta(checks, name, checkpoint, shards):
    """Our files of Meta's layout in torch.load, with weights_only and as maps, against the weights in transformers."""
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "meta"
        run("llama", "convert", "--checkpoint", checkpoint, "--output", out, "--num-shards", shards)
        params = json.loads((out / "params.json").read_text())
        paths = [out / f"consolidated.{number:02}.pth" for number in range(shards)]
        files = [torch.load(path, weights_only=True) for path in paths]
        mapped = [torch.load(path, weights_only=True, mmap=True) for path in paths]
        same = all(torch.equal(a[key], b[key]) for a, b in zip(files, mapped) for key in a)
        checks.line(same, f"{name}: {shards} files of torch.load, the same as maps")
        weights = {key: joined([file[key] for file in files], key) for key in files[0]}
        model, wrong = load(checkpoint).state_dict(), []
        for hf_name, want in model.items():
            _, *middle = hf_name.removesuffix(".weight").split(".")
            if hf_name.startswith("model.layers."):
                meta = f"layers.{middle[1]}.{META_NAMES['.'.join(middle[2:])]}.weight"
            else:
                meta = {"model.embed_tokens.weight": "tok_embeddings.weight", "model.norm.weight": "norm.weight",
                        "lm_head.weight": "output.weight"}[hf_name]
            got = weights.pop(meta).float()
            heads = {"wq": params["n_heads"], "wk": params.get("n_kv_heads", params["n_heads"])}
            for key, count in heads.items():
                if meta.endswith(f"attention.{key}.weight"):
                    got = in_hf_order(got, count)
            if not torch.equal(got, want):
                wrong.append(meta)
        checks.line(not wrong and not weights, f"{name}: weights of {shards} files equal transformers' {wrong[:3] or ''}")


def check_converted(checks):
    """Checkpoints of Meta's layout, converted by us, in transformers: logits against those of their generator."""
    for folder in sorted((ROOT / "crates" / "llama" / "tests" / "data" / "meta").iterdir()):
        golden = load_file(folder / "golden.safetensors")
        with tempfile.TemporaryDirectory() as out:
            run("llama", "convert", "--checkpoint", folder, "--output", pathlib.Path(out) / "hf")
            got = logits_of(load(pathlib.Path(out) / "hf"), [golden["ids"].tolist()])
        checks.within(f"{folder.name}: converted, logits in transformers", difference(got, [golden["logits"]]), TOLERANCE)


def check_quantised(checks, name, checkpoint):
    """Our codes, scales and offsets against those that bitsandbytes makes of the same weights, and our files in its reader."""
    import bitsandbytes.functional as bnb

    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "nf4"
        run("llama", "quantize", "--nf4", "--checkpoint", checkpoint, "--output", out)
        tensors, base = load_file(out / "model.safetensors"), load(checkpoint).state_dict()
        wrong, count = [], 0
        for weight in (key.removesuffix(".absmax") for key in tensors if key.endswith(".weight.absmax")):
            codes, state = bnb.quantize_4bit(base[weight], blocksize=64, compress_statistics=True, quant_type="nf4")
            prefix = f"{weight}."
            ours = bnb.QuantState.from_dict({k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}, "cpu")
            equal = (torch.equal(tensors[weight], codes) and torch.equal(ours.absmax, state.absmax)
                     and torch.equal(ours.state2.absmax, state.state2.absmax) and float(ours.offset) == float(state.offset)
                     and torch.equal(bnb.dequantize_4bit(tensors[weight], ours), bnb.dequantize_4bit(codes, state)))
            count += 1
            if not equal:
                wrong.append(weight)
        checks.line(count > 0 and not wrong, f"{name}: {count} weights in NF4 equal bitsandbytes' {wrong[:3] or ''}")


def check_programs(checks):
    check_converted(checks)
    models = [("stories260k", STORIES, "Once upon a time, there was a little girl")]
    smollm2 = os.environ.get("DROMEDARY_SMOLLM2")
    if smollm2:
        models.append(("SmolLM2", pathlib.Path(smollm2), "The three longest rivers of the world are the"))
    else:
        print("skipped  SmolLM2: DROMEDARY_SMOLLM2 is not set")
    for name, checkpoint, prompt in models:
        with tempfile.TemporaryDirectory() as folder:
            adapter, merged = train_and_merge(checkpoint, pathlib.Path(folder))
            tokenizer = open_tokenizer(merged)
            rows = [tokenizer.encode(text).ids for text in [prompt, *QUESTIONS, " ".join(map(ANSWER.format, QUESTIONS))]]
            compare(checks, name, checkpoint, adapter, merged, rows, TOLERANCE)
            check_completion(checks, f"{name} merged", merged, prompt, 32)
            check_results.check(checks, run, name, checkpoint, pathlib.Path(folder))
            check_chat.check(checks, run, name, checkpoint, pathlib.Path(folder))
        check_completion(checks, name, checkpoint, prompt, 64)
        for shards in (1, 2) if name == "stories260k" else (1, 3):
            check_meta(checks, name, checkpoint, shards)
        check_quantised(checks, name, checkpoint)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=pathlib.Path, help="HF checkpoint folder that the adapter belongs to")
    parser.add_argument("--adapter", type=pathlib.Path, help="PEFT adapter folder")
    parser.add_argument("--merged", type=pathlib.Path, help="HF checkpoint folder with the adapter added in")
    parser.add_argument("--ids", type=pathlib.Path, help="JSON array of arrays of token ids")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="largest share that may differ (default 1e-5)")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    checks = Checks()
    folders = (args.base, args.adapter, args.merged, args.ids)
    if all(folders):
        rows = json.loads(args.ids.read_text())
        compare(checks, args.base.name, args.base, args.adapter, args.merged, rows, args.tolerance)
    elif any(folders):
        parser.error("--base, --adapter, --merged and --ids are given together or not at all")
    else:
        check_programs(checks)
    print(f"{checks.failed} checks failed" if checks.failed else "all equal")
    sys.exit(1 if checks.failed else 0)


if __name__ == "__main__":
    main()
