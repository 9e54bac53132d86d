"""Connections between rank 0 and every other rank of a job: small messages, and the end of a process noticed at once.

torch's process groups are for training. A collective of theirs that one rank does not reach waits for half an hour and
then says nothing about who was missing; and they must not be used in the background while training uses them. Here a
rank that has died is known as soon as its connection ends, and one that hangs is named when the deadline has passed.
"""

from __future__ import annotations

import hmac
import json
import logging
import selectors
import socket
import struct
import time
from collections.abc import Collection, Mapping
from typing import Any

from ckptmgr.errors import TopologyError

__all__ = ["MAX_MESSAGE_NBYTES", "Link", "LinkClosed", "accept_links", "connect", "listen", "receive_from_all"]

_log = logging.getLogger("ckptmgr")

MAX_MESSAGE_NBYTES = 256 * 1024 * 1024
_LENGTH = struct.Struct("!Q")
_TELL_EVERY_S = 30.0
# Of whoever has not shown the token yet.
_HELLO_NBYTES = 1024
_HELLO_S = 10.0


class LinkClosed(Exception):
    """The other end is gone: its process has ended, or its connection was cut."""


class Link:
    """One connection. A message is anything that JSON holds.

    Args:
        sock: Connected.

    Attributes:
        max_nbytes: Larger messages are not taken in.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A host that is gone without a word is noticed too, in about two minutes.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 6)):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.socket = sock
        self.max_nbytes = MAX_MESSAGE_NBYTES
        self._received = bytearray()

    def send(self, message: Any, *, timeout_s: float) -> None:
        """Send a message.

        Raises:
            LinkClosed: The other end is gone.
            TimeoutError: It has taken nothing for that long.
        """
        body = json.dumps(message, separators=(",", ":")).encode()
        try:
            self.socket.settimeout(timeout_s)
            self.socket.sendall(_LENGTH.pack(len(body)) + body)
        except TimeoutError:
            raise
        except OSError as error:
            raise LinkClosed(str(error)) from error

    def receive(self, *, timeout_s: float) -> Any:
        """Wait for a message.

        Raises:
            LinkClosed: The other end is gone.
            TimeoutError: None came.
        """
        deadline = time.monotonic() + timeout_s
        while (message := self.pop()) is None:
            self.socket.settimeout(max(0.001, deadline - time.monotonic()))
            self.read()
            if time.monotonic() > deadline and not self._is_whole():
                raise TimeoutError
        return message[0]

    def read(self) -> None:
        """Take in what has arrived, at least one byte."""
        try:
            data = self.socket.recv(1 << 20)
        except TimeoutError:
            raise
        except OSError as error:
            raise LinkClosed(str(error)) from error
        if not data:
            raise LinkClosed("its process has ended")
        self._received += data

    def pop(self) -> tuple[Any] | None:
        """Return the next whole message that was taken in, in a tuple; None if there is none."""
        if not self._is_whole():
            return None
        end = _LENGTH.size + self._nbytes()
        body = bytes(self._received[_LENGTH.size : end])
        del self._received[:end]
        return (json.loads(body),)

    def close(self) -> None:
        """Close the connection: the other end sees it at once."""
        self.socket.close()

    def _nbytes(self) -> int:
        nbytes: int = _LENGTH.unpack_from(self._received)[0]
        if nbytes > self.max_nbytes:
            raise LinkClosed(f"a message of {nbytes} bytes is none of ours")
        return nbytes

    def _is_whole(self) -> bool:
        return len(self._received) >= _LENGTH.size and len(self._received) >= _LENGTH.size + self._nbytes()


def listen(host: str) -> socket.socket:
    """Return a socket that listens on a free port: on loopback where ``host`` is, else on all interfaces."""
    is_local = host in ("localhost", "127.0.0.1", "::1")
    return socket.create_server(("127.0.0.1" if is_local else "", 0), backlog=1024)


def accept_links(server: socket.socket, wanted: Collection[tuple[int, str]], token: str, *, timeout_s: float) -> Any:
    """Accept a link for every wanted pair of rank and channel. Whoever does not know the token is sent away.

    Returns:
        ``{(rank, channel): Link}``.

    Raises:
        TopologyError: Not all of them came in time. Names the ranks.
    """
    links: dict[tuple[int, str], Link] = {}
    deadline = time.monotonic() + timeout_s
    while len(links) < len(wanted):
        server.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            sock, _ = server.accept()
        except TimeoutError:
            for link in links.values():
                link.close()
            missing = sorted({rank for rank, _ in wanted} - {rank for rank, _ in links})
            raise TopologyError(
                f"ranks {', '.join(map(str, missing))} did not connect to rank 0 within {timeout_s:g} s",
                why="every rank has to call resume(), or fit(), at the same place of the program",
                next="look at the output of these ranks; rank 0 must be reachable under MASTER_ADDR",
            ) from None
        link = Link(sock)
        key = _introduced(link, token, timeout_s=min(_HELLO_S, max(0.001, deadline - time.monotonic())))
        if key in wanted and key not in links:
            links[key] = link
        else:
            link.close()
    return links


def _introduced(link: Link, token: str, *, timeout_s: float) -> Any:
    """Return the rank and the channel of whoever has connected; None unless it knows the token."""
    link.max_nbytes = _HELLO_NBYTES
    try:
        hello = link.receive(timeout_s=timeout_s)
        key = (hello["rank"], hello["channel"])
        hash(key)
        is_known = hmac.compare_digest(str(hello["token"]), token)
    except (LinkClosed, TimeoutError, ValueError, TypeError, KeyError, RecursionError):
        return None
    link.max_nbytes = MAX_MESSAGE_NBYTES
    return key if is_known else None


def connect(host: str, port: int, *, rank: int, channel: str, token: str, timeout_s: float) -> Link:
    """Connect a rank to rank 0.

    Raises:
        TopologyError: Rank 0 cannot be reached.
    """
    try:
        link = Link(socket.create_connection((host, port), timeout=timeout_s))
        link.send({"rank": rank, "channel": channel, "token": token}, timeout_s=timeout_s)
    except (OSError, LinkClosed) as error:
        raise TopologyError(
            f"rank {rank} cannot reach rank 0 at {host}:{port}",
            why=str(error),
            next="set MASTER_ADDR to the name under which the other hosts reach rank 0's",
        ) from error
    return link


def receive_from_all(
    links: Mapping[int, Link], *, what: str, timeout_s: float, is_current: Any
) -> tuple[dict[int, Any], dict[int, str]]:
    """Wait for one message from each rank, in whatever order they come.

    Args:
        links: By rank.
        what: What they are waited for, for the log.
        timeout_s: The deadline.
        is_current: Says whether a message belongs here; others come from operations that had passed their deadline.

    Returns:
        Messages by rank, and for each rank without one the reason.
    """
    messages: dict[int, Any] = {}
    lost: dict[int, str] = {}
    deadline, told_at = time.monotonic() + timeout_s, time.monotonic() + _TELL_EVERY_S
    with selectors.DefaultSelector() as selector:
        for rank, link in links.items():
            selector.register(link.socket, selectors.EVENT_READ, rank)
        _take(links, links, messages, is_current)
        while len(messages) + len(lost) < len(links):
            left = deadline - time.monotonic()
            if left <= 0:
                waited = f"it has not answered for {timeout_s:g} s: it hangs, or it is doing something else"
                lost |= dict.fromkeys(links.keys() - messages.keys() - lost.keys(), waited)
                break
            for key, _ in selector.select(min(left, _TELL_EVERY_S)):
                rank = key.data
                try:
                    links[rank].read()
                except (LinkClosed, TimeoutError) as error:
                    selector.unregister(key.fileobj)
                    if rank not in messages:
                        lost[rank] = f"it is gone: {error}"
            _take(links, links.keys() - messages.keys() - lost.keys(), messages, is_current)
            if time.monotonic() > told_at:
                told_at += _TELL_EVERY_S
                missing = ", ".join(map(str, sorted(links.keys() - messages.keys() - lost.keys())))
                if missing:
                    _log.warning("waiting for rank %s: %s", missing, what)
    return messages, lost


def _take(links: Mapping[int, Link], ranks: Collection[int], messages: dict[int, Any], is_current: Any) -> None:
    for rank in list(ranks):
        while rank not in messages and (message := links[rank].pop()) is not None:
            if is_current(message[0]):
                messages[rank] = message[0]
