"""bfloat16 attention answers as torch's does, and only runs where it was asked for and the CPU has AMX."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import ROUNDING, int8_linears, logits, quantized, relative_error, tiny, token_batches
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig

from hfq.common.errors import UsageError
from hfq.ptq.convert import int8_linear
from hfq.ptq.scheme import LayerScheme
from hfq.runtime.fusion import attention
from hfq.runtime.fusion.attention import bfloat16_attention
from hfq.runtime.fusion.flow import trace
from hfq.runtime.fusion.fuse import fuse, wanted_fusions
from hfq.runtime.int8.narrowing import Narrowing
from hfq.runtime.int8.shared_matmul import SharedMatmul
from hfq.runtime.kernels import cpu
from hfq.tuning.candidates import Candidate

LONG = token_batches(2, rows=32, length=40)
EVEN = [{"input_ids": batch["input_ids"]} for batch in token_batches(1, length=64)]


class Encoder(nn.Module):
    is_causal = False


class Decoder(nn.Module):
    is_causal = True


def tensors(*shape: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator) for _ in range(3)]


def padding(batch: int, length: int) -> Tensor:
    """Every row sees one key less than the one before it."""
    return (torch.arange(length) < length - torch.arange(batch)[:, None])[:, None, None, :]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_it_is_torchs_attention_within_bfloat16(masked: bool, scaling: float | None) -> None:
    query, key, value = tensors(4, 4, 100, 16)
    mask = padding(4, 100) if masked else None
    with torch.inference_mode():
        y, _ = bfloat16_attention(Encoder(), query, key, value, mask, scaling=scaling)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling).transpose(1, 2)
    assert y.shape == expected.shape and y.dtype == torch.float32
    assert not torch.equal(y, expected)  # it did run
    assert relative_error(y, expected) < 0.01


@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_form_for_amx_is_closer_still(masked: bool) -> None:
    query, key, value = tensors(4, 4, 100, 16)
    mask = padding(4, 100) if masked else None
    with torch.inference_mode():
        y = attention.fused_attention(query * 4, key, value, mask, scale=1.0)
    expected = F.scaled_dot_product_attention(query * 4, key, value, attn_mask=mask, scale=1.0).transpose(1, 2)
    assert y.shape == expected.shape and y.dtype == torch.float32
    assert 0 < relative_error(y, expected) < 0.01


def test_keys_that_are_masked_count_for_nothing() -> None:
    query, key, value = tensors(4, 4, 100, 16)
    mask = padding(4, 100)
    other = value.masked_fill(~mask.transpose(2, 3), 1e4)
    with torch.inference_mode():
        a, _ = bfloat16_attention(Encoder(), query, key, value, mask)
        b, _ = bfloat16_attention(Encoder(), query, key, other, mask)
    assert torch.equal(a, b)


def test_a_row_is_rounded_alone_as_in_a_batch() -> None:
    query, key, value = tensors(64, 4, 20, 16)
    lengths = torch.arange(64).remainder(16) + 5
    mask = (torch.arange(20) < lengths[:, None])[:, None, None, :]
    with torch.inference_mode():
        batch, _ = bfloat16_attention(Encoder(), query, key, value, mask)
        for row in (0, 7, 15):
            parts = [x[row : row + 1, :, : lengths[row]] for x in (query, key, value)]
            in_float32 = F.scaled_dot_product_attention(*parts).transpose(1, 2)
            alone, _ = bfloat16_attention(Encoder(), *parts, None)
            found = relative_error(batch[row : row + 1, : lengths[row]], alone)
            assert found < relative_error(in_float32, alone) / 2


def test_a_decoders_row_is_attended_alone_as_with_padding() -> None:
    query, key, value = tensors(2, 4, 200, 16)
    mask = torch.ones(2, 1, 200, 200, dtype=torch.bool).tril()
    padded, _ = bfloat16_attention(Decoder(), query, key, value, mask)
    alone, _ = bfloat16_attention(Decoder(), query[:1], key[:1], value[:1], None)
    assert relative_error(alone, padded[:1]) < 1e-5


def test_what_an_encoder_does_not_do_is_left_to_torch() -> None:
    query, key, value = tensors(4, 4, 100, 16)
    causal, _ = bfloat16_attention(Decoder(), query, key, value, None)
    assert torch.equal(
        causal, F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).contiguous()
    )
    additive = torch.zeros(4, 1, 100, 100).masked_fill(~padding(4, 100), -1e9)
    answer, _ = bfloat16_attention(Encoder(), query, key, value, additive)
    assert torch.equal(
        answer, F.scaled_dot_product_attention(query, key, value, attn_mask=additive).transpose(1, 2).contiguous()
    )


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Roberta", "Electra"])
def test_models_take_it_when_asked(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_FUSIONS", "all")
    model = quantized(tiny(family), Candidate("dynamic"), LONG)
    before = logits(model, LONG)
    fuse(model)
    native = cpu.multiplies_in_tiles()
    assert model.config._attn_implementation == (attention.NAME if native else "sdpa")
    assert relative_error(logits(model, LONG), before) < 0.1


def layers_that_return_bfloat16(model: nn.Module) -> list[str]:
    """By what they are told: a hook that looks would have them return float32."""
    layers = int8_linears(model).items()
    return [name for name, layer in layers if layer.narrowing is not None and layer.narrowing.active]


needs_tiles = pytest.mark.skipif(not cpu.multiplies_in_tiles(), reason="no AMX on this CPU, so nothing is narrowed")


@needs_tiles
@pytest.mark.parametrize("family", ["Bert", "DistilBert", "Roberta", "Electra"])
def test_query_key_and_value_are_rounded_by_the_matmul_where_attention_would(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = quantized(tiny(family), Candidate("static"), LONG)
    same = quantized(tiny(family), Candidate("static"), LONG)
    fuse(model)
    assert len(layers_that_return_bfloat16(model)) == 6  # three in each layer
    monkeypatch.setenv("HFQ_FUSIONS", "exact")
    fuse(same)
    same.set_attn_implementation(attention.NAME)
    assert not layers_that_return_bfloat16(same)
    assert torch.equal(logits(model, EVEN), logits(same, EVEN))


@needs_tiles
def test_they_are_not_for_an_attention_that_would_compute_with_rounded_scores() -> None:
    model: Any = quantized(tiny(), Candidate("static"), LONG)
    before = logits(model, LONG)
    fuse(model)
    model.set_attn_implementation("eager")
    assert not layers_that_return_bfloat16(model)
    assert relative_error(logits(model, LONG), before) < ROUNDING


@needs_tiles
@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_a_fused_model_may_still_be_turned_into_bfloat16(family: str) -> None:
    model = quantized(tiny(family), Candidate("static"), LONG)
    before = logits(model, LONG)
    fuse(model)
    answer = logits(model.to(torch.bfloat16), LONG)
    assert answer.dtype == torch.bfloat16
    assert relative_error(answer.float(), before) < 0.1


@needs_tiles
def test_a_pickled_model_runs_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_FUSIONS", "all")
    model: Any = quantized(tiny(), Candidate("static"), LONG)
    fuse(model)
    expected = logits(model, LONG)
    assert model.config._attn_implementation == attention.NAME
    torch.save((model, LONG), tmp_path / "model.pt")
    script = (
        "import sys, torch; model, batches = torch.load(sys.argv[1], weights_only=False); "
        "torch.save(torch.cat([model(**batch).logits for batch in batches]), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "model.pt", tmp_path / "logits.pt"], check=True)
    assert relative_error(torch.load(tmp_path / "logits.pt"), expected) < ROUNDING


class Curious(nn.Module):
    """A block that looks at its queries before attention does."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks = looks
        for name in ("query", "key", "value", "last"):
            setattr(self, name, int8_linear(nn.Linear(8, 8), LayerScheme.static((-3.0, 3.0))))

    def forward(self, input_ids: Tensor) -> Tensor:
        q, k, v = (
            getattr(self, name)(input_ids).unflatten(-1, (2, 4)).transpose(1, 2) for name in ("query", "key", "value")
        )
        y: Tensor = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.last(y) + (q.sum() if self.looks else 0)


@pytest.mark.parametrize("looks", [False, True])
def test_what_anybody_else_reads_is_not_taken_for_attentions_alone(looks: bool) -> None:
    model = Curious(looks)
    flow = trace(model, {"input_ids": torch.randn(2, 5, 8)})
    assert flow is not None
    assert flow.read_by_attention() == ([] if looks else [model.query, model.key, model.value])


def test_a_matmul_is_narrowed_where_all_who_share_it_are() -> None:
    layers = [int8_linear(nn.Linear(8, 8), LayerScheme.static((-3.0, 3.0))) for _ in range(4)]
    SharedMatmul(layers)
    config = BertConfig(attn_implementation=attention.NAME)
    narrowing = Narrowing(config, attention=attention.NAME)
    x = torch.randn(4, 6, 8)
    for layer in layers[:3]:
        layer.narrow(narrowing)
    assert {layer(x).dtype for layer in layers} == {torch.float32}
    for layer in layers:
        layer.narrow(narrowing)
    assert {layer(x).dtype for layer in layers} == {torch.bfloat16}
    assert {layer(x[:1, :2]).dtype for layer in layers} == {torch.bfloat16}
    config._attn_implementation = "eager"
    assert {layer(x).dtype for layer in layers} == {torch.float32}


@pytest.mark.parametrize("setting", ["exact", "none"])
def test_it_stays_off_unless_asked(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_FUSIONS", setting)
    model = quantized(tiny(), Candidate("static"), LONG)
    fuse(model)
    assert model.config._attn_implementation == "sdpa"


def test_an_implementation_that_the_user_chose_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_FUSIONS", "all")
    model: Any = quantized(tiny(), Candidate("static"), LONG)
    model.set_attn_implementation("eager")
    fuse(model)
    assert model.config._attn_implementation == "eager"


def test_fusions_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFQ_FUSIONS", "activation, attention")
    assert wanted_fusions() == ("activation", "attention")
    monkeypatch.setenv("HFQ_FUSIONS", "atention")
    with pytest.raises(UsageError, match=r"atention.*requantization"):
        wanted_fusions()


@pytest.mark.parametrize("kept", ["none", "activation", "residual", "requantization", "shared-matmul"])
def test_each_fusion_can_be_turned_off(kept: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_fusion import (
        blocks_that_add_in_the_matmul,
        fused_activations,
        layers_that_return_codes,
        layers_that_share_a_matmul,
    )

    monkeypatch.setenv("HFQ_FUSIONS", kept)
    model = quantized(tiny("Bert", hidden_act="relu"), Candidate("static"), LONG)
    fuse(model)
    assert bool(fused_activations(model)) == (kept == "activation")
    assert bool(layers_that_share_a_matmul(model)) == (kept == "shared-matmul")
    assert bool(blocks_that_add_in_the_matmul(model)) == (kept == "residual")
    assert not layers_that_return_codes(model)  # an activation function stands between the layers
