#!/usr/bin/env python3
"""A LLaMA in GGUF -> a Hugging Face folder in f32.

usage: gguf_llama_to_hf.py IN.gguf OUT_FOLDER          (needs pip's gguf and numpy)

Undoes llama.cpp's permutation of the rows of q and k. Writes config.json,
generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json and
special_tokens_map.json.
"""

import json
import os
import sys

import gguf
import numpy as np
from gguf.quants import dequantize

TENSORS = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# gguf's token type of control tokens.
CONTROL = 3


class Source:
    """The fields and tensors of a GGUF file."""

    def __init__(self, path):
        self.reader = gguf.GGUFReader(path)
        if self.field("general.architecture") != "llama":
            sys.exit(f"{path} holds no LLaMA")

    def field(self, name, default=None):
        field = self.reader.fields.get(name)
        return default if field is None else field.contents()

    def tensors(self):
        """Hugging Face's names and f32 values."""
        heads = {
            "attn_q": self.field("llama.attention.head_count"),
            "attn_k": self.field("llama.attention.head_count_kv"),
        }
        tensors = {}
        for tensor in self.reader.tensors:
            shape = [int(size) for size in reversed(tensor.shape)]
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
            if tensor.name in TENSORS:
                tensors[TENSORS[tensor.name]] = values
            elif tensor.name.startswith("blk."):
                _, layer, part, leaf = tensor.name.split(".")
                if part in heads:
                    values = unpermuted(values, heads[part])
                tensors[f"model.layers.{layer}.{LAYER_TENSORS[part]}.{leaf}"] = values
            else:
                sys.exit(f"unknown tensor {tensor.name}")
        return tensors


def unpermuted(weight, heads):
    """The inverse of llama.cpp's change from halves to pairs in each head."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def write_safetensors(path, tensors):
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name in sorted(tensors):
        size = tensors[name].size * 4
        shape = list(tensors[name].shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for name in sorted(tensors):
            file.write(np.ascontiguousarray(tensors[name], "<f4").tobytes())


def config(source, tied):
    eps = source.field("llama.attention.layer_norm_rms_epsilon")
    tokens = source.field("tokenizer.ggml.tokens")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **token_ids(source),
        "hidden_act": "silu",
        "hidden_size": source.field("llama.embedding_length"),
        "initializer_range": 0.041666666666666664,
        "intermediate_size": source.field("llama.feed_forward_length"),
        "max_position_embeddings": source.field("llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": source.field("llama.attention.head_count"),
        "num_hidden_layers": source.field("llama.block_count"),
        "num_key_value_heads": source.field("llama.attention.head_count_kv"),
        "pretraining_tp": 1,
        # GGUF stores it in f32: six digits give back the number that was meant.
        "rms_norm_eps": float(f"{eps:.6g}"),
        "rope_scaling": None,
        "rope_theta": float(source.field("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": source.field("llama.vocab_size") or len(tokens),
    }


def token_ids(source):
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{ours}_token_id": source.field(f"tokenizer.ggml.{theirs}_token_id")
            for ours, theirs in names.items()}


def added_token(content):
    return {"content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True}


def tokenizer(source, special):
    """Byte-level BPE; each digit by itself, then GPT-2's pattern."""
    tokens = source.field("tokenizer.ggml.tokens")
    kind = (source.field("tokenizer.ggml.model"), source.field("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        sys.exit(f"unknown kind of tokenizer: {kind}")
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **added_token(tokens[i])} for i in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {**byte_level, "add_prefix_space": False}]},
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": source.field("tokenizer.ggml.merges"),
        },
    }


def main():
    source, out = Source(sys.argv[1]), sys.argv[2]
    os.makedirs(out, exist_ok=True)

    def write(name, content):
        with open(os.path.join(out, name), "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=2)
            file.write("\n")

    tensors = source.tensors()
    write_safetensors(os.path.join(out, "model.safetensors"), tensors)
    write("config.json", config(source, tied="lm_head.weight" not in tensors))
    write("generation_config.json", {"_from_model_config": True, **token_ids(source)})

    tokens = source.field("tokenizer.ggml.tokens")
    types = source.field("tokenizer.ggml.token_type")
    special = [i for i, kind in enumerate(types) if kind == CONTROL]
    write("tokenizer.json", tokenizer(source, special))
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    named = {f"{ours}_token": tokens[source.field(f"tokenizer.ggml.{theirs}_token_id")]
             for ours, theirs in names.items()}
    write("special_tokens_map.json", named)
    write("tokenizer_config.json", {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): added_token(tokens[i]) for i in special},
        "additional_special_tokens": [tokens[i] for i in special if tokens[i].startswith("<|im_")],
        **named,
        "chat_template": source.field("tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": source.field("llama.context_length"),
        "tokenizer_class": "GPT2Tokenizer",
        "vocab_size": len(tokens),
    })
    count = sum(values.size for values in tensors.values())
    print(f"{len(tensors)} tensors, {count} parameters")


main()
