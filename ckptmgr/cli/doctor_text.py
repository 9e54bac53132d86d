"""A diagnosis for a terminal: what it is, what is wrong, what does not fit, and what to do, in this order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from ckptmgr.cli.output import format_nbytes, print_pairs
from ckptmgr.cli.printable import printable
from ckptmgr.diagnose.artifact import Artifact, GlobalUse, TensorFacts
from ckptmgr.diagnose.diagnosis import Diagnosis
from ckptmgr.diagnose.difference import Difference, Proposal
from ckptmgr.diagnose.drift import drift_lines

__all__ = ["print_diagnosis"]

_SHOWN = 10
_SHOWN_PROPOSALS = 30
_SHOWN_CODE = 60
_MAX_LINE = 2_000
_VERDICTS = ("dangerous", "code", "plain")
_WORDS = {
    "dangerous": "DANGEROUS",
    "code": "code",
    "plain": "plain",
}


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print a diagnosis on stdout. Long lists are shortened, and what a file holds cannot write over the terminal."""
    artifact = diagnosis.artifact
    print_pairs(
        {
            "place": artifact.place,
            "what": f"{artifact.title} ({artifact.certainty})",
            "size": "" if artifact.nbytes is None else format_nbytes(artifact.nbytes),
            "versions": ", ".join(f"{name} {version}" for name, version in artifact.versions.items()),
            "tensors": _tensors(artifact),
        }
    )
    _section("contents", [f"{name}: {words}" for name, words in artifact.contents.items()])
    _section("unpickling it would import", list(_globals(artifact.globals)))
    _section("problems", artifact.problems)
    if diagnosis.difference is not None:
        _print_difference(diagnosis, diagnosis.difference)
    elif diagnosis.uncomparable is not None:
        _section(f"compared with {diagnosis.against}", [f"not possible: {diagnosis.uncomparable}"])
    title = "not as it was when it was written"
    if any(drift.grade != "info" for drift in diagnosis.drifts):
        title += ", the likeliest cause of a failure first"
    _section(title, drift_lines(diagnosis.drifts))
    _section("next", artifact.advice)


def _print_difference(diagnosis: Diagnosis, difference: Difference) -> None:
    if difference.fits:
        _section(f"compared with {diagnosis.against}", [f"it fits: {len(difference.matched)} tensors"])
        return
    counts = {
        "the same": difference.matched,
        "missing": difference.missing,
        "unexpected": difference.unexpected,
        "of another shape": difference.shape,
        "of another dtype": difference.dtype,
    }
    summary = ", ".join(f"{len(items)} {words}" for words, items in counts.items() if items)
    _section(f"compared with {diagnosis.against}", [f"it does not fit: {summary}"])
    _section("missing: in the model, not in the file", [_told(it) for it in difference.missing])
    _section("unexpected: in the file, not in the model", [_told(it) for it in difference.unexpected])
    both = [(it.name, it.saved.shape, it.live.shape) for it in difference.shape]
    _section("of another shape", [f"{name}: {saved} in the file, {live} in the model" for name, saved, live in both])
    kinds = [(it.name, it.saved.dtype, it.live.dtype) for it in difference.dtype]
    _section("of another dtype", [f"{name}: {saved} in the file, {live} in the model" for name, saved, live in kinds])
    _section("proposals", list(_proposals(difference.proposals)), shown=_SHOWN_PROPOSALS)
    code = diagnosis.code()
    if diagnosis.selection is not None:
        _section("applied together, with a checkpoint of ckptmgr", [f"selection={diagnosis.selection}"])
    elif code:
        _section("applied together, those that are unknown left out", code, shown=_SHOWN_CODE)
    left = [
        f"{words}: {', '.join(names[:_SHOWN])}{_more(names)}"
        for words, names in (
            ("still missing", difference.missing_after),
            ("still unexpected", difference.unexpected_after),
            ("still of another shape", difference.shape_after),
        )
        if names
    ]
    _section("and then", left or ["nothing is left: it fits"] if difference.proposals else left)


def _proposals(proposals: Sequence[Proposal]) -> Iterator[str]:
    for proposal in proposals:
        lines = [f"{proposal.certainty}: {proposal.summary}", f"because {proposal.reason}"]
        for candidate in proposal.candidates:
            lines.append(f"maybe: {candidate.summary}")
            lines += [f"    {line}" for line in candidate.code]
        yield "\n      ".join(lines)


def _globals(uses: Iterable[GlobalUse]) -> Iterator[str]:
    for use in sorted(uses, key=lambda use: _VERDICTS.index(use.verdict)):
        yield f"{_WORDS[use.verdict]}: {use.name}" + (f" ({use.found})" if use.found else "")


def _tensors(artifact: Artifact) -> str:
    if artifact.tensors is None:
        return ""
    dtypes = Counter(it.dtype for it in artifact.tensors)
    return f"{len(artifact.tensors)}: " + ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common(_SHOWN))


def _told(tensor: TensorFacts) -> str:
    tied = "" if tensor.tied_to is None else f", another name of {tensor.tied_to}"
    return f"{tensor.name}: {tensor.dtype} {tensor.shape}{tied}"


def _more(names: Sequence[str]) -> str:
    return f" … and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""


def _section(title: str, lines: Sequence[str], *, shown: int = _SHOWN) -> None:
    """Print a heading and its lines; nothing where there are none."""
    if not lines:
        return
    print(f"\n{printable(title)}:")
    for line in lines[:shown]:
        text = line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]} … (--json has all of it)"
        print("    " + printable(text, keep="\n"))
    if len(lines) > shown:
        print(f"    … and {len(lines) - shown} more (--json lists all)")
