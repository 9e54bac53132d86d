"""What ranks tell each other, and what they learn of one that fails, dies, hangs, leaves, or does something else."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from ranks_of_threads import meet, on_all

from ckptmgr.errors import CkptmgrError, CorruptCheckpointError, Fenced, StorageError, TopologyError
from ckptmgr.ranks.group import Channel, RankFailure, Ranks
from ckptmgr.ranks.links import Link, LinkClosed, accept_links, connect, listen

LATE_S = 0.3
"""A deadline that passes in a test that waits for it."""


class Leaving(BaseException):
    """As SystemExit and KeyboardInterrupt do, it ends a process."""


@pytest.fixture
def job() -> Iterator[Callable[..., list[Ranks]]]:
    opened: list[Ranks] = []

    def start(world_size: int, *, timeout_s: float = 20.0) -> list[Ranks]:
        ranks = meet(world_size, timeout_s=timeout_s)
        opened.extend(ranks)
        return ranks

    yield start
    for rank in opened:
        rank.close()


def fail_on(rank: int, error: BaseException) -> Callable[[Ranks], Any]:
    """Return work that fails on one rank, in an operation of all."""

    def work(ranks: Ranks) -> Any:
        def own() -> int:
            if ranks.rank == rank:
                raise error
            return ranks.rank

        return ranks.loop.together("work", own)

    return work


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_values_of_all_ranks_reach_rank_0_and_its_answer_reaches_all(job, world_size):
    ranks = job(world_size) if world_size > 1 else [Ranks.alone()]
    numbers = list(range(world_size))
    assert on_all(ranks, lambda r: r.loop.decide("a", lambda: {"by": r.rank})) == [{"by": 0}] * world_size
    gathered = on_all(ranks, lambda r: r.loop.exchange("b", lambda: r.rank, list))
    assert gathered == [numbers] * world_size
    assert on_all(ranks, lambda r: r.loop.together("c", lambda: r.rank)) == numbers
    assert on_all(ranks, lambda r: r.loop.exchange("d", lambda: r.rank + 1, sum)) == [sum(numbers) + world_size] * (
        world_size
    )


def test_what_stays_on_its_rank_may_be_of_any_kind(job):
    results = on_all(job(2), lambda r: r.loop.together("snapshot", lambda: {r}))
    assert [next(iter(result)).rank for result in results] == [0, 1]


def test_a_message_larger_than_any_buffer_arrives_whole(job):
    text = "x" * 20_000_000
    assert (
        on_all(job(2), lambda r: r.loop.exchange("much", lambda: text, lambda texts: "".join(texts))) == [text * 2] * 2
    )


def test_the_two_channels_do_not_wait_for_each_other(job):
    ranks = job(2)
    with ThreadPoolExecutor(1) as pool:
        save = pool.submit(ranks[0].saves.exchange, "a save", lambda: 0, sum)
        assert on_all(ranks, lambda r: r.loop.exchange("a step", lambda: 1, sum)) == [2, 2]
        assert not save.done()
        assert ranks[1].saves.exchange("a save", lambda: 1, sum) == 1
        assert save.result() == 1


@pytest.mark.parametrize("victim", [0, 2])
def test_an_error_of_ours_keeps_its_class_and_its_advice_and_names_the_rank(job, victim):
    error = CorruptCheckpointError("shard 7 is damaged", why="a flipped bit", next="look at the disk")
    outcomes = on_all(job(3), fail_on(victim, error))
    assert [type(outcome) for outcome in outcomes] == [CorruptCheckpointError] * 3
    assert {(o.what, o.why, o.next) for o in outcomes} == {
        (f"rank {victim}: shard 7 is damaged", "a flipped bit", "look at the disk")
    }
    assert outcomes[victim].__cause__ is error


def test_the_same_error_on_several_ranks_is_told_once(job):
    def work(ranks: Ranks) -> Any:
        def own() -> None:
            if ranks.rank:
                raise StorageError("no space left")

        return ranks.loop.together("writing", own)

    assert {outcome.what for outcome in on_all(job(3), work)} == {"ranks 1, 2: no space left"}


@pytest.mark.parametrize("victim", [0, 1])
def test_an_error_of_another_kind_is_a_failure_of_that_rank_with_its_cause(job, victim):
    error = ZeroDivisionError("no batches")
    outcomes = on_all(job(2), fail_on(victim, error))
    for outcome in outcomes:
        assert isinstance(outcome, RankFailure)
        assert outcome.what == f"work failed on rank {victim}"
        assert outcome.why == f"rank {victim}: ZeroDivisionError: no batches"
        assert outcome.ranks == (victim,)
    assert outcomes[victim].__cause__ is error


def test_errors_of_different_classes_are_all_told(job):
    errors = [Fenced("attempt 2 owns the run"), None, StorageError("no space left", why="disk full")]

    def work(ranks: Ranks) -> Any:
        def own() -> None:
            if errors[ranks.rank] is not None:
                raise errors[ranks.rank]

        return ranks.loop.together("writing", own)

    for outcome in on_all(job(3), work):
        assert isinstance(outcome, RankFailure)
        assert outcome.why == "rank 0: attempt 2 owns the run; rank 2: no space left: disk full"
        assert outcome.ranks == (0, 2)


def test_what_rank_0_cannot_answer_fails_on_all(job):
    def refuse(results: Sequence[int]) -> int:
        raise TopologyError(f"{results} do not fit")

    for outcome in on_all(job(2), lambda r: r.loop.exchange("comparing", lambda: r.rank, refuse)):
        assert type(outcome) is TopologyError
        assert outcome.what == "[0, 1] do not fit"


@pytest.mark.parametrize("victim", [0, 1])
def test_after_a_failure_the_ranks_go_on_together(job, victim):
    ranks = job(2)
    assert all(isinstance(o, CkptmgrError) for o in on_all(ranks, fail_on(victim, StorageError("no"))))
    assert on_all(ranks, lambda r: r.loop.exchange("next", lambda: r.rank, sum)) == [1, 1]


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("death", [signal.SIGKILL, None], ids=["killed", "exits"])
def test_a_process_that_ends_without_a_word_is_noticed_at_once_and_named(victim, death):
    # Only the victim is forked: it has the sockets of no other rank.
    server = listen("127.0.0.1")
    port = server.getsockname()[1]
    pid = os.fork()
    if pid == 0:
        try:
            if victim == 0:
                links = accept_links(server, [(1, "loop")], "secret", timeout_s=20)
                links[1, "loop"].receive(timeout_s=20)
            else:
                server.close()
                connect("127.0.0.1", port, rank=1, channel="loop", token="secret", timeout_s=20)
            if death is not None:
                os.kill(os.getpid(), death)
        finally:
            os._exit(0)
    if victim == 0:
        server.close()
        channel = Channel(
            1, 2, {0: connect("127.0.0.1", port, rank=1, channel="loop", token="secret", timeout_s=20)}, timeout_s=300
        )
    else:
        with server:
            accepted = accept_links(server, [(1, "loop")], "secret", timeout_s=20)
        channel = Channel(0, 2, {1: accepted[1, "loop"]}, timeout_s=300)
    with pytest.raises(RankFailure, match=f"saving failed on rank {victim}") as caught:
        channel.exchange("saving", lambda: 1, sum)
    assert "it is gone" in str(caught.value)
    with pytest.raises(RankFailure, match="cannot be agreed on") as again:
        channel.exchange("the next save", lambda: 1, sum)
    assert f"rank {victim} is gone" in str(again.value)
    assert "start the job again" in str(again.value)
    channel.close()
    os.waitpid(pid, 0)


def test_a_rank_that_hangs_is_named_when_the_deadline_has_passed_and_its_late_answer_confuses_nobody(job):
    ranks = job(3, timeout_s=LATE_S)
    told = threading.Event()

    def work(rank: Ranks) -> Any:
        if rank.rank == 2:
            # It comes when the others have given it up.
            told.wait()
        try:
            return rank.loop.exchange("slow", lambda: f"slow {rank.rank}", list)
        finally:
            told.set()

    for outcome in on_all(ranks, work):
        assert isinstance(outcome, RankFailure)
        assert outcome.ranks == (2,)
        assert f"has not answered for {LATE_S:g} s" in outcome.why
    assert (
        on_all(ranks, lambda r: r.loop.exchange("next", lambda: f"next {r.rank}", list))
        == [["next 0", "next 1", "next 2"]] * 3
    )


def test_a_rank_0_that_hangs_is_given_up_by_the_others_and_its_late_answer_confuses_nobody(job):
    ranks = job(2, timeout_s=LATE_S)
    given_up = threading.Event()

    def work(rank: Ranks) -> Any:
        if rank.leads:
            given_up.wait()
        try:
            return rank.loop.exchange("slow", lambda: f"slow {rank.rank}", list)
        finally:
            given_up.set()

    outcomes = on_all(ranks, work)
    assert outcomes[0] == ["slow 0", "slow 1"]
    assert isinstance(outcomes[1], RankFailure)
    assert outcomes[1].ranks == (0,)
    assert (
        on_all(ranks, lambda r: r.loop.exchange("next", lambda: f"next {r.rank}", list)) == [["next 0", "next 1"]] * 2
    )


def test_a_rank_at_another_operation_is_told_what_it_and_the_others_do(job):
    ranks = job(3)
    outcomes = on_all(ranks, lambda r: r.loop.exchange("step 7" if r.rank == 1 else "step 8", lambda: 0, sum))
    for outcome in outcomes:
        assert isinstance(outcome, RankFailure)
        assert (outcome.what, outcome.why) == (
            "the ranks do not do the same: rank 0 is at: step 8",
            "rank 1 is at: step 7",
        )
        assert "same number of batches" in outcome.next
    # They would never fit together again.
    for outcome in on_all(ranks, lambda r: r.loop.exchange("step 9", lambda: 0, sum)):
        assert isinstance(outcome, RankFailure)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_leaves_because_of_an_error_tells_it_to_those_who_wait(job, victim):
    ranks = job(3)

    def work(rank: Ranks) -> Any:
        if rank.rank == victim:
            return rank.close(ValueError("batch 3 is empty"))
        return rank.loop.exchange("step 5", lambda: 0, sum)

    for outcome in on_all(ranks, work):
        if outcome is not None:
            assert isinstance(outcome, RankFailure)
            assert f"rank {victim}: ValueError: batch 3 is empty" in outcome.why


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_has_closed_the_run_is_out_of_step_with_those_who_go_on(job, victim):
    ranks = job(2)
    other = ranks[1 - victim]
    ranks[victim].close()
    with pytest.raises(RankFailure, match="do not do the same") as caught:
        other.loop.exchange("step 5", lambda: 0, sum)
    assert f"rank {victim} is at: the end: it has closed the run" in str(caught.value)
    with pytest.raises(RankFailure, match="cannot be agreed on"):
        other.loop.exchange("step 6", lambda: 0, sum)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("where", ["job", "answer"])
def test_what_ends_a_process_goes_its_way_and_the_others_do_not_wait(job, victim, where):
    ranks = job(2)

    def leave(*_: object) -> int:
        raise Leaving("killed by its scheduler")

    def work(rank: Ranks) -> Any:
        mine = rank.rank == victim or where == "answer"
        return rank.loop.exchange(
            "saving", leave if mine and where == "job" else lambda: 0, leave if where == "answer" else sum
        )

    outcomes = on_all(ranks, work)
    leaver = 0 if where == "answer" else victim
    assert type(outcomes[leaver]) is Leaving
    assert isinstance(outcomes[1 - leaver], RankFailure)
    assert f"rank {leaver}: Leaving: killed by its scheduler" in outcomes[1 - leaver].why


def test_when_one_rank_is_gone_the_others_do_not_wait_for_each_other_afterwards(job):
    ranks = job(3, timeout_s=100.0)
    ranks[2].loop._links[0].close()
    for what in ("the save of step 1", "the save of step 2"):
        outcomes = on_all(ranks[:2], lambda r, what=what: r.loop.exchange(what, lambda: 0, sum))
        assert [type(outcome) for outcome in outcomes] == [RankFailure, RankFailure]
        assert "rank 2" in str(outcomes[0])
        assert "rank 2" in str(outcomes[1])


def test_closing_twice_or_after_the_others_is_no_error(job):
    ranks = job(2)
    for rank in (*ranks, *ranks):
        rank.close()
    with pytest.raises(RankFailure, match="cannot be agreed on") as caught:
        ranks[0].loop.decide("a save", lambda: 1)
    assert "parted already" in str(caught.value)


def test_a_wait_can_be_cut_short_for_all_that_comes(job):
    ranks = job(2)
    ranks[0].hurry(LATE_S)
    with pytest.raises(RankFailure, match="failed on rank 1"):
        ranks[0].loop.decide("the last save", lambda: 1)
    ranks[0].hurry(500.0)
    assert ranks[0].saves.timeout_s == LATE_S


STRANGERS = {
    "a wrong token": {"rank": 1, "channel": "loop", "token": "guessed"},
    "no token": {"rank": 1, "channel": "loop"},
    "a rank that nobody waits for": {"rank": 9, "channel": "loop", "token": "secret"},
    "an infinite rank": {"rank": float("inf"), "channel": "loop", "token": "secret"},
    "no object": [1, 2],
    "nested without end": None,
}


@pytest.mark.parametrize("hello", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_is_sent_away_who_comes_with(hello):
    with listen("127.0.0.1") as server, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept_links, server, [(1, "loop")], "secret", timeout_s=20)
        body = b"[" * 100_000 if hello is None else json.dumps(hello).encode()
        stranger = socket.create_connection(server.getsockname())
        stranger.sendall(struct.pack("!Q", len(body)) + body)
        assert stranger.recv(1) == b"", "it is sent away"
        friend = connect(*server.getsockname(), rank=1, channel="loop", token="secret", timeout_s=20)
        link = accepted.result()[1, "loop"]
        friend.send("hello", timeout_s=20)
        assert link.receive(timeout_s=20) == "hello"
        for open_one in (stranger, friend, link):
            open_one.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"GET / HTTP/1.1\r\nHost: rank0\r\n\r\n", struct.pack("!Q", 2) + b"\xff\xff", struct.pack("!Q", 1 << 27)],
    ids=["silence", "http", "no text", "much announced"],
)
def test_garbage_is_sent_away_and_the_rank_that_comes_after_it_gets_in(content):
    with listen("127.0.0.1") as server, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept_links, server, [(1, "loop")], "secret", timeout_s=20)
        with socket.create_connection(server.getsockname()) as stranger:
            stranger.sendall(content)
            stranger.shutdown(socket.SHUT_WR)
            friend = connect(*server.getsockname(), rank=1, channel="loop", token="secret", timeout_s=20)
            accepted.result()[1, "loop"].close()
            friend.close()


def test_a_stranger_who_says_nothing_does_not_keep_the_ranks_waiting_past_their_deadline():
    with listen("127.0.0.1") as server, socket.create_connection(server.getsockname()):
        began = time.monotonic()
        with pytest.raises(TopologyError, match="ranks 1 did not connect"):
            accept_links(server, [(1, "loop")], "secret", timeout_s=LATE_S)
        assert time.monotonic() - began < 5


def test_ranks_that_did_not_come_are_named():
    with listen("127.0.0.1") as server:
        here = connect(*server.getsockname(), rank=2, channel="loop", token="secret", timeout_s=20)
        with pytest.raises(TopologyError, match=r"ranks 1, 3 did not connect to rank 0 within 0\.3 s"):
            accept_links(server, [(rank, "loop") for rank in (1, 2, 3)], "secret", timeout_s=LATE_S)
        here.close()


def test_a_rank_that_connects_twice_is_taken_once():
    with listen("127.0.0.1") as server, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept_links, server, [(1, "loop"), (2, "loop")], "secret", timeout_s=20)
        first, second, other = (
            connect(*server.getsockname(), rank=rank, channel="loop", token="secret", timeout_s=20)
            for rank in (1, 1, 2)
        )
        links = accepted.result()
        links[1, "loop"].send("to the first", timeout_s=20)
        assert first.receive(timeout_s=20) == "to the first"
        with pytest.raises(LinkClosed):
            second.receive(timeout_s=20)
        for link in (first, second, other, *links.values()):
            link.close()


def test_a_rank_0_that_cannot_be_reached_is_told_with_its_address():
    with listen("127.0.0.1") as server:
        port = server.getsockname()[1]
    with pytest.raises(TopologyError, match=f"rank 3 cannot reach rank 0 at 127.0.0.1:{port}") as caught:
        connect("127.0.0.1", port, rank=3, channel="loop", token="secret", timeout_s=5)
    assert "MASTER_ADDR" in str(caught.value)


def test_a_message_that_was_cut_off_half_way_breaks_the_channel():
    ours, theirs = socket.socketpair()
    channel = Channel(1, 2, {0: Link.__new__(Link)}, timeout_s=LATE_S)
    link = channel._links[0]
    link.socket, link._received = ours, bytearray()
    # Rank 0 reads nothing: the report does not fit into the socket, and half of it is sent.
    with pytest.raises(RankFailure, match="failed on rank 0"):
        channel.exchange("a large report", lambda: "x" * 50_000_000, list)
    with pytest.raises(RankFailure, match="cannot be agreed on"):
        channel.exchange("the next one", lambda: 1, list)
    theirs.close()
    ours.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "rank-0.cluster"])
def test_nobody_outside_of_this_host_is_listened_to_where_all_ranks_are_on_it(host):
    with listen(host) as server:
        assert (server.getsockname()[0] == "127.0.0.1") == (host != "rank-0.cluster")
