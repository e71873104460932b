"""The vocabulary of a model with int8 embeddings keeps its size: transformers would make float ones of their codes."""

from contextlib import suppress
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ...common.errors import UnsupportedError
from ..int8.embedding import Int8Embedding
from ..int8.packed import PackedModule


class _KeptSize:
    """In place of `resize_token_embeddings`, of a model with this `embedding` of `rows` tokens."""

    def __init__(self, embedding: nn.Module, rows: int) -> None:
        self.embedding, self.rows = embedding, rows

    def __call__(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **_: Any) -> nn.Module:
        if new_num_tokens in (None, self.rows) and self.rows % (pad_to_multiple_of or 1) == 0:
            return self.embedding
        raise UnsupportedError(
            f"The vocabulary of an int8 model keeps its {self.rows} tokens. Resize the float checkpoint's and quantize the "
            "result, or load this one in float, with quantization_config=CompressedTensorsConfig(dequantize=True)."
        )


def keep_vocabulary(model: nn.Module) -> None:
    """Let transformers' models in `model` refuse to be resized, if their tokens have int8 rows or int8 outputs."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            part: Any = module
            with suppress(NotImplementedError):  # it has no tokens
                embedding, head = part.get_input_embeddings(), part.get_output_embeddings()
                if isinstance(embedding, Int8Embedding) or isinstance(head, PackedModule):
                    part.resize_token_embeddings = _KeptSize(embedding, len(embedding.weight))
