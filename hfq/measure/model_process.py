"""A process that loads one model and times it: `python -m hfq.measure.model_process`, driven by `hfq.measure.timing`."""

import os
import time
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

from .process import peak_mib, serve


def main() -> None:
    """Answer `open` and `load` once, then `pass` and `outputs` as often as asked, until standard input ends."""
    serve(_Session, _Session.answer)


class _Session:
    def __init__(self, request: dict[str, Any]) -> None:
        import torch
        import transformers

        from ..common.memory import free_at_once
        from ..tasks.registry import find_architecture, make_task

        if request["threads"]:
            torch.set_num_threads(request["threads"])
        import_module("hfq.runtime.loading.quantizer")  # also where it is not used: libraries are no model's memory
        if request["stock"]:
            free_at_once()
        folder, settings = Path(request["folder"]), request["settings"]
        self.task = make_task(request["config"], name=request["task"], folder=folder, settings=settings)
        self.auto_class = getattr(transformers, self.task.auto_class)
        find_architecture(request["config"])  # imports the model's code before memory is counted
        self.stock = request["stock"]
        transformers.utils.logging.disable_progress_bar()
        self.torch = torch

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "open":
            return {}
        if request["do"] == "load":
            return self._load(request)
        return self.run_pass() if request["do"] == "pass" else self.save_outputs(request["path"])

    def _load(self, request: dict[str, Any]) -> dict[str, float]:
        from safetensors.torch import load_file

        from ..common.memory import drop_checkpoint_pages
        from ..runtime.int8.packed import memory_mib
        from ..runtime.loading.stock import stock_transformers

        self.batches = _batches(load_file(request["batches"]))
        imported_mib = peak_mib()
        os.environ["HFQ_COMPILE"] = "off"  # what is measured does not depend on what this machine compiled before
        start = time.perf_counter()
        with stock_transformers() if self.stock else nullcontext():
            self.model = self.auto_class.from_pretrained(
                request["model"], dtype=self.torch.float32, trust_remote_code=request["trust_remote_code"]
            ).eval()
        load_s = time.perf_counter() - start
        if request["compiled"]:
            from ..runtime.compiling.compile import compile

            self.model = compile(self.model)
        if self.stock:  # it widens its weights in the first forward: not with a batch's activations beside them
            self._outputs({name: rows[:1] for name, rows in self.batches[-1].items()})
            drop_checkpoint_pages()  # the int8 weights that it was widened from
        self._outputs(self.batches[-1])  # warm-up, and the largest batch: the peak is reached here
        return {"load_s": load_s, "imported_mib": imported_mib, "memory_mib": memory_mib(self.model)}

    def run_pass(self) -> dict[str, float]:
        start = time.perf_counter()
        for batch in self.batches:
            self._outputs(batch)
        return {"seconds": time.perf_counter() - start, "peak_mib": peak_mib()}

    def save_outputs(self, path: str) -> dict[str, float]:
        from safetensors.torch import save_file

        from ..runtime.fusion.snapshot import drawing_alike

        outputs = []
        for batch in self.batches:
            with drawing_alike():
                outputs += self._outputs(batch)
        save_file({str(row): output.contiguous().clone() for row, output in enumerate(outputs)}, path)
        return {}

    def _outputs(self, batch: dict[str, Any]) -> list[Any]:
        with self.torch.inference_mode():
            return self.task.outputs(self.model, batch)


def _batches(tensors: dict[str, Any]) -> list[dict[str, Any]]:
    """Undo `hfq.measure.timing`'s flat `position.name` keys."""
    batches: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        position, name = key.split(".", 1)
        batches.setdefault(int(position), {})[name] = tensor
    return [batches[position] for position in sorted(batches)]


if __name__ == "__main__":
    main()
