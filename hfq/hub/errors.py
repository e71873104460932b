"""What the Hub's client raises during a push, as one message: what is wrong, and what to do about it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

from httpx2 import Response
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

from ..common.errors import HfqError, HubError
from ..common.redact import redact
from .client import retry_after_s

# By HTTP status: what is wrong, and what to do about it.
_EXPLANATIONS = {
    401: (
        "the token is not valid",
        "Log in again with `hf auth login`, or give another token with --token or HF_TOKEN.",
    ),
    403: (
        "the token may not do this",
        "Use one with write access there, push to a namespace of your own with --to, or try --create-pr.",
    ),
    404: ("no such namespace or repository, or the token may not see it", "Check --to and the token."),
    409: (
        "the name is taken, or somebody is writing to it right now",
        "Push again, or choose another name with --to.",
    ),
    412: (
        "somebody else pushed to it in the meantime",
        "Nothing of this push was written. Look at what changed there, then push again.",
    ),
    429: ("the Hub takes no more requests from you for now", "Wait {wait}, then push again."),
}
_SERVER_FAILED = ("the Hub itself failed", "Nothing is lost: push again later.")
_REFUSED = ("the Hub refuses the request", "Mend what it names, then push again.")
# What huggingface_hub raises where an answer lacks what it needs: it takes answers apart without looking.
NOT_UNDERSTOOD = (LookupError, TypeError, AttributeError, AssertionError)


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into one `HubError` without the token in it."""
    try:
        yield
    except HfqError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError, *NOT_UNDERSTOOD) as error:
        raise HubError(redact(f"{doing} failed: {explain(error)}")) from error


def explain(error: BaseException) -> str:
    """What is wrong and what to do, by the HTTP or network error at the root of `error` if there is one."""
    cause = _http_error(error)
    if isinstance(cause, HfHubHTTPError):
        return _explain_status(cause.response.status_code, cause)
    if isinstance(cause, OfflineModeIsEnabled):
        return f"HF_HUB_OFFLINE is set, and this needs {constants.ENDPOINT}. Unset it and push again."
    if cause is not None:
        reason = str(cause) or type(cause).__name__
        return f"{constants.ENDPOINT} cannot be reached ({reason}). Check the network, then push again."
    if isinstance(error, (*NOT_UNDERSTOOD, json.JSONDecodeError)):
        return (
            f"{constants.ENDPOINT} gave an answer that is not the Hub's ({type(error).__name__}: {error}). Check "
            "HF_ENDPOINT and what stands between (a proxy, a login page), then push again."
        )
    return f"{str(error).strip().rstrip('.')}."


def _explain_status(status: int, error: HfHubHTTPError) -> str:
    """The same of an answer with this status."""
    response = error.response
    what, remedy = _SERVER_FAILED if status >= 500 else _EXPLANATIONS.get(status, _REFUSED)
    seconds = retry_after_s(response)
    wait = f"{seconds:.0f} seconds" if seconds is not None else "a few minutes"
    said = f": {error.server_message}" if error.server_message else ""
    return f"{what} ({response.url.host} answered {response.status_code}{said}). {remedy.format(wait=wait)}"


def conflict(error: BaseException) -> str:
    """`explain`, of a commit that found another one in its place, however the Hub put it."""
    root = _http_error(error)
    if isinstance(root, HfHubHTTPError):
        return _explain_status(412, root)
    what, remedy = _EXPLANATIONS[412]
    return f"{what}. {remedy}"


def response_of(error: BaseException) -> Response | None:
    """The answer at the root of an error; None if there was none."""
    root = _http_error(error)
    return root.response if isinstance(root, HfHubHTTPError) else None


def _http_error(error: BaseException | None) -> BaseException | None:
    while error is not None and not isinstance(error, (HTTPError, ConnectionError)):
        error = error.__cause__  # the client wraps a failed upload in a RuntimeError
    return error


def card_messages(text: str) -> str:
    """The messages in the JSON with which the Hub rejects a card, or `text` if it is something else."""
    try:
        return "; ".join(row["message"] for row in json.loads(text)["errors"]).rstrip(".")
    except (ValueError, KeyError, TypeError):
        return text.strip().rstrip(".")
