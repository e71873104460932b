"""A run as the summary of a GitHub job: `python -m hfq.report.summary REPORT --exit-code N` prints Markdown.

Reads what `--json` printed: a report, the trials of a missed goal, a line for each recipe of `hfq watch`, or nothing.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .report import Report
from .view import number, results

_FAILED = "Nothing was published: hfq ended with exit code {code}. What is wrong and what to do is in the log."
_MARKUP = re.compile(r"([!-/:-@\[-`{-~])")


def main() -> None:
    """Print the summary of the file on the command line."""
    parser = argparse.ArgumentParser(prog="python -m hfq.report.summary", description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("--exit-code", type=int, default=0, help="what hfq ended with")
    given = parser.parse_args()
    print(summarize(given.report.read_text(encoding="utf-8"), exit_code=given.exit_code))


def summarize(text: str, *, exit_code: int) -> str:
    """Markdown for what a command printed with `--json`, and for the code it ended with."""
    if not text.strip():
        return _FAILED.format(code=exit_code)
    try:
        found = json.loads(text)
    except json.JSONDecodeError:  # one object a line
        return _recipes(json.loads(line) for line in text.splitlines())
    if "recipe" in found:
        return _recipes([found])
    return _measured(Report.from_json(text), exit_code) if "quantized" in found else _missed(found)


def _measured(report: Report, exit_code: int) -> str:
    lines = [
        f"### {plain(report.checkpoint.id)} as INT8",
        "",
        "| Info Type | Baseline FP32 | Quantized INT8 |",
        "|---|---|---|",
        *(f"| {plain(row.label)} | {number(row.baseline)} | {number(row.quantized)} |" for row in results(report)),
        "",
        f"{plain(report.chosen)}, on {report.data.examples} examples of {plain(report.data.id)}. "
        f"The goal, at most {_goal(vars(report.goal))}, is {'met' if report.met else 'missed'}.",
    ]
    return "\n".join([*lines, "", _FAILED.format(code=exit_code)] if exit_code else lines)


def _missed(details: Mapping[str, Any]) -> str:
    return "\n".join(
        [
            "### The accuracy goal was missed: nothing was published",
            "",
            f"At most {_goal(details['goal'])} from FP32 {plain(details['metric'])} {details['baseline']['accuracy']:.4f}.",
            "",
            "| Trial | Accuracy | Loss |",
            "|---|---|---|",
            *(
                f"| {plain(row['name'])} | {row['accuracy']:.4f} | {row['loss']:+.4f} |"
                for row in details["trials"]
                if row["accuracy"] is not None
            ),
        ]
    )


def _recipes(outcomes: Iterable[Mapping[str, Any]]) -> str:
    rows = [f"| {plain(row['recipe'])} | {plain(row['state'])} | {plain(row['message'])} |" for row in outcomes]
    return "\n".join(["### Recipes", "", "| Recipe | State | |", "|---|---|---|", *rows])


def _goal(goal: Mapping[str, Any]) -> str:
    return f"{goal['tolerable_loss']:g} {plain(goal['kind'])} loss"


def plain(text: str) -> str:
    """Text that Markdown shows as it is, in one line: strangers choose the names of models and columns."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


if __name__ == "__main__":
    main()
