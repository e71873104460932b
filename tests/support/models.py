"""Tiny random models and their int8 versions, for tests that need a real one and no download."""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hfq.ptq.calibration import calibrate
from hfq.ptq.convert import quantize_model
from hfq.ptq.graph import find_folds
from hfq.ptq.layers import find_quantizable
from hfq.runtime.int8.linear import Int8Linear
from hfq.runtime.kernels.cpu import multiplies_in_tiles
from hfq.tuning.candidates import Candidate, Space

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(1)  # more only cost time with matrices this small

Batch = dict[str, Tensor]
VOCABULARY = 200
PADDING = 0
_SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
_SIZES = {"DistilBert": {"dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 128}}
# How far a fused model may be from itself: on CPUs with AMX its attention multiplies bfloat16.
ROUNDING = 0.05 if multiplies_in_tiles() else 0.02


def tiny(family: str = "Bert", *, seed: int = 0, **config: Any) -> Any:
    """A random classifier of three labels: `tiny("Roberta", hidden_act="relu")`. Its answers differ by input."""
    torch.manual_seed(seed)
    sizes = {**_SIZES.get(family, _SMALL), "vocab_size": VOCABULARY, "num_labels": 3, "pad_token_id": PADDING, **config}
    configuration = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForSequenceClassification")(configuration).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.mul_(4)  # transformers starts so small that all inputs are answered alike
    head = next(module for module in reversed(list(model.modules())) if isinstance(module, nn.Linear))
    head.bias.data = -logits(model, token_batches(4, vocabulary=sizes["vocab_size"])).mean(
        0
    )  # and every label gets its share
    return model


def token_batches(count: int, *, rows: int = 16, length: int = 12, vocabulary: int = VOCABULARY) -> list[Batch]:
    """Random tokens. Each row is shorter than the one before it, and padded."""
    batches = []
    for seed in range(count):
        ids = torch.randint(5, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
        mask = (torch.arange(length) < torch.linspace(length, length // 2, rows).round()[:, None]).long()
        batches.append({"input_ids": ids.where(mask.bool(), PADDING), "attention_mask": mask})
    return batches


def make_space(model: nn.Module, batches: Sequence[Batch], *, smooth: bool = False) -> Space:
    """What tuning knows of `model` after calibration on `batches`. `smooth`: find SmoothQuant folds, which takes long."""
    layers = find_quantizable(model, batches[0])
    folds = find_folds(model, batches[0], layers.layers) if smooth else []
    return Space(model, layers, calibrate(model, layers.layers, batches), folds)


def quantized(model: nn.Module, candidate: Candidate, batches: Sequence[Batch]) -> nn.Module:
    """The int8 model of `candidate`, calibrated on `batches`."""
    space = make_space(model, batches, smooth=candidate.alpha is not None)
    return quantize_model(model, space.plan(candidate), space.folds)


def logits(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """Answers to all batches: `[examples, labels]`."""
    with torch.inference_mode():
        return torch.cat([model(**batch).logits for batch in batches])


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Equal to the bit; where attention multiplies bfloat16 in one of them, as close as that."""
    assert torch.equal(found, expected) or (multiplies_in_tiles() and relative_error(found, expected) < ROUNDING)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference, relative to the norm of `expected`."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def int8_linears(model: nn.Module) -> dict[str, Int8Linear]:
    """The int8 layers, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}
