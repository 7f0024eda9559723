"""Checkpoints go to the disk directly, where the system allows, and are whole either way."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tracked_replay.recording import files
from tracked_replay.recording.files import PAGE, page_memory, write_aside, write_directly

SIZES = [0, 1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 17, 5 * 2**20 + 3]
CONTENT = bytes(range(251)) * 21000


def filled(size: int) -> memoryview:
    memory = page_memory(size)
    memory[:size] = CONTENT[:size]
    return memory


def resident(path: Path) -> int:
    command = ["fincore", "--noheadings", "--output=PAGES", str(path)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("fincore"), reason="fincore (util-linux) counts pages")
def test_a_file_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(CONTENT[: 200 * PAGE])
    command = ["stat", "-f", "-c", "%T", str(tmp_path)]
    kind = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if kind == "tmpfs" or not resident(tmp_path / "plain"):
        pytest.skip(f"a file system in memory, or one that keeps nothing there: {kind}")
    write_directly(tmp_path / "file", filled(200 * PAGE), 200 * PAGE)
    assert resident(tmp_path / "file") == 0
    assert (tmp_path / "file").read_bytes() == CONTENT[: 200 * PAGE]


def refuse_at_opening(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def open_(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(files.os, "open", open_)


def refuse_at_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = files.write_all
    calls = []

    def write_all(file: int, content: memoryview) -> int:
        calls.append(file)
        if len(calls) % 2:
            real(file, content[: len(content) // 2])
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, content)

    monkeypatch.setattr(files, "write_all", write_all)


def in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(files.os, "write", lambda file, content: real(file, content[: 64 * PAGE]))


def without_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT", raising=False)


def without_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(files.mmap, "MAP_ANONYMOUS", raising=False)


SYSTEMS = {
    "as it is": lambda _: None,
    "refused at opening": refuse_at_opening,
    "refused at writing": refuse_at_writing,
    "in pieces": in_pieces,
    "without the flag": without_the_flag,
    "without the memory": without_the_memory,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("system", SYSTEMS)
def test_a_file_has_all_its_bytes(system: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if system == "refused at writing" and not hasattr(os, "O_DIRECT"):
        pytest.skip("this system has no such way to write")
    SYSTEMS[system](monkeypatch)
    path = tmp_path / "new folder" / "file"
    write_directly(path, filled(size), size)
    assert path.read_bytes() == CONTENT[:size]
    path.write_bytes(CONTENT)  # left by a killed process, longer than what comes
    write_directly(path, filled(size), size)
    assert path.read_bytes() == CONTENT[:size]


def test_an_error_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: int, content: memoryview) -> int:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "folder").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        write_directly(tmp_path / "folder" / "file", filled(7), 7)
    (tmp_path / "folder").unlink()
    monkeypatch.setattr(files, "write_all", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_directly(tmp_path / "file", filled(7), 7)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_an_error_of_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
        write_directly(path, filled(7), 7)
    aside = tmp_path / "other"
    with pytest.raises(OSError, match=rf"No space left on device: '{aside}'"):
        write_aside(aside, lambda _: os.write(os.open("/dev/full", os.O_WRONLY), b"content"))
