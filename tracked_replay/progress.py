"""Progress bars with the time left; nothing where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(items: Iterable[T], total: int, description: str, unit: str = "step") -> Iterable[T]:
    """Go through ``items`` with a bar on standard error, if that is a terminal."""
    bar: Iterable[T] = tqdm(items, total=total, desc=description, unit=unit, disable=None, dynamic_ncols=True)
    return bar
