from pathlib import Path

import pytest
from run_samples import create_run, save, start
from safetensors.numpy import load_file

from ckptmgr.errors import CorruptCheckpointError, StorageError
from ckptmgr.format.digest import BLOCK_NBYTES
from ckptmgr.format.layout import CheckpointId
from ckptmgr.format.payload import FilePayload, TensorPayload
from ckptmgr.run.catalog import Catalog
from ckptmgr.run.prune import collect_torn, delete_checkpoints
from ckptmgr.run.reader import CheckpointReader
from ckptmgr.run.verify import verify_checkpoint
from ckptmgr.storage.local import LocalStorage


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def storage(root: Path) -> LocalStorage:
    storage = LocalStorage(root)
    create_run(storage)
    start(storage)
    return storage


ID = CheckpointId(10, 1, 0)


def test_what_is_committed_reads_back_and_any_safetensors_reader_agrees(storage: LocalStorage, root: Path) -> None:
    manifest = save(storage, 1, 10)
    reader = CheckpointReader(storage, manifest)
    arrays = load_file(root / ID.folder / "model.safetensors")
    for tensor in manifest.tensors:
        assert bytes(reader.read_tensor(tensor)) == arrays[tensor.name].tobytes()
    assert reader.read_state()["entries"]["model"]["handler"] == "module"
    assert all(file.header_nbytes % 4096 == 0 for file in manifest.files)


def test_every_flipped_byte_and_every_truncation_is_found(storage: LocalStorage, root: Path) -> None:
    save(storage, 1, 10)
    for path in sorted((root / ID.folder).iterdir()):
        data = path.read_bytes()
        # The header is mostly padding; a sample of it is enough here, the campaign flips them all.
        positions = [*range(0, min(len(data), 300)), *range(max(0, len(data) - 100), len(data))]
        for index in positions:
            path.write_bytes(data[:index] + bytes([data[index] ^ 1]) + data[index + 1 :])
            assert verify_checkpoint(Catalog(storage), ID), f"{path.name}: flip at {index}"
            path.write_bytes(data[:index])
            assert verify_checkpoint(Catalog(storage), ID), f"{path.name}: cut at {index}"
        path.write_bytes(data + b"x")
        assert verify_checkpoint(Catalog(storage), ID), f"{path.name}: longer"
        path.write_bytes(data)
    assert verify_checkpoint(Catalog(storage), ID) == []


def test_damage_names_the_tensor(storage: LocalStorage, root: Path) -> None:
    manifest = save(storage, 1, 10)
    path = root / ID.folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (damage,) = verify_checkpoint(Catalog(storage), ID)
    assert damage.tensor == "model/weight"
    with pytest.raises(CorruptCheckpointError, match="'weight'"):
        CheckpointReader(storage, manifest).read_tensor(manifest.tensors[1])


def test_a_tensor_of_several_blocks_is_checked_block_by_block(storage: LocalStorage, root: Path) -> None:
    data = bytearray(2 * BLOCK_NBYTES + 5)
    tensor = TensorPayload(name="big", entry="model", dtype="U8", shape=(len(data),), data=memoryview(data))
    manifest = save(storage, 1, 10, files=[FilePayload("model.safetensors", tensors=(tensor,))])
    assert len(manifest.tensors[0].blocks) == 3 * 32
    path = root / ID.folder / "model.safetensors"
    with path.open("r+b") as file:
        file.seek(manifest.tensors[0].offset + BLOCK_NBYTES + 1)
        file.write(b"x")
    (damage,) = verify_checkpoint(Catalog(storage), ID)
    assert str(manifest.tensors[0].offset + BLOCK_NBYTES) in damage.problem


def test_a_save_that_fails_leaves_the_one_before_and_its_leftovers_are_collected(storage: LocalStorage) -> None:
    save(storage, 1, 10)

    class Full:
        url = storage.url
        list, read, readinto, delete = storage.list, storage.read, storage.readinto, storage.delete

        def write(self, key: str, parts: object, *, exclusive: bool = False) -> None:
            if key.endswith("state.json"):
                raise StorageError("no space left")
            storage.write(key, parts, exclusive=exclusive)  # type: ignore[arg-type]

    with pytest.raises(StorageError):
        save(Full(), 1, 20, number=1)  # type: ignore[arg-type]
    catalog = Catalog(storage)
    assert catalog.latest().step == 10
    assert [id.step for id in catalog.torn] == [20]
    collect_torn(catalog, attempt=1)
    assert Catalog(storage).torn == []


def test_deleting_removes_the_whole_folder_and_nothing_else(storage: LocalStorage, root: Path) -> None:
    save(storage, 1, 10)
    save(storage, 1, 20, number=1)
    (root / "notes.txt").write_text("mine")
    delete_checkpoints(Catalog(storage), [ID])
    assert not (root / ID.folder).exists()
    assert (root / "notes.txt").exists()
    assert Catalog(storage).latest().step == 20


def test_nothing_is_deleted_that_a_kept_manifest_refers_to(storage: LocalStorage, root: Path) -> None:
    import msgspec

    from ckptmgr.format.layout import manifest_key
    from ckptmgr.format.record import encode_record

    old = save(storage, 1, 10)
    later = CheckpointId(20, 1, 1)
    reuses = msgspec.structs.replace(old, checkpoint=str(later), step=20)
    storage.write(manifest_key(later), [encode_record(reuses)])
    delete_checkpoints(Catalog(storage), [ID])
    collect_torn(Catalog(storage), attempt=1)
    assert verify_checkpoint(Catalog(storage), later) == []
    assert not (root / ID.folder / "manifest.json").exists()
