"""A process that prepares or runs one engine: `python -m hfq.bench.engine_process`, driven by `hfq.bench.run`.

Requests are JSON lines on standard input, answers JSON lines on standard output.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..measure.process import peak_mib, resident_mib, serve

if TYPE_CHECKING:
    from .engines import Preparing

MOST_ROWS = 33  # of a ragged request


class _Session:
    def __init__(self, request: dict[str, Any]) -> None:
        import torch

        from .engines import ENGINES, Job, versions

        self.torch = torch
        torch.set_num_threads(request["threads"])
        self.engine = ENGINES[request["engine"]]
        for module in self.engine.requires:
            __import__(module)
        self.job = Job(
            Path(request["quantized"]),
            Path(request["baseline"]),
            request["auto_class"],
            Path(request["calibration"]),
            request["threads"],
            request["layers"],
            request["embeds"],
        )
        self.versions = versions([request["engine"]])

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "open":
            return {"versions": self.versions}
        if request["do"] == "prepare":
            cast("Preparing", self.engine).prepare(self.job, Path(request["folder"]))
            return {}
        if request["do"] == "load":
            return self._load(request)
        if request["do"] == "outputs":
            batch = self._batch(request)
            batch["mask"][1::2, -(batch["mask"].shape[1] // 4) :] = 0  # every other row ends in padding
            outputs = self._forward(**batch).float()
            if outputs.dim() == 3:  # a row for each token: of the first, which is never padding
                outputs = outputs[:, 0]
            return {"outputs": outputs.tolist()}
        if request["do"] == "memory":
            return {name: now - self.imported[name] for name, now in resident_mib().items()}
        if request["do"] == "soak":
            return {"milliseconds": self._soak(request), "peak_mib": peak_mib() - self.imported_mib}
        return {"seconds": self._time(request), "peak_mib": peak_mib() - self.imported_mib}

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        import transformers

        batch = self._batch(request)
        getattr(
            transformers, request["architecture"], None
        )  # imports the model's code before time and memory are counted
        self.imported_mib, self.imported = peak_mib(), resident_mib()
        start = time.perf_counter()
        self.run = self.engine.load(Path(request["path"]), self.job)
        load_s = time.perf_counter() - start
        self._forward(**batch)  # some compile only now, and some weights take their place in memory
        return {"load_s": load_s, "first_answer_s": time.perf_counter() - start}

    def _time(self, request: dict[str, Any]) -> list[float]:
        batch = self._batch(request)
        seconds = []
        for _ in range(request["repeat"]):
            start = time.perf_counter()
            self._forward(**batch)
            seconds.append(time.perf_counter() - start)
        return seconds

    def _soak(self, request: dict[str, Any]) -> float:
        """Milliseconds for a thousand tokens, in requests of 1 to 33 rows of 1 to 512 tokens, or as many as there may be."""
        generator = self.torch.Generator().manual_seed(0)
        start, tokens = time.perf_counter(), 0
        while not tokens or time.perf_counter() - start < request["seconds"]:
            rows = int(self.torch.randint(1, MOST_ROWS + 1, (), generator=generator))
            lengths = self.torch.randint(1, request["longest"] + 1, (rows, 1), generator=generator)
            batch = self._batch({**request, "shape": (rows, int(lengths.max()))})
            batch["mask"] = (self.torch.arange(batch["ids"].shape[1]) < lengths).long()
            self._forward(**batch)
            tokens += int(lengths.sum())
        return 1e6 * (time.perf_counter() - start) / tokens

    def _forward(self, ids: Any, mask: Any) -> Any:
        with self.torch.no_grad():
            return self.run(ids, mask)

    def _batch(self, request: dict[str, Any]) -> dict[str, Any]:
        batch, length = request["shape"]
        generator = self.torch.Generator().manual_seed(0)
        ids = self.torch.randint(
            request["vocabulary"] // 10, request["vocabulary"], (batch, length), generator=generator
        )
        return {"ids": ids, "mask": self.torch.ones_like(ids)}


if __name__ == "__main__":
    serve(_Session, _Session.answer)
