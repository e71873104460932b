"""Every Markdown file of the repository: its commands are real, its Python runs, its links lead somewhere.

Commands are parsed by what would run them. Those that matter are run in the tests of what they do.
"""

import ast
import contextlib
import functools
import importlib.util
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from support.command import CHECKPOINT, ROOT, write_slice
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hfq
from hfq.cli.commands import app
from hfq.config import PostTrainingQuantConfig
from hfq.hub.local import LocalHub
from hfq.quantization import fit
from hfq.runtime.fusion.fuse import FUSION_SETS
from hfq.tasks.registry import tasks

FOLDERS = ("hfq", "model_cards", "pipelines", "tests", ".github")
DOCUMENTS = [ROOT / "README.md", *sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
CARDS = [path for path in DOCUMENTS if path.with_suffix(".json").is_file()]  # their models are not here
RUN_ELSEWHERE = (
    "HfqQuantizer",  # quantizes and measures, for half a minute: test_optimum.py
    "import SentenceTransformer",  # of a model that nobody published: test_sentence_transformers.py
)
RUNTIME = ROOT / "hfq" / "runtime" / "README.md"
TEXTS = [f"{word} you have won a prize, call now" for word in ("URGENT!", "Hi", "Tomorrow", "WINNER!!", "ok", "Hello")]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def prose(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def first_column(path: Path, heading: str) -> list[str]:
    """The first cell of each row of the table under a heading, without the table's own head."""
    section = path.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return [row.split("|")[1].strip() for row in section.splitlines() if row.startswith("|")][2:]


def commands(path: Path) -> Iterator[list[str]]:
    """The words of every command, without variables that are set before it."""
    for line in "\n".join(blocks(path, "bash")).replace("\\\n", " ").splitlines():
        for part in shlex.join(shlex.split(line, comments=True)).split(shlex.quote("&&")):
            words = shlex.split(part)
            while words and re.match(r"[A-Z_]+=", words[0]):
                words.pop(0)
            if words:
                yield words


# Commands


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_command_can_be_run(path: Path, tmp_path: Path) -> None:
    for words in commands(path):
        program, arguments = Path(words[0]).name, words[1:]
        for word in words:
            if word.startswith((*(f"{folder}/" for folder in FOLDERS), ".ci/")):
                assert (ROOT / word).exists(), f"{word} of {shlex.join(words)}"
        if program in ("hfq", "optimum-cli"):
            _check_hfq(arguments if program == "hfq" else _after("hfq", arguments))
        elif program == "pip":
            _check_requirements(_after("install", arguments))
        elif program.startswith("python"):
            _check_flags(arguments, _python_help(*_script(arguments), folder=tmp_path))
        elif program != "run":  # .ci/run, whose path was looked at
            assert program in ("ruff", "mypy", "lint-imports"), f"Say here what checks {shlex.join(words)}"
            tool = [str(Path(sys.executable).with_name(program)), *arguments[:1], "--help"]
            done = subprocess.run(tool, capture_output=True, text=True, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            _check_flags(arguments, done.stdout)


def test_readme_shows_the_commands_that_everyone_needs() -> None:
    shown = {words[1] for words in commands(ROOT / "README.md") if words[0].endswith("hfq")}
    assert shown >= {"quantize", "run", "eval", "report", "push"}


def _check_hfq(words: list[str]) -> None:
    known: Any = typer.main.get_command(app)
    name, *arguments = words
    known.commands[name].make_context(name, ["./out"] if arguments == ["--help"] else arguments)


def _check_requirements(arguments: list[str]) -> None:
    pinned = (ROOT / "constraints.txt").read_text().splitlines()
    extras = set(metadata("hfq").get_all("Provides-Extra") or ())
    for word in arguments:
        ours = re.fullmatch(r"(?:\.|hfq)(?:\[([\w,]+)])?(?: @ git\+(\S+))?", word)
        if ours:
            assert set((ours[1] or "dev").split(",")) <= extras
            assert (ours[2] or "") in (ROOT / "pyproject.toml").read_text()
        elif "==" in word:
            assert word in pinned
        elif not word.startswith("-"):
            assert word == "constraints.txt", f"Say here what checks {word}"


def _script(arguments: list[str]) -> tuple[str, bool]:
    """What python runs, and whether that is a module."""
    return (arguments[1], True) if arguments[0] == "-m" else (arguments[0], False)


@functools.cache
def _python_help(target: str, is_module: bool, *, folder: Path) -> str:
    if target == "pytest":  # where no file of ours is, so that it starts no Hub
        return subprocess.run(
            [sys.executable, "-m", "pytest", "--help"], cwd=folder, capture_output=True, text=True
        ).stdout
    if target == "venv":
        assert importlib.util.find_spec(target)
        return ""
    written = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(written), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [target, "--help"])
        if is_module:
            runpy.run_module(target, run_name="__main__")
        else:
            runpy.run_path(str(ROOT / target), run_name="__main__")
    assert not ended.value.code
    return written.getvalue()


def _check_flags(arguments: list[str], helps: str) -> None:
    for word in arguments[2 if arguments[:1] == ["-m"] else 0 :]:
        if word.startswith("-"):
            assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", helps), f"{word} of {arguments}"


def _after(first: str, words: list[str]) -> list[str]:
    assert words[0] == first
    return words[1:]


# Python


@pytest.fixture(scope="module")
def float_model() -> Any:
    return AutoModelForSequenceClassification.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def published(float_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the Hub under the name that the documents use."""
    folder = tmp_path_factory.mktemp("published") / "int8"
    with pytest.warns(UserWarning, match="eval_func"):
        fit(float_model, PostTrainingQuantConfig(approach="dynamic"), example_loader(float_model)).save(folder)
    AutoTokenizer.from_pretrained(CHECKPOINT).save_pretrained(folder)
    return folder


def example_loader(model: Any) -> list[Any]:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    return [dict(tokenizer(text, return_tensors="pt")) for text in TEXTS]


PYTHON = [
    pytest.param(path, code, id=f"{name_of(path)}-{number}")
    for path in DOCUMENTS
    for number, code in enumerate(blocks(path, "python"))
]


@pytest.mark.parametrize(("path", "code"), PYTHON)
def test_python_runs_as_it_stands(
    path: Path,
    code: str,
    float_model: Any,
    published: Path,
    hub: LocalHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With what a reader has: a model, its tokenizer, texts, and a function that scores."""
    ast.parse(code)
    if path in CARDS or any(name in code for name in RUN_ELSEWHERE):
        return
    demo = tmp_path / "pipelines" / "demo"
    write_slice(demo / "data", train=100, validation=100)
    (demo / CHECKPOINT.name).symlink_to(CHECKPOINT)
    monkeypatch.chdir(tmp_path)
    hub.commit_folder("me/bert-mrpc-int8", published)
    loader = example_loader(float_model)

    def accuracy(model: Any) -> float:
        with torch.inference_mode():
            return sum(int(model(**batch).logits.argmax()) for batch in loader) / len(loader)

    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    given = {"model": float_model, "tokenizer": tokenizer, "texts": TEXTS, "loader": loader, "accuracy": accuracy}
    names = {"hfq": hfq, **given, "__name__": "__main__"}
    exec(compile(code, str(path), "exec"), names)
    if "logits" in names:
        expected = torch.cat([names["model"](**batch).logits for batch in loader])
        torch.testing.assert_close(names["logits"], expected, atol=1e-4, rtol=1e-4)
    for saved in re.findall(r'save\("([^"]+)"\)', code):
        assert AutoModelForSequenceClassification.from_pretrained(tmp_path / saved).config.quantization_config
    if "hfq.lightning.quantize" in code:
        assert json.loads((tmp_path / "saved_model" / "hfq.json").read_text())["baseline"]["accuracy"] > 0.95


def test_readme_shows_lightning_in_under_25_lines() -> None:
    (code,) = [block for block in blocks(ROOT / "README.md", "python") if "hfq.lightning.quantize" in block]
    assert len(code.splitlines()) < 25


# What is said


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 130


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", prose(path)):
        found = path.parent / target if target else path
        assert found.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", prose(found), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]


def test_the_tables_name_all_there_is() -> None:
    """Tasks, fusions, and variables of the environment that hfq reads."""
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "hfq").rglob("*.py"))
    variables = set(re.findall(r'environ(?:\.get\(|\[)"(HFQ_\w+)"', source))
    assert {name.strip("`") for name in first_column(RUNTIME, "Environment variables") if "HFQ" in name} == variables
    for path in DOCUMENTS:
        assert set(re.findall(r"HFQ_[A-Z_]+", path.read_text(encoding="utf-8"))) <= variables
    assert [name.strip("`") for name in first_column(RUNTIME, "Fusions")] == list(FUSION_SETS["all"])
    assert sorted(first_column(ROOT / "README.md", "Tasks")) == sorted(tasks())
