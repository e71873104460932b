"""`--engine ray`: recipes spread over two nodes of a Ray cluster on this machine come out as they do here, and once."""

import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml
from support.command import CHECKPOINT, PATIENCE, ROOT, Running, forkserver, timeless, write_outliers, write_slice

from hfq.hub.local import LocalHub

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'hfq[ray]'")
from ray.cluster_utils import Cluster  # noqa: E402 (after Ray is known to be there)

USER = "hfq-user"
FAST = {"approach": "dynamic", "max_trials": 1, "threads": 1}
TIMED = {"README.md", "hfq.json", "plots/accuracy_speed.png"}
ELSEWHERE = {"hardware": None, "command": None}
STORE = {"object_store_memory": 100 << 20, "num_cpus": 1, "include_log_monitor": False}


@dataclass(frozen=True)
class Nodes:
    """A cluster of two nodes, with room for one recipe each."""

    address: str
    head: int  # process of the head's raylet; of the worker nodes, any may be killed
    logs: Path
    site: Path  # a folder that its workers import from

    def fork(self) -> None:
        """Have workers that start from now on fork the processes in which they measure."""
        code = f"import sys\nsys.executable = {str(forkserver().programs / 'python')!r}\n"
        (self.site / "sitecustomize.py").write_text(code)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Its workers find this hfq, but no token and no Hub of their own."""
    site = tmp_path_factory.mktemp("site")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            path = [str(site), str(ROOT), os.environ.get("PYTHONPATH")]
            patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
            patch.setenv("RAY_worker_niceness", "0")  # else they wait until the other tests on this machine have ended
            for name in ("HF_TOKEN", "HF_ENDPOINT"):
                patch.delenv(name)
            cluster = Cluster(initialize_head=True, head_node_args={**STORE, "include_dashboard": False})
            stack.callback(cluster.shutdown)
            cluster.add_node(**STORE)
        head = cluster.head_node
        raylet = head.all_processes["raylet"][0].process.pid
        yield Nodes(cluster.address, raylet, Path(head.get_session_dir_path()), site)


def on(nodes: Nodes) -> tuple[str, ...]:
    return "--engine", "ray", "--ray-address", nodes.address


def write_recipes(project: Path, **recipes: dict[str, object]) -> None:
    (project / "pipelines").mkdir()
    for name, values in recipes.items():
        (project / "pipelines" / f"{name}.yaml").write_text(yaml.safe_dump({"dataset": "../data", **values}))


def assert_same(spread: Path, local: Path) -> None:
    """The export of a run on the cluster is that of one here, byte for byte where nothing is timed."""
    first, second = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (spread, local)
    )
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name]} <= TIMED
    reports = [timeless(json.loads(files["hfq.json"])) | ELSEWHERE for files in (first, second)]
    assert reports[0] == reports[1]


@pytest.mark.parametrize("named_by", ["--ray-address", "RAY_ADDRESS", "a cluster that was killed"])
def test_a_cluster_that_does_not_answer_is_said_at_once(named_by: str, tmp_path: Path) -> None:
    """Ray itself would try for two minutes. Before the cluster is started that the others use: Ray would find it."""
    write_slice(tmp_path / "data", train=8, validation=8)
    write_recipes(tmp_path, one={**FAST, "checkpoint": str(CHECKPOINT)})
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = "{}:{}".format(*taken.getsockname())
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(address)  # as Ray notes it
        option = ["--ray-address", address] if named_by == "--ray-address" else []
        env = {"RAY_ADDRESS": address if named_by == "RAY_ADDRESS" else None, "RAY_TMPDIR": str(tmp_path)}
        done = forkserver().hfq("run", "pipelines/one.yaml", "--engine", "ray", *option, cwd=tmp_path, env=env)
    assert (done.code, len(done.err.splitlines())) == (2, 1), done.err
    assert re.match(rf"hfq: No Ray cluster answers at '[\d.]+:{address.split(':')[1]}'", done.err)
    assert "Start one with `ray start --head`" in done.err


def test_one_recipe_is_helped_by_other_workers_and_goes_on_wherever_it_was_left(nodes: Nodes, tmp_path: Path) -> None:
    """Begun on the cluster until this process is killed, there again until it is interrupted, and ended here."""
    write_slice(tmp_path / "data", train=100, validation=50)
    recipe = {**FAST, "checkpoint": str(CHECKPOINT), "explore": True, "max_trials": 2, "output": "../out"}
    write_recipes(tmp_path, one=recipe)
    project, log = tmp_path / "pipelines", tmp_path / "out.hfq-work" / "trials.jsonl"
    with Running("run", "one.yaml", *on(nodes), cwd=project) as running:
        owner = running.until("on ").split("process ")[1].strip()
        helper = running.until("evaluated on").split("process ")[1].strip(":\n")
        running.until("meets the goal")
        running.stop(signal.SIGKILL)
    assert helper != owner
    trials = [row["trial"] for row in map(json.loads, log.read_text().splitlines()) if "trial" in row]
    assert len(trials) == 2

    with Running("run", "one.yaml", "--resume", *on(nodes), cwd=project) as running:
        worker = psutil.Process(int(running.until("on ").split("process ")[1]))
        running.until("▸ Checkpoint")
        done = running.stop(signal.SIGINT)
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1].startswith("hfq: Interrupted. Nothing was published; run the same command with")
    worker.wait(PATIENCE)  # it does not go on with what nobody waits for

    done = forkserver().hfq("run", "one.yaml", "--resume", "--json", cwd=project)
    assert done.code == 0, done.err
    assert json.loads(done.out)["trials"] == trials
    assert not log.parent.exists()


def test_recipes_whose_worker_or_node_is_killed_are_finished_by_others_and_published_once(
    hub: LocalHub, nodes: Nodes, tmp_path: Path
) -> None:
    nodes.fork()  # not before: a trial that is over at once leaves others nothing to help with
    write_slice(tmp_path / "data", train=100, validation=50)
    hub.create_repo(f"{USER}/ray-source", private=True)
    hub.commit_folder(f"{USER}/ray-source", write_outliers(tmp_path / "outliers"))
    recipe = {**FAST, "checkpoint": f"{USER}/ray-source", "tolerable_loss": 0}
    write_recipes(
        tmp_path,
        a={**recipe, "to": "ray-a", "output": "a-out", "allow_loss": True},
        b={**recipe, "to": "ray-b", "output": "b-out", "allow_loss": True},
        gone={**recipe, "checkpoint": str(tmp_path / "gone"), "to": "ray-gone"},
        hard={**recipe, "to": "ray-hard"},
    )
    with Running("run", "pipelines", "--push", "--json", *on(nodes), cwd=tmp_path) as running:
        while len(workers := dict(re.findall(r"([ab])\.yaml │   on .*process (\d+)", running.err))) < 2:
            running.until("process")
        raylets = {name: psutil.Process(int(pid)).parent() for name, pid in workers.items()}
        (here,) = (name for name, raylet in raylets.items() if raylet.pid == nodes.head)
        (away,) = {"a", "b"} - {here}
        for process in [raylets[away], *raylets[away].children(recursive=True)]:
            process.kill()
        if f"{here}.yaml │ ▸ Export" not in running.err:
            running.until(f"{here}.yaml │ ▸ Export")
        *_, last = (tmp_path / f"{here}-out.hfq-work" / "trials.jsonl").read_text().splitlines()
        os.kill(int(workers[here]), signal.SIGKILL)
        done = running.end()

    assert done.code == 1, done.err  # the gravest: one could not be read there
    outcomes = {row["recipe"]: row for row in map(json.loads, done.out.splitlines())}
    assert {name: row["state"] for name, row in outcomes.items()} == {
        "a.yaml": "published",
        "b.yaml": "published",
        "gone.yaml": "failed",
        "hard.yaml": "missed",
    }
    assert done.err.count(f"{here}.yaml │ ! Its worker was lost (WorkerCrashedError)") == 1
    assert done.err.count(f"{away}.yaml │ ! Its worker was lost") == 1
    assert outcomes["hard.yaml"]["exit_code"] == 3
    assert "hard.yaml │ ! No trial met the goal" in done.err
    assert f"gone.yaml │ ! The checkpoint {tmp_path / 'gone'} is not on " in done.err
    assert "raylet" not in done.err, "only hfq speaks"
    for name in "ab":
        commit, _ = hub.commits(f"{USER}/ray-{name}")  # the other is the one the Hub makes itself
        assert commit.sha in outcomes[f"{name}.yaml"]["message"]
        assert hub.files(f"{USER}/ray-{name}")["hfq.json"] == (tmp_path / f"{name}-out" / "hfq.json").read_bytes()
    assert not any("ray-hard" in path for method, path, _ in hub.requests if method == "POST")
    assert not list(tmp_path.glob("[ab]-out.hfq-work"))

    found = json.loads((tmp_path / f"{here}-out" / "hfq.json").read_text())
    assert found["trials"] == [json.loads(last)["trial"]], "a trial that was logged is not repeated"
    alone = forkserver().hfq("run", f"pipelines/{here}.yaml", "--output", "local", cwd=tmp_path)
    assert alone.code == 0, alone.err
    assert_same(tmp_path / f"{here}-out", tmp_path / "local")

    token = os.environ["HF_TOKEN"]
    assert token not in done.out + done.err
    assert not [path for path in nodes.logs.rglob("*") if path.is_file() and token.encode() in path.read_bytes()]
