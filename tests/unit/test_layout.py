import pytest

from ckptmgr.errors import UsageError
from ckptmgr.format.layout import (
    CheckpointId,
    attempt_key,
    check_key,
    manifest_key,
    note_key,
    parse_attempt_key,
    parse_checkpoint_key,
    payload_stem,
)


def test_an_id_names_step_attempt_and_save_and_sorts_by_them() -> None:
    ids = [CheckpointId(9, 2, 0), CheckpointId(10, 1, 3), CheckpointId(9, 2, 1), CheckpointId(9, 1, 7)]
    assert sorted(map(str, ids)) == [str(id) for id in sorted(ids)]
    assert [CheckpointId.parse(str(id)) for id in ids] == ids


@pytest.mark.parametrize("text", ["", "latest", "1-1-1", "\N{ARABIC-INDIC DIGIT ONE}000000001-000001-000000"])
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        CheckpointId.parse(text)


def test_keys_can_be_read_back() -> None:
    id = CheckpointId(1200, 3, 5)
    assert parse_checkpoint_key(manifest_key(id)) == (id, "manifest.json")
    assert parse_checkpoint_key(note_key(id, 4, 1)) == (id, "note-000004-000001.json")
    assert parse_attempt_key(attempt_key(3, "line")) == (3, "line")
    assert parse_attempt_key("attempts/000003/other.json") is None
    assert parse_checkpoint_key("checkpoints/x/manifest.json") is None


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/a",
        "../a",
        "a/../b",
        "a//b",
        "a/",
        "a\\b",
        "a\0b",
        "C:",
        "s3://b/k",
        ".hidden",
        "a/.b",
        "ä",
        "a" * 129,
        "a b",
    ],
)
def test_names_that_could_leave_the_root_or_confuse_a_file_system_are_refused(key: str) -> None:
    with pytest.raises(UsageError):
        check_key(key)


def test_every_key_of_the_layout_passes_the_check() -> None:
    id = CheckpointId(1, 1, 1)
    for key in (manifest_key(id), note_key(id, 1, 1), attempt_key(1, "claim"), id.folder + "model.safetensors"):
        assert check_key(key) == key


@pytest.mark.parametrize(
    ("entry", "stem"),
    [
        ("model", "model"),
        ("Model", "entry-0003"),
        ("a/b", "entry-0003"),
        ("manifest", "entry-0003"),
        ("", "entry-0003"),
    ],
)
def test_a_file_is_named_after_its_entry_where_that_is_safe(entry: str, stem: str) -> None:
    assert payload_stem(entry, 3) == stem
