"""Checkpoints do not stay in the machine's memory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tracked_replay.recording.files import let_go_from_memory

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
    let_go_from_memory(path)
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    let_go_from_memory(path)
    assert resident(path) == 0
    assert path.read_bytes() == bytes(PAGES * 4096)


def test_a_system_without_the_call_keeps_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    path = tmp_path / "file"
    path.write_bytes(b"content")
    let_go_from_memory(path)
    assert path.read_bytes() == b"content"
