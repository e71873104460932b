"""`hfq webhook`: only who knows the secret is heard, and what was asked for is done once, whatever ends the process."""

import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.command import CHECKPOINT, PATIENCE, Running, forkserver, write_slice

from hfq.common.errors import UsageError
from hfq.hub.local import LocalHub
from hfq.runs.job_queue import Job, JobQueue
from hfq.runs.webhook import announced

USER = "hfq-user"
SECRET = "what only the Hub knows"
A, B = Job("a.yaml", "a" * 40), Job("b.yaml", "b" * 40)


def event(name: str, sha: str | None, *, ref: str = "refs/heads/main", **changes: Any) -> bytes:
    """What the Hub posts when somebody pushes to a model. `changes`: of the event or of the repository."""
    payload = {
        "event": {"action": changes.get("action", "update"), "scope": changes.get("scope", "repo.content")},
        "repo": {
            "type": changes.get("type", "model"),
            "name": name,
            "id": "6366c000a2abcdf2fd69a080",
            "private": False,
            "url": {"web": f"https://huggingface.co/{name}", "api": f"https://huggingface.co/api/models/{name}"},
            "headSha": sha,
            "owner": {"id": "61d2000c3c2083e1c08af22d"},
        },
        "updatedRefs": [{"ref": ref, "oldSha": None, "newSha": sha}],
        "webhook": {"id": "6390e855e30d9209411de93b", "version": 3},
    }
    return json.dumps(payload).encode()


def post(port: int, body: bytes, *, secret: str | None = SECRET) -> tuple[int, Any]:
    """The status and the JSON of the answer."""
    headers = {"Content-Type": "application/json"} | ({} if secret is None else {"X-Webhook-Secret": secret})
    request = urllib.request.Request(f"http://127.0.0.1:{port}/webhooks/hub", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


@pytest.fixture
def port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


# From the Hub's request to the published commit


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with a recipe for the source `hfq-user/hooked`, which is not there yet."""
    write_slice(tmp_path / "data", train=100, validation=50)
    (tmp_path / "pipelines").mkdir()
    recipe = {"checkpoint": f"{USER}/hooked", "dataset": "../data", "approach": "dynamic", "max_trials": 1}
    (tmp_path / "pipelines" / "hooked.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


def test_an_announced_revision_is_published_once_even_if_the_process_is_killed(
    hub: LocalHub, project: Path, port: int
) -> None:
    arguments = ("webhook", "pipelines", "--port", port)
    with Running(*arguments, cwd=project, env={"WEBHOOK_SECRET": SECRET}) as running:
        running.until(f"Listening on http://127.0.0.1:{port}/webhooks/hub")
        assert "hooked is not on the Hub" in running.until("! ")
        revision = hub.commit_folder(f"{USER}/hooked", CHECKPOINT)
        pushed = event(f"{USER}/hooked", revision)
        for secret, status in ((None, 401), ("", 403), (SECRET[:-1], 403), (SECRET + "x", 403), ("ü", 403)):
            assert post(port, pushed, secret=secret)[0] == status
            assert post(port, b"{", secret=secret)[0] == status, "the secret is looked at before the body"
        assert post(port, b"{")[0] == 422
        assert post(port, b" " * (1 << 20) + pushed)[0] == 413
        assert post(port, pushed) == (202, {"queued": ["hooked.yaml"]})
        running.until("▸ Baseline")
        assert post(port, pushed) == (202, {"queued": []})
        assert running.stop(signal.SIGKILL).code == -signal.SIGKILL
    assert not (project / "hooked-int8").exists()

    with Running(*arguments, cwd=project, env={"WEBHOOK_SECRET": SECRET}) as running:
        running.until(f"holds {USER}/hooked at {revision[:19]}: commit")
        running.until("nothing to do")  # the look at start, which the first process had put off
        while post(port, pushed) != (202, {"queued": ["hooked.yaml"]}):
            time.sleep(0.05)  # it is finished an instant after it is reported
        running.until("Queued")
        running.until("nothing to do")
        done = running.stop(signal.SIGINT)
    assert (done.code, done.out) == (130, "")
    assert done.err.count("▸ Trials") == 1
    assert len(hub.commits(f"{USER}/hooked-int8")) == 2  # the Hub makes the first
    assert json.loads(hub.files(f"{USER}/hooked-int8")["hfq.json"])["checkpoint"]["revision"] == revision
    for text in (SECRET, os.environ["HF_TOKEN"]):
        assert text not in done.err
        assert not any(text.encode() in path.read_bytes() for path in project.rglob("*") if path.is_file())


@pytest.mark.parametrize(("secret", "says"), [(None, "is not set"), ("", "is not set"), ("ü", "no header can")])
def test_a_server_without_a_proper_secret_does_not_start(secret: str | None, says: str, project: Path) -> None:
    done = forkserver().hfq("webhook", "pipelines", cwd=project, env={"WEBHOOK_SECRET": secret})
    assert done.code == 2
    assert "WEBHOOK_SECRET" in done.err and says in done.err
    assert not (project / "hfq-queue").exists()


def test_a_port_in_use_is_refused(project: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        number = taken.getsockname()[1]
        arguments = ("webhook", "pipelines", "--port", number)
        done = forkserver().hfq(*arguments, cwd=project, env={"WEBHOOK_SECRET": SECRET})
    assert done.code == 1
    assert f"127.0.0.1:{number} cannot be listened on" in done.err and "--port" in done.err
    assert "Traceback" not in done.err


# Which recipes an event is about


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    values = {
        "followed.yaml": {"checkpoint": "me/model"},
        "branch.yaml": {"checkpoint": "me/model", "revision": "next"},
        "other.yaml": {"checkpoint": "me/other"},
    }
    for name, recipe in values.items():
        (tmp_path / name).write_text(yaml.safe_dump(recipe))
    (tmp_path / "broken.yaml").write_text("checkpoint: [")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ["followed.yaml"]),
        ({"ref": "refs/heads/next"}, ["branch.yaml"]),
        ({"ref": "refs/tags/next"}, ["branch.yaml"]),
        ({"ref": "refs/pr/1"}, []),
        ({"type": "dataset"}, []),
        ({"scope": "discussion"}, []),
        ({"scope": "repo", "action": "delete"}, []),
        ({"scope": "repo.config"}, []),
    ],
    ids=str,
)
def test_an_event_is_about_the_recipes_that_follow_what_was_pushed_to(
    change: dict[str, str], expected: list[str], recipes: Path
) -> None:
    for name in ("me/model", "Me/Model"):
        assert announced(event(name, "a" * 40, **change), recipes) == [Job(recipe, "a" * 40) for recipe in expected]


def test_a_branch_that_was_deleted_is_no_news(recipes: Path) -> None:
    assert announced(event("me/model", None), recipes) == []


def test_a_new_repository_comes_without_a_list_of_changes(recipes: Path) -> None:
    created = json.loads(event("me/other", "a" * 40, scope="repo", action="create"))
    del created["updatedRefs"]
    assert [job.recipe for job in announced(json.dumps(created).encode(), recipes)] == ["other.yaml"]


# The queue


@pytest.fixture
def queue(tmp_path: Path) -> Iterator[JobQueue]:
    with closing(JobQueue(tmp_path / "queue", retry_s=1e-3)) as found:
        yield found


def reopened(queue: JobQueue, folder: Path) -> JobQueue:
    """The queue as the next process finds it after a SIGKILL: nothing but the files."""
    copy = folder / "copy"
    shutil.copytree(folder / "queue", copy)
    return JobQueue(copy)


def test_the_same_revision_queued_twice_is_one_job(queue: JobQueue) -> None:
    assert queue.put(A)
    assert not queue.put(A)
    assert queue.put(B)
    job = queue.take()
    assert job == A
    assert not queue.put(A), "it is running"
    queue.finish(job)
    assert queue.take() == B
    assert queue.put(A), "it was done before, and somebody asks again"


def test_jobs_are_taken_in_the_order_they_came(queue: JobQueue) -> None:
    jobs = [Job("a.yaml", str(number)) for number in range(5)]
    for number, job in enumerate(jobs):
        queue.put(job)
        os.utime(next((queue._waiting).glob(job.file_name)), (number, number))
    assert [queue.take() for _ in jobs] == jobs


def test_what_was_running_when_the_process_was_killed_is_taken_again(queue: JobQueue, tmp_path: Path) -> None:
    queue.put(A)
    assert queue.take().attempts == 1
    queue.put(B)
    with closing(reopened(queue, tmp_path)) as later:
        again = [later.take(), later.take()]
        assert [(job, job.attempts) for job in again] == [(A, 2), (B, 1)]
        for job in again:
            later.finish(job)
        assert not list((tmp_path / "copy").rglob("*.json"))


def test_a_process_killed_while_it_took_a_job_leaves_one_job(queue: JobQueue, tmp_path: Path) -> None:
    """Between the two steps of taking, the job is counted and still waits; a file half-written has no name yet."""
    queue.put(A)
    queue.take()
    running = tmp_path / "queue" / "running" / A.file_name
    waiting = tmp_path / "queue" / "waiting"
    shutil.copy(running, waiting / A.file_name)
    (waiting / f".{B.file_name}.tmp").write_text('{"recipe": "b.ya')
    with closing(reopened(queue, tmp_path)) as later:
        later.finish(later.take())
        assert not list((tmp_path / "copy").rglob("*.json"))


def test_a_job_that_failed_is_taken_again_after_a_while_and_others_before_it(tmp_path: Path) -> None:
    with closing(JobQueue(tmp_path / "queue", retry_s=0.2)) as queue:
        queue.put(A)
        assert queue.retry(queue.take()) == 0.2
        queue.put(B)
        assert queue.take() == B
        again = queue.take()
        assert (again, again.attempts) == (A, 2)
        assert queue.retry(again) == 0.4


def test_take_waits_for_a_job_of_another_thread(queue: JobQueue) -> None:
    taken: list[Job] = []
    thread = threading.Thread(target=lambda: taken.append(queue.take()))
    thread.start()
    queue.put(A)
    thread.join(30)
    assert taken == [A]


def test_a_queue_belongs_to_one_process(queue: JobQueue, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Another hfq works on the queue"):
        JobQueue(tmp_path / "queue")


@pytest.mark.parametrize("text", ["", "[]", '{"recipe": "a.yaml"}', '{"recipe": "../a", "revision": "x"}', "\x00"])
def test_a_file_that_is_no_job_is_passed_over(text: str, queue: JobQueue, tmp_path: Path) -> None:
    (tmp_path / "queue" / "waiting" / "0.json").write_text(text)
    queue.put(A)
    assert queue.take() == A
