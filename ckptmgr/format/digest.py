"""Digests of stored bytes: every byte is hashed once, in blocks, and everything else derives from the blocks.

A region of a file (one tensor, a header, a whole document) is cut into blocks of 16 MiB from its first byte. The
digests of the blocks are listed; the digest of a region or a file is the digest of its block digests laid end to end.
So a reader of a range checks only the blocks that it touches, and no byte is ever hashed twice.

Digests show damage, not intent: whoever can write the files can also write matching digests.
"""

from __future__ import annotations

from collections.abc import Iterator

from xxhash import xxh3_128_digest

__all__ = ["ALGORITHM", "BLOCK_NBYTES", "DIGEST_NBYTES", "block_digests", "combined_digest", "nblocks", "split_blocks"]

ALGORITHM = "xxh3-128"
BLOCK_NBYTES = 16 * 1024 * 1024
DIGEST_NBYTES = 16


def nblocks(nbytes: int) -> int:
    """Return how many blocks a region of ``nbytes`` has; an empty region has none."""
    return -(-nbytes // BLOCK_NBYTES)


def split_blocks(data: memoryview) -> Iterator[memoryview]:
    """Yield the blocks of one region, in order, without copying."""
    for start in range(0, data.nbytes, BLOCK_NBYTES):
        yield data[start : start + BLOCK_NBYTES]


def block_digests(data: bytes | bytearray | memoryview) -> bytes:
    """Return the digests of a region's blocks, laid end to end (16 bytes each)."""
    return b"".join(xxh3_128_digest(block) for block in split_blocks(memoryview(data).cast("B")))


def combined_digest(blocks: bytes) -> str:
    """Return the digest, in hex, of the region or file whose block digests these are."""
    return xxh3_128_digest(blocks).hex()
