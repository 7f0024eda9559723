"""Two tensors bit for bit: which elements differ, and by how many representable numbers."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tracked_replay.compare.result import TensorComparison, Tolerance
from tracked_replay.errors import RecordingError

Bits = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_WITHOUT_SIGN = (torch.float8_e8m0fnu,)
_WITHOUT_MINUS_ZERO = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)  # their −0 is the NaN
_PACKED = (torch.float4_e2m1fn_x2,)


def compare_tensor(name: str, a: Tensor | None, b: Tensor | None, max_ulp: int = 0) -> TensorComparison:
    """Compare two tensors of one name by their bits.

    The tolerance is for rounding: it lets floating-point and complex elements pass, integers and bools must agree.
    With a tolerance of at least 1, −0 passes for +0 and a NaN for any other NaN; a NaN never passes for a number.
    A complex number is compared part by part and is as far apart as the part that is further.

    Tensors of another dtype or shape are not compared further; their counts stay 0.

    Args:
        name: what the result is called.
        a, b: of any shape and stride, on any device; ``None`` where that side lacks the tensor.
        max_ulp: elements at most this many representable numbers apart count as equal.

    Raises:
        RecordingError: the tensor holds several numbers a byte, which are not told apart here.
    """
    form = _compare_form(name, a, b)
    if a is None or b is None or not form.equal:
        return form
    if a.dtype in _PACKED:
        raise RecordingError(f"{name}: found {form.dtype_a}; allowed: dtypes whose numbers fill whole bytes")
    if a.device != b.device:
        a, b = a.cpu(), b.cpu()
    bits_a, bits_b = _bits(a), _bits(b)
    if torch.equal(bits_a, bits_b):
        return form
    differs = (bits_a != bits_b).any(dim=1)
    first = int(differs.cpu().numpy().argmax())
    found_a, found_b = _to_numpy(bits_a[differs]), _to_numpy(bits_b[differs])
    compared = replace(
        form,
        difference="values",
        differing=len(found_a),
        first_index=tuple(int(index) for index in np.unravel_index(first, tuple(a.shape))),
        first_a=_text(found_a[0], a.dtype),
        first_b=_text(found_b[0], a.dtype),
        **_measures(found_a, found_b, a.dtype, max_ulp),
    )
    return replace(compared, equal=compared.beyond == 0)


def compare_states(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: Tolerance) -> tuple[TensorComparison, ...]:
    """Compare all tensors of two states by name.

    Returns:
        One comparison a name, in the order of ``a``, then those that only ``b`` has; without the names that a pattern
        of ``tolerance.ignore`` matches.
    """
    names = [*a, *(name for name in b if name not in a)]
    return tuple(
        compare_tensor(name, a.get(name), b.get(name), tolerance.max_ulp)
        for name in names
        if not any(fnmatchcase(name, pattern) for pattern in tolerance.ignore)
    )


def _compare_form(name: str, a: Tensor | None, b: Tensor | None) -> TensorComparison:
    """Compare presence, dtype and shape; all values count as equal."""
    present = b if a is None else a
    if present is None:
        raise ValueError(f"{name}: neither side has the tensor")
    if a is None or b is None:
        difference = "missing in a" if a is None else "missing in b"
    elif a.dtype != b.dtype:
        difference = "dtype"
    else:
        difference = "none" if a.shape == b.shape else "shape"
    return TensorComparison(
        name=name,
        equal=difference == "none",
        difference=difference,
        dtype_a=None if a is None else str(a.dtype).removeprefix("torch."),
        dtype_b=None if b is None else str(b.dtype).removeprefix("torch."),
        shape_a=None if a is None else tuple(a.shape),
        shape_b=None if b is None else tuple(b.shape),
        elements=present.numel(),
    )


def _part(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _bits(tensor: Tensor) -> Tensor:
    """The bits as signed integers, elements × parts: two parts where they are complex, else one."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    parts = 2 if tensor.is_complex() else 1
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view(_INTEGERS[real.itemsize]).reshape(tensor.numel(), parts)


def _to_numpy(bits: Tensor) -> Bits:
    found: Bits = bits.cpu().numpy().view(_BITS[bits.itemsize])
    return found


def _measures(a: Bits, b: Bits, dtype: torch.dtype, max_ulp: int) -> dict[str, Any]:
    """The fields of a TensorComparison that are counted or measured over the differing elements.

    Args:
        a, b: bits of the differing elements, elements × parts.
        dtype: of the tensors.
        max_ulp: the tolerance.
    """
    values_a, values_b = _values(a, dtype), _values(b, dtype)
    ulp = _distance(a, b, dtype)
    nan_a, nan_b = np.isnan(values_a), np.isnan(values_b)
    nan = nan_a | nan_b
    payloads = nan_a & nan_b & (a != b)
    rounded = dtype.is_floating_point or dtype.is_complex
    passed = np.where(nan, payloads & (max_ulp > 0) | (a == b), ulp <= (max_ulp if rounded else 0))
    numbers = ulp.max(axis=1)[~nan.any(axis=1)]
    absolute, relative = _largest(values_a, values_b, None if rounded else ulp[:, 0].astype(np.float64))

    def count(parts: np.ndarray[Any, np.dtype[np.bool_]]) -> int:
        return int(parts.any(axis=1).sum())

    return {
        "beyond": count(~passed),
        "largest_absolute": absolute,
        "largest_relative": relative,
        "largest_ulp": int(numbers.max()) if len(numbers) else None,
        "median_ulp": float(np.median(numbers)) if len(numbers) else None,
        "nan_on_one_side": count(nan_a != nan_b),
        "nan_payloads": count(payloads),
        "signed_zeros": count((values_a == 0) & (values_b == 0) & (a != b)),
        "subnormals": count(_subnormal(values_a, dtype) | _subnormal(values_b, dtype)),
        "infinities": count(np.isinf(values_a) | np.isinf(values_b)),
    }


def _values(bits: Bits, dtype: torch.dtype) -> Floats:
    """The numbers that bits stand for, in float64 (integers beyond 2⁵³ rounded)."""
    found: Floats = torch.from_numpy(bits).view(_part(dtype)).to(torch.float64).numpy()
    return found


def _distance(a: Bits, b: Bits, dtype: torch.dtype) -> Bits:
    """Representable numbers from ``a`` to ``b``; the unsigned type of the same width holds every distance."""
    ordered_a, ordered_b = _ordered(a, dtype), _ordered(b, dtype)
    distance: Bits = np.maximum(ordered_a, ordered_b) - np.minimum(ordered_a, ordered_b)
    return distance


def _ordered(bits: Bits, dtype: torch.dtype) -> Bits:
    """Unsigned integers in the order of the numbers, neighbours 1 apart, −0 just below +0. Meaningless for NaN."""
    top = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    ordered: Bits
    if (dtype.is_floating_point or dtype.is_complex) and dtype not in _WITHOUT_SIGN:
        ordered = np.where(bits & top != 0, ~bits, bits | top)
        return ordered - (ordered >= top) if dtype in _WITHOUT_MINUS_ZERO else ordered
    ordered = bits ^ top if dtype.is_signed and dtype not in _WITHOUT_SIGN else bits
    return ordered


def _largest(a: Floats, b: Floats, distance: Floats | None) -> tuple[float | None, float | None]:
    """Largest finite absolute and relative difference.

    Args:
        a, b: values, elements × parts.
        distance: |a − b| where float64 would round it away; ``None`` takes it from the values.
    """
    if a.shape[1] == 2:
        a, b = a.view(np.complex128), b.view(np.complex128)
    with np.errstate(all="ignore"):
        absolute = np.abs(a - b)[:, 0] if distance is None else distance
        relative = absolute / np.maximum(np.abs(a), np.abs(b))[:, 0]
    found = [values[np.isfinite(values)] for values in (absolute, relative)]
    largest = [float(values.max()) if len(values) else None for values in found]
    return largest[0], largest[1]


def _subnormal(values: Floats, dtype: torch.dtype) -> np.ndarray[Any, np.dtype[np.bool_]]:
    smallest = torch.finfo(_part(dtype)).tiny if dtype.is_floating_point or dtype.is_complex else 0.0
    subnormal: np.ndarray[Any, np.dtype[np.bool_]] = (values != 0) & (np.abs(values) < smallest)
    return subnormal


def _text(bits: Bits, dtype: torch.dtype) -> str:
    """An element's parts as ``value (0xbits)``; the value is the shortest text that reads back to it."""
    part = torch.from_numpy(bits).view(_part(dtype))
    # NumPy has no bfloat16 and float8; float32 holds their numbers exactly.
    narrow = dtype.is_floating_point and dtype not in (torch.float16, torch.float32, torch.float64)
    texts = [str(value) for value in (part.float() if narrow else part).numpy()]
    value = texts[0] if len(texts) == 1 else f"{texts[0]}{'' if texts[1].startswith('-') else '+'}{texts[1]}j"
    return f"{value} ({' '.join(f'0x{int(part):0{2 * bits.itemsize}x}' for part in bits)})"
