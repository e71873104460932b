"""A fault at a random request of a run that pulls, quantizes and pushes, again and again: `python tests/campaign.py`.

Each run has one of `faulty_proxy.KINDS` of fault at one request, between the client and the local Hub. It must end with
the model published whole in one commit, or not at all; what it says, its exit code and its files must agree with that;
and the same command again, without a fault, must succeed. Some of the runs are of `hfq watch --once`, for a source that
was never published or has a new revision: that must become one commit, and looking again must make none.

    python tests/campaign.py --runs 200 --seed 0

prints a line for each run and exits with 1 if one of them broke a rule. `--only N` repeats run N. Takes seconds a run.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.command import Done, Forkserver, copy_checkpoint, write_slice
from support.factories import make_folder, make_report
from support.faulty_proxy import Fault, FaultyProxy

from hfq.common.names import PLOT_FILES
from hfq.hub.local import LocalHub
from hfq.hub.local.store import RefusedError

USER = "hfq-user"
DATA = f"{USER}/data"
OPTIONS = {"approach": "dynamic", "max_trials": 1, "calibration_samples": 8, "max_length": 16, "allow_loss": True}
EXPORT = {
    *("README.md", "config.json", "hfq.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *PLOT_FILES,
}
MODES = ("quantize", "quantize a dataset of the Hub", "watch: new source", "watch: new revision")


@dataclass
class Campaign:
    """A Hub, a proxy before it, and a process to fork commands from, for as long as the `with` block lasts."""

    seed: int
    broken: list[str] = field(default_factory=list)

    def __enter__(self) -> "Campaign":
        self.home = Path(tempfile.mkdtemp(prefix="hfq-campaign-"))
        self.hub = LocalHub()
        self.hub.start()
        self.proxy = FaultyProxy(self.hub.url).__enter__()
        self.model = small_checkpoint(self.home / "model")
        self.data = write_slice(self.home / "rows", train=24, validation=16)
        self.hub.commit_folder(DATA, self.data, repo_type="dataset")
        variables = {**self.hub.environment(), "HF_ENDPOINT": self.proxy.url, "HFQ_HUB_PATIENCE": "4"}
        caches = {"HF_HOME": str(self.home / "hf"), "HF_DATASETS_CACHE": str(self.home / "hf" / "datasets")}
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        self.server = Forkserver({**variables, **caches, **quiet}, fork_workers=True)
        self._lengths: dict[str, int] = {}
        return self

    def __exit__(self, *_: object) -> None:
        self.server.close()
        self.proxy.__exit__()
        self.hub.stop()
        shutil.rmtree(self.home)

    def run(self, number: int) -> str:
        """Carry out one run and its rerun; say what happened. Rules it broke are in `broken`."""
        chance = random.Random(f"{self.seed}/{number}")
        mode = chance.choices(MODES, weights=(4, 2, 2, 2))[0]
        place = chance.randrange(self._length(mode))
        trial = self._prepare(mode, f"run-{number}")
        self.proxy.begin(Fault(chance.choice, at=place))
        started = time.monotonic()
        done = trial.command()
        fault = next(
            (f"{kind} at {method} {path}" for method, path, kind in self.proxy.requests if is_fault(kind)), "none"
        )
        text = f"{mode}; {fault.partition('?')[0]}; exit {done.code}, {time.monotonic() - started:.1f} s"
        problems = list(trial.problems(done))
        self.proxy.begin()
        words = ("push", "out", "--to", trial.target) if done.code == 0 and not trial.is_watch else ()
        again = trial.command(*words)  # what is published is not made again, and not sent again
        problems += [f"rerun: {problem}" for problem in trial.problems(again, must_succeed=True)]
        if trial.is_watch and done.code:
            problems += [f"third look: {problem}" for problem in trial.problems(trial.command(), must_succeed=True)]
        if problems:
            self.broken.append(f"run {number}: {text}")
            return "\n".join([f"BROKEN {text}", *problems, done.err, again.err])
        shutil.rmtree(trial.folder)
        return text

    def _prepare(self, mode: str, name: str) -> "Trial":
        """A source whose weights nobody has seen, and a command to publish it."""
        weights = load_file(self.model / "model.safetensors")
        weights["classifier.bias"] += 1e-3
        save_file(weights, self.model / "model.safetensors", metadata={"format": "pt"})
        source, target = f"{USER}/{name}", f"{USER}/{name}-int8"
        revision = self.hub.commit_folder(source, self.model)
        shutil.rmtree(self.home / "hf", ignore_errors=True)
        folder = Path(tempfile.mkdtemp(dir=self.home))
        published = 0
        if mode == "watch: new revision":
            report = make_report()
            old = make_folder(
                folder.with_suffix(".old"), replace(report, checkpoint=replace(report.checkpoint, revision="0" * 40))
            )
            self.hub.commit_folder(target, old)
            published = 1
        dataset = DATA if "dataset" in mode else str(self.data)
        recipe = {"checkpoint": source, "dataset": dataset, "to": target, "output": "out", "push": True, **OPTIONS}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return Trial(self, folder, target, revision, mode.startswith("watch"), published)

    def _length(self, mode: str) -> int:
        """How many requests such a run has, which must succeed without a fault."""
        if mode in self._lengths:
            return self._lengths[mode]
        trial = self._prepare(mode, re.sub("[^a-z]+", "-", mode))
        self.proxy.begin()
        done = trial.command()
        if problems := list(trial.problems(done, must_succeed=True)):
            raise SystemExit("\n".join([f"Without a fault, {mode!r} fails:", *problems, done.err]))
        shutil.rmtree(trial.folder)
        self._lengths[mode] = len(self.proxy.requests)
        return self._lengths[mode]


@dataclass
class Trial:
    """A command that publishes `revision` of a source to `target`. `published`: commits there before it."""

    campaign: Campaign
    folder: Path
    target: str
    revision: str
    is_watch: bool
    published: int

    def command(self, *words: str) -> Done:
        usual = ("watch", "recipe.yaml", "--once") if self.is_watch else ("run", "recipe.yaml")
        return self.campaign.server.hfq(*(words or usual), cwd=self.folder)

    def problems(self, done: Done, *, must_succeed: bool = False) -> Iterator[str]:
        """Rules that are broken by what is on the Hub, in the folder, and in what the command said."""
        state, commits = self._published()
        if done.code not in (0, 1) or (must_succeed and done.code != 0):
            yield f"the exit code is {done.code}"
        if state not in ("whole", "untouched", "gone"):
            yield f"the repository is {state}"
        if (done.code == 0) != (state == "whole"):
            yield f"the exit code is {done.code}, but the repository is {state}"
        if commits > self.published + 1:
            yield f"{commits} commits"
        if state == "gone" and commits < 0:
            yield "an empty repository is left, and nothing says so" * ("could not be removed" not in done.err)
        text = done.err + done.out
        if "Traceback" in text or "Warning" in text:
            yield "more than a message"
        messages = [line for line in done.err.splitlines() if not line.startswith(("▸ ", " ", "! "))]
        if len(messages) != (done.code != 0):
            yield f"{len(messages)} messages"
        token = self.campaign.hub.token
        if token in text or any(
            token.encode() in path.read_bytes() for path in self.folder.rglob("*") if path.is_file()
        ):
            yield "the token is shown"
        left = {path.name for path in self.folder.iterdir()} - {"recipe.yaml"}
        if left - {"out"}:
            yield f"{left} are left behind"
        out = self.folder / "out"
        if out.exists() and (missing := {name for name in EXPORT if not (out / name).is_file()}):
            yield f"the output lacks {missing}"

    def _published(self) -> tuple[str, int]:
        """What the repository is, and the number of commits in it beside the Hub's own."""
        hub = self.campaign.hub
        try:
            commits = len(hub.commits(self.target)) - 1
        except RefusedError:
            return "gone", 0
        if commits == 0:
            return "gone", -1
        files = hub.files(self.target)
        if commits == self.published and b"0" * 40 in files["hfq.json"]:
            return "untouched", commits
        if set(files) - {".gitattributes"} != EXPORT:
            return f"half there: {sorted(files)}", commits
        revision = json.loads(files["hfq.json"])["checkpoint"]["revision"]
        if revision != self.revision:
            return f"of revision {revision}", commits
        weights = self.folder / "published.safetensors"
        weights.write_bytes(files["model.safetensors"])
        try:
            with safe_open(weights, framework="np") as file:
                return ("whole" if any("weight_scale" in name for name in file.keys()) else "without scales"), commits  # noqa: SIM118
        finally:
            weights.unlink()


def small_checkpoint(folder: Path) -> Path:
    """The demo's checkpoint with one layer of three: what it answers matters little here."""
    copy_checkpoint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not re.search(r"\.layer\.[12]\.", name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def is_fault(kind: str) -> bool:
    """Whether a request was spoiled: the others have the status they were answered with, which may be one of a fault."""
    return kind.startswith("!")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="carry out this run alone")
    given = parser.parse_args()
    with Campaign(given.seed) as campaign:
        outcomes: Counter[str] = Counter()
        for number in [given.only] if given.only is not None else range(given.runs):
            text = campaign.run(number)
            outcomes["published" if "exit 0" in text else "not published"] += 1
            print(f"{number:4} {text}", flush=True)
        print(
            f"{sum(outcomes.values())} runs, seed {given.seed}: {dict(outcomes)}; rules broken in {len(campaign.broken)}"
        )
        print("\n".join(campaign.broken))
    sys.exit(bool(campaign.broken))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
