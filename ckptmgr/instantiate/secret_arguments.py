"""Secrets of the environment among the arguments of what is built in: refused, before anything is imported.

A configuration may read any variable, and it may come with a run directory from anybody. What is built in was reviewed
for what it runs, not for where it writes: a logger whose ``save_dir`` is ``https://somewhere/${oc.env:API_KEY}`` tells
the key to somewhere before it fails.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from ckptmgr.errors import NotAllowedError
from ckptmgr.instantiate.allow_list import BUILT_IN, AllowList
from ckptmgr.instantiate.targets import is_list
from ckptmgr.launch.redact import secret_values

__all__ = ["refuse_secret_arguments"]

# Its manager reads the run with them; where the run lies, the user says.
_TAKES_SECRETS = frozenset({"storage_options"})


def refuse_secret_arguments(node: object, key: str, allow: AllowList, environ: Mapping[str, str] | None = None) -> None:
    """Refuse a configuration that gives a secret of the environment to something that is built in.

    What the user's own side allows may be given secrets: that is the user's to know.

    Args:
        node: A slot of a resolved configuration. Without ``_target_``, its own keys are arguments of what is built in.
        key: Its name.
        allow: Tells what is built in.
        environ: Environment whose secrets are looked for; the process's by default.

    Raises:
        NotAllowedError: Names the key, and no secret.
    """
    environ = os.environ if environ is None else environ
    secrets = secret_values(environ)
    for place, text in _texts(node, key, True, allow) if secrets else ():
        found = next((secret for secret in secrets if secret in text), None)
        if found is not None:
            variable = next(name for name, value in environ.items() if value == found)
            raise NotAllowedError(
                f"{place.replace(found, '[redacted]')} holds the value of {variable}",
                why="that is a secret, and what is built in may write or send what it is given; nothing was imported",
                next="leave it out; only a class that you allow yourself may be given a secret",
            )


def _texts(node: object, key: str, is_built_in: bool, allow: AllowList) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            is_built_in = allow.source_of(str(node["_target_"])) == BUILT_IN
        for name, value in node.items():
            inner = f"{key}.{name}"
            if is_built_in and isinstance(name, str):
                yield inner, name
            if not (is_built_in and name in _TAKES_SECRETS and key == "checkpoint"):
                yield from _texts(value, inner, is_built_in, allow)
    elif is_list(node):
        for number, value in enumerate(node):
            yield from _texts(value, f"{key}.{number}", is_built_in, allow)
    elif is_built_in and isinstance(node, str):
        yield key, node
