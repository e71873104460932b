"""From a float model and a calibration slice to an int8 model: observers, scales, SmoothQuant, conversion, `fit`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..fitting import fit

__all__ = ["fit"]


def __getattr__(name: str) -> Any:
    if name == "fit":
        from ..fitting import fit  # it uses all of this package, so not before it is asked for

        return fit
    raise AttributeError(f"module 'hfq.quantization' has no attribute {name!r}")
