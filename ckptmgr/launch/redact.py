"""Keep secrets out of run directories: command lines and URLs, with whatever looks like a secret taken out.

A run directory is copied, shared and published. What was taken out cannot be put back, so what is left says that it is
incomplete, and a resume refuses to guess. Recognition is by name (`--api-key`), by place (URL userinfo and queries), by
value (equal to a secret of the environment) and by shape (tokens of well-known services). A secret given under an
innocent name, with an unknown shape and in no variable, is not recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote_plus

__all__ = [
    "REDACTED",
    "RedactedArguments",
    "is_secret_name",
    "redact_argv",
    "redact_text",
    "redact_url",
    "secret_values",
]

REDACTED = "[redacted]"
MIN_SECRET_LENGTH = 8


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_ALWAYS_SECRET = _words(
    "password passwd passphrase secret secrets credential credentials bearer apikey apitoken authtoken accesstoken"
    " secretkey accesskey privatekey authkey"
)
# A key is a secret only with one of these before it: `--sort-key`, `--key-dim` and `cache_key` are none.
_KEY_OWNERS = _words(
    "api access private secret auth account encryption signing master service client storage shared sas ssh deploy"
    " wandb comet neptune openai anthropic hf license subscription"
)
# These tokens are pieces of text: `--pad-token "<pad>"`. `token` in any other company is a credential.
_TEXT_TOKENS = _words(
    "pad eos bos unk mask sep cls start end stop special image audio video prefix suffix middle fim next decoder prompt"
    " text newline separator max min num per first last"
)
# A name that ends in one of these tells where a secret is or how it is used, not what it is.
_POINTERS = _words("file path dir directory env name type length len size dropout count limit policy prompt")
_INNOCENT_VARIABLES = frozenset({"PWD", "OLDPWD", "GOOGLE_APPLICATION_CREDENTIALS", "GPG_KEY"})
_SIGNED_QUERY = frozenset({"sig", "signature", "key", "token", "auth", "code", "awsaccesskeyid", "googleaccessid"})
_SIGNED_QUERY_ENDINGS = ("-signature", "-credential", "-security-token")

# Repetitions are bounded wherever a search could start again within them: endless arguments must not take for ever.
_SHAPES = re.compile(
    r"""(?<![A-Za-z0-9])(?:
      hf_[A-Za-z0-9]{16,}                              # Hugging Face
    | gh[opsur]_[A-Za-z0-9]{16,} | github_pat_\w{16,}  # GitHub
    | glpat-[\w-]{16,}                                 # GitLab
    | (?:AKIA|ASIA)[A-Z0-9]{12,}                       # AWS
    | sk-(?=[\w-]{0,99}\d)[\w-]{16,}                   # OpenAI, Anthropic
    | xox[a-z]-[A-Za-z0-9-]{8,}                        # Slack
    | AIza[\w-]{30,}                                   # Google
    | eyJ[\w-]{8,999}\.[\w-]{8,4999}\.[\w-]+           # JSON web token
    )""",
    re.VERBOSE,
)
_PRIVATE_KEY = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_AUTHORIZATION = re.compile(r"\b(bearer|basic)\s{1,9}[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,39}://[^\s'\"<>]+")
_USERINFO = re.compile(r"^([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)@")
_QUERY_ITEM = re.compile(r"([?&;#])([^=?&;#]{1,199})=([^&;#]*)")
_PAIR = re.compile(
    r"""(?P<name>[A-Za-z_][\w.-]{0,99})(?P<between>["']?\s{0,9}[=:]\s{0,9}["']?)(?P<value>[^\s,;&"'}\])]+)"""
)
_OPTION = re.compile(r"(?P<name>[-+~]*[A-Za-z_][\w.@/-]*)=(?P<value>.*)", re.DOTALL)
_BARE_OPTION = re.compile(r"--?[A-Za-z][\w.-]*")


@dataclass(frozen=True, slots=True)
class RedactedArguments:
    """A command line that may be stored.

    Attributes:
        argv: The arguments, each at its place.
        is_redacted: Something was taken out, so these are not the arguments that were typed.
    """

    argv: tuple[str, ...]
    is_redacted: bool


def is_secret_name(name: str) -> bool:
    """Say whether what goes by this name is a secret: an option, a configuration key, an environment variable.

    Example:
        >>> [is_secret_name(name) for name in ("--hf-token", "apiKey", "db.password", "AWS_SECRET_ACCESS_KEY")]
        [True, True, True, True]
        >>> [is_secret_name(name) for name in ("--pad-token", "max_tokens", "tokenizer", "sort_key", "password_file")]
        [False, False, False, False, False]
    """
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[-1] in _POINTERS:
        return False
    if not _ALWAYS_SECRET.isdisjoint(words):
        return True
    pairs = list(zip(["", *words], words, strict=False))
    if any(word == "key" and before in _KEY_OWNERS for before, word in pairs):
        return True
    before, last = pairs[-1]
    if last == "key" and not _KEY_OWNERS.isdisjoint(words):
        return True
    return (last == "token" and before not in _TEXT_TOKENS) or last in ("pass", "pwd")


def secret_values(environ: Mapping[str, str]) -> tuple[str, ...]:
    """Return the values of the environment variables whose names are secret, long ones first.

    Short values are left out: a password like ``1234`` would take digits out of every argument.
    """
    values = {
        value
        for name, value in environ.items()
        if len(value) >= MIN_SECRET_LENGTH and name not in _INNOCENT_VARIABLES and is_secret_name(name)
    }
    return tuple(sorted(values, key=lambda value: (-len(value), value)))


def redact_argv(argv: Sequence[str], environ: Mapping[str, str]) -> RedactedArguments:
    """Take secrets out of a command line.

    Args:
        argv: Arguments as the process got them.
        environ: The process's environment. Only read.
    """
    secrets = secret_values(environ)
    redacted: list[str] = []
    is_value_of_secret = False
    for argument in argv:
        if is_value_of_secret and not _BARE_OPTION.fullmatch(argument):
            redacted.append(REDACTED)
            is_value_of_secret = False
            continue
        is_value_of_secret = bool(_BARE_OPTION.fullmatch(argument)) and is_secret_name(argument)
        redacted.append(_redact_argument(argument, secrets))
    return RedactedArguments(argv=tuple(redacted), is_redacted=redacted != list(argv))


def redact_text(text: str, secrets: Iterable[str] = ()) -> str:
    """Take secrets out of any text: those given, URLs' credentials, known tokens, ``name=value`` with a secret name."""
    for secret in secrets:
        text = text.replace(secret, REDACTED)
    text = _PRIVATE_KEY.sub(REDACTED, text)
    text = _AUTHORIZATION.sub(rf"\1 {REDACTED}", text)
    text = _URL.sub(lambda match: redact_url(match.group()), text)
    text = _SHAPES.sub(REDACTED, text)
    return _PAIR.sub(_redact_pair, text)


def redact_url(url: str) -> str:
    """Take userinfo and the values of token-like query parameters out of a URL.

    A lone user name of ssh and sftp stays: it is part of the address, and no secret.

    Example:
        >>> redact_url("s3://key:secret@bucket/run?region=eu&X-Amz-Signature=abc")
        's3://[redacted]@bucket/run?region=eu&X-Amz-Signature=[redacted]'
    """
    userinfo = _USERINFO.match(url)
    if userinfo:
        scheme, user = userinfo.groups()
        is_login = ":" not in user and scheme.lower().rpartition("+")[2] in ("ssh", "sftp")
        if not is_login:
            url = f"{scheme}://{REDACTED}@{url[userinfo.end() :]}"
    return _QUERY_ITEM.sub(_redact_query_item, url)


def _redact_argument(argument: str, secrets: Sequence[str]) -> str:
    option = _OPTION.fullmatch(argument)
    if option and option["value"] and is_secret_name(option["name"]):
        return f"{option['name']}={REDACTED}"
    return redact_text(argument, secrets)


def _redact_pair(match: re.Match[str]) -> str:
    name, between, value = match.group("name", "between", "value")
    if value.startswith("[redacted") or not is_secret_name(name):
        return match.group()
    return f"{name}{between}{REDACTED}"


def _redact_query_item(match: re.Match[str]) -> str:
    mark, name, value = match.groups()
    plain = unquote_plus(name).lower()
    is_signed = plain in _SIGNED_QUERY or plain.endswith(_SIGNED_QUERY_ENDINGS)
    return f"{mark}{name}={REDACTED}" if value and (is_signed or is_secret_name(unquote_plus(name))) else match.group()
