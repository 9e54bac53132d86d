"""Keeps credentials out of everything that is printed or recorded."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

__all__ = ["Redactor", "printable_url"]

_SECRET_NAME = re.compile(
    r"secret|token|password|passwd|passphrase|credential|signature|^sas|connection_string|account_key|^key$|_key$|^user",
    re.IGNORECASE,
)
# Azure writes `abfs://container@account.dfs.core.windows.net`: that is a place, no user.
_CONTAINER_SCHEMES = frozenset({"abfs", "abfss", "adl", "az", "wasb", "wasbs"})
_MIN_SECRET_LENGTH = 4


def printable_url(url: str) -> str:
    """Return the URL without user, password, query and fragment."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    _, rest = _split_user(scheme, rest)
    return f"{scheme}://{re.split('[?#]', rest, maxsplit=1)[0]}".rstrip("/")


class Redactor:
    """Replaces, in the text of an error, what a URL and its storage options keep secret.

    Args:
        url: As the user gave it.
        storage_options: As the user gave them; nothing of them is kept but the values of secret-looking names.
    """

    def __init__(self, url: str, storage_options: Mapping[str, object]) -> None:
        found = {text for text in (*_url_secrets(url), *_option_secrets(storage_options)) if text}
        # The longest first, or a password that contains another one would be half shown.
        self._secrets = sorted((text for text in found if len(text) >= _MIN_SECRET_LENGTH), key=len, reverse=True)

    def __call__(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _split_user(scheme: str, rest: str) -> tuple[str, str]:
    """Split what follows ``://`` into user information (empty if there is none) and everything after it."""
    user, separator, host = rest.rpartition("@")
    # Secret keys hold slashes, unescaped more often than not: with a colon before it, even a late `@` ends them.
    if not separator or ("/" in user and ":" not in user):
        return "", rest
    if scheme in _CONTAINER_SCHEMES and ":" not in user:
        return "", rest
    return user, host


def _url_secrets(url: str) -> Iterator[str]:
    scheme, _, rest = url.partition("://")
    user, rest = _split_user(scheme, rest)
    yield user
    yield user.partition(":")[2]
    query = rest.partition("?")[2]
    yield query
    yield from (value for _, _, value in (pair.partition("=") for pair in query.split("&")))


def _option_secrets(options: Mapping[str, object], *, is_secret: bool = False) -> Iterator[str]:
    for name, value in options.items():
        hidden = is_secret or _SECRET_NAME.search(str(name)) is not None
        if isinstance(value, Mapping):
            yield from _option_secrets(value, is_secret=hidden)
        elif hidden and isinstance(value, str):
            yield value
