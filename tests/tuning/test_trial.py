"""Looking at a model leaves it as it was."""

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
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


@dataclass
class Memory:
    calls: int = 0
    sizes: list[int] = field(default_factory=list)


class Remembering(nn.Module):
    """Keeps what it saw deep inside of what it holds, and on a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.added = nn.Linear(16, 16), nn.Linear(16, 4), nn.ModuleList()
        self.nested: dict[str, list[Any]] = {"seen": [{}]}
        self.queue, self.memory, self.numbers = deque[int](maxlen=3), Memory(), np.zeros(2)
        self.first.calls = 0
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        self.nested["seen"][0][len(self.nested["seen"][0])] = x
        self.queue.append(len(x))
        self.memory.calls += 1
        self.memory.sizes.append(len(x))
        self.numbers += 1
        self.first.calls += 1
        self.added.append(nn.Identity())
        self.mean.mul_(0.9).add_(x.mean(0))
        answer: Tensor = self.last(self.first(x).relu())
        return answer

    @property
    def state(self) -> Any:
        sizes = (len(self.nested["seen"][0]), len(self.queue), len(self.memory.sizes), len(self.added))
        return sizes, self.memory.calls, self.numbers.tolist(), self.first.calls, self.mean.tolist()


@pytest.mark.parametrize("calibrated_by", ["data", "function"])
def test_fit_leaves_what_a_model_remembers_as_it_was_in_both_models(calibrated_by: str) -> None:
    model, batches = Remembering(), [torch.randn(4, 16) for _ in range(2)]

    def run(which: nn.Module) -> float:
        return sum(which(batch).mean().item() for batch in batches)

    before, conf = model.state, PostTrainingQuantConfig(approach="static")
    data: Any = {"calib_dataloader": batches} if calibrated_by == "data" else {"calib_func": run}
    int8 = fit(model, conf, **data, eval_func=lambda which: run(which) * 0)
    assert (model.state, int8.state) == (before, before)
    int8(batches[0])
    assert model.state == before
    assert int8.state[1:4] == (1, [1.0, 1.0], 1)


def test_a_set_is_as_it_was_whatever_the_order_of_its_copy() -> None:
    model = Counting()
    model.names = set()
    for number in range(6):
        model.names.add(8 * number)
    assert list(model.names) != list(model.names.copy())
    with unchanged(model) as found:
        pass
    assert not found.changed
