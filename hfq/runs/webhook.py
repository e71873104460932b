"""`hfq webhook`: the Hub tells what is new on the sources of a folder of recipes, and it is published.

`huggingface_hub`'s `WebhooksServer` listens, in a thread; the main thread works off a queue that survives a restart. What
the Hub sends only says which recipes to look at: what is new is asked of the Hub, as in `hfq watch`.
"""

import hmac
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from uuid import uuid4

from huggingface_hub import WebhookPayload
from pydantic import ValidationError

from ..common.errors import HfqError, HubError, UsageError
from ..common.installation import installation
from ..common.names import is_path
from ..common.redact import redact
from ..common.ui import Reporter
from ..recipe import read_recipe
from .job_queue import Job, JobQueue
from .recipe_folder import recipe_files
from .watch import Missed, Watcher

PATH = "/webhooks/hub"
MOST_ATTEMPTS = 5
_MOST_BYTES = 1 << 20
_SCOPES = ("repo", "repo.content")
_AT_START = "whatever is new at start"


@dataclass(frozen=True)
class Endpoint:
    """Where to listen, and `secret`: what the Hub must send as `X-Webhook-Secret`."""

    host: str
    port: int
    secret: str | None


def serve(
    folder: Path, endpoint: Endpoint, *, queue: Path, recipes: Path, token: str | None, retry_s: float
) -> NoReturn:
    """Publish what the Hub says is new, and at start what was new while nobody listened, until interrupted.

    Args:
        folder, recipes, token: as `hfq.runs.watch.Watcher` has them.
        queue: folder for what is to be done; it is made if there is none.
        retry_s: see `hfq.runs.job_queue.JobQueue`.

    Raises:
        UsageError: no secret, no recipe, no gradio, or a queue that another process has.
        HubError: the address cannot be had.
    """
    secret = endpoint.secret
    if not secret or not (secret.isascii() and secret.isprintable()):
        raise UsageError(
            f"WEBHOOK_SECRET {'holds characters that no header can' if secret else 'is not set, and without it anybody could start runs here'}. "
            "Set it to the secret of the webhook in your Hub settings: printable ASCII."
        )
    ui = Reporter()
    watcher = Watcher(folder, recipes=recipes, token=token, missed=Missed(queue / "missed.json"))
    with closing(JobQueue(queue, retry_s=retry_s)) as jobs:
        for path in recipe_files(folder):
            jobs.put(Job(path.name, _AT_START))

        def receive(body: bytes) -> list[str]:
            found = [job for job in announced(body, folder) if jobs.put(job)]
            for job in found:
                ui.note(f"Queued: {job.recipe}, because of {job.revision[:19]}")
            return [job.recipe for job in found]

        with _listening(receive, endpoint=endpoint):
            ui.stage(f"Listening on http://{endpoint.host}:{endpoint.port}{PATH}")
            while True:
                _work(jobs, jobs.take(), watcher, ui)


def _work(jobs: JobQueue, job: Job, watcher: Watcher, ui: Reporter) -> None:
    """Do one job. What the Hub or the network refused is tried again; a wrong recipe or a missed goal is not."""
    if job.attempts > MOST_ATTEMPTS:
        ui.warn(
            f"{job.recipe} was begun {MOST_ATTEMPTS} times and never finished: it is left until its source changes."
        )
        jobs.finish(job)
        return
    outcome = watcher.update(job.recipe)
    if outcome.state == "failed" and outcome.exit_code == HfqError.exit_code and job.attempts < MOST_ATTEMPTS:
        ui.note(f"{job.recipe} is tried again in {jobs.retry(job):.0f} seconds")
    else:
        jobs.finish(job)


def announced(body: bytes, folder: Path) -> list[Job]:
    """The recipes whose source an event of the Hub is about, with the revision it announces.

    Raises:
        ValidationError: that is no event as the Hub sends them (version 3).
    """
    event = WebhookPayload.model_validate_json(body)
    if event.repo.type != "model" or event.event.scope not in _SCOPES or event.event.action == "delete":
        return []
    heads = {update.ref: update.newSha for update in event.updatedRefs or []}
    found = []
    for path in recipe_files(folder):
        try:
            recipe = read_recipe(path)
        except UsageError:
            continue  # said at start, and again when it is looked at
        if is_path(recipe.checkpoint) or recipe.checkpoint.casefold() != event.repo.name.casefold():
            continue
        name = recipe.revision or "main"
        shas = [heads[ref] for ref in (f"refs/heads/{name}", f"refs/tags/{name}", name) if heads.get(ref)]
        if shas:
            found.append(Job(path.name, str(shas[0])))
        elif not heads:  # as of a new repository: nothing says that it is the same as one that is queued
            found.append(Job(path.name, f"{event.event.action} {uuid4().hex}"))
    return found


class _Secret(str):
    """Takes as long to compare with a wrong secret as with the right one. `WebhooksServer` compares with `!=`."""

    def __ne__(self, other: object) -> bool:
        return not hmac.compare_digest(self.encode(), str(other).encode())

    def __eq__(self, other: object) -> bool:
        return not self != other

    __hash__ = str.__hash__


@contextmanager
def _listening(receive: Callable[[bytes], Sequence[str]], *, endpoint: Endpoint) -> Iterator[None]:
    """`WebhooksServer` in a thread of its own for the length of the block.

    Its handler takes the request and not the payload: FastAPI would read and check a payload before the secret.
    """
    try:
        import gradio
        from fastapi import Request
        from fastapi.responses import JSONResponse
        from huggingface_hub import WebhooksServer
    except ImportError as error:
        raise UsageError(f"hfq webhook needs gradio, which is not installed: {installation('webhook')}.") from error

    async def hub(request: Request) -> JSONResponse:
        body = b""
        async for chunk in request.stream():
            body += chunk
            if len(body) > _MOST_BYTES:
                return JSONResponse({"error": f"More than {_MOST_BYTES} bytes"}, status_code=413)
        try:
            return JSONResponse({"queued": list(receive(body))}, status_code=202)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, row['loc']))}: {row['msg']}" for row in error.errors()]
            return JSONResponse({"error": f"No event of the Hub, version 3: {'; '.join(wrong)}"}, status_code=422)
        except (HfqError, OSError) as error:  # not queued: the Hub is to see that, and can send it again
            return JSONResponse({"error": redact(str(error))}, status_code=503)

    with gradio.Blocks(analytics_enabled=False, title="hfq webhook") as page:
        gradio.Markdown(f"hfq listens at `{PATH}`.")
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # it prints, and standard output is for data
            warnings.simplefilter("ignore", UserWarning)  # it is experimental, says the library
            server = WebhooksServer(ui=page, webhook_secret=_Secret(endpoint.secret or ""))
            server.add_webhook(PATH.removeprefix("/webhooks"))(hub)
            server.launch(
                prevent_thread_lock=True,
                share=False,  # its default off a Space is a tunnel that opens this machine to the internet
                server_name=endpoint.host,
                server_port=endpoint.port,
                max_file_size=1,  # gradio takes uploads from anybody
                ssr_mode=False,
                quiet=True,
            )
    except OSError as error:
        raise HubError(
            f"{endpoint.host}:{endpoint.port} cannot be listened on: {error}. Choose another --host or --port."
        ) from error
    try:
        yield
    finally:
        page.close(verbose=False)
