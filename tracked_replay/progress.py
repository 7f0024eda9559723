"""Progress of long loops: a bar with the time left on a terminal, a log line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 30.0

logger = logging.getLogger(__name__)


def progress(items: Iterable[T], total: int, description: str, unit: str = "step", done: int = 0) -> Iterator[T]:
    """Go through ``items`` and show how far it is on standard error.

    Args:
        items: what is gone through.
        total: how many there are.
        description: shown before the numbers.
        unit: of one item.
        done: how many of them were done before and are not among ``items``.
    """
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, initial=done, desc=description, unit=unit, dynamic_ncols=True)
        return
    started = said = time.monotonic()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES and done + count < total:
            said = now
            left = (now - started) / count * (total - done - count)
            logger.info("%s: %d of %d %ss, about %.0f s left", description, done + count, total, unit, left)
