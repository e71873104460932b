"""Attention between int8 layers: bfloat16 products on CPUs with AMX, torch's own attention elsewhere.

It stands under its own name in transformers' attention registry, so every model that looks its attention up there can
use it, whatever its family. Which attention runs depends on the model and the CPU alone, never on how many texts come
together, how long they are or how they are padded, so that a text is rounded in a batch as it is alone. torch's fused
attention keeps scores and sums in float32. With AVX-512 BF16 alone it is slower on bfloat16 than on float32 (twice as
slow at 8 x 128 on an EPYC), and so are matmuls of bfloat16 with a softmax between them, which round scores as well.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..int8.narrowing import Narrowing
from ..kernels.cpu import multiplies_in_tiles

NAME = "hfq"
LANES = 16  # floats of the widest vector registers


def register(*, compiled: bool = False) -> None:
    """Put the attention under `NAME` where transformers looks it up. It takes the same masks as "sdpa".

    `compiled`: torch's own, which `hfq.runtime.compiling.inductor.attention_template` stands in for.
    """
    AttentionInterface.register(NAME, sdpa_attention_forward if compiled else bfloat16_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


class Registration:
    """What a model keeps whose config names `NAME`: wherever it is unpickled, transformers knows the name."""

    def __init__(self) -> None:
        if NAME not in AttentionInterface():
            register()

    def __reduce__(self) -> tuple[Any, ...]:
        return Registration, ()


def can_replace(model: PreTrainedModel) -> bool:
    """Whether `model` runs torch's attention because nobody asked for another."""
    return model.config._attn_implementation == "sdpa" and multiplies_in_tiles()


def use(model: PreTrainedModel) -> Narrowing:
    """Have `model` look up the attention of this module. Returns: what says to layers whether it does."""
    model.hfq_attention = Registration()  # type: ignore[assignment]
    model.set_attn_implementation(NAME)
    return Narrowing(model.config, attention=NAME)


def bfloat16_attention(  # noqa: PLR0913 - transformers calls it so
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`softmax(q k^T * scaling + mask) v` of an encoder: float `[batch, heads, length, size]` to `[batch, length, heads, size]`.

    `attention_mask`: bool, true where a key may be seen, broadcast to `[batch, heads, length, keys]`. Products are
    bfloat16 with float32 sums. What an encoder does not do (causal masks, shared key heads, dropout, additive masks) goes
    to torch's attention; small inputs do not, though they gain nothing, or their outputs would be others. A float32 model
    may hand over bfloat16 (`hfq.runtime.int8.narrowing`).
    """
    _, heads, _, size = query.shape
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # Without padding, a causal mask may be left to `is_causal`: the mask does not say whether there is one.
    plain = not causal and key.shape[1] == heads and value.shape == key.shape and not dropout
    plain &= not any(kwargs.get(name) is not None for name in ("position_bias", "cache", "softcap", "s_aux"))
    plain &= attention_mask is None or attention_mask.dtype == torch.bool
    dtype = _dtype_of(module, query.dtype) if query.dtype == torch.bfloat16 else query.dtype
    if not plain:
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    scale = size**-0.5 if scaling is None else scaling
    return fused_attention(query, key, value, attention_mask, scale=scale, dtype=dtype), None


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scale: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same by torch's fused attention: products of bfloat16, scores, softmax and sums in float32."""
    if query.dtype != torch.bfloat16 or key.dtype != torch.bfloat16 or value.dtype != torch.bfloat16:
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    key, value, mask = in_whole_registers(key, value, mask)
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).to(dtype).contiguous()


def in_whole_registers(key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same keys and values with others that are masked, up to a multiple of `LANES`, and always a mask.

    torch sums what is beyond a multiple in another order than the rest, and in yet another without a mask. That is 3e-7 of
    a number, and enough to move an int8 code: with these, a text's codes are the same alone, padded, and in a batch.

    `key` and `value`: `[batch, heads, keys, size]`. `mask`: bool, true where a key may be seen, or float, which is added.
    """
    keys = key.shape[2]
    more = -keys % LANES
    if mask is None:
        mask = torch.ones(1, 1, 1, keys, dtype=torch.bool)
    elif mask.stride(2) == 0:  # laid out for each query
        mask = mask[:, :, :1]
    if not more:
        return key, value, mask
    unseen = -torch.inf if mask.is_floating_point() else False
    return F.pad(key, (0, 0, 0, more)), F.pad(value, (0, 0, 0, more)), F.pad(mask, (0, more), value=unseen)


def _dtype_of(module: torch.nn.Module, default: torch.dtype) -> torch.dtype:
    """Of the floats that `module` computes with: an int8 weight that is not packed yet is its parameter, too."""
    near = (p for child in module.children() for p in child._parameters.values() if p is not None)  # takes less time
    return next((p.dtype for p in itertools.chain(near, module.parameters()) if p.is_floating_point()), default)
