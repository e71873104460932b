"""The int8 model that `fit` returns: what it was made from, and ways to keep it."""

import copy
import copyreg
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .common.errors import ExportError
from .common.files import write_text
from .common.names import REPORT_FILE
from .export.checkpoint import write_weights_and_config
from .export.stock import check_openable, check_written
from .ptq.inputs import Batch
from .ptq.scheme import Plan
from .report.card import render_fit_card
from .report.report import Report
from .runtime.inside import sentence_transformer, transformers_part
from .tuning.trial import Trial

_CLASSES: dict[type, type] = {}


class Quantized:
    """Beside what the float model's class does: `trials`, `report`, `save`, `save_pretrained`, `push_to_hub`."""

    _hfq_plan: Plan
    _hfq_report: Report
    _hfq_example: Batch | None  # a few calibration inputs

    @property
    def trials(self) -> list[Trial]:
        """Every candidate that was evaluated, in order."""
        return list(self._hfq_report.trials)

    def report(self) -> Report:
        """What was done, layer by layer, and what it cost."""
        return self._hfq_report

    def save(self, save_dir: str | Path) -> None:
        """Write a folder that `hfq.load` opens and, if this is a transformers model, stock `from_pretrained`.

        That of a sentence-transformers model is one of sentence-transformers, which opens it too.

        Raises:
            ExportError: the folder holds something else, or cannot be written, or stock transformers would open another
                model than this one. Nothing is left half-written.
            UnsupportedError: it opens no int8 checkpoint of this architecture.
        """
        folder = Path(save_dir)
        if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / REPORT_FILE).exists())):
            raise ExportError(f"{folder} exists and was not written by hfq. Choose another folder, or remove it.")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
                written, earlier = Path(work) / "new", Path(work) / "earlier"
                written.mkdir()
                self._write(written)
                if folder.exists():
                    folder.rename(earlier)
                written.rename(folder)
        except OSError as error:
            raise ExportError(f"{folder} cannot be written: {error.strerror or error}.") from error

    def save_pretrained(self, save_directory: str | Path, *, push_to_hub: bool = False, **kwargs: Any) -> None:
        """`save`, by the name transformers' users know. `kwargs`: of `push_to_hub`."""
        self.save(save_directory)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        token: str | None = None,
        private: bool = False,
        create_pr: bool = False,
        commit_message: str = "INT8 export by hfq",
    ) -> str:
        """Publish in one atomic commit; the same content again makes none. Returns the repository's address.

        Raises:
            HubError: the Hub or the repository's content does not allow it. Nothing was published.
        """
        from .publish import push_folder
        from .recipe import PushOptions

        with tempfile.TemporaryDirectory(prefix="hfq-") as work:
            folder = Path(work) / "model"
            self.save(folder)
            pushed = push_folder(
                folder,
                repo_id=repo_id,
                default_name=repo_id,
                token=token,
                message=commit_message,
                options=PushOptions(private=private, create_pr=create_pr),
            )
        return pushed.url

    def _write(self, folder: Path) -> None:
        assert isinstance(self, nn.Module)
        inside = sentence_transformer(self)
        name = transformers_part(self)
        part = inside or (self if name is None else self.get_submodule(name))
        check_openable(part)
        plan = _within(self._hfq_plan, name)
        write = partial(write_weights_and_config, part, plan, _config(part), widened=inside is not None)
        if inside is None:
            write(folder=folder)
        else:
            _write_around(self, inside, folder, lambda path: write(folder=path))
        if isinstance(part, PreTrainedModel):
            kind = type(part).__mro__[2] if isinstance(part, Quantized) else type(part)
            check_written(part, folder, kind=kind, batch=self._hfq_example if name is None else None)
        generation: Any = getattr(part, "generation_config", None)
        if generation is not None and getattr(part, "can_generate", lambda: False)():
            generation.save_pretrained(folder)
        write_text(folder / REPORT_FILE, self._hfq_report.to_json())
        write_text(folder / "README.md", render_fit_card(self._hfq_report))


def _write_around(model: nn.Module, inside: PreTrainedModel, folder: Path, write: Callable[[Path], None]) -> None:
    """Have a sentence-transformers model write its folder, in which `write` does what the model `inside` would."""
    inside.save_pretrained = lambda path, **_: write(Path(path))  # type: ignore[method-assign]
    try:
        type(model).__mro__[2].save(model, str(folder), create_model_card=False)  # type: ignore[attr-defined]
    finally:
        del inside.save_pretrained


def quantized_like(model: nn.Module, quantized: nn.Module, *, plan: Plan, report: Report, example: Batch | None) -> Any:
    """Make `quantized`, a module of the class of `model`, a `Quantized` of that class."""
    quantized.__class__ = _class_of(type(model))
    quantized._hfq_plan = plan  # type: ignore[assignment]
    quantized._hfq_report = report  # type: ignore[assignment]
    quantized._hfq_example = example  # type: ignore[assignment]
    return quantized


def _class_of(kind: type) -> type:
    """A subclass of the same name: transformers writes it into config.json, and stock transformers looks it up."""
    if kind not in _CLASSES:
        members = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__reduce__": _reduce,
            "hfq_runs_as": kind,  # its forward is that one's, so `hfq.compile` keeps graphs for both
        }
        _CLASSES[kind] = _metaclass(type(kind))(kind.__name__, (Quantized, kind), members)
    return _CLASSES[kind]


@cache
def _metaclass(of: type[type]) -> Any:
    """One whose classes are pickled by their float class: pools of processes are given a class, too."""
    found = type(of.__name__, (of,), {"__module__": of.__module__})
    copyreg.pickle(found, _reduce_class)
    return found


def _reduce_class(quantized: type) -> Any:
    return _class_of, (quantized.__mro__[2],)


def _reduce(self: nn.Module) -> Any:
    """Pickle by the float class, which can be found by its name."""
    return _restore, (type(self).__mro__[2],), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__


def _restore(kind: type) -> Any:
    return object.__new__(_class_of(kind))


def _within(plan: Plan, part: str | None) -> Plan:
    """The layers of `plan` by their names in `part`."""
    if part is None:
        return plan
    layers = {name.removeprefix(f"{part}."): scheme for name, scheme in plan.layers.items()}
    return replace(plan, layers=layers, embeddings=tuple(name.removeprefix(f"{part}.") for name in plan.embeddings))


def _config(model: nn.Module) -> dict[str, Any]:
    """A transformers model's config.json; of another module only the name of its class."""
    config: Any = getattr(model, "config", None)
    if isinstance(model, PreTrainedModel):
        return {**copy.deepcopy(config.to_dict()), "architectures": [type(model).__name__]}
    return {"hfq_module": type(model).__qualname__}
