"""Patience with the Hub: what fails in passing is asked again, what never answers is given up.

huggingface_hub repeats some of its requests and not others, sleeps as long as a Hub says, however long, and waits for
ever for most answers. Its client is replaced, once, by one that treats all requests alike.
"""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

import httpx2
from huggingface_hub import close_session, get_session, set_client_factory
from huggingface_hub.utils import hf_raise_for_status, parse_ratelimit_headers

from ..common.errors import UsageError
from ..common.ui import Reporter

ATTEMPTS = 6  # with waits of 0.5, 1, 2, 4 and 8 seconds in between, unless the Hub names its own
PATIENCE_S = 300.0  # the Hub's limits count requests in windows of five minutes
TIMEOUT_S = 60.0
WORTH_MENTIONING_S = 5.0
_PASSING_STATUSES = (408, 425, 429, 500, 502, 503, 504)
_PASSING_ERRORS = (httpx2.TimeoutException, httpx2.NetworkError, httpx2.RemoteProtocolError)
_CARD_CHECK = "/api/validate-yaml"
# What may be asked twice though it is a POST: it changes nothing that a second time would change again.
_REPEATABLE = re.compile(rf"{_CARD_CHECK}|/preupload/|/paths-info/|/info/lfs/objects/")


@cache
def be_patient() -> None:
    """Give huggingface_hub, in this process, the client of this module, unless the user has given it one.

    Raises:
        UsageError: the environment names a proxy that no client can use.
    """
    try:
        default = get_session()
    except (ImportError, ValueError, httpx2.InvalidURL) as error:
        raise UsageError(
            f"The proxy that HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names cannot be used: {str(error).rstrip('.')}. Mend or "
            "unset it."
        ) from error
    if default.timeout == httpx2.Timeout(None):
        hooks = default.event_hooks
        set_client_factory(lambda: PatientClient(event_hooks=hooks, follow_redirects=True, timeout=TIMEOUT_S))


@contextmanager
def proxies_changed(changes: Mapping[str, str]) -> Iterator[None]:
    """While the block runs, the Hub's client has these variables, such as HTTP_PROXY, which it reads when it is made."""
    before = {name: os.environ.get(name, "") for name in changes}
    os.environ.update(changes)
    close_session()
    try:
        yield
    finally:
        os.environ.update(before)
        close_session()


class Waits:
    """The pauses between attempts at one thing. `HFQ_HUB_PATIENCE` sets how many seconds they may sum up to."""

    def __init__(self) -> None:
        self._left_s = float(os.environ.get("HFQ_HUB_PATIENCE") or PATIENCE_S)
        self._attempts = 1

    def too_long(self, response: httpx2.Response) -> bool:
        """Whether the Hub asks for more than is left."""
        return (retry_after_s(response) or 0) > self._left_s

    def another(self, error: BaseException | None, response: httpx2.Response | None = None) -> bool:
        """Wait, and say True; or say False at once where that would take too long, or has been done enough.

        `error` or `response` is what failed; the response may say how long to wait.
        """
        asked_s = retry_after_s(response) if response is not None else None
        wait_s = asked_s if asked_s is not None else 0.5 * 2 ** (self._attempts - 1)
        if self._attempts == ATTEMPTS or wait_s > self._left_s:
            return False
        if wait_s >= WORTH_MENTIONING_S:
            what = f"answered {response.status_code}" if response is not None else f"failed ({error})"
            Reporter().note(f"The Hub {what}: trying again in {wait_s:.0f} seconds")
        self._attempts += 1
        self._left_s -= wait_s
        time.sleep(wait_s)
        return True


class PatientClient(httpx2.Client):
    """Sends again what failed in passing and can be sent again. After the last attempt it raises, whoever asked."""

    def send(self, request: httpx2.Request, *, stream: bool = False, **options: Any) -> httpx2.Response:
        _limit(request)
        waits = Waits()
        while True:
            try:
                response = super().send(request, stream=stream, **options)
            except _PASSING_ERRORS as error:
                if not (_is_repeatable(request) and waits.another(error)):
                    raise
                continue
            if request.url.path == _CARD_CHECK and _has_no_opinion(response):
                return httpx2.Response(200, json={"errors": [], "warnings": []}, request=request)
            failed = response.status_code in _PASSING_STATUSES or (not stream and _is_cut_off(response))
            if not failed or not (_is_repeatable(request) or waits.too_long(response)):
                return response
            response.read()
            response.close()
            if not (_is_repeatable(request) and waits.another(None, response)):
                # huggingface_hub would begin anew, or sleep for as long as the answer says. The card's check must get an
                # answer: it looks at its status when an error is raised.
                if request.url.path != _CARD_CHECK:
                    hf_raise_for_status(response)
                return response


def is_passing(error: BaseException) -> bool:
    """Whether what failed may go well the next time: by the error, or by what it was raised from."""
    return is_cut(error) or any(
        response.status_code in _PASSING_STATUSES
        for one in _causes(error)
        if (response := getattr(one, "response", None))
    )


def is_cut(error: BaseException) -> bool:
    """Whether a connection ended early: with an error, or with less than was announced."""
    return any(isinstance(one, _PASSING_ERRORS) or "Consistency check failed" in str(one) for one in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _is_repeatable(request: httpx2.Request) -> bool:
    """Not a commit, whose answer may be lost; nor a file on its way up, which the client winds back itself."""
    if not isinstance(request.stream, httpx2.ByteStream):
        return False
    return request.method in ("GET", "HEAD", "DELETE") or bool(_REPEATABLE.search(request.url.path))


def _limit(request: httpx2.Request) -> None:
    """Most calls come with no timeout at all, on purpose: `None`, which replaces the client's own."""
    given = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: given.get(name) or TIMEOUT_S for name in ("connect", "read", "write", "pool")
    }


def _has_no_opinion(response: httpx2.Response) -> bool:
    """A Hub need not be able to check cards; that it cannot is no reason to keep one back."""
    if response.status_code in (404, 405, 501):
        return True
    if not response.is_success:
        return False
    try:
        return not isinstance(json.loads(response.read()), dict)
    except ValueError:
        return True


def _is_cut_off(response: httpx2.Response) -> bool:
    """Whether an answer says that it is JSON, and ends before it is."""
    if not (response.is_success and response.headers.get("Content-Type", "").startswith("application/json")):
        return False
    try:
        response.json()
    except ValueError:
        return True
    return False


def retry_after_s(response: httpx2.Response) -> float | None:
    """How many seconds the Hub asks to wait, or None. A date counts from the Hub's own clock, not from this one."""
    limit = parse_ratelimit_headers(response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    text = response.headers.get("Retry-After", "").strip()
    if text.isdigit():
        return float(text)
    try:
        until = parsedate_to_datetime(text)
        return max(0.0, (until - parsedate_to_datetime(response.headers.get("Date", ""))).total_seconds())
    except (ValueError, TypeError):  # TypeError: one date has a time zone, the other has none
        return None
