import json

import msgspec
import pytest

from ckptmgr.errors import CorruptCheckpointError, FormatVersionError
from ckptmgr.format.digest import block_digests, combined_digest
from ckptmgr.format.manifest import AttemptClaim, RunMarker
from ckptmgr.format.record import NEWEST_VERSION, decode_excerpt, decode_record, encode_record, parse_json

CLAIM = AttemptClaim(version=1, attempt=3, nonce="ab", claimed_at="2026-01-01T00:00:00Z", host="node", pid=7)


def test_a_record_comes_back_as_it_was() -> None:
    assert decode_record(encode_record(CLAIM), AttemptClaim, where="claim.json") == CLAIM


def test_a_record_is_json_whose_digest_can_be_cut_out_without_parsing() -> None:
    data = encode_record(CLAIM)
    assert json.loads(data)["record"]["attempt"] == 3
    assert data[11:20] == b"xxh3-128:"


def test_every_truncation_and_every_flipped_bit_is_noticed() -> None:
    data = encode_record(CLAIM)
    for length in range(len(data)):
        with pytest.raises(CorruptCheckpointError):
            decode_record(data[:length], AttemptClaim, where="claim.json")
    for index in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[index] ^= 1 << bit
            with pytest.raises(CorruptCheckpointError):
                decode_record(bytes(broken), AttemptClaim, where="claim.json")


def test_a_record_of_a_newer_format_says_to_upgrade() -> None:
    newer = msgspec.structs.replace(CLAIM, version=NEWEST_VERSION + 1)
    with pytest.raises(FormatVersionError, match="upgrade"):
        decode_record(encode_record(newer), AttemptClaim, where="claim.json")


def test_fields_that_this_version_does_not_know_are_ignored() -> None:
    class LaterClaim(AttemptClaim, frozen=True, kw_only=True):
        colour: str = "red"

    later = LaterClaim(**msgspec.structs.asdict(CLAIM), colour="blue")
    assert decode_record(encode_record(later), AttemptClaim, where="claim.json") == CLAIM


def test_a_record_that_is_too_large_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(CorruptCheckpointError, match="at most 10"):
        decode_record(encode_record(CLAIM), AttemptClaim, where="claim.json", max_nbytes=10)


def test_a_field_called_by_half_of_a_surrogate_pair_is_damage() -> None:
    body = msgspec.json.encode(CLAIM).replace(b'"host"', b'"\\ud800"')
    data = b'{"digest":"xxh3-128:' + combined_digest(block_digests(body)).encode() + b'","record":' + body + b"}\n"
    with pytest.raises(CorruptCheckpointError, match="surrogates"):
        decode_record(data, AttemptClaim, where="claim.json")


@pytest.mark.parametrize(
    "text",
    [b'{"a":1,"a":2}', b"[NaN]", b"[Infinity]", b"[" * 100_000, b'{"a":' + b"1" * 5000 + b"}", b"", b"\xff"],
    ids=["duplicate", "nan", "infinity", "deep", "huge", "empty", "not-utf8"],
)
def test_what_is_not_strict_json_is_refused(text: bytes) -> None:
    with pytest.raises(CorruptCheckpointError):
        parse_json(text, where="state.json")


def test_an_excerpt_is_checked_like_the_whole_record_where_it_is_read() -> None:
    marker = RunMarker(version=1, run_id="00" * 8, created_at="now", parent="p")

    class Excerpt(msgspec.Struct, frozen=True):
        version: int
        run_id: str

    class Later(msgspec.Struct, frozen=True):
        version: int
        run_id: int

    data = encode_record(marker)
    assert decode_excerpt(data, Excerpt, where="x").run_id == "00" * 8
    with pytest.raises(CorruptCheckpointError, match="x is damaged"):
        decode_excerpt(data.replace(b"now", b"nox"), Excerpt, where="x")
    with pytest.raises(CorruptCheckpointError, match="a field is not as the format says"):
        decode_excerpt(data, Later, where="x")
    for later in (encode_record(Excerpt(version=9, run_id="a")), encode_record(Later(version=9, run_id=1))):
        with pytest.raises(FormatVersionError):
            decode_excerpt(later, Excerpt, where="x")
