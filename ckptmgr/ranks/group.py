"""`Ranks`: the processes of one job, and the three things that they do together.

==============  ====================================================================================================
``decide``      rank 0 does something, all get what it returned, or its error
``together``    all do something, each gets what it returned; if one fails, all fail, naming it
``exchange``    all do something, rank 0 makes an answer from what they returned, all get the answer
==============  ====================================================================================================

All three are `exchange`. With one rank there is nobody to talk to: the work is done and its errors go their way.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from ckptmgr import errors
from ckptmgr.errors import CkptmgrError, TopologyError
from ckptmgr.ranks.links import Link, LinkClosed, accept_links, connect, listen, receive_from_all
from ckptmgr.ranks.told import OfRank

__all__ = ["DEFAULT_TIMEOUT_S", "Channel", "RankFailure", "Ranks"]

T = TypeVar("T")

_log = logging.getLogger("ckptmgr")

DEFAULT_TIMEOUT_S = 1800.0
"""How long a rank may be waited for, by default. In seconds."""

_CHANNELS = ("loop", "saves")
# Rank 0 names who is late; so the others wait longer for it than it waits for them.
_PATIENCE = 3
# Whoever does not take a message by then learns of the end from the connection.
_GOODBYE_S = 5.0
# The number of a message that ends a channel, whatever its other end waits for.
_LEFT = 2**62


class RankFailure(TopologyError):
    """Other ranks failed, or are gone. Which, and why.

    Attributes:
        ranks: Their numbers.
    """

    ranks: tuple[int, ...] = ()


class Channel:
    """A sequence of operations that all ranks take part in, in the same order.

    Two channels are independent of each other: one for the training loop, one for saves in the background.

    Args:
        rank: This process.
        world_size: Number of processes.
        links: On rank 0 one to each other rank, elsewhere one to rank 0.
        timeout_s: How long a rank may be waited for.

    Attributes:
        timeout_s: The same; may be changed.
    """

    def __init__(self, rank: int, world_size: int, links: Mapping[int, Link], *, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self._links = dict(links)
        self.timeout_s = timeout_s
        self._number = 0
        self._broken: str | None = None
        self._is_closed = False

    def decide(self, what: str, job: Callable[[], T]) -> T:
        """Run ``job`` on rank 0 only, and return on every rank what it returned: what JSON holds.

        Raises:
            CkptmgrError: Rank 0's error, on every rank.
            RankFailure: A rank is gone, late, or doing something else.
        """
        return self.exchange(what, lambda: None, lambda _: job())

    def together(self, what: str, job: Callable[[], T]) -> T:
        """Run ``job`` on every rank, and return this rank's own result, of any kind, once all have succeeded.

        Raises:
            CkptmgrError: It failed on some ranks; raised on all, naming them. Where all failures are of one class of
                ours, of that class.
            RankFailure: A rank failed otherwise, or is gone, late, or doing something else.
        """
        kept: list[T] = []
        self.exchange(what, lambda: kept.append(job()), lambda _: None)
        return kept[0]

    def exchange(self, what: str, job: Callable[[], Any], answer: Callable[[Sequence[Any]], T]) -> T:
        """Run ``job`` on every rank, make an ``answer`` from the results on rank 0, and return it on every rank.

        Args:
            what: The operation, in the same words on every rank.
            job: Returns what JSON holds.
            answer: Gets the results by rank; returns what JSON holds.

        Raises:
            CkptmgrError, RankFailure: As `together`, and whatever ``answer`` raises, on every rank.
        """
        if self.world_size == 1:
            return answer([job()])
        if self._broken is not None:
            failure = RankFailure(f"{what} cannot be agreed on", why=self._broken, next=_RESTART)
            # The ranks that know of nothing would wait for this one until their deadline.
            self.close(failure)
            raise failure
        self._number += 1
        own: BaseException | None = None
        report: dict[str, Any] = {"number": self._number, "what": what}
        try:
            report["result"] = job()
        except Exception as error:
            own, report["error"] = error, _described(error)
        except BaseException as error:
            # The process is leaving. The others must not wait for it, nor take its absence for a crash.
            self.close(error)
            raise
        verdict = self._lead(what, report, answer) if self.rank == 0 else self._follow(what, report)
        if "error" not in verdict:
            return verdict["answer"]  # type: ignore[no-any-return]
        raise _rebuilt(verdict["error"]) from (own or verdict.get("cause"))

    def close(self, error: BaseException | None = None) -> None:
        """End all connections. Whoever waits for this rank is told at once, and why if there was an error."""
        if not self._is_closed:
            self._is_closed = True
            reason = {} if error is None else {"error": _described(error)}
            self._leave({"number": _LEFT, "what": "the end: it has closed the run", **reason})
        self._broken = self._broken or "the ranks have parted already"
        for link in self._links.values():
            link.close()

    def _lead(self, what: str, report: dict[str, Any], answer: Callable[[Sequence[Any]], Any]) -> dict[str, Any]:
        number = self._number
        reports, lost = receive_from_all(
            self._links,
            what=what,
            timeout_s=self.timeout_s,
            is_current=lambda message: message["number"] >= number,
        )
        reports[0] = report
        verdict: dict[str, Any]
        failed = {rank: message["error"] for rank, message in reports.items() if "error" in message}
        failed |= {rank: _lost(reason) for rank, reason in lost.items()}
        elsewhere = {r: m["what"] for r, m in reports.items() if (m["number"], m["what"]) != (number, what)}
        if any(message["number"] == _LEFT for message in reports.values()):
            self._broken = "a rank has left"
        cause: BaseException | None = None
        if failed:
            verdict = {"error": _joined(what, failed)}
            if any("is gone" in reason for reason in lost.values()):
                self._broken = f"rank {min(lost)} is gone"
        elif elsewhere:
            self._broken = "the ranks have lost step with each other"
            verdict = {"error": _out_of_step("rank 0", what, elsewhere)}
        else:
            try:
                verdict = {"answer": answer([reports[rank]["result"] for rank in range(self.world_size)])}
            except Exception as error:
                verdict, cause = {"error": _described(error)}, error
            except BaseException as error:
                self.close(error)
                raise
        for rank, link in self._links.items():
            try:
                link.send({"number": number, **verdict}, timeout_s=self.timeout_s)
            except (LinkClosed, TimeoutError):
                # It is told of at the next operation, unless this one failed anyway.
                self._broken = self._broken or f"rank {rank} is gone"
        return {**verdict, "cause": cause}

    def _follow(self, what: str, report: dict[str, Any]) -> dict[str, Any]:
        link = self._links[0]
        try:
            self._send_report(link, report)
            while True:
                verdict: dict[str, Any] = link.receive(timeout_s=_PATIENCE * self.timeout_s)
                if verdict["number"] == _LEFT:
                    self._broken = "rank 0 has left"
                    if "error" in verdict:
                        return {"error": _joined(what, {0: verdict["error"]})}
                    return {"error": _out_of_step(f"rank {self.rank}", what, {0: verdict["what"]})}
                if verdict["number"] == report["number"]:
                    return verdict
        except LinkClosed as error:
            self._broken = "rank 0 is gone"
            return {"error": _joined(what, {0: _lost(f"it is gone: {error}")})}
        except TimeoutError:
            return {"error": _joined(what, {0: _lost(f"it has not answered for {_PATIENCE * self.timeout_s:g} s")})}

    def _send_report(self, link: Link, report: dict[str, Any]) -> None:
        try:
            link.send(report, timeout_s=self.timeout_s)
        except TimeoutError:
            # Half of a message is on its way: nothing that follows it would be understood.
            self._broken = "rank 0 takes no messages"
            raise

    def _leave(self, report: dict[str, Any]) -> None:
        for link in self._links.values():
            with suppress(LinkClosed, TimeoutError):
                link.send(report, timeout_s=_GOODBYE_S)


class Ranks:
    """The processes of one job.

    Args:
        rank: This process, from 0.
        world_size: Number of processes.
        channels: By name: ``loop`` and ``saves``.

    Attributes:
        loop: For what the training loop does.
        saves: For saves in the background.
    """

    def __init__(self, rank: int, world_size: int, channels: Mapping[str, Channel]) -> None:
        self.rank = rank
        self.world_size = world_size
        self.loop = channels["loop"]
        self.saves = channels["saves"]
        self._voice = None if rank == 0 else OfRank(rank)
        if self._voice is not None:
            _log.addFilter(self._voice)

    @classmethod
    def alone(cls) -> Ranks:
        """Return the only rank of a job of one process."""
        return cls(0, 1, {name: Channel(0, 1, {}, timeout_s=DEFAULT_TIMEOUT_S) for name in _CHANNELS})

    @classmethod
    def meet(
        cls,
        rank: int,
        world_size: int,
        *,
        host: str,
        broadcast: Callable[[dict[str, Any] | None], dict[str, Any]],
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Ranks:
        """Connect the ranks of a job with each other.

        Args:
            rank: This process.
            world_size: Number of processes, at least 2.
            host: Under which the others reach rank 0.
            broadcast: Brings rank 0's address to all of them: called with it on rank 0, with None elsewhere.
            timeout_s: How long a rank may be waited for, now and later.

        Raises:
            TopologyError: Not all of them came.
        """
        if rank == 0:
            with listen(host) as server:
                token = secrets.token_hex(16)
                broadcast({"host": host, "port": server.getsockname()[1], "token": token})
                wanted = [(other, name) for other in range(1, world_size) for name in _CHANNELS]
                links = accept_links(server, wanted, token, timeout_s=timeout_s)
            by_channel = {name: {r: link for (r, n), link in links.items() if n == name} for name in _CHANNELS}
        else:
            place = broadcast(None)
            by_channel = {
                name: {
                    0: connect(
                        place["host"],
                        int(place["port"]),
                        rank=rank,
                        channel=name,
                        token=place["token"],
                        timeout_s=timeout_s,
                    )
                }
                for name in _CHANNELS
            }
        return cls(
            rank, world_size, {n: Channel(rank, world_size, by_channel[n], timeout_s=timeout_s) for n in _CHANNELS}
        )

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which decides and commits."""
        return self.rank == 0

    def hurry(self, timeout_s: float) -> None:
        """Wait no longer than this for a rank, from now on. In seconds."""
        for channel in (self.loop, self.saves):
            channel.timeout_s = min(channel.timeout_s, timeout_s)

    def close(self, error: BaseException | None = None) -> None:
        """Part from the other ranks; because of an error, if there was one."""
        self.saves.close(error)
        self.loop.close(error)
        if self._voice is not None:
            _log.removeFilter(self._voice)


_RESTART = "end all ranks and start the job again: it goes on from the newest committed checkpoint"


def _described(error: BaseException) -> dict[str, Any]:
    if isinstance(error, CkptmgrError):
        kind = type(error).__name__
        return {"class": kind, "what": error.what, "why": error.why, "next": error.next}
    text = f"{type(error).__name__}: {error}".rstrip(": ")
    return {"class": None, "what": text, "why": None, "next": None}


def _lost(reason: str) -> dict[str, Any]:
    return {"class": None, "what": reason, "why": None, "next": None}


def _joined(what: str, failed: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """Make one error of those of several ranks; of their class where all have the same."""
    kinds = {error["class"] for error in failed.values()}
    kind = kinds.pop() if len(kinds) == 1 else None
    first = failed[min(failed)]
    by_text: dict[str, list[int]] = {}
    for rank in sorted(failed):
        error = failed[rank]
        text = ": ".join(filter(None, (error["what"], error["why"] if kind is None else None)))
        by_text.setdefault(text, []).append(rank)
    told = "; ".join(f"{_name(ranks)}: {text}" for text, ranks in by_text.items())
    if kind is not None:
        return {"class": kind, "what": told, "why": first["why"], "next": first["next"], "ranks": sorted(failed)}
    return {
        "class": "RankFailure",
        "what": f"{what} failed on {_name(sorted(failed))}",
        "why": told,
        "next": first["next"] or _RESTART,
        "ranks": sorted(failed),
    }


def _out_of_step(who: str, what: str, elsewhere: Mapping[int, str]) -> dict[str, Any]:
    told = "; ".join(f"rank {rank} is at: {other}" for rank, other in sorted(elsewhere.items()))
    return {
        "class": "RankFailure",
        "what": f"the ranks do not do the same: {who} is at: {what}",
        "why": told,
        "next": "call step(), save(), batches() and close() equally often, with the same step, on every rank; "
        "give every rank the same number of batches",
        "ranks": sorted(elsewhere),
    }


def _rebuilt(error: Mapping[str, Any]) -> CkptmgrError:
    kind = RankFailure if error["class"] in (None, "RankFailure") else getattr(errors, error["class"])
    rebuilt: CkptmgrError = kind(error["what"], why=error["why"], next=error["next"])
    if isinstance(rebuilt, RankFailure):
        rebuilt.ranks = tuple(error.get("ranks", ()))
    return rebuilt


def _name(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"
