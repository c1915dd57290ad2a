#!/usr/bin/env python3
"""npm's llama-tokenizer-js (LLaMA-2's vocabulary and merges, in base64) -> tokenizer.json.

usage: llama_tokenizer_js_to_json.py IN.tgz OUT.json
"""

import base64
import json
import re
import struct
import sys
import tarfile

from llama_style import tokenizer

with tarfile.open(sys.argv[1]) as archive:
    script = archive.extractfile("package/llama-tokenizer.js").read().decode("utf-8")

blobs = [base64.b64decode(text) for text in re.findall(r"[\"'`]([A-Za-z0-9+/=]{50000,})[\"'`]", script)]
vocabulary = [blob for blob in blobs if blob.startswith(b"<unk>\n")]
pairs = [blob for blob in blobs if not blob.startswith(b"<unk>\n")]
if len(vocabulary) != 1 or len(pairs) != 1:
    sys.exit("expected one vocabulary and one list of merges")

pieces = vocabulary[0].decode("utf-8").split("\n")
ids = struct.unpack(f"<{len(pairs[0]) // 2}H", pairs[0])
merges = [(pieces[left], pieces[right]) for left, right in zip(ids[::2], ids[1::2])]
if (len(pieces), len(merges)) != (32000, 61249):
    sys.exit(f"unexpected sizes: {len(pieces)} pieces, {len(merges)} merges")

made = tokenizer(pieces, merges, special=range(3), unknown="<unk>", begin=1)
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(made, file, ensure_ascii=False, indent=1)
print(f"{len(pieces)} pieces, {len(merges)} merges")
