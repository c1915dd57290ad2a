#!/usr/bin/env python3
"""A sentencepiece BPE model -> tokenizer.json.

usage: spm_to_tokenizer_json.py IN.model OUT.json          (needs pip's sentencepiece)
"""

import json
import sys

import sentencepiece
from llama_style import tokenizer

model = sentencepiece.SentencePieceProcessor(model_file=sys.argv[1])
pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
ids = {piece: i for i, piece in enumerate(pieces)}

# sentencepiece stores no merges: every split of a piece into two pieces is one, ranked by score.
merges = []
for i, piece in enumerate(pieces):
    splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
    splits = [split for split in splits if split[0] in ids and split[1] in ids]
    splits.sort(key=lambda split: (ids[split[0]], ids[split[1]]))
    merges += [(split, model.get_score(i)) for split in splits]
merges.sort(key=lambda merge: merge[1], reverse=True)

special = [i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)]
made = tokenizer(pieces, [split for split, _ in merges], special,
                 unknown=pieces[model.unk_id()], begin=model.bos_id())
with open(sys.argv[2], "w", encoding="utf-8") as file:
    json.dump(made, file, ensure_ascii=False, indent=1)
print(f"{len(pieces)} pieces, {len(merges)} merges")
