"""Looking at a model leaves it as it was."""

from typing import Any

import pytest
import torch
from support.models import quantized, relative_error, token_batches
from torch import Tensor, nn
from transformers import BigBirdConfig, BigBirdForSequenceClassification

from hfq.config import PostTrainingQuantConfig
from hfq.quantization import fit
from hfq.runtime.fusion.fuse import fuse
from hfq.runtime.fusion.snapshot import unchanged
from hfq.tuning.candidates import Candidate


def test_a_model_that_gives_up_sparse_attention_for_short_texts_keeps_it() -> None:
    """And answers long ones as before it was fused."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BigBirdConfig(**sizes, vocab_size=200, max_position_embeddings=256, block_size=4, num_random_blocks=1)
    batches = token_batches(1, rows=2, length=128)
    model: Any = quantized(BigBirdForSequenceClassification(config).eval(), Candidate("static"), batches)
    with torch.inference_mode():
        before = model(**batches[0]).logits
        fuse(model)
        assert model.bert.attention_type == "block_sparse"
        assert type(model.bert.encoder.layer[0].attention.self).__name__ == "BigBirdBlockSparseAttention"
        assert relative_error(model(**batches[0]).logits, before) < 0.02
        assert sum(layer.shared_matmul is not None for layer in model.modules() if hasattr(layer, "shared_matmul")) == 6


def test_fit_without_data_leaves_sparse_attention_to_the_model_and_to_what_it_makes() -> None:
    """It looks at both with a short example of transformers' own."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BigBirdConfig(**sizes, vocab_size=200, max_position_embeddings=256, block_size=4, num_random_blocks=1)
    model = BigBirdForSequenceClassification(config).eval()
    with pytest.warns(UserWarning, match="without tuning"):
        int8 = fit(model, PostTrainingQuantConfig(approach="dynamic"))
    assert [m.bert.attention_type for m in (model, int8)] == ["block_sparse", "block_sparse"]


class Counting(nn.Module):
    """Changes itself in every way."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.calls, self.seen, self.table = nn.Linear(4, 4), 0, list[int](), {"a": 1}
        self.parts = nn.ModuleList([nn.ReLU()])
        self.register_buffer("sum", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        self.table["b"] = 2
        self.sum += torch.rand(4)
        self.new = True
        self.parts[0] = nn.Tanh()
        self.dense = nn.Linear(4, 4)
        answer: Tensor = self.dense(x)
        return answer


def test_whatever_a_forward_changes_in_a_model_is_put_back() -> None:
    model = Counting()
    dense, numbers = model.dense, torch.get_rng_state()
    with unchanged(model) as found:
        model(torch.ones(1, 4))
    assert found.changed
    assert (model.calls, model.seen, model.table, hasattr(model, "new")) == (0, [], {"a": 1}, False)
    assert model.dense is dense and isinstance(model.parts[0], nn.ReLU) and not model.sum.any()
    assert torch.equal(torch.get_rng_state(), numbers)
    with unchanged(model.dense) as found:
        model.dense(torch.ones(1, 4))
    assert not found.changed


def test_a_set_is_as_it_was_whatever_the_order_of_its_copy() -> None:
    model = Counting()
    model.names = set()
    for number in range(6):
        model.names.add(8 * number)
    assert list(model.names) != list(model.names.copy())
    with unchanged(model) as found:
        pass
    assert not found.changed
