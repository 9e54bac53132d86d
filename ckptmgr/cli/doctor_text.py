"""A diagnosis for a terminal: what it is, what is wrong, what does not fit, and what to do, in this order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

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
_VERDICTS = {"dangerous": "DANGEROUS", "code": "code"}


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
    _section("next", diagnosis.advice)


def _print_difference(diagnosis: Diagnosis, difference: Difference) -> None:
    other = diagnosis.against
    if difference.fits:
        _section(f"compared with {other}", [f"it fits: {len(difference.matched)} tensors"])
        return
    counts = {
        "the same": difference.matched,
        "missing": difference.missing,
        "unexpected": difference.unexpected,
        "of another shape": difference.shape,
        "of another dtype": difference.dtype,
    }
    summary = ", ".join(f"{len(items)} {words}" for words, items in counts.items() if items)
    _section(f"compared with {other}", [f"it does not fit: {summary}"])
    _section(f"missing: in {other}, not in the file", [_told(it) for it in difference.missing])
    _section(f"unexpected: in the file, not in {other}", [_told(it) for it in difference.unexpected])
    shapes = [f"{it.name}: {it.saved.shape} in the file, {it.live.shape} in {other}" for it in difference.shape]
    _section("of another shape", shapes)
    dtypes = [f"{it.name}: {it.saved.dtype} in the file, {it.live.dtype} in {other}" for it in difference.dtype]
    _section("of another dtype", dtypes)
    _section("proposals", list(_proposals(difference.proposals)), shown=_SHOWN_PROPOSALS)
    if diagnosis.selection is not None:
        line = f"checkpointer.restore({diagnosis.reference!r}, selection={diagnosis.selection})"
        _section("applied together, those that are unknown left out", ["from ckptmgr import Selection", line])
    else:
        _section("applied together, those that are unknown left out", diagnosis.code(), shown=_SHOWN_CODE)
    left = [
        f"{words}: {', '.join(names[:_SHOWN])}{_more(names)}"
        for words, names in (
            ("still missing", difference.missing_after),
            ("still unexpected", difference.unexpected_after),
            ("still of another shape", difference.shape_after),
        )
        if names
    ]
    if difference.proposals or left:
        _section("and then", left or ["nothing is left: it fits"])


def _proposals(proposals: Sequence[Proposal]) -> Iterator[tuple[str, ...]]:
    for proposal in proposals:
        lines = [f"{proposal.certainty}: {proposal.summary}", f"  because {proposal.reason}"]
        for candidate in proposal.candidates:
            lines.append(f"  maybe: {candidate.summary}")
            lines += [f"      {line}" for line in candidate.code]
        yield tuple(lines)


def _globals(uses: Sequence[GlobalUse]) -> Iterator[str]:
    for verdict, word in _VERDICTS.items():
        for use in uses:
            if use.verdict == verdict:
                yield f"{word}: {use.name}" + (f" ({use.found})" if use.found else "")
    nplain = sum(use.verdict == "plain" for use in uses)
    if nplain:
        yield f"{nplain} plain ones, which torch.load takes with weights_only=True"


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


def _section(title: str, items: Sequence[str | tuple[str, ...]], *, shown: int = _SHOWN) -> None:
    """Print a heading and what stands below it, each in one line or in several; nothing where there is nothing."""
    if not items:
        return
    print(f"\n{printable(title)}:")
    for item in items[:shown]:
        for line in (item,) if isinstance(item, str) else item:
            text = line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]} … (--json has all of it)"
            print("    " + printable(text))
    if len(items) > shown:
        print(f"    … and {len(items) - shown} more (--json lists all)")
