"""A process that loads one model and times it: `python -m hfq.worker`, driven by `hfq.benchmark`.

Its own process, so that memory is that of a user's program and no model profits from another's allocator
settings. Requests are JSON lines on standard input, answers JSON lines on standard output.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

S = TypeVar("S")


def main() -> None:
    """Answer `open` and `load` once, then `pass` and `logits` as often as asked, until standard input ends."""
    serve(_Session, _Session.answer)


def serve(opened: Callable[[dict[str, Any]], S], answer: Callable[[S, dict[str, Any]], dict[str, Any]]) -> None:
    """Answer each request line; the first one opens the session that answers them all, itself included."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # libraries print, in C++ too; only answers may go to the asker
    sys.stdout = sys.stderr
    session: S | None = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            session = opened(request) if session is None else session
            found = answer(session, request)
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(found), file=answers, flush=True)


class _Session:
    def __init__(self, request: dict[str, Any]) -> None:
        import torch
        import transformers

        if request["threads"]:
            torch.set_num_threads(request["threads"])
        for module in request["imports"]:
            import_module(module)
        self.auto_class = getattr(transformers, request["auto_class"])
        getattr(transformers, request["architecture"], None)  # imports the model's code before memory is counted
        self.stock = request["stock"]
        if self.stock:
            _without_hfq()
        transformers.utils.logging.disable_progress_bar()
        self.torch = torch

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "open":
            return {}
        if request["do"] == "load":
            return self._load(request)
        return self.run_pass() if request["do"] == "pass" else self.save_logits(request["path"])

    def _load(self, request: dict[str, Any]) -> dict[str, float]:
        from safetensors.torch import load_file

        from .runtime.memory import drop_checkpoint_pages

        self.batches = _batches(load_file(request["batches"]))
        imported_mib = peak_mib()
        start = time.perf_counter()
        self.model = self.auto_class.from_pretrained(
            request["model"], dtype=self.torch.float32, trust_remote_code=request["trust_remote_code"]
        ).eval()
        load_s = time.perf_counter() - start
        if request["compiled"]:
            from .runtime.compiling import compile

            self.model = compile(self.model)
        if self.stock:  # it widens its weights in the first forward: not with a batch's activations beside them
            self._forward({name: rows[:1] for name, rows in self.batches[-1].items()})
            drop_checkpoint_pages()  # the int8 weights that it was widened from
        self._forward(self.batches[-1])  # warm-up, and the largest batch: the peak is reached here
        return {"load_s": load_s, "imported_mib": imported_mib, "memory_mib": self._memory_mib()}

    def run_pass(self) -> dict[str, float]:
        start = time.perf_counter()
        for batch in self.batches:
            self._forward(batch)
        return {"seconds": time.perf_counter() - start, "peak_mib": peak_mib()}

    def save_logits(self, path: str) -> dict[str, float]:
        from safetensors.torch import save_file

        save_file({"logits": self.torch.cat([self._forward(batch).logits.float() for batch in self.batches])}, path)
        return {}

    def _forward(self, batch: dict[str, Any]) -> Any:
        with self.torch.inference_mode():
            return self.model(**batch)

    def _memory_mib(self) -> float:
        from .runtime.modules import memory_mib

        return memory_mib(self.model)


def peak_mib() -> float:
    """Resident peak of this process so far, MiB. `ru_maxrss` would count what the parent held before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if match:
            return int(match[1]) / 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def resident_mib() -> dict[str, float]:
    """Resident memory of this process now, MiB: `private` to it, and `shared` with others, which have it mapped too."""
    import psutil

    found = psutil.Process().memory_full_info()  # on Linux, from smaps
    return {"private": found.uss / 2**20, "shared": max(0, found.rss - found.uss) / 2**20}


def _batches(tensors: dict[str, Any]) -> list[dict[str, Any]]:
    """Undo `hfq.benchmark`'s flat `position.name` keys."""
    batches: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        position, name = key.split(".", 1)
        batches.setdefault(int(position), {})[name] = tensor
    return [batches[position] for position in sorted(batches)]


def _without_hfq() -> None:
    """Load as transformers does where hfq is not installed."""
    from transformers.quantizers import auto
    from transformers.quantizers.quantizer_compressed_tensors import CompressedTensorsHfQuantizer

    auto.AUTO_QUANTIZER_MAPPING["compressed-tensors"] = CompressedTensorsHfQuantizer


if __name__ == "__main__":
    main()
