"""What a compiled encoder is made of, as one model: `python tests/support/pieces.py FOLDER` compiles it as `hfq.compile` would."""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hfq.runtime.compiling.blocked import gelu, quantize_rows
from hfq.runtime.compiling.inductor.compiler import compile_graph
from hfq.runtime.kernels.cpu import compiles_to_bfloat16
from hfq.runtime.kernels.layouts import VNNI

HEADS, SIZE, FEATURES, PRODUCTS = 3, 32, 96, 192
SHAPE = [2, 5, 70]  # of the inputs, tokens and what of them is seen; compiled for any other batch and length
NAN, HUGE = 0, 1  # tokens


class Pieces(nn.Module):
    """Answers, by name, what is computed from float32 `[batch, length, 3 * FEATURES]` that belong to the tokens."""

    def forward(self, inputs: Tensor, tensors: list[Tensor]) -> dict[str, Tensor]:
        table, weight, bias, codes, added, *matrix = tensors
        x = F.embedding(inputs[0], table)
        seen = inputs[1].bool()[:, None, None, :]
        length = x.shape[1]
        qkv = [part.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for part in x.chunk(3, -1)]
        mask = added[:, :length, :length].unsqueeze(0)
        y, residual, other = x.chunk(3, -1)
        normed = F.layer_norm(y + residual, (FEATURES,), weight, bias, 1e-12)
        doubled = F.layer_norm(y, (FEATURES,))
        doubled.mul_(2)
        first = F.layer_norm(residual + other, (FEATURES,), bias, weight)
        own = [part.unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for part in (x * 1.5).chunk(3, -1)]
        each = seen.expand(-1, -1, length, -1) & (torch.arange(length) != 1)  # laid out for each query, and alike
        causal = each & torch.ones(length, length, dtype=torch.bool).tril()
        distances = added[:, :length, :length].expand(x.shape[0], -1, -1, -1).contiguous()
        unseen = torch.where(seen.expand(-1, -1, length, -1), 0.0, torch.finfo(torch.float32).min)
        changing = added[:, :length, :length] * 2
        of_first, weights = attended_by_matmuls(*qkv, changing)
        changing.neg_()
        of_changed, _ = attended_by_matmuls(*qkv, changing)
        of_own, _ = attended_by_matmuls(*qkv, distances, unseen)
        copied = added[:, :length, :length].expand(x.shape[0], -1, -1, -1).contiguous()
        copied.neg_()
        later = table.view(2, -1, 3 * FEATURES)[1:]  # starts in the middle of its memory
        answers = {
            "attention": attended(*qkv),
            "attention with keys unseen": attended(*qkv, seen),
            "attention with numbers added": attended(*qkv, mask, scale=0.5),
            "attention as codes": codes_of(attended(*qkv, seen), codes),
            "attention with keys unseen by each": attended(*qkv, each),
            "attention with later keys unseen": attended(*qkv, causal),
            "attention of the first token as codes": codes_of(attended(*qkv, causal)[:, :1], codes),
            "attention with keys seen by some alone": attended(*qkv, (torch.arange(length) != 1)[:, None]),
            "attention that alone reads its numbers": attended(*own, seen),
            "attention by matmuls": of_own,
            "attention by matmuls of the distance alone": attended_by_matmuls(*qkv, distances)[0],
            "attention by matmuls, its sums halved": attended_by_matmuls(*qkv, distances, unseen, then=0.5)[0],
            "attention by matmuls as codes": codes_of(attended_by_matmuls(*qkv, distances, unseen)[0], codes),
            "attention by matmuls of the first token as codes": codes_of(
                attended_by_matmuls(*qkv, distances, unseen)[0][:, :1], codes
            ),
            "attention by matmuls whose weights are read": of_first,
            "weights of attention": weights,
            "attention by matmuls, of what was changed since": of_changed,
            "attention by matmuls, of a copy that was changed": attended_by_matmuls(*qkv, copied)[0],
            "attention by matmuls, of what comes after them": attended_by_matmuls(*qkv, mask, late=True)[0],
            "attention by distance": attended_by_distance(qkv, added, seen),
            "attention by distance as codes": codes_of(attended_by_distance(qkv, added, seen), codes),
            "gelu as codes": codes_of(gelu(y) if torch.compiler.is_compiling() else F.gelu(y), codes),
            "numbers as codes": codes_of(x[..., :90], codes),
            "sum, normed": normed,
            "sum, normed, as codes": codes_of(normed, codes),
            "sum of the first token, normed": F.layer_norm(y + other, (FEATURES,), weight, bias)[:, 0],
            "normed, doubled, as codes": codes_of(doubled, codes),
            "normed in halves, as codes": codes_of(F.layer_norm(x, (3 * FEATURES,)).unflatten(-1, (6, -1)), codes),
            "added to itself, normed, as codes": codes_of(F.layer_norm(later + later, (3 * FEATURES,)), codes),
            "normed as codes": codes_of(F.layer_norm(other + 1e3, (FEATURES,)), codes),
            "normed for a sum, as codes": codes_of(first, codes),
            "sum with what was normed, as codes": codes_of(F.layer_norm(other + first, (FEATURES,)), codes),
            **rows_of("numbers in rows", x),
            **rows_of("numbers in short rows", x[..., :90]),
            **rows_of("normed in rows", F.layer_norm(y, (FEATURES,), weight, bias)),
            **rows_of("normed in halves of rows", F.layer_norm(x, (3 * FEATURES,)).unflatten(-1, (6, -1))),
        }
        if multiplies_blocks():
            products = multiplied(codes_of(y, codes), *matrix).view(*x.shape[:2], PRODUCTS)
            sums = F.layer_norm(x[..., :PRODUCTS] + products, (PRODUCTS,), table[7, :PRODUCTS], table[9, :PRODUCTS])
            answers |= {"products and a sum, normed": sums, "products and a sum, as codes": codes_of(sums, codes)}
            wide = F.layer_norm(x[..., -PRODUCTS:], (PRODUCTS,))
            products = multiplied(codes_of(other, codes), *matrix).view(*x.shape[:2], PRODUCTS)
            sums = F.layer_norm(products + wide, (PRODUCTS,))
            answers |= {"normed for products": codes_of(wide, codes), "products and that": codes_of(sums, codes)}
            of_rows = [codes_of(other, codes), *matrix, x.abs().amax(-1).view(-1, 1), table[5, :PRODUCTS]]
            products = multiplied(*of_rows).view(*x.shape[:2], PRODUCTS)
            sums = F.layer_norm(x[..., :PRODUCTS] + products, (PRODUCTS,), table[7, :PRODUCTS])
            answers |= {"products of rows and a sum, normed": sums, **rows_of("products of rows and a sum", sums)}
            answers |= rows_of("gelu of products of rows", F.gelu(multiplied(*of_rows)))
            answers |= rows_of("relu of products", multiplied(codes_of(y, codes), *matrix).relu_())
            answers |= rows_of("gelu of products", F.gelu(multiplied(*of_rows[:-1])))
        return answers


def multiplies_blocks() -> bool:
    """Whether compiled code multiplies weights in the layout `VNNI` here."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and bool(torch.cpu.get_capabilities()["avx512_vnni"])


def multiplied(
    codes: Tensor,
    matrix: Tensor,
    scale: Tensor,
    offset: Tensor,
    row_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """float32 `[rows, out]` of uint8 `[rows, in]` and int8 `[out / block, in, block]`."""
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.hfq.int8_linear(codes, matrix, scale, offset, row_scale, bias)
        return found
    y = F.linear(codes.float(), VNNI.restore(matrix).float()) * scale + offset
    return (y if row_scale is None else y * row_scale) + (0 if bias is None else bias)


def rows_of(name: str, x: Tensor) -> dict[str, Tensor]:
    """Codes of each row of `x` with a scale of its own, and the scales."""
    rows = x.reshape(-1, x.shape[-1])
    codes, scales = torch.ops.hfq.quantize_rows(rows) if torch.compiler.is_compiling() else quantize_rows(rows)
    return {f"{name}, their codes": codes, f"{name}, their scales": scales}


def attended(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Attention in rows of all heads."""
    return F.scaled_dot_product_attention(query, key, value, mask, scale=scale).transpose(1, 2).flatten(2)


def attended_by_matmuls(
    query: Tensor, key: Tensor, value: Tensor, *added: Tensor, then: float = 1, late: bool = False
) -> tuple[Tensor, Tensor]:
    """The same, written out as in MPNet, and the weights of values."""
    scores = torch.matmul(query, key.transpose(-1, -2)) / SIZE**0.5
    scores += added[0] * 0.7 if late else added[0]
    for x in added[1:]:
        scores = x + scores
    weights = (scores * then if then != 1 else scores).softmax(-1)
    return torch.matmul(weights, value).permute(0, 2, 1, 3).contiguous().flatten(2), weights


def attended_by_distance(qkv: list[Tensor], added: Tensor, seen: Tensor) -> Tensor:
    """Attention in rows of all heads, with products by distance as in DeBERTa. They are of 512 distances."""
    query, key, value = (part.contiguous().view(-1, *part.shape[2:]) for part in qkv)
    batch, _, length, _ = qkv[0].shape
    tables = [added[None, ..., start : start + SIZE].contiguous().view(-1, 512, SIZE) for start in (0, SIZE)]
    tables = [table.repeat(batch, 1, 1) for table in tables]
    distances = torch.arange(length)[:, None] - torch.arange(length)[None]
    of_query, of_key = ((x + 256).clamp(0, 511)[None].expand(query.shape[0], -1, -1) for x in (distances, -distances))
    scores = torch.bmm(query, key.transpose(-1, -2) / 8)
    by = torch.gather(torch.bmm(query, tables[0].transpose(-1, -2)), -1, of_query) / 8
    by += torch.gather(torch.bmm(key, tables[1].transpose(-1, -2)), -1, of_key).transpose(-1, -2) / 8
    scores = (scores + by).view(-1, HEADS, length, length)
    weights = scores.masked_fill(~seen, torch.finfo(torch.float32).min).softmax(-1)
    attended = torch.bmm(weights.view(-1, length, length), value)
    return attended.view(-1, HEADS, length, SIZE).permute(0, 2, 1, 3).contiguous().flatten(2)


def codes_of(x: Tensor, codes: Tensor) -> Tensor:
    """uint8 `[rows, size of the last axis]` of `x`."""
    rows = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        found: Tensor = torch.ops.hfq.quantize(rows, codes)
        return found
    return ((rows * codes[0]).round() + codes[1]).clamp(0, 255).to(torch.uint8)


def make_tensors() -> list[Tensor]:
    """What the pieces read.

    Numbers of 200 tokens, a norm's weight and bias, codes, what is added to scores, and a matrix with scale and offset.
    """
    generator = torch.Generator().manual_seed(0)
    table, weight, bias, added = (
        torch.randn(*shape, generator=generator)
        for shape in ((200, 3 * FEATURES), (FEATURES,), (FEATURES,), (HEADS, 512, 512))
    )
    table[NAN] = float("nan")
    table[HUGE] = 1e6
    matrix = VNNI.arrange(torch.randint(-128, 128, (PRODUCTS, FEATURES), dtype=torch.int8, generator=generator))
    scale, offset = torch.rand(2, PRODUCTS, generator=generator).div(5e3).unbind()
    return [table, weight, bias, torch.tensor([40.0, 100.0]), added, matrix, scale, offset]


if __name__ == "__main__":
    torch.set_num_threads(1)
    fusions = ["compiled-attention", *(["compiled-residual"] if compiles_to_bfloat16() else [])]
    inputs = torch.ones(SHAPE, dtype=torch.long)
    compile_graph(Pieces(), Path(sys.argv[1]), inputs=inputs, tensors=make_tensors(), fusions=fusions)
