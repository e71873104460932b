"""Drive the engines: prepare each, load each in a process of its own, then time them in turn on every shape."""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from ..common.errors import UsageError
from ..common.installation import installation
from ..common.ui import Reporter
from ..measure.hardware import hardware
from ..measure.process import Process
from ..report.report import package_versions, read_report
from ..source.bounds import check_model
from ..source.checkpoint import Checkpoint, pull
from ..source.sentence_model import read_sentence_model
from ..tasks.labels import count_labels
from ..tasks.registry import find_task
from ..tasks.text.tokens import TextTask
from .engines import ENGINES, OF_EMBEDDINGS, PEERS, REFERENCE, WEIGHTS, missing

CALIBRATION = 100  # inputs, as the peers' own guides take
SAME_ANSWER = 0.9  # share of inputs answered as the float model does; below it the table says so
SAME_LOGITS = 0.5  # relative difference of logits; above it the table says so, too
FIRST_SHAPE = (1, 16)  # of the input that is answered as soon as a model is loaded: so small that only loading shows
VARIABLES = ("HFQ_", "ONEDNN_", "DNNL_", "OMP_", "KMP_", "GOMP_", "MALLOC_", "GLIBC_TUNABLES", "ATEN_CPU_CAPABILITY")
Shape = tuple[int, int]


@dataclass(frozen=True)
class Latency:
    """Milliseconds a forward of one shape, and examples a second at the median."""

    p50: float
    p95: float
    p99: float
    throughput: float
    samples: int


@dataclass(frozen=True)
class SecondProcess:
    """Another process that loads the same and answers one input, while the first has it loaded.

    MiB that this took, less what imports take: `private_mib` is what it adds to the host, `shared_mib` what it has
    resident and other processes as well, such as pages of the weight file and of libraries. Seconds: as in
    `EngineResult`.
    """

    load_s: float
    first_answer_s: float
    private_mib: float
    shared_mib: float


@dataclass(frozen=True)
class Timing:
    """What is timed: batch and length of each input, by how many threads, and how often each engine has its turn."""

    shapes: Sequence[Shape]
    threads: int
    rounds: int


@dataclass(frozen=True)
class EngineResult:
    """`load_s`: seconds. `first_answer_s`: seconds from the start of loading to the answer to one small input.

    `size_mib`, `peak_mib`: MiB of the weights that it loads, and the peak less what imports take. `by_shape`: keys like
    "8x128". `agreement`: share of inputs of the largest shape, at least 16 and half of them padded, whose label is the
    float model's; of vectors, their mean cosine. `error`: relative difference of logits or vectors. Both are None where
    nothing was compared. `failure`: why it did not run to the end; what it did until then was measured.
    """

    name: str
    load_s: float = 0.0
    first_answer_s: float = 0.0
    size_mib: float = 0.0
    peak_mib: float = 0.0
    agreement: float | None = None
    error: float | None = None
    by_shape: dict[str, Latency] = field(default_factory=dict)
    second_process: SecondProcess | None = None
    failure: str | None = None


@dataclass(frozen=True)
class BenchResult:
    """What one run measured. Only figures of one run may be compared.

    `setup`: what it takes to repeat it: rounds, revisions, versions of packages, and variables of the environment.
    """

    checkpoint: str
    baseline: str
    shapes: list[str]
    hardware: dict[str, Any]
    engines: list[EngineResult]
    setup: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> list[EngineResult]:
        """Those that did not run to the end."""
        return [engine for engine in self.engines if engine.failure is not None]


def read_shapes(text: str) -> list[Shape]:
    """Shapes, with commas between them.

    Raises:
        UsageError: one is not batch x length.
    """
    shapes = []
    for one in text.split(","):
        if not re.fullmatch(r"\s*[1-9]\d*x[1-9]\d*\s*", one):
            raise UsageError(f"--shapes {one!r} is not batch x length, such as 8x128.")
        batch, length = one.split("x")
        shapes.append((int(batch), int(length)))
    return shapes


def bench(
    quantized: Checkpoint,
    baseline: Checkpoint,
    *,
    names: Mapping[str, str | None],
    timing: Timing,
    ui: Reporter,
) -> BenchResult:
    """Measure engines on random tokens. `names`: of engines, with the interpreter of each, None for this one.

    An engine that fails is reported as such, and does not end the others.

    Raises:
        UsageError: `baseline` is not the float model of `quantized`, a shape is longer than it takes, or an engine does
            not run such models.
        SourceError: a checkpoint is not the model that its config says.
    """
    shapes, threads = timing.shapes, timing.threads
    _check(quantized, baseline, shapes)
    found: dict[str, dict[str, Any]] = {}
    used: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory(prefix="hfq-bench-") as folder, ExitStack() as stack:
        opening = opening_request(quantized, baseline, threads=threads, folder=Path(folder))
        opening["pythons"] = names
        if not opening["embeds"] and (strange := [name for name in names if name in OF_EMBEDDINGS]):
            raise UsageError(
                f"--vs {', '.join(strange)} is for models of sentence embeddings, which {quantized.info.id} is not."
            )
        running: dict[str, Process] = {}
        loading: dict[str, dict[str, Any]] = {}
        for name in names:
            ui.stage(f"Prepare and load {name}")
            found[name] = {}
            try:
                loading[name] = prepare(name, opening, Path(folder) / name)
                process, used[name], found[name] = _load(name, opening, loading[name])
                running[name] = stack.enter_context(process)
            except Exception as error:  # a peer's own failure, of any type: it is a result
                found[name]["failure"] = str(error)
                ui.warn(f"{name}: {error}")
                continue
            weights = ENGINES[name].loads
            found[name]["size_mib"] = (
                {"quantized": quantized, "baseline": baseline}[weights].size_mib
                if weights
                else _size_mib(Path(folder) / name)
            )
        for batch, length in sorted(shapes, key=lambda shape: shape[0] * shape[1]):
            ui.stage(f"Time {batch}×{length}")
            _time(running, found, {**opening, "shape": [batch, length]}, rounds=timing.rounds)
        largest = max(shapes, key=lambda shape: shape[0] * shape[1])
        _compare(running, found, {**opening, "do": "outputs", "shape": [max(16, largest[0]), largest[1]]})
        for name in running:
            ui.stage(f"Load {name} in a second process")
            try:
                found[name]["second_process"] = _load_beside(name, opening, loading[name])
            except Exception as error:
                ui.warn(f"{name}, in a second process: {error}")
    results = [EngineResult(name=name, **found[name]) for name in names]
    setup = {
        "rounds": timing.rounds,
        "revisions": {"checkpoint": quantized.info.revision, "baseline": baseline.info.revision},
        "compared": "cosine" if opening["embeds"] else "label",
        "versions": {**package_versions(), **{k: v for name in used if not names[name] for k, v in used[name].items()}},
        "elsewhere": {name: found for name, found in used.items() if names[name]},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
    }
    return BenchResult(
        quantized.info.id,
        baseline.info.id,
        [f"{batch}x{length}" for batch, length in shapes],
        {**hardware(), "threads": threads},
        results,
        setup,
    )


def opening_request(quantized: Checkpoint, baseline: Checkpoint, *, threads: int, folder: Path) -> dict[str, Any]:
    """What every process is told first. `folder`: for the inputs that peers calibrate on.

    Raises:
        SourceError: a checkpoint is not the model that its config says, which nobody may load then.
    """
    auto_class = find_task(quantized.config, folder=quantized.path).auto_class
    for checkpoint in (quantized, baseline):
        check_model(checkpoint, auto_class)
    vocabulary = (
        AutoConfig.from_pretrained(quantized.path).get_text_config().vocab_size
    )  # a config may call it otherwise
    calibration = folder / "calibration.safetensors"
    save_file(_calibration(vocabulary), calibration)
    return {
        "do": "open",
        "quantized": str(quantized.path),
        "baseline": str(baseline.path),
        "auto_class": auto_class,
        "architecture": (quantized.config.get("architectures") or [""])[0],
        "calibration": str(calibration),
        "vocabulary": vocabulary,
        "threads": threads,
        "layers": None,
        "embeds": _embeds(quantized),
        "pythons": {},
        "shape": FIRST_SHAPE,
    }


def _embeds(checkpoint: Checkpoint) -> bool:
    """Whether it is a model of sentence-transformers' that makes a vector of a text."""
    found = read_sentence_model(checkpoint.path)
    return found is not None and found.kind == "SentenceTransformer" and not found.has("SpladePooling")


def chosen(peers: Sequence[str], *, compiled: bool, pythons: Mapping[str, str]) -> dict[str, str | None]:
    """Engines to run with their interpreters, the float model first: all installed peers if none is named.

    `pythons`: interpreters of peers whose packages are in an environment of their own, by name.

    Raises:
        UsageError: a peer is unknown, or named and not installed; an interpreter does not exist.
    """
    if unknown := [name for name in (*peers, *pythons) if name not in PEERS]:
        raise UsageError(f"--vs {', '.join(unknown)} is not known. Expected some of: {', '.join(PEERS)}.")
    for name, python in pythons.items():
        if shutil.which(python) is None:
            raise UsageError(
                f"--peer-python {name}={python}: there is no such program. Name the interpreter, bin/python."
            )
    for name in peers:
        if name not in pythons and (absent := missing(name)):
            raise UsageError(
                f"--vs {name} needs {', '.join(absent)}. Install them: {installation('bench')}. Or name an interpreter "
                f"that has them: --peer-python {name}=PATH"
            )
    wanted = peers or [name for name in PEERS if name in pythons or (name not in OF_EMBEDDINGS and not missing(name))]
    names = [REFERENCE, "hfq", *(["hfq-compiled"] if compiled else []), *wanted]
    return {name: pythons.get(name) for name in names}


def read_pythons(given: Sequence[str]) -> dict[str, str]:
    """Interpreters by the name of the peer.

    Raises:
        UsageError: one is not NAME=PATH.
    """
    found = {}
    for one in given:
        name, equals, path = one.partition("=")
        if not (name and equals and path):
            raise UsageError(f"--peer-python {one!r} is not NAME=PATH, such as st-openvino=./venv/bin/python.")
        found[name] = path
    return found


def pull_baseline(quantized: Checkpoint, named: str | None, *, token: str | None) -> Checkpoint:
    """The float checkpoint called `named`, or the one that hfq.json says `quantized` was made from.

    Raises:
        UsageError: it was made from a folder, whose place hfq.json does not keep.
        SourceError: it cannot be pulled, or there is no hfq.json.
    """
    if named is not None:
        return pull(named, token=token)
    report = read_report(quantized.path)
    if report.of_object:
        raise UsageError(
            f"{quantized.info.id} was made by fit from a model in memory. Say where its float checkpoint is: --baseline FOLDER"
        )
    made_from = report.checkpoint
    if made_from.revision.startswith("sha256:"):
        raise UsageError(
            f"{quantized.info.id} was made from a folder called {made_from.id}. Say where: --baseline FOLDER"
        )
    return pull(made_from.id, revision=made_from.revision, token=token)


def _check(quantized: Checkpoint, baseline: Checkpoint, shapes: Sequence[Shape]) -> None:
    """Refuse what cannot be measured, or could be but not compared."""
    name = baseline.info.id
    task = find_task(quantized.config, folder=quantized.path)
    if not issubclass(task, TextTask):
        raise UsageError(
            f"hfq bench times models on random tokens, and one for {task.name} reads something else. On your own data: "
            f"hfq eval {quantized.info.id} --dataset DATA has seconds and memory, and hfq eval {name} those of the baseline."
        )
    if baseline.is_quantized:
        raise UsageError(
            f"--baseline {name} is quantized. Pass the float checkpoint that {quantized.info.id} was made from."
        )
    for what, of in (("labels", count_labels), ("tokens in its vocabulary", lambda config: config.get("vocab_size"))):
        here, there = of(quantized.config), of(baseline.config)
        if here != there:
            raise UsageError(
                f"--baseline {name} is another model: it has {there} {what}, and {quantized.info.id} {here}. "
                "Pass the checkpoint that it was made from."
            )
    most = quantized.config.get("max_position_embeddings")
    if most and (longest := max(length for _, length in shapes)) > most:
        raise UsageError(f"{quantized.info.id} takes at most {most} tokens, and --shapes has {longest}.")


def prepare(name: str, opening: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make what the engine loads; return the request that loads it.

    In a process of its own, so that quantizing is in neither time nor memory.
    """
    if checkpoint := ENGINES[name].loads:
        return {**opening, "do": "load", "path": opening[checkpoint]}
    folder.mkdir()
    with open_engine(name, opening) as process:
        process.hear()
        process.ask({"do": "prepare", "folder": str(folder)})
    return {**opening, "do": "load", "path": str(folder)}


def open_engine(name: str, opening: dict[str, Any]) -> Process:
    """A process for the engine called `name`, which was told `opening` and has not answered yet."""
    process = Process("hfq.bench.engine_process", name, python=opening["pythons"].get(name))
    process.tell({**opening, "engine": name})
    return process


def _load(
    name: str, opening: dict[str, Any], loading: dict[str, Any]
) -> tuple[Process, dict[str, str], dict[str, Any]]:
    """The process, versions of what it runs, and what loading took."""
    process = open_engine(name, opening)
    try:
        versions = process.hear()["versions"]
        return process, versions, {**process.ask(loading), "by_shape": {}}
    except BaseException:
        process.close()
        raise


def _size_mib(folder: Path) -> float:
    """Of the weights that a peer made, MiB."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in WEIGHTS) / 2**20


def _load_beside(name: str, opening: dict[str, Any], loading: dict[str, Any]) -> SecondProcess:
    process, _, loaded = _load(name, opening, loading)
    with process:
        memory = process.ask({**opening, "do": "memory"})
    return SecondProcess(loaded["load_s"], loaded["first_answer_s"], memory["private"], memory["shared"])


def _time(
    running: dict[str, Process], found: dict[str, dict[str, Any]], request: dict[str, Any], *, rounds: int
) -> None:
    """`rounds` turns of every engine on one shape, after a warm-up in which they compile and settle."""
    batch, length = request["shape"]
    repeat = max(2, min(30, 4096 // (batch * length)))
    seconds: dict[str, list[float]] = {name: [] for name in running}
    for turn in range(rounds + 1):
        for name in list(running):
            try:
                answer = running[name].ask({**request, "do": "time", "repeat": repeat if turn else 3})
            except Exception as error:
                found[name]["failure"] = f"at {batch}x{length}: {error}"
                del running[name]
                continue
            found[name]["peak_mib"] = answer["peak_mib"]
            if turn:
                seconds[name] += answer["seconds"]
    for name in running:
        p50, p95, p99 = (
            torch.tensor(seconds[name], dtype=torch.float64)
            .quantile(torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64))
            .tolist()
        )
        found[name]["by_shape"][f"{batch}x{length}"] = Latency(
            p50 * 1e3, p95 * 1e3, p99 * 1e3, batch / p50, len(seconds[name])
        )


def _compare(running: dict[str, Process], found: dict[str, dict[str, Any]], request: dict[str, Any]) -> None:
    answers: dict[str, torch.Tensor] = {}
    for name in list(running):
        try:
            answers[name] = torch.tensor(running[name].ask(request)["outputs"])
        except Exception as error:
            batch, length = request["shape"]
            found[name]["failure"] = f"at {batch}x{length}: {error}"
            del running[name]
    reference = answers.get(REFERENCE)
    if reference is None:
        return
    for name, outputs in answers.items():
        if request["embeds"]:
            alike = torch.cosine_similarity(outputs, reference)
        else:
            alike = (outputs.argmax(1) == reference.argmax(1)).float()
        found[name]["agreement"] = alike.mean().item()
        found[name]["error"] = ((outputs - reference).norm() / reference.norm()).item()


def _calibration(vocabulary: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(16, 128, (CALIBRATION,), generator=generator).tolist()
    return {
        f"{i:03d}": torch.randint(vocabulary // 10, vocabulary, (1, length), generator=generator)
        for i, length in enumerate(lengths)
    }
