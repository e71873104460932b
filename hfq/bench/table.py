"""A bench result as Markdown, JSON and a plot."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..common.files import write_bytes, write_text
from ..common.redact import redact
from ..report.plots import png, quiet_matplotlib
from .engines import ENGINES, PEERS, REFERENCE
from .growth import BATCH, LENGTH, Point, steeper
from .run import SAME_ANSWER, SAME_LOGITS, BenchResult, EngineResult


def write(result: BenchResult, growth: Sequence[Point], folder: Path) -> list[Path]:
    """`bench.md`, `bench.json` and `bench.png` in `folder`, which is made if need be; `growth.png` if it was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"bench.{suffix}" for suffix in ("md", "json", "png")]
    write_text(paths[0], redact(markdown(result, growth)))
    write_text(paths[1], redact(json.dumps(as_dict(result, growth), indent=2, ensure_ascii=False)))
    write_bytes(paths[2], _plot(result))
    if growth:
        paths.append(folder / "growth.png")
        write_bytes(paths[-1], _plot_growth(growth))
    return paths


def as_dict(result: BenchResult, growth: Sequence[Point]) -> dict[str, Any]:
    """Everything that was measured."""
    return {**asdict(result), "growth": [asdict(point) for point in growth]}


def markdown(result: BenchResult, growth: Sequence[Point]) -> str:
    """The figures as tables: by shape, by engine, and by size."""
    ran = [engine for engine in result.engines if engine.by_shape]
    lines = [
        f"# {result.checkpoint}",
        "",
        f"{result.hardware['cpu']}, {result.hardware['threads']} threads, torch kernel {result.hardware['kernel']}. "
        f"Float model: {result.baseline}. All engines in turn, in one run; times are milliseconds.",
        "",
        "| batch x length | engine | p50 | p95 | p99 | of | examples/s | x FP32 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in result.shapes:
        timed = {engine.name: engine.by_shape[shape] for engine in ran if shape in engine.by_shape}
        reference = timed.get(REFERENCE)
        for name, latency in timed.items():
            ratio = f"{reference.p50 / latency.p50:.2f}" if reference else ""
            lines.append(
                f"| {shape} | {name} | {latency.p50:.2f} | {latency.p95:.2f} | {latency.p99:.2f} "
                f"| {latency.samples} | {latency.throughput:.1f} | {ratio} |"
            )
    lines += [
        "",
        f"| engine | load s | first answer s | size MiB | peak MiB | {_compared(result)} |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [_engine_row(engine) for engine in ran]
    lines += [
        "",
        "The first answer is to 1x16, counted from the start of loading: weights are packed, and some models compiled, "
        "only then. " + _quantizing_while_loading(ran) + "Half of the inputs whose answers are compared are padded.",
    ]
    lines += _second_processes(ran)
    lines += [f"\n**{engine.name} did not run to the end:** {engine.failure}" for engine in result.failed]
    lines += [
        f"\n**{engine.name} answers otherwise than the float model on these inputs.**"
        for engine in ran
        if engine.agreement is not None and engine.error is not None
        if engine.agreement < SAME_ANSWER or engine.error > SAME_LOGITS
    ]
    if growth:
        lines += ["", "| | size | engine | ms | peak MiB |", "|---|---|---|---|---|"]
        lines += [
            f"| {point.axis} | {point.value} | {point.engine} | {point.milliseconds:.1f} | {point.peak_mib:.0f} |"
            for point in growth
        ]
        lines += [f"\n**{sentence}**" for sentence in steeper(growth)]
    versions = {"": result.setup.get("versions"), **result.setup.get("elsewhere", {})}
    for where, packages in versions.items():
        if packages:
            listed = ", ".join(f"{name} {version}" for name, version in packages.items())
            lines += ["", f"Versions{where and f' of {where}'}: {listed}."]
    return "\n".join([*lines, ""])


def _compared(result: BenchResult) -> str:
    vectors = result.setup.get("compared") == "cosine"
    return "cosine to FP32 | vector error" if vectors else "same label as FP32 | logit error"


def _engine_row(engine: EngineResult) -> str:
    compared = ("", "") if engine.agreement is None else (f"{engine.agreement:.1%}", f"{engine.error:.3f}")
    return (
        f"| {engine.name} | {engine.load_s:.2f} | {engine.first_answer_s:.2f} | {engine.size_mib:.1f} "
        f"| {engine.peak_mib:.0f} | {' | '.join(compared)} |"
    )


def _quantizing_while_loading(ran: Sequence[EngineResult]) -> str:
    names = [engine.name for engine in ran if engine.name in PEERS and ENGINES[engine.name].loads]
    if not names:
        return ""
    return f"Loading, size and peak of {' and '.join(names)} are of the float checkpoint, which is quantized while it loads. "


def _second_processes(ran: Sequence[EngineResult]) -> list[str]:
    rows = [
        f"| {engine.name} | {second.load_s:.2f} | {second.first_answer_s:.2f} | {second.private_mib:.1f} "
        f"| {second.shared_mib:.1f} |"
        for engine in ran
        if (second := engine.second_process)
    ]
    if not rows:
        return []
    return [
        "",
        "A second process that loads the same while the first has it loaded, and answers one input. Memory is what that "
        "took, less what imports take: private is what it adds to the host; shared is resident in other processes as "
        "well, such as pages of the weight file and of libraries.",
        "",
        "| engine | load s | first answer s | private MiB | shared MiB |",
        "|---|---|---|---|---|",
        *rows,
    ]


def _plot(result: BenchResult) -> bytes:
    """Examples a second, a group of bars a shape."""
    quiet_matplotlib()
    from matplotlib.figure import Figure

    ran = [engine for engine in result.engines if engine.by_shape]
    figure = Figure(figsize=(max(7.0, 1.5 + 1.6 * len(result.shapes)), 4.0), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(1, len(ran))
    for position, engine in enumerate(ran):
        timed = {index: engine.by_shape[shape] for index, shape in enumerate(result.shapes) if shape in engine.by_shape}
        places = [index + (position - (len(ran) - 1) / 2) * width for index in timed]
        axes.bar(places, [latency.throughput for latency in timed.values()], width, label=engine.name)
    axes.set_xticks(range(len(result.shapes)), result.shapes)
    axes.set_xlabel("batch x length (tokens)")
    axes.set_ylabel("examples per second (median)")
    axes.set_yscale("log")
    title = f"{result.checkpoint} on {result.hardware['cpu']}, {result.hardware['threads']} threads"
    axes.set_title(title, parse_math=False)
    axes.grid(axis="y", alpha=0.3)
    if ran:
        figure.legend(loc="outside right upper")
    return png(figure)


def _plot_growth(growth: Sequence[Point]) -> bytes:
    """Time above, memory below; a column for each axis."""
    quiet_matplotlib()
    from matplotlib.figure import Figure

    axes_names = list(dict.fromkeys(point.axis for point in growth))
    usual = f"{BATCH}x{LENGTH}"
    fixed = {
        "layers": usual,
        "batch": f"length {LENGTH}",
        "length": f"batch {BATCH}",
        "processes": usual,
        "soak": "s of ragged batches",
    }
    figure = Figure(figsize=(3.6 * len(axes_names), 5.6), layout="constrained")
    grid = figure.subplots(2, len(axes_names), squeeze=False, sharey="row")
    for column, axis in enumerate(axes_names):
        for engine in dict.fromkeys(point.engine for point in growth):
            points = [point for point in growth if point.axis == axis and point.engine == engine]
            values = [point.value for point in points]
            grid[0][column].plot(values, [point.milliseconds for point in points], marker="o", label=engine)
            grid[1][column].plot(values, [point.peak_mib for point in points], marker="o")
        grid[0][column].set_title(f"{axis} ({fixed[axis]})")
        grid[1][column].set_xlabel(axis)
        for row in grid:
            row[column].set_ylim(bottom=0)
            row[column].grid(alpha=0.3)
    grid[0][0].set_ylabel("ms a forward")
    grid[1][0].set_ylabel("peak memory, MiB")
    figure.legend(loc="outside upper right", ncols=2)
    return png(figure)
