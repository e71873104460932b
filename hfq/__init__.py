"""hfq: INT8 export for the Hugging Face Hub.

Importing the package is cheap: it loads neither torch nor transformers, it only asks to be told when
transformers' quantizer registry is imported, so that `from_pretrained` then runs int8 kernels.
"""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from wrapt import when_imported

from .common.version import __version__

__all__ = ["__version__", "by_length", "compile", "load"]

if TYPE_CHECKING:
    from .loading import load
    from .runtime.compiling.compile import compile
    from .runtime.fusion.slicing import by_length


@when_imported("transformers.quantizers.auto")
def _register(auto: Any) -> None:
    def int8_quantizer(config: Any, **kwargs: Any) -> Any:
        from .runtime.loading.quantizer import make_quantizer  # imports torch: not before a checkpoint asks for it

        return make_quantizer(config, **kwargs)

    class Settings:
        @staticmethod
        def from_dict(settings: dict[str, Any]) -> Any:
            from .runtime.loading.quantizer import read_settings

            return read_settings(settings)

    auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"] = int8_quantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["compressed-tensors"] = Settings


@when_imported("transformers.modeling_utils")
def _import_runtime(_: Any) -> None:
    with suppress(ImportError):  # which the first int8 checkpoint raises again: no reason not to load float ones
        from .runtime.loading import quantizer  # noqa: F401  # takes as long as loading a model, so it is no part of that


@when_imported("transformers.trainer")
def _watch_trainings(trainer: Any) -> None:
    from .runtime.loading.quantizer import RefuseTraining

    trainer.DEFAULT_CALLBACKS.append(RefuseTraining)


def __getattr__(name: str) -> Any:
    if name == "load":
        from .loading import load

        return load
    if name == "compile":
        from .runtime.compiling.compile import compile

        return compile
    if name == "by_length":
        from .runtime.fusion.slicing import by_length

        return by_length
    raise AttributeError(f"module 'hfq' has no attribute {name!r}")
