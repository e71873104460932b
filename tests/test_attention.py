"""bfloat16 attention answers as torch's does, and only runs where it was asked for and the CPU has bfloat16."""

from typing import Any

import pytest
import torch
from models import logits, quantized, relative_error, tiny, token_batches
from torch import Tensor, nn
from torch.nn import functional as F

from hfq.errors import UsageError
from hfq.runtime import attention
from hfq.runtime.attention import bfloat16_attention
from hfq.runtime.fusion import fuse, wanted_fusions
from hfq.tuning.candidates import Candidate

LONG = token_batches(2, rows=32, length=40)


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
    native = attention.multiplies_bfloat16()
    assert model.config._attn_implementation == (attention.NAME if native else "sdpa")
    assert relative_error(logits(model, LONG), before) < 0.1


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
