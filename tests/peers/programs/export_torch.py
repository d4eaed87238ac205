"""``export_torch.py MODEL OUT.onnx``: the same encoder, pooled and normalised, through ``torch.onnx.export``."""

import sys

import torch
from transformers import AutoModel


class Encoder(torch.nn.Module):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=-1)


batch, length = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
example = torch.ones(2, 16, dtype=torch.int64)
torch.onnx.export(
    Encoder(sys.argv[1]), (example, example.clone()), sys.argv[2], dynamo=True,
    input_names=["input_ids", "attention_mask"], output_names=["sentence_embedding"],
    dynamic_shapes={"input_ids": {0: batch, 1: length}, "attention_mask": {0: batch, 1: length}},
)  # fmt: skip
