"""``encode_plain.py MODEL TEXTS.json OUT.npy``: mean-pooled unit vectors of texts, by transformers alone."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

folder, texts, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), sys.argv[3]
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
found = []
with torch.no_grad():
    for begin in range(0, len(texts), 32):
        batch = tokenizer(
            texts[begin : begin + 32], padding=True, truncation=True, max_length=128, return_tensors="pt"
        )  # fmt: skip
        hidden = model(**batch).last_hidden_state
        weight = batch["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden * weight).sum(1) / weight.sum(1)
        found.append(torch.nn.functional.normalize(pooled, dim=-1))
np.save(out, torch.cat(found).numpy())
