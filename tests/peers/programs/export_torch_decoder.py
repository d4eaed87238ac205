"""``export_torch_decoder.py MODEL OUT.onnx``: a decoder with its key/value cache through ``torch.onnx.export``."""

import sys

import torch
from transformers import AutoModelForCausalLM, DynamicCache


class Decoder(torch.nn.Module):
    """The cache goes in and comes out flat (key, value of each layer), as runtimes want it."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        found = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        present = [tensor for layer in found.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return found.logits, *present


decoder = Decoder(sys.argv[1])
config = decoder.model.config
size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
past = [torch.zeros(2, config.num_key_value_heads, 5, size) for _ in range(2 * config.num_hidden_layers)]
ids = torch.ones(2, 3, dtype=torch.int64)
mask = torch.ones(2, 8, dtype=torch.int64)
free = torch.export.Dim.DYNAMIC
names = [f"{layer}.{what}" for layer in range(config.num_hidden_layers) for what in ("key", "value")]
torch.onnx.export(
    decoder, (ids, mask, torch.arange(5, 8).repeat(2, 1), past), sys.argv[2], dynamo=True,
    input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in names)],
    output_names=["logits", *(f"present.{name}" for name in names)],
    dynamic_shapes={
        "input_ids": {0: free, 1: free}, "attention_mask": {0: free, 1: free}, "position_ids": {0: free, 1: free},
        "past": [{0: free, 2: free} for _ in past],
    },
)  # fmt: skip
