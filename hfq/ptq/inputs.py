"""What a dataloader yields, as the keyword arguments a model's `forward` is called with."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

LABELS = ("labels", "label")
Batch = Mapping[str, Any]  # of tensors, nearly always


def bind(model: nn.Module, batch: Any) -> dict[str, Any]:
    """The keyword arguments by which `model` takes `batch`.

    A mapping goes in by name, without what `forward` has no place for and without labels it does not need. A tensor
    is the first argument. A tuple or list holds one value for each argument without a default, in order, and may end
    with a label, which is dropped; its only value, or the one before the label, may be any of these again.

    Raises:
        TypeError: `forward` does not take these values, or it cannot be told which is the label.
    """
    parameters = _parameters(model)
    if isinstance(batch, Mapping):
        return _by_name(model, batch, parameters)
    if isinstance(batch, Tensor):
        return _by_position(model, [batch], parameters)
    if isinstance(batch, list | tuple) and batch:
        return _sequence(model, batch, parameters)
    raise TypeError(
        f"A batch is a {type(batch).__name__} ({_short(batch)}); expected a tensor, a dict of tensors, or a tuple such "
        "as (input, label)."
    )


def bind_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a call that was made as `model(*args, **kwargs)`."""
    return _by_position(model, args, _parameters(model)) | dict(kwargs)


def take(model: nn.Module, dataloader: Iterable[Any], samples: int) -> list[dict[str, Any]]:
    """Batches of `dataloader`, bound, until they hold `samples` examples; the last one is cut to that number.

    Raises:
        TypeError: a batch does not fit the model.
        ValueError: there is no batch.
    """
    taken: list[dict[str, Any]] = []
    wanted = samples
    for batch in dataloader:
        inputs = bind(model, batch)
        rows = count(inputs)
        taken.append(inputs if rows <= wanted else head(inputs, wanted))
        wanted -= rows
        if wanted <= 0:
            break
    if not taken:
        raise ValueError("calib_dataloader yields no batch: there is nothing to calibrate on.")
    return taken


def count(batch: Batch) -> int:
    """Examples in `batch`: the length of its first tensor with a dimension, else 1."""
    return next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), 1)


def head(batch: Batch, rows: int) -> dict[str, Any]:
    """The first `rows` examples of `batch`: of every tensor that has one row for each example."""
    total = count(batch)
    return {
        name: value[:rows] if isinstance(value, Tensor) and value.dim() and len(value) == total else value
        for name, value in batch.items()
    }


def spread(batches: Sequence[Batch], examples: int) -> list[Batch]:
    """Batches with about so many examples of `batches`, spread over all of them: they hold the shortest first."""
    some = batches[:: max(1, len(batches) // examples)]
    return [head(batch, max(1, examples // len(some))) for batch in some]


def _sequence(model: nn.Module, values: Sequence[Any], parameters: Sequence[inspect.Parameter]) -> dict[str, Any]:
    required = sum(parameter.default is parameter.empty for parameter in parameters if not _is_variable(parameter))
    if len(values) == 1:
        return bind(model, values[0])
    if len(values) == required:
        return _by_position(model, values, parameters)
    if len(values) == 2:
        return bind(model, values[0])
    if len(values) == required + 1:
        return _by_position(model, values[:-1], parameters)
    raise TypeError(
        f"A batch holds {len(values)} values, and {type(model).__name__}.forward({', '.join(map(str, parameters))}) "
        "does not say which of them are inputs. Yield a dict with the argument names as keys."
    )


def _by_name(model: nn.Module, batch: Batch, parameters: Sequence[inspect.Parameter]) -> dict[str, Any]:
    takes = {parameter.name: parameter for parameter in parameters}
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    inputs = {
        name: value
        for name, value in batch.items()
        if (name in takes and not (name in LABELS and takes[name].default is None))
        or (anything and name not in takes and name not in LABELS)
    }
    missing = [p.name for p in parameters if not _is_variable(p) and p.default is p.empty and p.name not in inputs]
    if missing or not inputs:
        wanted = ", ".join(map(str, parameters))
        raise TypeError(
            f"A batch with the keys {', '.join(map(str, batch))} does not fit {type(model).__name__}.forward({wanted})"
            + (f": {', '.join(missing)} is missing." if missing else ": none of them is an argument.")
        )
    return inputs


def _by_position(model: nn.Module, values: Sequence[Any], parameters: Sequence[inspect.Parameter]) -> dict[str, Any]:
    names = [parameter.name for parameter in parameters if not _is_variable(parameter)]
    if len(values) > len(names):
        raise TypeError(
            f"{len(values)} values do not fit {type(model).__name__}.forward({', '.join(map(str, parameters))}). "
            "hfq calls a model by argument names; yield a dict of them."
        )
    return dict(zip(names, values, strict=False))


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def _is_variable(parameter: inspect.Parameter) -> bool:
    return parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
