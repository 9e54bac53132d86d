"""Which failures of a remote storage pass by themselves, and how often we wait for that."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import TypeVar

import stamina

__all__ = ["is_transient", "retrying"]

_log = logging.getLogger("ckptmgr.storage")
_T = TypeVar("_T")

_ATTEMPTS = 6
_TIMEOUT_S = 120.0
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_TRANSIENT_ERRNO = frozenset(
    getattr(errno, name)
    for name in (
        *("EAGAIN", "EBUSY", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTUNREACH", "ENETDOWN", "ENETRESET"),
        *("ENETUNREACH", "EPIPE", "EREMOTEIO", "ETIMEDOUT"),
    )
    if hasattr(errno, name)
)
# By name, because none of these libraries is ours to import: a user has the one that serves his URL.
_TRANSIENT_NAMES = frozenset(
    {
        *("ClientConnectionError", "ClientPayloadError", "ServerDisconnectedError"),  # aiohttp
        *("ConnectionClosedError", "ConnectTimeoutError", "EndpointConnectionError", "HTTPClientError"),  # botocore
        *("IncompleteRead", "ProtocolError", "ReadTimeoutError", "ResponseParserError"),  # botocore, urllib3
        *("ServiceRequestError", "ServiceResponseError"),  # azure
        "TransportError",  # google.auth
    }
)


def is_transient(error: BaseException) -> bool:
    """Tell whether trying again may help: a timeout, a broken connection, a busy or failing server."""
    if isinstance(error, _FINAL):
        return False
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    if isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO:
        return True
    if any(base.__name__ in _TRANSIENT_NAMES for base in type(error).__mro__):
        return True
    status = _http_status(error)
    if status is not None:
        return status in (408, 429) or status >= 500
    return error.__cause__ is not None and is_transient(error.__cause__)


def retrying(what: str, call: Callable[[], _T], *, describe: Callable[[BaseException], str]) -> _T:
    """Run one whole operation until it succeeds, fails for good, or 6 attempts or 2 minutes are over.

    Args:
        what: For the log: the operation and its object.
        call: Must be safe to run again.
        describe: Text of an error, fit for the log.
    """
    for attempt in stamina.retry_context(on=is_transient, attempts=_ATTEMPTS, timeout=_TIMEOUT_S):
        with attempt:
            try:
                return call()
            except Exception as error:
                if is_transient(error):
                    _log.warning("%s failed (attempt %d): %s", what, attempt.num, describe(error))
                raise
    raise AssertionError("unreachable")


def _http_status(error: BaseException) -> int | None:
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    for status in (response, getattr(error, "status", None), getattr(error, "code", None)):
        if isinstance(status, int) or (isinstance(status, str) and status.isdecimal()):
            return int(status)
    return getattr(error, "status_code", None)
