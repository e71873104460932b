"""Patterns that find layers again by name, under whatever prefix `from_pretrained` adds to names or takes from them.

A classifier's `bert.encoder.layer.0.output.dense` is `encoder.layer.0.output.dense` where its encoder is opened alone.
A pattern that is a type's name would also find layers that the checkpoint has not, such as a pooler that is new.
"""

import re
from collections.abc import Iterator, Mapping
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

Group = TypeVar("Group", int, str)


def find_patterns(model: nn.Module, groups: Mapping[str, Group]) -> dict[Group, list[str]]:
    """By group, patterns as compressed-tensors has them: each matches layers of this group, and nothing else in `model`.

    `groups`: each layer's, by its name in `model`.
    """
    names: dict[Group | None, set[str]] = {}
    for name in dict.fromkeys([*groups, *(name for name, _ in model.named_modules() if name)]):
        names.setdefault(groups.get(name), set()).update({name, _alone(model, name) or name})
        names.setdefault(None, set()).update(_in_missing_decoder(model, name))
    patterns: dict[Group, dict[str, None]] = {group: {} for group in groups.values()}
    fits: dict[tuple[Group, str], bool] = {}

    def fit(pattern: str, group: Group) -> bool:
        if (group, pattern) not in fits:
            matches = re.compile(pattern).match
            fits[group, pattern] = not any(matches(name) for other in names if other != group for name in names[other])
        return fits[group, pattern]

    for name, group in groups.items():
        fitting = next((pattern for pattern in _candidates(model, name) if fit(pattern, group)), None)
        patterns[group][name if fitting is None else f"re:{fitting}"] = None
    return {group: list(found) for group, found in patterns.items()}


def _alone(model: nn.Module, name: str) -> str | None:
    """What a layer may be called where the transformers model within `model` that it is in is opened alone.

    None: it is in a head, or `model` is not transformers'.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    first, _, rest = name.partition(".")
    if model.base_model is not model:
        return rest if first == model.base_model_prefix else None
    return rest if rest and isinstance(getattr(model, first), PreTrainedModel) else name


def _in_missing_decoder(model: nn.Module, name: str) -> Iterator[str]:
    """What its twin in the decoder is called where an encoder alone, as T5's, is opened with a decoder that is new."""
    first, _, rest = name.partition(".")
    if first == "encoder" and rest and not hasattr(model, "decoder"):
        yield f"decoder.{rest}"


def _candidates(model: nn.Module, name: str) -> Iterator[str]:
    """Expressions that match `name`, the most general first; none tries twice what it repeats (`hfq.trust`)."""
    alone = _alone(model, name)
    if alone is not None:
        yield from (rf"(?:|.*\.){text}$" for text in _texts(alone))
        if alone != name:
            part = re.escape(name.removesuffix(alone))
            yield from (rf"(?:|{part}|.*\.{part}){text}$" for text in _texts(alone))
            yield from (rf"(?:|.*\.){text}$" for text in _texts(name))
    if any(part.isdigit() for part in name.split(".")):
        yield from (f"{text}$" for text in _texts(name)[:-1])


def _texts(name: str) -> list[str]:
    """`name` with any numbers in the place of its own; of all but the last, which may say what a layer is; and as it is."""
    parts = [re.escape(part) for part in name.split(".")]
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    free: tuple[list[int], ...] = (numbers, numbers[:-1], [])
    texts = [r"\.".join(r"\d+" if i in some else part for i, part in enumerate(parts)) for some in free]
    return list(dict.fromkeys(texts))
