"""A token reaches no log, message, traceback, report or file, however a command fails and whoever says it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.command import CHECKPOINT, ROOT, Done, forkserver, hfq, hfq_in, write_slice
from support.factories import make_folder, make_report
from support.hostile_hub import HostileHub

from hfq.common.redact import redact, remember
from hfq.report.card import render_card
from hfq.report.report import Report
from hfq.tuning.log import TrialLog

TOKEN = "hf_" + "Recognisable0" * 3
ODD = "s3cret-of-an-organisation"  # no pattern finds this one


def clean(done: Done, *folders: Path) -> str:
    """What was said on both streams, if neither that nor any file in `folders` holds a token."""
    said = done.out + done.err
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    for secret in (TOKEN, ODD):
        assert secret not in said
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    return said


FAILING = {
    "quantize ./nowhere --token {odd}": "./nowhere does not exist",
    "quantize {odd}/model --token {odd}": "holds a token",
    "quantize ./{odd} --token={odd}": "holds a token",
    "quantize stranger/model --token {token}": "(401)",
    "quantize {checkpoint} --dataset ./nowhere --token {odd}": "nowhere does not exist",
    "quantize {checkpoint} --dataset {data} --split {odd} --save-recipe saved.yaml --token {odd}": "holds a token",
    "quantize {checkpoint} --to a/{token}": "holds a token",
    "run broken.yaml --token {odd}": "holds a token",
    "run recipes broken.yaml --json --push --token {odd}": "the token is not valid",
    "run recipes --engine ray --token {odd}": "--token cannot be given with --engine ray",
    "report ./{odd} --token {odd}": "HF_TOKEN has no hfq.json",
    "inspect ./{odd} --json --token {odd}": "HF_TOKEN does not exist",
    "eval {checkpoint} --dataset {data} --split {odd} --json --token {odd}": "holds a token",
    "bench ./{odd} --token {odd} --json": "HF_TOKEN does not exist",
    "push out --to hfq-user/x --token {odd}": "401",
    "watch recipes --once --json --token {odd}": "Not published",
    "webhook recipes --queue {odd} --token {odd}": "WEBHOOK_SECRET is not set",
}


@pytest.mark.parametrize("line", FAILING)
def test_no_command_that_fails_shows_its_token(line: str, tmp_path: Path) -> None:
    cwd = tmp_path / "cwd"
    make_folder(cwd / "out")
    (cwd / "recipes").mkdir()
    data = write_slice(tmp_path / "data", train=20, validation=20)
    recipe = f"checkpoint: {CHECKPOINT}\ndataset: {data}\nto: hfq-user/x\n"
    (cwd / "recipes" / "a.yaml").write_text(recipe)
    (tmp_path / "broken.yaml").write_text(f"{recipe}split: {ODD}\n")
    words = [
        word.format(odd=ODD, token=TOKEN, checkpoint=CHECKPOINT, data=data)
        for word in line.replace("broken", "../broken").split()
    ]
    done = forkserver().hfq(*words, cwd=cwd, env={"HF_TOKEN": TOKEN})
    assert done.code in (1, 2)
    assert FAILING[line] in clean(done, cwd)
    assert "Traceback" not in done.err
    if "--save-recipe" in line:
        assert not (cwd / "saved.yaml").exists()


@pytest.mark.parametrize("debug", [None, "1"])
def test_an_error_nobody_expected_is_one_message_without_the_token(debug: str | None, tmp_path: Path) -> None:
    """A library is broken, and says more than it should."""
    library, cwd = tmp_path / "library", tmp_path / "cwd"
    library.mkdir()
    cwd.mkdir()
    (library / "safetensors.py").write_text(f"raise RuntimeError('Bearer {ODD}')\n")
    variables = {"HFQ_DEBUG": debug, "HF_TOKEN": ODD, "PYTHONPATH": f"{library}{os.pathsep}{ROOT}"}
    done = hfq("inspect", CHECKPOINT, cwd=cwd, env=variables)
    assert (done.code, done.out) == (1, "")
    clean(done, cwd)
    message = done.err.splitlines()[-1]
    assert message.startswith("hfq: Unexpected ") and "HFQ_DEBUG=1" in message
    assert ("Traceback" in done.err) == bool(debug)


def test_a_hub_that_answers_with_something_else_is_not_repeated(tmp_path: Path) -> None:
    """It describes a model by a list, which its client does not expect."""
    with HostileHub({}, answer=(200, [f"Bearer {ODD}"])) as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": ODD, "HF_HUB_VERBOSITY": "debug"}
        done = hfq_in(variables, "inspect", "mallory/model", cwd=tmp_path)
    assert (done.code, done.out) == (1, "")
    assert "the answer is not the Hub's" in clean(done, tmp_path)


def test_a_hub_that_says_the_token_back_is_not_repeated(tmp_path: Path) -> None:
    with HostileHub({}, answer=(500, {"error": "no"})) as hub:
        done = hfq_in({"HF_ENDPOINT": hub.url, "HF_TOKEN": ODD}, "inspect", "mallory/model", cwd=tmp_path)
    assert done.code == 1
    assert "bad token Bearer HF_TOKEN" in clean(done, tmp_path)


def test_neither_report_nor_card_nor_trial_log_holds_a_token(tmp_path: Path) -> None:
    remember(ODD)
    report = make_report(command=f"hfq run x --token {TOKEN}", warnings=[f"{ODD} and {TOKEN}"], chosen=ODD)
    for text in (report.to_json(), render_card(report, repo_id=None)):
        assert TOKEN not in text and ODD not in text
    assert Report.from_json(report.to_json()).warnings == ["HF_TOKEN and HF_TOKEN"]
    log = TrialLog(tmp_path / "trials.jsonl", depends_on={"x": TOKEN}, resume=False)
    log.rank(ODD, 0.5)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == [
        {"depends_on": {"x": "HF_TOKEN"}},
        {"output_error": 0.5, "ranked": "HF_TOKEN"},
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"GET /?token={TOKEN}&x", "GET /?token=HF_TOKEN&x"),
        (f"{{'Authorization': 'Bearer {TOKEN}'}}", "{'Authorization': 'Bearer HF_TOKEN'}"),
        ("authorization: Bearer abc.def-ghi", "authorization: Bearer HF_TOKEN"),
        ("hfq push --token=abc --to x", "hfq push --token=HF_TOKEN --to x"),
        ("hf_internal_testing and hf-internal", "hf_internal_testing and hf-internal"),
    ],
)
def test_finds_tokens_by_their_look(text: str, expected: str) -> None:
    assert redact(text) == expected


def test_what_a_library_logs_or_prints_is_redacted_too() -> None:
    script = f"""
import logging, sys, warnings
from hfq.common.redact import guard_streams, remember
remember({ODD!r})
guard_streams()
logging.basicConfig(level=logging.DEBUG)
logging.getLogger("httpcore").debug("send headers %r", [(b"authorization", b"Bearer {ODD}")])
warnings.warn("{ODD}")
print("{ODD}", file=sys.stdout)
raise ValueError("{ODD}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ODD not in done.stdout + done.stderr
    assert done.stdout == "HF_TOKEN\n"
    assert logging.getLevelName(logging.DEBUG) in done.stderr and "ValueError: HF_TOKEN" in done.stderr
