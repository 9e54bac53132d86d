"""What every storage must do, as tests: subclass `StorageConformance` in a test module of yours."""

from __future__ import annotations

import array
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from ckptmgr.errors import UsageError
from ckptmgr.storage.protocol import Buffer, CopiesFrom, Entry, Storage

__all__ = ["StorageConformance"]

BAD_KEYS = [
    "",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "../a",
    "a\\b",
    "C:/a",
    "a\0b",
    ".a",
    "a/.b",
    "a b",
    "é",
    "s3://a",
]
SPANS = [
    (0, None),
    (0, 0),
    (0, 1),
    (3, 7),
    (9, 10),
    (9, 99),
    (10, None),
    (10, 12),
    (99, None),
    (99, 100),
    (5, 5),
    (5, 3),
]


class StorageConformance:
    """Tests of the `Storage` protocol, sentence by sentence.

    A subclass provides a fixture ``storage``: a storage whose root does not exist yet, or is empty; and `reopen`.

    Example:
        class TestMyStorage(StorageConformance):
            @pytest.fixture
            def storage(self, tmp_path):
                return MyStorage(tmp_path / "run")

            def reopen(self, storage):
                return MyStorage(storage.url)

    Attributes:
        large_nbytes: More than the storage sends in one request.
        race_names: How many names 8 threads race for.
    """

    large_nbytes = 24 << 20
    race_names = 40

    def reopen(self, storage: Storage) -> Storage:
        """Return another storage of the same root that shares nothing with this one, as another process has it."""
        raise NotImplementedError

    def test_it_is_a_storage_and_has_a_printable_url(self, storage: Storage) -> None:
        assert isinstance(storage, Storage)
        assert storage.url
        assert storage.url in str(storage.url)

    def test_a_missing_root_is_an_empty_list(self, storage: Storage) -> None:
        assert storage.list() == []
        assert storage.list("checkpoints/") == []

    def test_what_was_written_is_read_by_another_storage_of_the_same_root(self, storage: Storage) -> None:
        storage.write("a/b/c.bin", [b"one", b"two"])
        other = self.reopen(storage)
        assert other.read("a/b/c.bin") == b"onetwo"
        assert other.list() == [Entry("a/b/c.bin", 6)]

    def test_parts_may_be_any_buffers_and_empty_ones(self, storage: Storage) -> None:
        doubles = memoryview(array.array("d", [1.0, 2.0]))
        parts: list[Buffer] = [b"", b"ab", bytearray(b"cd"), memoryview(b"ef"), memoryview(b""), doubles, bytearray()]
        storage.write("mixed", iter(parts))
        assert storage.read("mixed") == b"abcdef" + doubles.tobytes()

    @pytest.mark.parametrize("exclusive", [False, True])
    @pytest.mark.parametrize("parts", [[], [b""]])
    def test_an_object_may_be_empty(self, storage: Storage, parts: list[bytes], exclusive: bool) -> None:
        storage.write("empty", parts, exclusive=exclusive)
        assert storage.list() == [Entry("empty", 0)]
        assert storage.read("empty") == b""
        assert storage.read("empty", start=0, stop=5) == b""
        storage.readinto("empty", memoryview(bytearray(0)))
        with pytest.raises(EOFError):
            storage.readinto("empty", memoryview(bytearray(1)))

    def test_only_one_part_is_held_at_a_time(self, storage: Storage) -> None:
        reused = bytearray(1 << 20)
        count = self.large_nbytes // len(reused) + 1

        def parts() -> Iterator[memoryview]:
            for number in range(count):
                reused[:] = bytes([number % 251]) * len(reused)
                yield memoryview(reused)
            reused[:] = bytes(len(reused))

        storage.write("large", parts())
        target = bytearray(count * len(reused))
        storage.readinto("large", memoryview(target))
        assert all(
            target[number << 20 : (number + 1) << 20] == bytes([number % 251]) * len(reused) for number in range(count)
        )

    def test_one_part_may_be_large(self, storage: Storage) -> None:
        content = os.urandom(1 << 16) * (self.large_nbytes >> 16) + b"tail"
        storage.write("head/large", [b"head", memoryview(content)])
        assert storage.list() == [Entry("head/large", len(content) + 4)]
        target = bytearray(len(content))
        storage.readinto("head/large", memoryview(target), start=4)
        assert target == content
        assert storage.read("head/large", start=len(content), stop=1 << 40) == b"tail"

    def test_lists_are_sorted_by_key_and_cut_by_whole_names(self, storage: Storage) -> None:
        for key in ("b/2", "b/10/x", "b.json", "ba/1", "a", "b/1"):
            storage.write(key, [key.encode()])
        assert [entry.key for entry in storage.list()] == ["a", "b.json", "b/1", "b/10/x", "b/2", "ba/1"]
        assert storage.list("b/") == [Entry("b/1", 3), Entry("b/10/x", 6), Entry("b/2", 3)]
        assert storage.list("b/10/") == [Entry("b/10/x", 6)]
        assert storage.list("c/") == []
        assert storage.list("a/") == []

    @pytest.mark.parametrize(("start", "stop"), SPANS)
    def test_reads_are_clipped_to_the_object(self, storage: Storage, start: int, stop: int | None) -> None:
        storage.write("digits", [b"0123456789"])
        assert storage.read("digits", start=start, stop=stop) == b"0123456789"[start:stop]

    def test_readinto_fills_the_buffer_from_an_offset(self, storage: Storage) -> None:
        storage.write("digits", [b"0123456789"])
        target = bytearray(b"........")
        storage.readinto("digits", memoryview(target)[2:6], start=6)
        assert target == b"..6789.."

    @pytest.mark.parametrize("start", [7, 10, 99])
    def test_readinto_behind_the_end_is_an_eof_error(self, storage: Storage, start: int) -> None:
        storage.write("digits", [b"0123456789"])
        with pytest.raises(EOFError):
            storage.readinto("digits", memoryview(bytearray(4)), start=start)

    def test_reading_what_is_missing_is_file_not_found(self, storage: Storage) -> None:
        for _ in range(2):
            with pytest.raises(FileNotFoundError):
                storage.read("folder/none")
            with pytest.raises(FileNotFoundError):
                storage.read("folder/none", start=2, stop=5)
            with pytest.raises(FileNotFoundError):
                storage.read("folder/none", start=2, stop=2)
            for nbytes in (0, 4):
                with pytest.raises(FileNotFoundError):
                    storage.readinto("folder/none", memoryview(bytearray(nbytes)))
            with pytest.raises(FileNotFoundError):
                storage.read("folder")
            storage.write("folder/some", [b"1"]) if not storage.list() else None

    @pytest.mark.parametrize("exclusive", [False, True])
    def test_nobody_sees_an_object_before_it_is_whole(self, storage: Storage, exclusive: bool) -> None:
        other = self.reopen(storage)
        seen: list[Entry] = []

        def parts() -> Iterator[bytes]:
            for _ in range(3):
                seen.extend(other.list())
                with pytest.raises(FileNotFoundError):
                    other.read("under/way")
                yield b"part"

        storage.write("under/way", parts(), exclusive=exclusive)
        assert seen == []
        assert other.read("under/way") == b"partpartpart"

    @pytest.mark.parametrize("nbytes_before", ["none", "few", "large"])
    def test_parts_that_raise_store_nothing(self, storage: Storage, nbytes_before: str) -> None:
        # An OSError in the parts is no failure of the storage, so it must come out as it went in.
        reason = OSError(5, "the parts failed")

        def parts() -> Iterator[bytes]:
            for _ in range({"none": 0, "few": 1, "large": (self.large_nbytes >> 20) + 1}[nbytes_before]):
                yield bytes(1 << 20)
            raise reason

        with pytest.raises(OSError) as caught:
            storage.write("torn", parts())
        assert caught.value is reason
        assert self.reopen(storage).list() == []
        with pytest.raises(FileNotFoundError):
            storage.read("torn")
        storage.write("torn", [b"now it works"], exclusive=True)
        assert storage.read("torn") == b"now it works"

    def test_parts_of_an_exclusive_write_that_raise_leave_the_name_free(self, storage: Storage) -> None:
        def parts() -> Iterator[bytes]:
            yield b"part"
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            storage.write("claim", parts(), exclusive=True)
        assert storage.list() == []
        storage.write("claim", [b"mine"], exclusive=True)

    @pytest.mark.parametrize("first_exclusive", [False, True])
    def test_an_exclusive_write_never_replaces(self, storage: Storage, first_exclusive: bool) -> None:
        storage.write("claim", [b"first"], exclusive=first_exclusive)
        for contender in (storage, self.reopen(storage)):
            with pytest.raises(FileExistsError):
                contender.write("claim", [b"second, longer"], exclusive=True)
        assert storage.read("claim") == b"first"
        assert storage.list() == [Entry("claim", 5)]

    def test_of_racing_exclusive_writers_exactly_one_wins(self, storage: Storage) -> None:
        racers = 8
        storages = [self.reopen(storage) for _ in range(racers)]
        start = threading.Barrier(racers)

        def race(racer: int) -> list[str]:
            won = []
            for number in range(self.race_names):
                key = f"race/{number:03d}/claim.json"
                start.wait(timeout=60)
                try:
                    storages[racer].write(key, [b"racer ", str(racer).encode()], exclusive=True)
                    won.append(key)
                except FileExistsError:
                    pass
            return won

        with ThreadPoolExecutor(racers) as pool:
            winners = dict(enumerate(pool.map(race, range(racers))))
        claims = sorted((key, racer) for racer, keys in winners.items() for key in keys)
        assert [key for key, _ in claims] == [f"race/{number:03d}/claim.json" for number in range(self.race_names)]
        assert all(storage.read(key) == f"racer {racer}".encode() for key, racer in claims)
        assert [entry.key for entry in storage.list()] == [key for key, _ in claims]

    def test_writers_of_different_names_do_not_disturb_each_other(self, storage: Storage) -> None:
        def work(worker: int) -> None:
            for number in range(5):
                storage.write(f"shared/{worker}-{number}", [b"x" * worker, b"y" * number])
                storage.delete(f"shared/{worker}-{number - 1}") if number % 2 else None

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))
        expected = sorted(Entry(f"shared/{w}-{n}", w + n) for w in range(8) for n in (1, 3, 4))
        assert self.reopen(storage).list() == expected

    def test_what_was_deleted_is_gone_for_everybody(self, storage: Storage) -> None:
        storage.write("a/1", [b"1"])
        storage.write("a/2", [b"2"])
        other = self.reopen(storage)
        assert len(other.list()) == 2
        storage.delete("a/1")
        assert other.list() == [Entry("a/2", 1)]
        with pytest.raises(FileNotFoundError):
            other.read("a/1")
        other.write("a/1", [b"again"], exclusive=True)
        assert storage.read("a/1") == b"again"

    def test_deleting_what_is_missing_is_no_error(self, storage: Storage) -> None:
        storage.delete("never/was")
        storage.write("a/1", [b"1"])
        storage.delete("a/1")
        storage.delete("a/1")
        storage.delete("a/0")
        assert storage.list() == []

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_names_outside_the_grammar_are_refused(self, storage: Storage, key: str) -> None:
        with pytest.raises(UsageError):
            storage.write(key, [b"x"])
        with pytest.raises(UsageError):
            storage.write(key, [b"x"], exclusive=True)
        with pytest.raises(UsageError):
            storage.read(key)
        with pytest.raises(UsageError):
            storage.readinto(key, memoryview(bytearray(1)))
        with pytest.raises(UsageError):
            storage.delete(key)
        assert storage.list() == []

    def test_what_the_server_copies_is_a_whole_object_of_its_own(self, storage: Storage) -> None:
        if not isinstance(storage, CopiesFrom):
            return
        storage.write("a/one", [b"content"])
        other = self.reopen(storage)
        if other is storage or not storage.copy_from(other, "a/one", "b/two"):
            return
        assert other.read("b/two") == b"content"
        storage.delete("a/one")
        assert other.list() == [Entry("b/two", 7)]
        with pytest.raises(FileNotFoundError):
            storage.copy_from(other, "a/one", "b/three")
        assert other.list() == [Entry("b/two", 7)]
