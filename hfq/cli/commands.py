"""Commands, nothing else: flags become a recipe, errors become one message and an exit code.

Exit codes: 0 done; 1 it could not be done; 2 wrong arguments; 3 no trial met the accuracy goal; 130 interrupted.
"""

import json
import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ..common.errors import GoalNotMetError, HfqError, HubError, UsageError
from ..common.redact import guard_streams, printable, redact, remember, traceback_of
from ..common.version import __version__

if TYPE_CHECKING:
    from ..common.ui import Reporter
    from ..recipe import Recipe
    from ..report.report import Result
    from ..runs.local import Engine

app = typer.Typer(
    name="hfq",
    help="INT8 export for the Hugging Face Hub: calibrated, tuned to an accuracy goal, measured, published.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


class Approach(str, Enum):
    auto = "auto"
    static = "static"
    dynamic = "dynamic"


class Criterion(str, Enum):
    relative = "relative"
    absolute = "absolute"


class EngineName(str, Enum):
    local = "local"
    ray = "ray"


def _expanded(value: Any) -> Any:
    """A path, or several, as `user_path` has them."""
    from ..common.files import user_path

    return [user_path(path) for path in value] if isinstance(value, list | tuple) else value and user_path(value)


Checkpoint = Annotated[str, typer.Argument(help="Hub id or folder of a checkpoint.", show_default=False)]
Dataset = Annotated[str | None, typer.Option(help="Hub id, folder or file (CSV, JSON, Parquet).", show_default=False)]
Subset = Annotated[
    str | None, typer.Option(help="Dataset configuration, such as mrpc of nyu-mll/glue.", show_default=False)
]
Split = Annotated[
    str | None,
    typer.Option(help="Split to evaluate on.  \\[default: validation, else test]", show_default=False),
]
TextColumn = Annotated[
    list[str] | None, typer.Option(help="Text column; repeat it for a pair, in order.", show_default=False)
]
LabelColumn = Annotated[str | None, typer.Option(help="Column of labels.", show_default=False)]
Metric = Annotated[
    str | None,
    typer.Option(
        help="accuracy, f1, precision, recall or matthews_correlation.  \\[default: accuracy]",
        show_default=False,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(help="Longest input in tokens.  \\[default: the model's limit]", show_default=False),
]
BatchSize = Annotated[int | None, typer.Option(help="Examples a batch.  \\[default: 32]", show_default=False)]
Seed = Annotated[int | None, typer.Option(help="Seed of every random choice.  \\[default: 42]", show_default=False)]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the checkpoint.", show_default=False)]
Task = Annotated[str | None, typer.Option(help="Task.  \\[default: found from the architecture]", show_default=False)]
Threads = Annotated[int | None, typer.Option(help="CPU threads.  \\[default: torch's]", show_default=False)]
Accelerator = Annotated[
    str | None,
    typer.Option(help="Lightning accelerator of evaluations.  \\[default: cpu]", show_default=False),
]
Devices = Annotated[
    int | None, typer.Option(help="Lightning devices of evaluations.  \\[default: 1]", show_default=False)
]
Strategy = Annotated[
    str | None, typer.Option(help="Lightning strategy of evaluations.  \\[default: auto]", show_default=False)
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Hub token.  \\[default: HF_TOKEN or `hf auth login`]",
        show_default=False,
        callback=lambda token: _clean_token(token),
    ),
]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code from the checkpoint's repository.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on standard output.")]
To = Annotated[str | None, typer.Option(help="Repository.  \\[default: YOU/CHECKPOINT-int8]", show_default=False)]
Private = Annotated[bool, typer.Option("--private", help="Create the repository private.")]
CreatePr = Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing to main.")]
Force = Annotated[
    bool,
    typer.Option("--force", help="Overwrite a repository that holds another model; its history keeps that."),
]
Branch = Annotated[
    str | None, typer.Option(help="Branch to push to; made if there is none.  \\[default: main]", show_default=False)
]
Tag = Annotated[str | None, typer.Option(help="Tag for the commit that is pushed.", show_default=False)]
Push = Annotated[bool, typer.Option("--push", help="Publish the result on the Hub.")]
LocalHub = Annotated[
    bool,
    typer.Option("--local-hub", help="Start a Hub on loopback and push there: nothing leaves this machine."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run; no trial is repeated.")]


Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", help="Name the files that are left behind.", callback=lambda given: _be_verbose(given)
    ),
]


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(f"hfq {__version__}")
        raise typer.Exit


@app.command(
    epilog="""**Examples**

hfq quantize Intel/bert-base-uncased-mrpc --push

hfq quantize ./my-checkpoint --dataset ./data --output ./out

hfq quantize ./my-checkpoint --dataset nyu-mll/glue --subset mrpc --calibration-split train --split validation"""
)
def quantize(
    checkpoint: Checkpoint,
    dataset: Dataset = None,
    subset: Subset = None,
    split: Split = None,
    calibration_split: Annotated[
        str | None, typer.Option(help="Split to calibrate on.  \\[default: train]", show_default=False)
    ] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    metric: Metric = None,
    approach: Annotated[
        Approach | None,
        typer.Option(help="Post-training quantization to search.  \\[default: auto]", show_default=False),
    ] = None,
    calibration_samples: Annotated[
        int | None, typer.Option(help="Examples to calibrate on.  \\[default: 100]", show_default=False)
    ] = None,
    tolerable_loss: Annotated[
        float | None, typer.Option(help="Largest accuracy loss.  \\[default: 0.01]", show_default=False)
    ] = None,
    criterion: Annotated[
        Criterion | None, typer.Option(help="How the loss counts.  \\[default: relative]", show_default=False)
    ] = None,
    max_trials: Annotated[
        int | None, typer.Option(help="Most evaluations to spend.  \\[default: 600]", show_default=False)
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(help="Most seconds of tuning; 0 is no limit.  \\[default: 0]", show_default=False),
    ] = None,
    explore: Annotated[bool, typer.Option("--explore", help="Evaluate every candidate, then choose.")] = False,
    allow_loss: Annotated[
        bool,
        typer.Option("--allow-loss", help="Save the best trial even if it misses the goal; the card says so."),
    ] = False,
    max_length: MaxLength = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    revision: Revision = None,
    task: Task = None,
    threads: Threads = None,
    accelerator: Accelerator = None,
    devices: Devices = None,
    strategy: Strategy = None,
    output: Annotated[
        str | None, typer.Option(help="Folder to write.  \\[default: CHECKPOINT-int8]", show_default=False)
    ] = None,
    push: Push = False,
    to: To = None,
    private: Private = False,
    create_pr: CreatePr = False,
    force: Force = False,
    branch: Branch = None,
    tag: Tag = None,
    token: Token = None,
    trust_remote_code: RemoteCode = False,
    save_recipe: Annotated[
        Path | None,
        typer.Option(help="Also write the recipe of this run, for `hfq run`.", show_default=False, callback=_expanded),
    ] = None,
    local_hub: LocalHub = False,
    resume: Resume = False,
    verbose: Verbose = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint to INT8, measure it, write it to a folder, and publish it with --push."""
    from ..recipe import make_recipe, write_recipe

    flags = {
        "checkpoint": checkpoint, "dataset": dataset, "subset": subset, "split": split, "calibration_split": calibration_split,
        "text_columns": text_column, "label_column": label_column, "metric": metric, "approach": approach and approach.value,
        "calibration_samples": calibration_samples, "tolerable_loss": tolerable_loss,
        "criterion": criterion and criterion.value, "max_trials": max_trials, "timeout": timeout, "explore": explore,
        "allow_loss": allow_loss, "max_length": max_length, "batch_size": batch_size, "seed": seed, "revision": revision, "task": task,
        "threads": threads, "accelerator": accelerator, "devices": devices, "strategy": strategy, "output": output, "push": push, "to": to,
        "private": private, "create_pr": create_pr, "force": force, "branch": branch, "tag": tag, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    recipe = make_recipe(_given(flags))
    if save_recipe:
        write_recipe(recipe, save_recipe)
    engine = _engine(EngineName.local, ray_address=None, token=token, resume=resume)
    _run(recipe, engine, name=recipe.name, token=token, local_hub=local_hub, as_json=as_json)


@app.command(
    epilog="""**Examples**

hfq run pipelines/demo.yaml --local-hub

hfq run pipelines/ --push

hfq run pipelines/ --push --engine ray --ray-address head:6379"""
)
def run(
    recipes: Annotated[
        list[Path],
        typer.Argument(help="Recipes, YAML files, or folders of them.", show_default=False, callback=_expanded),
    ],
    output: Annotated[
        str | None, typer.Option(help="Folder to write, instead of the recipe's.", show_default=False)
    ] = None,
    push: Push = False,
    engine: Annotated[
        EngineName, typer.Option(help="Where: here, or on the workers of a Ray cluster.")
    ] = EngineName.local,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="host:port of the Ray cluster.  \\[default: RAY_ADDRESS, or the one on this machine]",
            show_default=False,
        ),
    ] = None,
    token: Token = None,
    local_hub: LocalHub = False,
    resume: Resume = False,
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
    from ..recipe import make_recipe, read_recipe

    chosen = _engine(engine, ray_address=ray_address, token=token, resume=resume)
    if len(recipes) > 1 or recipes[0].is_dir():
        if output:
            raise UsageError("--output is for one recipe. Several are written to the 'output' that each of them names.")
        prefixed = engine is EngineName.ray  # they run at once, so that each line has to say whose it is
        _run_many(recipes, chosen, prefixed=prefixed, push=push, token=token, local_hub=local_hub, as_json=as_json)
        return
    found = read_recipe(recipes[0])
    changed = {**found.model_dump(), **_given({"output": output, "push": push})}
    _run(make_recipe(changed), chosen, name=recipes[0].name, token=token, local_hub=local_hub, as_json=as_json)


@app.command(
    epilog="**Examples**\n\nhfq inspect ./out\n\nhfq inspect me/bert-mrpc-int8 --json\n\nhfq inspect --runtime"
)
def inspect(
    checkpoint: Annotated[
        str | None, typer.Argument(help="Hub id or folder of a checkpoint.", show_default=False)
    ] = None,
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Show what this machine runs int8 with; no checkpoint is needed.")
    ] = False,
    revision: Revision = None,
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
        found, display = describe(pull(checkpoint, revision=revision, token=token, trust_remote_code=True)), show
    if as_json:
        _print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        display(found)


@app.command(
    name="report", epilog="**Examples**\n\nhfq report ./out\n\nhfq report me/bert-mrpc-int8 --output bert.html"
)
def report_command(
    result: Annotated[str, typer.Argument(help="Folder or Hub id of what `hfq quantize` wrote.", show_default=False)],
    output: Annotated[Path, typer.Option(help="File to write.", callback=_expanded)] = Path("report.html"),
    revision: Revision = None,
    token: Token = None,
) -> None:
    """Show what a run found as one HTML file: verdict, figures, trials, layers, data, hardware."""
    from ..common.files import write_text
    from ..common.ui import Reporter
    from ..report.page import render_page
    from ..report.report import read_report
    from ..source.checkpoint import pull_report

    found = read_report(pull_report(result, revision=revision, token=token))
    if found.of_object:
        raise UsageError(
            f"{result} was quantized as an object, by `fit`: what is known of it is in its README.md. hfq report shows "
            "what `hfq quantize` measured."
        )
    if output.is_dir():
        raise UsageError(f"--output {output} is a folder. Expected a file, such as {output / 'report.html'}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    write_text(output, render_page(found))
    Reporter().stage(f"Wrote {output}")


@app.command(
    name="bench",
    epilog="**Examples**\n\nhfq bench ./out --baseline ./my-checkpoint\n\n"
    "hfq bench me/bert-mrpc-int8 --vs openvino,onnxruntime --shapes 1x16,32x128",
)
def bench_command(
    checkpoint: Checkpoint,
    vs: Annotated[
        str,
        typer.Option(
            help="Peers, with commas: openvino, onnxruntime, torch, torchao, inc.  \\[default: those installed]",
            show_default=False,
        ),
    ] = "",
    baseline: Annotated[
        str | None,
        typer.Option(help="Float checkpoint it was made from.  \\[default: what hfq.json names]", show_default=False),
    ] = None,
    shapes: Annotated[str, typer.Option(help="Batch x length, with commas.")] = "1x16,1x128,8x128,32x128",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every engine on each shape.")] = 5,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Also time `hfq.compile`.")] = True,
    growth: Annotated[
        bool, typer.Option("--growth", help="Also measure how time and memory grow with layers, batch and length.")
    ] = False,
    output: Annotated[
        Path, typer.Option(help="Folder for bench.md, bench.json and bench.png.", callback=_expanded)
    ] = Path("bench"),
    threads: Threads = None,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Latency, throughput, load time, size and memory beside FP32 and the int8 runtimes that are installed.

    Load time and memory also of a second process on the host: what it adds, and what it shares with the first.
    """
    import torch

    from ..bench.engines import PEERS
    from ..bench.growth import Point, grow
    from ..bench.run import bench, chosen, pull_baseline
    from ..bench.table import as_dict, markdown, write
    from ..common.ui import Reporter
    from ..measure.hardware import hardware
    from ..source.checkpoint import pull

    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {output} is a file. Name a folder.")
    if threads is not None and threads < 1:
        raise UsageError(f"--threads should be at least 1, not {threads}.")
    sizes = [_shape(text) for text in shapes.split(",")]
    names = chosen([name.strip() for name in vs.split(",") if name.strip()], compiled=compiled)
    quantized = pull(checkpoint, token=token)
    if not quantized.is_quantized:
        raise UsageError(f"{checkpoint} is not quantized. Quantize it first: hfq quantize {checkpoint} --output ./out")
    float_model = pull_baseline(quantized, baseline, token=token)
    threads = threads or torch.get_num_threads()
    machine, ui = {**hardware(), "threads": threads}, Reporter()
    found = bench(
        quantized,
        float_model,
        names=names,
        shapes=sizes,
        threads=threads,
        rounds=rounds,
        hardware=machine,
        ui=ui,
    )
    points: list[Point] = []
    written = write(found, points, output)
    if growth:
        points = grow(quantized, float_model, threads=threads, ui=ui)
        written = write(found, points, output)
    _print(json.dumps(as_dict(found, points), indent=2, ensure_ascii=False) if as_json else markdown(found, points))
    ui.stage(f"Wrote {', '.join(map(str, written))}")
    for engine in found.failed:
        if engine.name not in PEERS:
            raise HfqError(f"{engine.name} did not run to the end: {engine.failure}")


@app.command(
    name="eval",
    epilog="**Examples**\n\nhfq eval ./out --dataset ./data --split test\n\nhfq eval ./out --dataset ./data --compile",
)
def evaluate(
    checkpoint: Checkpoint,
    dataset: Dataset = None,
    subset: Subset = None,
    split: Split = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    metric: Metric = None,
    max_length: MaxLength = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    revision: Revision = None,
    task: Task = None,
    threads: Threads = None,
    accelerator: Accelerator = None,
    devices: Devices = None,
    strategy: Strategy = None,
    token: Token = None,
    trust_remote_code: RemoteCode = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Run it through `hfq.compile`.")] = False,
    as_json: Json = False,
) -> None:
    """Measure accuracy, seconds and memory of any checkpoint, quantized or not."""
    from ..common.ui import Reporter
    from ..pipeline import evaluate_checkpoint
    from ..recipe import make_recipe
    from ..report.tables import show_facts

    flags = {
        "checkpoint": checkpoint, "dataset": dataset, "subset": subset, "split": split, "text_columns": text_column,
        "label_column": label_column, "metric": metric, "max_length": max_length, "batch_size": batch_size, "seed": seed,
        "revision": revision, "task": task, "threads": threads, "accelerator": accelerator, "devices": devices, "strategy": strategy,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    recipe = make_recipe(_given(flags))
    found = evaluate_checkpoint(recipe, recipes=_recipes(), ui=Reporter(), token=token, compiled=compiled)
    if as_json:
        _print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        show_facts(found)


@app.command(name="push", epilog="**Examples**\n\nhfq push ./out --to me/bert-mrpc-int8")
def push_command(
    folder: Annotated[
        Path, typer.Argument(help="Folder that `hfq quantize` wrote.", show_default=False, callback=_expanded)
    ],
    to: To = None,
    private: Private = False,
    create_pr: CreatePr = False,
    force: Force = False,
    branch: Branch = None,
    tag: Tag = None,
    token: Token = None,
    local_hub: LocalHub = False,
    verbose: Verbose = False,
) -> None:
    """Publish a quantized folder in one atomic commit. The same content twice makes no second commit."""
    from ..common.ui import Reporter
    from ..pipeline import renew_card
    from ..recipe import make_recipe
    from ..report.report import read_report
    from ..report.view import model_name

    report = read_report(folder)
    with _hub(local_hub) as hub_token:
        target = _target(to, model_name(report).removesuffix("-int8"), hub_token or token)
        if not report.of_object:
            renew_card(folder, report, repo_id=target)
        how = {"private": private, "create_pr": create_pr, "force": force, "branch": branch, "tag": tag}
        recipe = make_recipe({"checkpoint": str(folder), "to": target, **how})
        _publish(folder, recipe, token=hub_token or token, ui=Reporter())


@app.command(epilog="**Examples**\n\nhfq watch pipelines/ --once\n\nhfq watch pipelines/ --interval 600")
def watch(
    folder: Annotated[
        Path, typer.Argument(help="Folder of recipes, or one recipe.", show_default=False, callback=_expanded)
    ],
    once: Annotated[bool, typer.Option("--once", help="Look once and exit, for schedules.")] = False,
    interval: Annotated[float, typer.Option(min=1, help="Seconds between two looks.")] = 600,
    token: Token = None,
    verbose: Verbose = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a line of JSON for each recipe looked at.")] = False,
) -> None:
    """Quantize and publish what is new: recipes whose repository lacks the newest revision of the source.

    A recipe publishes to its `to`, or to YOU/CHECKPOINT-int8. One that fails does not stop the others.
    """
    from ..runs.recipe_folder import exit_code
    from ..runs.watch import Watcher

    watcher = Watcher(folder, recipes=_recipes(), token=token)
    while True:
        outcomes = watcher.round()
        if as_json:
            _print("\n".join(json.dumps(asdict(outcome), ensure_ascii=False) for outcome in outcomes))
            sys.stdout.flush()
        if once:
            break
        time.sleep(interval)
    if code := exit_code(outcomes):
        failed = [outcome.recipe for outcome in outcomes if outcome.exit_code]
        _fail(f"Not published: {', '.join(failed)}. What each lacks is said above.", code)


@app.command(
    epilog="""**Examples**

WEBHOOK_SECRET=… hfq webhook pipelines/ --port 7860

WEBHOOK_SECRET=… hfq webhook pipelines/ --host 0.0.0.0"""
)
def webhook(
    folder: Annotated[
        Path, typer.Argument(help="Folder of recipes, or one recipe.", show_default=False, callback=_expanded)
    ],
    queue: Annotated[
        Path, typer.Option(help="Folder for what is to be done; it survives a restart.", callback=_expanded)
    ] = Path("hfq-queue"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    retry: Annotated[
        float, typer.Option(min=1, help="Seconds until what failed is tried again; doubles with each attempt.")
    ] = 60,
    token: Token = None,
    verbose: Verbose = False,
) -> None:
    """Listen to the Hub's webhooks, and quantize and publish what is new, as `hfq watch` does.

    The Hub posts to /webhooks/hub. The webhook's secret is read from WEBHOOK_SECRET.
    """
    from ..runs.webhook import Address, serve

    secret = os.environ.get("WEBHOOK_SECRET")
    serve(
        folder, queue=queue, address=Address(host, port), secret=secret, recipes=_recipes(), token=token, retry_s=retry
    )


_HIDDEN = ("--token", "--engine", "--ray-address")


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM, as a type that typer and Lightning do not know: each would end the command in its own way."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number  # as a shell has it


def main() -> None:
    """The `hfq` command."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))  # pools end theirs so
    prepare_libraries()
    guard_streams()
    try:
        app()
    except HfqError as error:
        _fail(str(error), error.exit_code)
    except _Interrupted as interrupted:
        _fail("Interrupted.", interrupted.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away: nothing left to say
        sys.exit(1)
    except OSError as error:
        _debug(error)
        _fail(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 1)
    except Exception as error:  # a traceback could show a stranger's text, or a token, and helps nobody but us
        _debug(error)
        what = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        _fail(f"Unexpected {what.rstrip('.')}. This is an error of hfq: HFQ_DEBUG=1 shows where, for a report.", 1)


def prepare_libraries() -> None:
    """Quieten libraries before they are imported, by their environment and loggers. What the user set there stays."""
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error"}
    quiet["DATASETS_VERBOSITY"] = "critical"  # its errors are raised too
    if not sys.stderr.isatty():
        quiet |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    workers = {"TOKENIZERS_PARALLELISM": "false"}  # they are forked after the tokenizer ran
    for name, value in {**quiet, **workers}.items():
        os.environ.setdefault(name, value)
    for logger in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which warns of its GPU kernels
        logging.getLogger(logger).setLevel(logging.ERROR)


def _interrupt(number: int, _: object) -> None:
    raise _Interrupted(number)


def _clean_token(token: str | None) -> str | None:
    """Refuse what cannot be sent in a header: the HTTP client would, and show the token in its message."""
    for source, value in (("--token", token), ("HF_TOKEN", os.environ.get("HF_TOKEN"))):
        if value and not re.fullmatch("[!-~]*", value.strip()):
            raise UsageError(f"{source} holds characters that are in no token. Copy it again from your Hub settings.")
    remember(token)
    return token and token.strip()


def _be_verbose(given: bool) -> bool:
    """Let every `Reporter` of this process name what it would only count."""
    if given:
        os.environ["HFQ_VERBOSE"] = "1"
    return given


def _engine(name: EngineName, *, ray_address: str | None, token: str | None, resume: bool) -> "Engine":
    from ..runs.local import run_here

    if name is EngineName.local:
        if ray_address:
            raise UsageError("--ray-address is for --engine ray.")
        return partial(run_here, recipes=_recipes(), token=token, resume=resume)
    if token:
        raise UsageError(
            "--token cannot be given with --engine ray: a Ray cluster shows the command line of who uses it. Set HF_TOKEN."
        )
    from ..runs.ray_engine import run_on_ray

    return partial(run_on_ray, address=ray_address, token=token, resume=resume)


def _run(recipe: "Recipe", engine: "Engine", *, name: str, token: str | None, local_hub: bool, as_json: bool) -> None:
    from ..report.tables import show_result
    from ..runs.local import Run

    with _hub(local_hub) as hub_token:
        if recipe.push or local_hub:  # a name that cannot be pushed to costs seconds now, minutes later
            recipe = recipe.model_copy(update={"to": _target(recipe.to, recipe.name, hub_token or token)})
    run = Run(name, recipe, _command())
    try:
        ((_, result),) = engine([run])
        if isinstance(result, Exception):
            raise result
    except GoalNotMetError as error:
        if as_json:
            _print(json.dumps(error.details, indent=2, ensure_ascii=False))
        raise
    except _Interrupted as interrupted:
        _fail("Interrupted. Nothing was published; run the same command with --resume to go on.", interrupted.exit_code)
    run.ui.stage(f"Done: {result.folder}")
    show_result(result.report, run.ui.console)
    _publish_result(result, recipe, run.ui, token=token, local_hub=local_hub)
    if as_json:
        _print(result.report.to_json().rstrip())


def _run_many(
    given: list[Path],
    engine: "Engine",
    *,
    prefixed: bool,
    push: bool,
    token: str | None,
    local_hub: bool,
    as_json: bool,
) -> None:
    """Run every recipe, publish those that are to be, and end with the code of the gravest failure."""
    from ..runs.local import run_all
    from ..runs.recipe_folder import Outcome, exit_code, read_recipes

    with _hub(local_hub) as hub_token:
        recipes = read_recipes(given, push=push, publish_all=local_hub, token=hub_token or token)
    outcomes: list[Outcome] = []
    publish = partial(_publish_result, token=token, local_hub=local_hub)
    try:
        with closing(run_all(recipes, engine, publish=publish, prefixed=prefixed)) as ended:
            for outcome in ended:
                outcomes.append(outcome)
                if as_json:
                    _print(json.dumps(asdict(outcome), ensure_ascii=False))
                    sys.stdout.flush()
    except _Interrupted as interrupted:
        _fail("Interrupted. What is done is said above; of the rest, --resume repeats no trial.", interrupted.exit_code)
    if code := exit_code(outcomes):
        failed = [outcome.recipe for outcome in outcomes if outcome.exit_code]
        _fail(f"Not done: {', '.join(failed)}. What each lacks is said above.", code)


def _publish_result(
    result: "Result", recipe: "Recipe", ui: "Reporter", *, token: str | None, local_hub: bool
) -> str | None:
    """Push a finished run if it is to be; return what to say of it."""
    if not (recipe.push or local_hub):
        return None
    try:
        with _hub(local_hub) as hub_token:
            return _publish(result.folder, recipe, token=hub_token or token, ui=ui)
    except HubError as error:
        raise HubError(f"{error} {result.folder} is complete: `hfq push` publishes it without a new run.") from error


@contextmanager
def _hub(local: bool) -> Iterator[str | None]:
    """For the length of the block, a Hub on loopback with its token; or the configured Hub, and None."""
    if not local:
        yield None
        return
    from huggingface_hub import constants

    from ..hub.client import proxies_changed
    from ..hub.local import LocalHub as Server

    configured = constants.ENDPOINT, constants.HF_HUB_DISABLE_XET
    with Server() as server, proxies_changed(server.direct()):
        constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = server.url, True
        try:
            yield server.token
        finally:
            constants.ENDPOINT, constants.HF_HUB_DISABLE_XET = configured


def _target(to: str | None, name: str, token: str | None) -> str:
    from ..publish import resolve_repo_id

    resolve_repo_id(None, default_name="any", token=token)  # asks the Hub whose token it is
    return resolve_repo_id(to, default_name=f"{name}-int8", token=token)


def _publish(folder: Path, recipe: "Recipe", *, token: str | None, ui: "Reporter") -> str:
    from ..publish import COMMIT_TITLE, push_folder

    ui.stage("Publish")
    pushed = push_folder(
        folder,
        repo_id=recipe.to,
        default_name=folder.resolve().name,
        token=token,
        message=f"{COMMIT_TITLE} {__version__}",
        **recipe.publishing,
    )
    said = f"{pushed.url} at {pushed.commit}" if pushed.changed else f"{pushed.url} holds this already: no commit"
    ui.note(said)
    ui.left_behind(pushed.left, where="published")
    return said


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags that were used: the others keep the recipe's defaults."""
    return {name: value for name, value in flags.items() if value is not None and value is not False and value != []}


def _recipes() -> Path:
    from ..common.resources import resource

    return resource("pipelines")


def _command() -> str:
    """This command line, without the token, and without where things lie and run."""
    words, hide = [], False
    for word in sys.argv[1:]:
        if not (hide or word.startswith(_HIDDEN)):
            words.append(Path(word).name if word.startswith(("/", "~")) else word)
        hide = word in _HIDDEN
    return redact(shlex.join(["hfq", *words]))


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _shape(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\s*[1-9]\d*x[1-9]\d*\s*", text):
        raise UsageError(f"--shapes {text!r} is not batch x length, such as 8x128.")
    batch, length = text.split("x")
    return int(batch), int(length)


def _debug(error: Exception) -> None:
    if os.environ.get("HFQ_DEBUG"):
        sys.stderr.write(traceback_of(error))


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"hfq: {printable(message)}\n")
    sys.exit(code)
