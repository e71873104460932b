"""Tokens and control characters, taken out of whatever a person or a program gets to read. The one place that knows how.

Every file hfq writes text to and both standard streams go through `redact`: what a library says is covered too.
"""

import os
import re
import sys
import traceback
from contextlib import suppress
from typing import Any, TextIO

REPLACEMENT = "HF_TOKEN"
_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WEBHOOK_SECRET")
_SHORTEST = 6  # what is shorter is no secret, and would be found in ordinary words
_PATTERN = re.compile(r"\b(?:hf|api_org)_[A-Za-z0-9]{16,}|(?<=--token=)[^\s'\"]+|(?<=\bBearer )[\w.~+/=-]{6,}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_given: set[str] = set()


def remember(token: str | None) -> None:
    """Take this text out from now on, as well as what the environment and `hf auth login` hold."""
    if token:
        _given.add(token.strip())


def redact(text: str) -> str:
    """`text` with HF_TOKEN in place of every token."""
    for secret in sorted(_secrets(), key=len, reverse=True):
        text = text.replace(secret, REPLACEMENT)
    return _PATTERN.sub(REPLACEMENT, text)


def redact_command(line: str) -> str:
    """A command line without its token. Of prose, which may say "--token or …", that would leave nothing."""
    return re.sub(r"(?<=--token )\S+", REPLACEMENT, redact(line))


def holds_token(text: str) -> bool:
    """Whether `redact` would change it."""
    return redact(text) != text


def printable(text: str) -> str:
    """What a terminal shows and does not obey: control characters become visible, and tokens go."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], redact(text))


def traceback_of(error: BaseException) -> str:
    """Where an error came from, for bug reports."""
    return redact("".join(traceback.format_exception(error)))


class Guarded:
    """A text stream that passes on everything but tokens."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """From now on no token reaches standard output or standard error, whoever writes there."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Guarded):
            setattr(sys, name, Guarded(stream))


def _secrets() -> set[str]:
    found = {*_given, *(os.environ.get(name, "").strip() for name in _VARIABLES)}
    hub = sys.modules.get("huggingface_hub")  # not imported: no token was read from the file of `hf auth login`
    if hub is not None:
        with suppress(OSError, ValueError):  # a file that cannot be read gives no token away; who needs it says so
            found.add(hub.get_token() or "")
    return {secret for secret in found if len(secret) >= _SHORTEST}
