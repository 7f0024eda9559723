"""Memory of a replay that holds all states against one that streams them from disk, the bytes on disk, and the time.

    PYTHONPATH=. python tests/benchmarks/memory.py [--steps 250,500,1000] [--width 0.5] [--batch 8] [--rounds 3]

A ResNet-9 on random images of 8×8 pixels: a step is cheap, and a state (parameters, running statistics and momentum)
is not. Each peak is that of a fresh process: its largest resident memory (VmHWM) over what was resident after imports,
set-up and one training step (VmRSS); on a GPU the largest allocation over the one then. The times are of one process,
in turn.
"""

from __future__ import annotations

import multiprocessing
import re
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measuring import (
    Row,
    SmallImages,
    bytes_under,
    in_turn,
    noise_setup,
    numbers,
    quotients,
    record_training,
    replay,
    run_alone,
)

from tracked_replay.recording import Recording, folder_source
from tracked_replay.recording.checkpoints import FOLDER as CHECKPOINTS
from tracked_replay.recording.generators import FOLDER as GENERATORS

QUICK = {"steps": "10,20", "width": 0.125, "timed": 10, "rounds": 1, "threads": 1}
MODES = ("memory", "stream")
MEGABYTE = 1e6


def measure(
    steps: str = "250,500,1000",
    width: float = 0.5,
    batch: int = 8,
    every: int = 25,
    timed: int = 250,
    rounds: int = 3,
    threads: int = 2,
    device: str = "cpu",
) -> list[Row]:
    """Record, replay in fresh processes, and time both modes.

    Args:
        steps: numbers of training steps T, ascending; the share that streaming takes is promised for the middle one.
        width: of the network.
        batch: examples a step.
        every: `record.every` of one more recording at the middle T.
        timed: steps of the replays that are timed.
        rounds: of everything.
        threads: of torch.
        device: `cpu` or `cuda`.
    """
    sizes = {"width": width, "batch": batch, "threads": threads, "device": device}
    counts = numbers(steps)
    middle = counts[len(counts) // 2]
    rows, streamed = [], {}
    for count in counts:
        peaks, on_disk = _peaks(sizes, count, 1, MODES, rounds)
        streamed[count] = peaks["stream"]
        at = sizes | {"steps": count}
        rows += [
            Row(f"{mode}_{count}", f"peak, {mode} mode, T = {count}", peaks[mode], "MB", None, at) for mode in MODES
        ]
        share = quotients(peaks["stream"], peaks["memory"])
        goal = 0.2 if count == middle else None
        rows.append(Row(f"share_{count}", f"peak of stream ÷ memory mode, T = {count}", share, "", goal, at, peaks))
        rows.append(Row(f"disk_{count}", f"states on disk, T = {count}", [on_disk], "MB", None, at))
    growth = quotients(streamed[counts[-1]], streamed[counts[0]])
    words = f"peak of stream mode, T = {counts[-1]} ÷ T = {counts[0]}"
    rows.append(Row("stream_growth", words, growth, "", 1.1, sizes))
    peaks, on_disk = _peaks(sizes, middle, every, ("stream",), rounds)
    at = sizes | {"steps": middle, "every": every}
    said = f"T = {middle}, every {every}th state kept"
    rows.append(Row("stream_sparse", f"peak, stream mode, {said}", peaks["stream"], "MB", None, at))
    rows.append(Row("disk_sparse", f"states on disk, {said}", [on_disk], "MB", None, at))
    times = _times(sizes, timed, max(rounds, 5) if rounds > 1 else 1)
    slowdown = quotients(times["stream"], times["memory"])
    words = f"time of stream ÷ memory mode, T = {timed}"
    return [*rows, Row("slowdown", words, slowdown, "", 1.1, sizes | {"steps": timed}, times)]


def _peaks(
    sizes: Mapping[str, Any], steps: int, every: int, modes: tuple[str, ...], rounds: int
) -> tuple[dict[str, list[float]], float]:
    """Peak memory of replays by mode, one a round, and the bytes of the states on disk; all in MB."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        record_training(noise_setup(**sizes, steps=steps, task=SmallImages, record__every=every), root)
        on_disk = bytes_under(root / CHECKPOINTS, root / GENERATORS) / MEGABYTE
        peaks: dict[str, list[float]] = {mode: [] for mode in modes}
        for _ in range(rounds):
            for mode in modes:
                peaks[mode].append(fresh_process(_peak, root, sizes, steps, every, mode) / MEGABYTE)
    return peaks, on_disk


def fresh_process(function: Callable[..., int], *arguments: object) -> int:
    """What a function returns in a process that did nothing before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _peak(root: Path, sizes: Mapping[str, Any], steps: int, every: int, mode: str) -> int:
    """Bytes of a replay over what the process held before."""
    setup = noise_setup(**sizes, steps=steps, task=SmallImages, record__every=every)
    setup.take(setup.initial)
    on_gpu = setup.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated() if on_gpu else resident("VmRSS")
    replay(setup, Recording(folder_source(root)), 1, mode)
    return (torch.cuda.max_memory_allocated() if on_gpu else resident("VmHWM")) - base


def resident(field: str) -> int:
    """A size of this process in bytes, as Linux counts it."""
    # Not getrusage, whose maximum a new process takes over from the one that started it.
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise SystemExit(f"memory: /proc/self/status has no {field}; this benchmark needs Linux")
    return int(found[1]) * 1024


def _times(sizes: Mapping[str, Any], steps: int, rounds: int) -> dict[str, list[float]]:
    setup = noise_setup(**sizes, steps=steps, task=SmallImages)
    with tempfile.TemporaryDirectory() as folder:
        recording = record_training(setup, Path(folder))
        works = {mode: lambda mode=mode: replay(setup, recording, 1, mode) for mode in MODES}
        for work in works.values():
            work()
        return in_turn(works, rounds)


if __name__ == "__main__":
    run_alone(measure, QUICK)
