"""What a model's forward is called with: by name, without what says nothing.

People spell out defaults, and libraries pass `return_dict=True` or flags as the config has them. None of it changes an
output, so none of it is to decide which way a forward is computed.
"""

import inspect
from collections.abc import Callable
from typing import Any

_FLAGS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}  # of any config
_SIMPLE = (bool, int, float, str)


class Arguments:
    """Those that `function`, a model's forward, takes. `flags`: whether its config's flags hold where none are passed."""

    def __init__(self, function: Callable[..., Any], *, flags: bool) -> None:
        self.function = function
        self._flags = flags
        parameters = inspect.signature(function).parameters.values()
        self._names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], config: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
        """The arguments again, by name where that can be, and whether the outputs are to be made a tuple of."""
        names = self._names[: len(args)]
        if len(args) > len(names) or not kwargs.keys().isdisjoint(names):
            return args, kwargs, False
        bound = {
            name: value
            for name, value in (*zip(names, args, strict=True), *kwargs.items())
            if not self._says_nothing(name, value, config)
        }
        # Where it is no parameter of a forward, transformers' decorator takes it, and makes a tuple of what is returned.
        as_tuple = self._flags and "return_dict" not in self._defaults and bound.get("return_dict") is False
        if as_tuple:
            del bound["return_dict"]
        return (), bound, as_tuple

    def _says_nothing(self, name: str, value: Any, config: Any) -> bool:
        if name in self._defaults:
            default = self._defaults[name]
            if value is default or (type(value) in _SIMPLE and type(value) is type(default) and value == default):
                return True
        if name not in _FLAGS or not self._flags:
            return False
        return value is None or (type(value) is bool and value == bool(getattr(config, name, _FLAGS[name])))
