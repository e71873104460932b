"""Commands, nothing else: what was given becomes a recipe, and what was found is written.

Libraries are imported where a command uses them, so that help and wrong arguments take no time.
"""

import os
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..common.errors import GoalNotMetError, HfqError, HubError, UsageError
from ..common.version import __version__
from ..recipe import EXPLAINED, PUBLISHING, Evaluation, Recipe, make_recipe, read_recipe, write_recipe
from .console import Interrupted, command_line, fail, show_tasks, write, write_json, write_line
from .options import (
    Contest,
    Hub,
    Json,
    Listener,
    Place,
    Recipes,
    Resume,
    Token,
    Verbose,
    examples,
    expanded,
    with_options,
)

if TYPE_CHECKING:
    from ..common.ui import Reporter
    from ..report.report import Result
    from ..runs.local import Engine
    from ..runs.recipe_folder import Outcome

WARMED = "1x16,8x128"  # a single input, and a batch: a graph each, for any length
app = typer.Typer(
    name="hfq",
    help="INT8 export for the Hugging Face Hub: calibrated, tuned to an accuracy goal, measured, published.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"hfq {__version__}")
        raise typer.Exit


@app.command(
    epilog=examples(
        "hfq quantize Intel/bert-base-uncased-mrpc --push",
        "hfq quantize ./my-checkpoint --dataset ./data --output ./out",
        "hfq quantize ./my-checkpoint --dataset nyu-mll/glue --subset mrpc --calibration-split train --split validation",
    )
)
@with_options(*Recipe.model_fields)
def quantize(  # noqa: PLR0913 - a parameter is a flag
    flags: dict[str, Any],
    hub: Hub,
    save_recipe: Annotated[
        Path | None,
        typer.Option(help="Also write the recipe of this run, for `hfq run`.", show_default=False, callback=expanded),
    ] = None,
    resume: Resume = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile it at the end, for whoever loads it on this machine: hfq warm.")
    ] = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint to INT8, measure it, write it to a folder, and publish it with --push."""
    recipe = make_recipe(flags)
    if compiled:
        _demand_compiler()
    if save_recipe:
        write_recipe(recipe, save_recipe)
    engine = _engine(Place(resume=resume), token=hub.token)
    result = _run(recipe, engine, name=recipe.name, hub=hub, as_json=as_json)
    if compiled:
        _warm({"checkpoint": str(result.folder), "threads": recipe.threads}, WARMED, token=hub.token)


@app.command(
    epilog=examples(
        "hfq run pipelines/demo.yaml --local-hub",
        "hfq run pipelines/ --push",
        "hfq run pipelines/ --push --engine ray --ray-address head:6379",
    )
)
@with_options("push", output="Folder to write, instead of the recipe's.")
def run(
    recipes: Annotated[
        list[Path],
        typer.Argument(help="Recipes, YAML files, or folders of them.", show_default=False, callback=expanded),
    ],
    flags: dict[str, Any],
    place: Place,
    hub: Hub,
    verbose: Verbose = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print the report as JSON on standard output; of several recipes, a line for each."
        ),
    ] = False,
) -> None:
    """Run recipes: the flags of `hfq quantize`, in files.

    Of several recipes, or a folder, one that fails does not stop the others.
    """
    engine = _engine(place, token=hub.token)
    if len(recipes) > 1 or recipes[0].is_dir():
        if "output" in flags:
            raise UsageError("--output is for one recipe. Several are written to the 'output' that each of them names.")
        prefixed = place.engine == "ray"  # they run at once, so that each line has to say whose it is
        _run_many(recipes, engine, prefixed=prefixed, push="push" in flags, hub=hub, as_json=as_json)
        return
    recipe = make_recipe({**read_recipe(recipes[0]).model_dump(), **flags})
    _run(recipe, engine, name=recipes[0].name, hub=hub, as_json=as_json)


@app.command(epilog=examples("hfq tasks", "hfq tasks --json"))
def tasks(as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False) -> None:
    """Show the tasks: what --task, --column and --metric take."""
    from ..tasks.registry import describe_tasks

    found = describe_tasks()
    if as_json:
        write_json(found)
    else:
        show_tasks(found)


@app.command(epilog=examples("hfq inspect ./out", "hfq inspect me/bert-mrpc-int8 --json", "hfq inspect --runtime"))
@with_options("revision")
def inspect(
    flags: dict[str, Any],
    checkpoint: Annotated[
        str | None, typer.Argument(help="Hub id or folder of a checkpoint.", show_default=False)
    ] = None,
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Show what this machine runs int8 with; no checkpoint is needed.")
    ] = False,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Show what is int8 and what is not, scales, sizes, config and provenance; or this machine's kernels."""
    from ..report.tables import describe, describe_runtime, show, show_facts
    from ..source.checkpoint import pull

    if (checkpoint is None) is not runtime:
        raise UsageError("hfq inspect takes a checkpoint, or --runtime and no checkpoint.")
    if checkpoint is None:
        found, display = describe_runtime(), show_facts
    else:
        pulled = pull(checkpoint, revision=flags.get("revision"), token=token, trust_remote_code=True)
        found, display = describe(pulled), show
    if as_json:
        write_json(found)
    else:
        display(found)


@app.command(
    name="explain",
    epilog=examples(
        "hfq explain ./my-checkpoint --dataset ./data",
        "hfq explain ./out --baseline ./my-checkpoint --dataset ./data --json",
    ),
)
@with_options(*Evaluation.model_fields, *EXPLAINED)
def explain_command(
    flags: dict[str, Any],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="Float checkpoint that an INT8 one was made from.  \\[default: what hfq.json names]",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path, typer.Option(help="Folder for explain.html, explain.png and explain.json.", callback=expanded)
    ] = Path("explain"),
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Say why INT8 differs: each layer alone, what its activations look like, what would mend it, and what flips.

    Of a float checkpoint it is the plain static INT8 of it that is explained, with what --layer says.
    """
    from ..bench.run import pull_baseline
    from ..common.ui import Reporter
    from ..explain.explain import explain_checkpoint
    from ..report.explained import show, to_json
    from ..report.explained import write as write_explained
    from ..source.checkpoint import pull

    recipe, ui = make_recipe(flags), Reporter()
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file. Name a folder.")
    given = pull(recipe.checkpoint, revision=recipe.revision, token=token, trust_remote_code=recipe.trust_remote_code)
    if given.is_quantized:
        floats = pull_baseline(given, baseline, token=token)
        recipe = recipe.model_copy(
            update={"checkpoint": baseline or floats.info.id, "revision": None if baseline else floats.info.revision}
        )
    elif baseline:
        raise UsageError(f"--baseline is for an INT8 checkpoint; {recipe.checkpoint} is a float one.")
    exported = given if given.is_quantized else None
    found = explain_checkpoint(recipe, recipes=_recipes(), ui=ui, token=token, exported=exported)
    paths = write_explained(found, output)
    if as_json:
        write(to_json(found).rstrip())
    else:
        show(found)
    ui.stage(f"Wrote {', '.join(map(str, paths))}")


@app.command(name="report", epilog=examples("hfq report ./out", "hfq report me/bert-mrpc-int8 --output bert.html"))
@with_options("revision")
def report_command(
    result: Annotated[str, typer.Argument(help="Folder or Hub id of what `hfq quantize` wrote.", show_default=False)],
    flags: dict[str, Any],
    output: Annotated[Path, typer.Option(help="File to write.", callback=expanded)] = Path("report.html"),
    token: Token = None,
) -> None:
    """Show what a run found as one HTML file: verdict, figures, trials, layers, data, hardware."""
    from ..common.files import write_text
    from ..common.ui import Reporter
    from ..report.page import render_page
    from ..report.report import read_report
    from ..source.checkpoint import pull_report

    found = read_report(pull_report(result, revision=flags.get("revision"), token=token))
    if found.of_object:
        raise UsageError(
            f"{result} was quantized as an object, by `fit`: what is known of it is in its README.md. hfq report shows "
            "what `hfq quantize` measured."
        )
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder. Expected a file, such as {output / 'report.html'}.")
    page = render_page(found)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_text(output, page)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror or error}. Choose another --output.") from error
    Reporter().stage(f"Wrote {output}")


@app.command(
    name="bench",
    epilog=examples(
        "hfq bench ./out --baseline ./my-checkpoint",
        "hfq bench me/bert-mrpc-int8 --vs openvino,onnxruntime --shapes 1x16,32x128",
    ),
)
@with_options("checkpoint", "threads")
def bench_command(
    flags: dict[str, Any],
    contest: Contest,
    output: Annotated[
        Path, typer.Option(help="Folder for bench.md, bench.json and bench.png.", callback=expanded)
    ] = Path("bench"),
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Latency, throughput, load time, size and memory beside FP32 and the int8 runtimes that are installed.

    Load time and memory also of a second process on the host: what it adds, and what it shares with the first.
    """
    import torch

    from ..bench.engines import PEERS
    from ..bench.growth import Point, grow
    from ..bench.run import Timing, bench, chosen, pull_baseline, read_pythons, read_shapes
    from ..bench.table import as_dict, markdown
    from ..bench.table import write as write_bench
    from ..common.ui import Reporter
    from ..source.checkpoint import pull

    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file. Name a folder.")
    checkpoint, threads = flags["checkpoint"], flags.get("threads", torch.get_num_threads())
    if threads < 1:
        raise UsageError(f"--threads should be at least 1, not {threads}.")
    shapes = read_shapes(contest.shapes)
    peers = [name.strip() for name in contest.vs.split(",") if name.strip()]
    names = chosen(peers, compiled=contest.compiled, pythons=read_pythons(contest.peer_python or []))
    quantized = pull(checkpoint, token=token)
    if not quantized.is_quantized:
        raise UsageError(f"{checkpoint} is not quantized. Quantize it first: hfq quantize {checkpoint} --output ./out")
    float_model = pull_baseline(quantized, contest.baseline, token=token)
    ui = Reporter()
    timing = Timing(shapes, threads, contest.rounds)
    found = bench(quantized, float_model, names=names, timing=timing, ui=ui)
    points: list[Point] = []
    written = write_bench(found, points, output)
    if contest.growth:
        ran = {engine.name for engine in found.engines} - {engine.name for engine in found.failed}
        growing = {name: python for name, python in names.items() if name in ran}
        points = grow(quantized, float_model, names=growing, threads=threads, ui=ui)
        written = write_bench(found, points, output)
    if as_json:
        write_json(as_dict(found, points))
    else:
        write(markdown(found, points))
    ui.stage(f"Wrote {', '.join(map(str, written))}")
    for engine in found.failed:
        if engine.name not in PEERS:
            raise HfqError(f"{engine.name} did not run to the end: {engine.failure}")


@app.command(
    name="warm",
    epilog=examples(
        "hfq warm me/bert-mrpc-int8",
        "hfq warm ./out --shapes 1x16,8x128 --threads 2",
        "hfq warm ./out --export ./graphs",
    ),
)
@with_options("checkpoint", "revision", "threads")
def warm_command(
    flags: dict[str, Any],
    shapes: Annotated[str, typer.Option(help="Batch x length, with commas.")] = WARMED,
    export_to: Annotated[
        Path | None,
        typer.Option(
            "--export",
            help="Also copy what is compiled to this folder, for machines without a compiler: HFQ_GRAPHS=FOLDER there.",
            show_default=False,
            callback=expanded,
        ),
    ] = None,
    token: Token = None,
) -> None:
    """Compile an INT8 checkpoint before it is served: whoever loads it on this machine has its graphs at once.

    One graph is for single inputs of any length, one for batches of any size and length.
    """
    from ..common.ui import Reporter
    from ..runtime.compiling.folders import export
    from ..runtime.compiling.graphs import made_with

    kept = _warm(flags, shapes, token=token)
    if export_to is not None:
        export(kept, export_to, made_with=made_with())
        Reporter().stage(f"Wrote {export_to}: set HFQ_GRAPHS to where it will be")


@app.command(
    name="eval",
    epilog=examples("hfq eval ./out --dataset ./data --split test", "hfq eval ./out --dataset ./data --compile"),
)
@with_options(*Evaluation.model_fields)
def evaluate(
    flags: dict[str, Any],
    token: Token = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Run it through `hfq.compile`.")] = False,
    baseline: Annotated[
        str | None,
        typer.Option(help="Float checkpoint that --metric fidelity compares with.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure accuracy, seconds and memory of any checkpoint, quantized or not."""
    from ..common.ui import Reporter
    from ..pipeline import evaluate_checkpoint
    from ..report.tables import show_facts

    recipe = make_recipe(flags)
    found = evaluate_checkpoint(
        recipe, recipes=_recipes(), ui=Reporter(), token=token, compiled=compiled, baseline=baseline
    )
    if as_json:
        write_json(found)
    else:
        label = found.pop("metric_label")  # programs find every task's score as `accuracy`
        show_facts({label if name == "accuracy" else name: value for name, value in found.items()})


@app.command(name="push", epilog=examples("hfq push ./out --to me/bert-mrpc-int8"))
@with_options("to", *PUBLISHING)
def push_command(
    folder: Annotated[
        Path, typer.Argument(help="Folder that `hfq quantize` wrote.", show_default=False, callback=expanded)
    ],
    flags: dict[str, Any],
    hub: Hub,
    verbose: Verbose = False,
) -> None:
    """Publish a quantized folder in one atomic commit. The same content twice makes no second commit."""
    from ..common.ui import Reporter
    from ..pipeline import renew_card
    from ..publish import find_target, hub_session, publish
    from ..report.report import read_report
    from ..report.view import model_name

    report = read_report(folder)
    with hub_session(local=hub.local_hub) as hub_token:
        token = hub_token or hub.token
        target = find_target(flags.get("to"), model_name(report).removesuffix("-int8"), token=token)
        if not report.of_object:
            renew_card(folder, report, repo_id=target)
        publish(folder, make_recipe({**flags, "checkpoint": str(folder), "to": target}), token=token, ui=Reporter())


@app.command(epilog=examples("hfq watch pipelines/ --once", "hfq watch pipelines/ --interval 600"))
def watch(
    folder: Recipes,
    once: Annotated[bool, typer.Option("--once", help="Look once and exit, for schedules.")] = False,
    interval: Annotated[float, typer.Option(min=1, help="Seconds between two looks.")] = 600,
    token: Token = None,
    verbose: Verbose = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each recipe looked at.")] = False,
) -> None:
    """Quantize and publish what is new: recipes whose repository lacks the newest revision of the source.

    A recipe publishes to its `to`, or to YOU/CHECKPOINT-int8. One that fails does not stop the others.
    """
    from ..runs.watch import Watcher

    watcher = Watcher(folder, recipes=_recipes(), token=token)
    while True:
        outcomes = watcher.round()
        for outcome in outcomes if as_json else ():
            write_line(asdict(outcome))
        if once:
            break
        time.sleep(interval)
    _end(outcomes, "Not published")


@app.command(
    epilog=examples(
        "WEBHOOK_SECRET=… hfq webhook pipelines/ --port 7860", "WEBHOOK_SECRET=… hfq webhook pipelines/ --host 0.0.0.0"
    )
)
@with_options()
def webhook(
    folder: Recipes,
    listener: Listener,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """Listen to the Hub's webhooks, and quantize and publish what is new, as `hfq watch` does.

    The Hub posts to /webhooks/hub. The webhook's secret is read from WEBHOOK_SECRET.
    """
    from ..runs.webhook import Endpoint, serve

    serve(
        folder,
        Endpoint(listener.host, listener.port, secret=os.environ.get("WEBHOOK_SECRET")),
        queue=listener.queue,
        recipes=_recipes(),
        token=token,
        retry_s=listener.retry,
    )


def _engine(place: Place, *, token: str | None) -> "Engine":
    from ..runs.local import run_here

    if place.engine == "local":
        if place.ray_address:
            raise UsageError("--ray-address is for --engine ray.")
        return partial(run_here, recipes=_recipes(), token=token, resume=place.resume)
    if token:
        raise UsageError(
            "--token cannot be given with --engine ray: a Ray cluster shows the command line of who uses it. Set HF_TOKEN."
        )
    from ..runs.ray_engine import run_on_ray

    return partial(run_on_ray, address=place.ray_address, token=token, resume=place.resume)


def _demand_compiler() -> None:
    from ..runtime.compiling.compile import has_compiler

    if not has_compiler():
        raise UsageError("--compile needs a C++ compiler (g++ or clang++, or its path in CXX), and there is none.")


def _warm(flags: dict[str, Any], shapes: str, *, token: str | None) -> list[Path]:
    """Compile the checkpoint of `flags` for `shapes`. Returns: the folders of what was compiled, or was there."""
    import torch

    from ..bench.run import read_shapes
    from ..common.ui import Reporter
    from ..loading import load_with_inputs
    from ..runtime.compiling.warming import warm

    if threads := flags.get("threads"):
        torch.set_num_threads(threads)
    wanted = read_shapes(shapes)
    ui = Reporter()
    model, names = load_with_inputs(flags["checkpoint"], revision=flags.get("revision"), token=token)
    kept: set[Path] = set()
    for batch, length in wanted:
        started = time.monotonic()
        kept.update(warm(model, (batch, length), names=names))
        ui.stage(f"{batch}x{length}: compiled, or found, in {time.monotonic() - started:.1f} s")
    return sorted(kept)


def _run(recipe: Recipe, engine: "Engine", *, name: str, hub: Hub, as_json: bool) -> "Result":
    from ..publish import find_target, hub_session
    from ..report.tables import show_result
    from ..runs.local import Run

    if recipe.push or hub.local_hub:  # a name that cannot be pushed to costs seconds now, minutes later
        with hub_session(local=hub.local_hub) as hub_token:
            target = find_target(recipe.to, recipe.name, token=hub_token or hub.token)
        recipe = recipe.model_copy(update={"to": target})
    run = Run(name, recipe, command_line())
    try:
        ((_, result),) = engine([run])
        if isinstance(result, Exception):
            raise result
    except GoalNotMetError as error:
        if as_json:
            write_json(error.details)
        raise
    except Interrupted as interrupted:
        fail("Interrupted. Nothing was published; run the same command with --resume to go on.", interrupted.exit_code)
    run.ui.stage(f"Done: {result.folder}")
    show_result(result.report, run.ui.console)
    _publish_result(result, recipe, run.ui, hub=hub)
    if as_json:
        write(result.report.to_json().rstrip())
    return result


def _run_many(given: list[Path], engine: "Engine", *, prefixed: bool, push: bool, hub: Hub, as_json: bool) -> None:
    """Run every recipe, publish those that are to be, and end with the code of the gravest failure."""
    from ..publish import hub_session
    from ..runs.local import run_all
    from ..runs.recipe_folder import read_recipes

    with hub_session(local=hub.local_hub) as hub_token:
        recipes = read_recipes(given, push=push, publish_all=hub.local_hub, token=hub_token or hub.token)
    outcomes: list[Outcome] = []
    try:
        with closing(run_all(recipes, engine, publish=partial(_publish_result, hub=hub), prefixed=prefixed)) as ended:
            for outcome in ended:
                outcomes.append(outcome)
                if as_json:
                    write_line(asdict(outcome))
    except Interrupted as interrupted:
        fail("Interrupted. What is done is said above; of the rest, --resume repeats no trial.", interrupted.exit_code)
    _end(outcomes, "Not done")


def _publish_result(result: "Result", recipe: Recipe, ui: "Reporter", *, hub: Hub) -> str | None:
    """Push a finished run if it is to be; return what to say of it."""
    from ..publish import hub_session, publish

    if not (recipe.push or hub.local_hub):
        return None
    try:
        with hub_session(local=hub.local_hub) as hub_token:
            return publish(result.folder, recipe, token=hub_token or hub.token, ui=ui)
    except HubError as error:
        raise HubError(f"{error} {result.folder} is complete: `hfq push` publishes it without a new run.") from error


def _end(outcomes: "Sequence[Outcome]", what: str) -> None:
    """End with the code of the gravest failure, if something failed."""
    from ..runs.recipe_folder import exit_code

    if code := exit_code(outcomes):
        failed = [outcome.recipe for outcome in outcomes if outcome.exit_code]
        fail(f"{what}: {', '.join(failed)}. What each lacks is said above.", code)


def _recipes() -> Path:
    from ..common.resources import resource

    return resource("pipelines")
