"""What is no model is said to be none: pointers, error pages, empty and zeroed files, texts, pipes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from sniff_samples import look, shapes

from ckptmgr.diagnose.sniff import sniff
from ckptmgr.errors import CheckpointNotFoundError, StorageError, UsageError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 123456789\n"
ANNEX = b"/annex/objects/SHA256E-s104857600--abcdef.pt\n"


def test_a_pointer_of_git_lfs_tells_the_size_and_the_command(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(LFS)
    artifact = look(tmp_path / "model.pt")
    assert artifact.kind == "lfs-pointer"
    assert artifact.details["nbytes_of_the_content"] == 123456789
    assert "117.7 MiB" in artifact.title
    assert "git lfs pull --include model.pt" in artifact.advice[0]


def test_pointers_of_git_annex_in_a_file_and_as_a_link(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(ANNEX)
    (tmp_path / "b.pt").symlink_to(".git/annex/objects/Xx/Yy/SHA256E-s104857600--abc.pt/SHA256E-s104857600--abc.pt")
    for name in ("a.pt", "b.pt"):
        artifact = look(tmp_path / name)
        assert artifact.kind == "annex-pointer"
        assert artifact.details["nbytes_of_the_content"] == 104857600
        assert artifact.advice[0].startswith("git annex get")


@pytest.mark.parametrize(
    "page",
    [
        b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>",
        b"\xef\xbb\xbf\n <HTML><TITLE>404 Not Found</TITLE>",
        b'<?xml version="1.0"?><!DOCTYPE html PUBLIC ""><html><title>404 Not Found</title>',
        b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>404 Not Found</Code></Error>',
    ],
)
def test_a_page_of_an_error_is_no_download(page: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(page)
    artifact = look(tmp_path / "model.pt")
    assert artifact.kind == "html"
    assert "404 Not Found" in artifact.title
    assert "the download failed" in artifact.problems[0]


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "x.pt").touch()
    assert look(tmp_path / "x.pt").kind == "empty"


def test_a_file_of_zeros_as_a_crash_leaves_it(tmp_path: Path) -> None:
    with (tmp_path / "x.pt").open("wb") as file:
        file.truncate(100 << 20)
    artifact = look(tmp_path / "x.pt")
    assert artifact.kind == "zeros"
    assert artifact.certainty == "certain"
    assert artifact.details["is_sparse"] is True
    assert look(tmp_path / "x.pt", check_nbytes=1 << 20).certainty == "likely"
    with (tmp_path / "x.pt").open("r+b") as file:
        file.seek(90 << 20)
        file.write(b"x")
    assert look(tmp_path / "x.pt").kind == "unknown"


@pytest.mark.parametrize(
    ("name", "content", "kind", "words"),
    [
        ("x.json", b'{"weight_map": {}}', "json", "the index of a sharded model"),
        ("x.json", b'{"model_type": "gpt2", "architectures": ["X"]}', "json", "configuration of a transformers model"),
        ("x.pt", b'{"error": "Access denied"}', "json", "a JSON file with error"),
        ("x.json", b'{"a": ', "json", "a JSON file"),
        ("x.yaml", b"model:\n  lr: 1\n", "yaml", "begins with 'model:'"),
        ("x.pt", b"Entry not found", "text", "begins with 'Entry not found'"),
        ("x.pt", b"I am not a pickle.", "text", ""),
        ("x.pt", b"cat\nmouse\n", "text", ""),
        ("x.pt", b"N.\n", "text", ""),
        ("x.pt", b"12345\n", "text", ""),
        ("x.pt", "Größe 1\n".encode(), "text", ""),
        ("x.png", b"\x89PNG\r\n\x1a\n" + bytes(30), "unknown", "a PNG image"),
        ("x.bin", b"\xde\xad\xbe\xef" * 10, "unknown", "an unknown kind"),
    ],
)
def test_texts_and_unknown_bytes(name: str, content: bytes, kind: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    artifact = look(tmp_path / name)
    assert artifact.kind == kind
    assert words in artifact.title
    if kind == "unknown":
        assert artifact.details["first_bytes"] == content[:16].hex(" ")


def test_a_safetensors_file_and_what_can_be_wrong_with_it(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    state = {
        "a": torch.ones(2, 3),
        "b": torch.ones(4, dtype=torch.bfloat16),
        "c": torch.ones(2).to(torch.float8_e4m3fn),
    }
    save_file(state, file, metadata={"format": "pt", "made_by": "tests"})
    artifact = look(file)
    assert artifact.kind == "safetensors"
    assert shapes(artifact) == {"a": ("float32", (2, 3)), "b": ("bfloat16", (4,)), "c": ("float8_e4m3fn", (2,))}
    assert artifact.details["metadata"] == {"format": "pt", "made_by": "tests"}
    assert artifact.problems == ()
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    assert (
        look(file)
        .problems[0]
        .startswith(f"truncated: it ends after {len(whole) - 3} bytes, and should have {len(whole)}")
    )
    assert look(file).details["expected_nbytes"] == len(whole)
    file.write_bytes(whole[:60])
    assert "its header alone needs" in look(file).problems[0]
    file.write_bytes(whole + b"x")
    assert "1 bytes follow its last tensor" in look(file).problems[0]
    file.write_bytes(whole.replace(b"[2,3]", b"[2,9]"))
    assert "does not fit" in look(file).problems[0]
    file.write_bytes(whole.replace(b"[2,3]", b"[2,x]"))
    assert "cannot be read" in look(file).problems[0]


def test_a_small_file_that_declares_a_large_tensor_is_told_without_memory(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1000000000000000],"data_offsets":[0,4000000000000000]}}'
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header)
    artifact = look(tmp_path / "x")
    assert shapes(artifact) == {"a": ("float32", (10**15,))}
    assert "truncated" in artifact.problems[0]


def test_nothing_there_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="nothing is at"):
        sniff(tmp_path / "no.pt")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(CheckpointNotFoundError, match="a link to nowhere"):
        sniff(tmp_path / "link")
    with pytest.raises(UsageError):
        sniff("")
    with pytest.raises(CheckpointNotFoundError):
        sniff("memory://no/such/thing")


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageError, match="not a regular file"):
        sniff(tmp_path / "pipe")


def test_files_behind_a_url_are_recognised_like_local_ones() -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    fs.pipe_file("/sniff/model.pt", LFS)
    with fs.open("/sniff/a.pt", "wb") as file:
        torch.save({"w": torch.ones(3)}, file)
    fs.pipe_file("/sniff/hf/config.json", b'{"model_type": "x", "architectures": ["Y"]}')
    fs.pipe_file("/sniff/hf/tokenizer.json", b"{}")
    try:
        assert look("memory://sniff/model.pt").kind == "lfs-pointer"
        artifact = look("memory://sniff/a.pt")
        assert artifact.kind == "state-dict"
        assert shapes(artifact) == {"w": ("float32", (3,))}
        assert look("memory://sniff/hf").kind == "hf-model"
        assert look("memory://sniff").kind == "directory"
    finally:
        fs.rm("/sniff", recursive=True)
