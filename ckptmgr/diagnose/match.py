"""The complete difference between the tensors of a file and those of a model, and what would make them fit.

Pure and without torch: names, shapes and dtypes are all that it looks at. Proposals are made in the order in which
they are applied, each for what is left by those before. What could be several things is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptmgr.diagnose.artifact import TensorFacts
from ckptmgr.diagnose.difference import Change, Difference, Proposal
from ckptmgr.diagnose.draft import Draft
from ckptmgr.diagnose.fused import propose_fused
from ckptmgr.diagnose.leftovers import propose_harmless, propose_tied
from ckptmgr.diagnose.renames import propose_renames
from ckptmgr.diagnose.reordered import propose_reordered
from ckptmgr.diagnose.reshaped import propose_casts, propose_resizes, propose_transposes
from ckptmgr.diagnose.wrapping import propose_prefixes

__all__ = ["match"]

_STAGES = (
    propose_prefixes,
    propose_harmless,
    propose_reordered,
    propose_fused,
    propose_renames,
    propose_fused,
    propose_tied,
    propose_transposes,
    propose_resizes,
    propose_casts,
)


def match(saved: Sequence[TensorFacts], live: Sequence[TensorFacts]) -> Difference:
    """Compare the tensors of a file with those of a model, and propose what would make them fit.

    Args:
        saved: The file's. Of a name that stands twice the last one counts, as in a dict.
        live: The model's, with ``tied_to`` where two names are of one tensor.

    Returns:
        The difference by the names as they are. Names longer than 512 characters are compared, and nothing is proposed
        for them.
    """
    before, now = {it.name: it for it in saved}, {it.name: it for it in live}
    both = [Change(name, it, now[name]) for name, it in before.items() if name in now]
    draft = Draft(saved, live)
    for propose in _STAGES:
        propose(draft)
    left = _Left(draft)
    return Difference(
        matched=tuple(it.name for it in both if (it.saved.shape, it.saved.dtype) == (it.live.shape, it.live.dtype)),
        shape=tuple(it for it in both if it.saved.shape != it.live.shape),
        dtype=tuple(it for it in both if it.saved.shape == it.live.shape and it.saved.dtype != it.live.dtype),
        missing=tuple(it for name, it in now.items() if name not in before),
        unexpected=tuple(it for name, it in before.items() if name not in now),
        proposals=tuple(sorted(draft.proposals, key=_is_unknown)),
        missing_after=left.missing,
        unexpected_after=left.unexpected,
        shape_after=left.shape,
    )


class _Left:
    """What no proposal covers that can be applied."""

    def __init__(self, draft: Draft) -> None:
        self.missing = tuple(name for name in draft.live if name not in draft.current)
        self.unexpected = tuple(name for name in draft.current if name not in draft.live)
        both = ((name, it) for name, it in draft.current.items() if name in draft.live)
        self.shape = tuple(name for name, it in both if it.shape != draft.live[name].shape)


def _is_unknown(proposal: Proposal) -> bool:
    return not proposal.is_applied
