"""Pictures small enough to be held by a page, each once, as CSS classes with a data URI."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.image
import numpy as np

_SIDES = (128, 96, 64, 48, 32, 24, 16)  # pixels of the longer side
_NO_METADATA: dict[str, Any] = {"Software": None}
_SHARP_UP_TO = 96  # pixels; an image that is smaller is enlarged, and its pixels are to be seen


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
    """Return an image, uint8 (H, W) or (H, W, 3), with at most `side` pixels a side: means of equal blocks."""
    step = -(-max(pixels.shape[:2]) // side)
    if step <= 1:
        return pixels
    total = pixels.astype(np.float64)
    for axis in (0, 1):
        starts = np.arange(0, pixels.shape[axis], step)
        sizes = np.diff(np.append(starts, pixels.shape[axis]))
        shape = [1] * pixels.ndim
        shape[axis] = len(sizes)
        total = np.add.reduceat(total, starts, axis=axis) / sizes.reshape(shape)
    return np.round(total).astype(np.uint8)


def png_bytes(pixels: np.ndarray) -> bytes:
    """Return an image, uint8 (H, W) or (H, W, 3), as PNG; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    rgb = pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)
    matplotlib.image.imsave(
        buffer, np.ascontiguousarray(rgb), format="png", metadata=_NO_METADATA, pil_kwargs={"optimize": True}
    )
    return buffer.getvalue()


def picture_rules(pictures: Mapping[str, np.ndarray], budget: int) -> str:
    """Return CSS that gives each class its picture as background.

    `pictures`: class name → uint8 (H, W) or (H, W, 3). All are shrunk further until their data URIs are at most
    `budget` characters; the smallest size is kept even where it is not enough.
    """
    encoded: Sequence[str] = []
    for side in _SIDES:
        encoded = [base64.b64encode(png_bytes(shrunk(pixels, side))).decode("ascii") for pixels in pictures.values()]
        if sum(map(len, encoded)) <= budget:
            break
    return "\n".join(
        f".{name}{{background-image:url(data:image/png;base64,{data})"
        f"{';image-rendering:pixelated' if max(pixels.shape[:2]) <= _SHARP_UP_TO else ''}}}"
        for (name, pixels), data in zip(pictures.items(), encoded, strict=True)
    )
