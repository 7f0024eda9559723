"""Checkpoints do not stay in the machine's memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tracked_replay.recording.files import PageCache, write_aside, write_new

PAGES = 200


def resident(path: Path) -> int:
    command = ["fincore", "--noheadings", "--output=PAGES", str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("fincore"), reason="fincore (util-linux) counts pages")
def test_a_file_that_is_on_the_disk_leaves_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(PAGES * 4096))
    command = ["stat", "-f", "-c", "%T", str(tmp_path)]
    kind = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if kind == "tmpfs" or resident(path) != PAGES:
        pytest.skip(f"a file system in memory, or with pages of another size: {kind}")
    pages = PageCache()
    with path.open("rb") as stream:
        pages.let_go(stream.fileno())
        os.fsync(stream.fileno())
    pages.close()
    assert resident(path) == 0
    assert path.read_bytes() == bytes(PAGES * 4096)


def test_one_file_at_most_is_kept_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    pages = PageCache()
    for name in "abcd":
        write_new(tmp_path / name, [name.encode()], pages.let_go)
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == before + 1
    pages.close()
    if sys.platform == "linux":
        assert len(os.listdir("/proc/self/fd")) == before
    assert [(tmp_path / name).read_text() for name in "abcd"] == list("abcd")


def test_a_system_without_the_call_keeps_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    pages = PageCache()
    write_new(tmp_path / "file", [b"content"], pages.let_go)
    pages.close()
    assert (tmp_path / "file").read_bytes() == b"content"


PARTS = [b"", b"one", memoryview(bytes(range(256)) * 40), b"", *(bytes([number % 256]) * 3 for number in range(1500))]


@pytest.mark.parametrize("system", ["whole", "in pieces", "without the call"])
def test_a_file_has_all_its_parts(system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "without the call":
        monkeypatch.delattr(os, "writev", raising=False)
    elif system == "in pieces":
        monkeypatch.setattr(os, "writev", lambda file, parts: os.write(file, b"".join(parts)[:1000]), raising=False)
    path = tmp_path / "new folder" / "file"
    path.parent.mkdir()
    path.write_bytes(b"left by a killed process, longer than what comes" * 1000)
    path.parent.rename(tmp_path / "other")  # the folder is made, or what is there is written over
    write_new(path, PARTS)
    write_new(tmp_path / "other" / "file", PARTS)
    assert path.read_bytes() == (tmp_path / "other" / "file").read_bytes() == b"".join(PARTS)


def test_an_error_leaves_no_file(tmp_path: Path) -> None:
    def fail(file: int) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_new(tmp_path / "file", [b"content"], fail)
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        write_new(tmp_path / "folder" / "file", [b"content"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_an_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_new(path, [b"content"])
    aside = tmp_path / "other"
    with pytest.raises(OSError, match=rf"No space left on device: '{aside}'"):
        write_aside(aside, lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"content"))
