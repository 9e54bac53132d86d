"""``ckptmgr diff``: what changed between two checkpoints, from the configuration to every weight."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ckptmgr.cli.arguments import json_option, quiet_option, refuse_configuration
from ckptmgr.cli.complete import complete_checkpoint

if TYPE_CHECKING:
    from ckptmgr.diff import Diff, TensorDiff

__all__ = ["command"]

_DIFFERENT = 1
_LIMIT = 40
_COMMIT_LETTERS = 10


@click.command(name="diff")
@click.argument("a", metavar="A", shell_complete=complete_checkpoint)
@click.argument("b", metavar="[B]", required=False, shell_complete=complete_checkpoint)
@click.option("--only", metavar="PATTERN", multiple=True, help="Only paths such as 'model/*' or optimizer/groups.")
@click.option("--weights/--no-weights", default=True, help="Read the tensors that differ, or compare digests alone.")
@click.option("--read", is_flag=True, help="Read tensors also whose digests are equal: finds damage and NaNs.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if something differs.")
@click.option("--limit", type=click.IntRange(min=0), help=f"Print so many lines of each kind; by default {_LIMIT}.")
@quiet_option()
@json_option()
def command(
    a: str,
    b: str | None,
    only: Sequence[str],
    weights: bool,
    read: bool,
    exit_code: bool,
    limit: int | None,
    as_json: bool,
) -> None:
    """Compare checkpoint A with B: what is recorded of them, their state, and every tensor, the largest change first.

    A and B are RUN_DIR or RUN_DIR@REF, of one run or of two; or weights alone: a safetensors file, its index, or a
    directory with model.safetensors. Without B, A is compared with the checkpoint before it.

    A pattern of --only matches a whole path, or what the path lies in: 'model', 'model/layers.3.*'. With it the state
    alone is compared.

    Exits with 12 if something is damaged. Tensors whose digests are equal are not read without --read. A NaN is equal
    to nothing, also to itself: where bits are the same and NaNs are among them, both are told.
    """
    from ckptmgr.diff import compare

    for place in (a, b):
        if place is not None:
            refuse_configuration(place)
    diff = compare(a, b, only=only, weights=weights, read=read)
    if as_json:
        from ckptmgr.cli.output import print_json

        print_json(_as_json(diff, limit))
    else:
        _print(diff, _LIMIT if limit is None else limit)
    if exit_code and not diff.is_same:
        sys.stdout.flush()
        raise click.exceptions.Exit(_DIFFERENT)


def _print(diff: Diff, limit: int) -> None:
    from ckptmgr.cli.output import format_nbytes, format_time, note, print_pairs

    for letter, side in (("a", diff.a), ("b", diff.b)):
        step = "" if side.step is None else f"step {side.step}, {format_time(side.created_at or '')} UTC, "
        print_pairs({letter: f"{side.label} ({step}{_count(side.ntensors, 'tensor')}, {format_nbytes(side.nbytes)})"})
    for text in diff.notes:
        note(text)
    _print_facts(diff, limit)
    lines = [_entry_line(diff, index) for index in range(len(diff.entries))]
    _print_lines("entries", lines, len(lines), limit)
    _print_lines("state", [str(change) for change in diff.values], diff.nvalues, limit)
    _print_tensors(diff, limit)
    print()
    print(_summary(diff))


def _print_facts(diff: Diff, limit: int) -> None:
    from ckptmgr.cli.output import print_table

    facts = [fact for fact in diff.facts if fact.about != "configuration"]
    if facts:
        print()
        shown = [[fact.name, *(_fact_text(fact.name, text) for text in (fact.a, fact.b))] for fact in facts]
        print_table(["", "a", "b"], shown[:limit] if limit else shown[:0])
        _print_rest(len(shown), limit)
    changes = [fact for fact in diff.facts if fact.about == "configuration"]
    lines = [
        f"{fact.name}: added, {fact.b}"
        if fact.a is None
        else f"{fact.name}: removed, was {fact.a}"
        if fact.b is None
        else f"{fact.name}: {fact.a} -> {fact.b}"
        for fact in changes
    ]
    _print_lines("configuration", lines, len(lines), limit)


def _fact_text(name: str, text: str | None) -> str:
    if text is None:
        return "-"
    return text[:_COMMIT_LETTERS] if name in ("commit", "uncommitted changes") else text


def _entry_line(diff: Diff, index: int) -> str:
    entry = diff.entries[index]
    if entry.a is None:
        return f"{entry.name}: only in b ({entry.b})"
    if entry.b is None:
        return f"{entry.name}: only in a ({entry.a})"
    called = f"{entry.name}: called {entry.renamed} in b" if entry.renamed else f"{entry.name}:"
    if entry.a == entry.b:
        return called
    return f"{called}{',' if entry.renamed else ''} captured by {entry.a} -> {entry.b}"


def _print_lines(title: str, lines: Sequence[str], count: int, limit: int) -> None:
    from ckptmgr.cli.printable import printable

    if not lines:
        return
    print()
    print(title)
    for line in lines[:limit]:
        print(f"  {printable(line)}")
    _print_rest(count, limit)


def _print_rest(count: int, limit: int) -> None:
    if count > limit:
        print(f"  … and {count - limit} more (--limit {count} prints them)")


def _print_tensors(diff: Diff, limit: int) -> None:
    from ckptmgr.cli.output import print_table

    shown = [tensor for tensor in diff.tensors if tensor.is_change or _has_nan(tensor)]
    if not shown:
        return
    print()
    rows = [
        [
            tensor.path + (f" (also {', '.join(tensor.aliases)})" if tensor.aliases else ""),
            _form_text(tensor),
            tensor.verdict,
            *_numbers(tensor),
        ]
        for tensor in shown[:limit]
    ]
    headers = ["tensor", "form", "verdict", "max |a-b|", "|a-b|/|a|", "differ", "NaN", "infinite"]
    print_table(headers, rows, right=["max |a-b|", "|a-b|/|a|", "differ"])
    _print_rest(len(shown), limit)


def _has_nan(tensor: TensorDiff) -> bool:
    return tensor.measured is not None and any(tensor.measured.nnan)


def _form_text(tensor: TensorDiff) -> str:
    forms = [f"{form.dtype} {list(form.shape)}" for form in (tensor.a, tensor.b) if form is not None]
    return forms[0] if forms[0] == forms[-1] else " -> ".join(forms)


def _numbers(tensor: TensorDiff) -> list[str]:
    measured = tensor.measured
    if measured is None:
        return [""] * 5
    return [
        "" if measured.max_abs is None else f"{measured.max_abs:.4g}",
        "" if measured.relative is None else f"{measured.relative:.3g}",
        "" if measured.ndifferent is None else str(measured.ndifferent),
        f"{measured.nnan[0]} -> {measured.nnan[1]}" if any(measured.nnan) else "",
        f"{measured.ninf[0]} -> {measured.ninf[1]}" if any(measured.ninf) else "",
    ]


def _summary(diff: Diff) -> str:
    """Return what was found in one or two sentences."""
    verdicts = Counter(tensor.verdict for tensor in diff.tensors)
    unread = sum(tensor.verdict == "equal bits" and tensor.measured is None for tensor in diff.tensors)
    nan = sum(tensor.verdict == "equal bits" and _has_nan(tensor) for tensor in diff.tensors)
    words = [f"{_count(len(diff.changed), 'tensor')} changed"] if diff.changed else []
    if verdicts["equal"]:
        words.append(f"{verdicts['equal']} equal")
    if unread:
        words.append(f"{unread} with equal digests, not read")
    if nan:
        words.append(f"{nan} with equal bits and NaN in them")
    bare = verdicts["equal bits"] - unread - nan
    if bare:
        words.append(f"{bare} with equal bits")
    if verdicts["not compared"]:
        words.append(f"{verdicts['not compared']} of the same form, not compared")
    tensors = ", ".join(words) or "no tensors to compare"
    return f"no difference: {tensors}" if diff.is_same else tensors


def _count(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number} {what}s"


def _as_json(diff: Diff, limit: int | None) -> dict[str, Any]:
    import dataclasses

    verdicts = Counter(tensor.verdict for tensor in diff.tensors)
    shown = [tensor for tensor in diff.tensors if tensor.is_change or _has_nan(tensor)]
    return {
        "is_same": diff.is_same,
        "a": dataclasses.asdict(diff.a),
        "b": dataclasses.asdict(diff.b),
        "facts": [dataclasses.asdict(fact) for fact in diff.facts[:limit]],
        "entries": [dataclasses.asdict(entry) for entry in diff.entries[:limit]],
        "values": [dataclasses.asdict(change) for change in diff.values[:limit]],
        "nvalues": diff.nvalues,
        "tensors": [_tensor_as_json(tensor) for tensor in shown[:limit]],
        "verdicts": dict(sorted(verdicts.items())),
        "notes": list(diff.notes),
    }


def _tensor_as_json(tensor: TensorDiff) -> dict[str, Any]:
    import dataclasses

    document = {**dataclasses.asdict(tensor), "verdict": tensor.verdict}
    if tensor.measured is not None:
        for name in ("max_abs", "relative"):
            value = getattr(tensor.measured, name)
            # JSON has no infinity.
            document["measured"][name] = str(value) if value is not None and math.isinf(value) else value
    return document
