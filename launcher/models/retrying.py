"""Asking a hub again: when that may help, how often, and what is told meanwhile.

It imports nothing of this project, as `files.py`: an image's layer with a model stands on it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from typing import TypeVar

import tenacity

_ATTEMPTS = 4
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
_TIMEOUT, _TOO_MANY = 408, 429
# The hubs' clients change their HTTP library from version to version; its errors have no root.
_HTTP_LIBRARIES = frozenset(("requests", "urllib3", "httpx", "httpx2", "httpcore", "http"))
_OFFLINE = "OfflineModeIsEnabled"  # huggingface_hub was told to ask nobody

T = TypeVar("T")


class HubError(Exception):
    """The hub did not give what was asked for; why, in one line."""


def retry(fetch: Callable[[], T], tell: Callable[[str, float], None]) -> T:
    """`fetch`, again after what may pass; `tell` gets what happened and the pause in seconds."""

    def say(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        tell(_first_line(error), state.upcoming_sleep)

    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=tenacity.wait_exponential_jitter(initial=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S),
        retry=tenacity.retry_if_exception(may_pass),
        before_sleep=say,
        reraise=True,
    )
    try:
        return retrying(fetch)
    except Exception as error:
        raise HubError(_first_line(error)) from error


def may_pass(error: BaseException) -> bool:
    """The network's failures and the server's own; not a refusal, nor a full disk."""
    for one in _list_causes(error):
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int):
            return status >= 500 or status in (_TIMEOUT, _TOO_MANY)
        if type(one).__name__ == _OFFLINE:
            return False
        if isinstance(one, ConnectionError | TimeoutError | socket.gaierror):
            return True
        if type(one).__module__.partition(".")[0] in _HTTP_LIBRARIES:
            return True
        if type(one) is OSError and one.errno is None:  # ModelScope's way to say the same
            return True
    return False


def _first_line(error: BaseException | None) -> str:
    """And of a failed connection only whose it was."""
    text = str(error).strip().partition("\n")[0].partition(": Max retries exceeded")[0]
    return text or type(error).__name__


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    """A client's "not here, and the hub cannot be reached" has the reason below it."""
    while error is not None:
        yield error
        error = error.__cause__
