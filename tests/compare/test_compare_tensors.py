"""Tensors bit for bit, against NumPy's and the standard library's own steps from number to number."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from tracked_replay.compare.result import TensorComparison, Tolerance
from tracked_replay.compare.tensors import compare_states, compare_tensor
from tracked_replay.errors import RecordingError

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
FLOAT8 = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NAN, INF = float("nan"), float("inf")


def compare(a: object, b: object, dtype: torch.dtype = torch.float32, max_ulp: int = 0) -> TensorComparison:
    return compare_tensor("w", torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype), max_ulp)


def from_bits(bits: list[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor(bits, dtype=INTEGERS[dtype.itemsize]).view(dtype)


def test_equal_tensors_have_nothing_to_tell() -> None:
    a = torch.tensor([[1.0, NAN, -0.0], [INF, 1e-45, -INF]])
    assert compare_tensor("w", a, a.clone()) == TensorComparison(
        name="w",
        equal=True,
        difference="none",
        dtype_a="float32",
        dtype_b="float32",
        shape_a=(2, 3),
        shape_b=(2, 3),
        elements=6,
    )


def test_every_field_of_a_small_example() -> None:
    a = torch.tensor([[1.0, 2.0, 0.0], [NAN, INF, 1e-45]])
    b = torch.tensor([[1.0, 2.5, -0.0], [4.0, 3.0, 3e-45]])
    assert compare_tensor("w", a, b) == TensorComparison(
        name="w",
        equal=False,
        difference="values",
        dtype_a="float32",
        dtype_b="float32",
        shape_a=(2, 3),
        shape_b=(2, 3),
        elements=6,
        differing=5,
        beyond=5,
        largest_absolute=0.5,
        largest_relative=0.5,  # of the subnormals, 1 and 2 units
        largest_ulp=0x7F800000 - 0x40400000,  # infinity to 3
        median_ulp=(1 + (0x40200000 - 0x40000000)) / 2,  # of 1, 1, 2.5 − 2 and infinity − 3
        first_index=(0, 1),
        first_a="2.0 (0x40000000)",
        first_b="2.5 (0x40200000)",
        nan_on_one_side=1,
        signed_zeros=1,
        subnormals=1,
        infinities=1,
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_zeros_of_two_signs_are_neighbours(dtype: torch.dtype) -> None:
    strict = compare([0.0, 1.0], [-0.0, 1.0], dtype)
    assert not strict.equal
    assert (strict.differing, strict.beyond, strict.signed_zeros, strict.largest_ulp) == (1, 1, 1, 1)
    assert (strict.largest_absolute, strict.largest_relative, strict.subnormals) == (0.0, None, 0)
    width = 2 * dtype.itemsize
    assert strict.first_a == f"0.0 (0x{'0' * width})"
    assert strict.first_b == f"-0.0 (0x8{'0' * (width - 1)})"
    near = compare([0.0, 1.0], [-0.0, 1.0], dtype, max_ulp=1)
    assert near.equal
    assert (near.difference, near.differing, near.beyond) == ("values", 1, 0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_payloads_differ_unless_there_is_a_tolerance(dtype: torch.dtype) -> None:
    nan = int(torch.tensor([NAN], dtype=dtype).view(INTEGERS[dtype.itemsize]))
    a, b = from_bits([nan, nan], dtype), from_bits([nan, nan + 1], dtype)
    assert torch.isnan(b).all()
    strict = compare_tensor("w", a, b)
    assert not strict.equal
    assert (strict.differing, strict.beyond, strict.nan_payloads, strict.nan_on_one_side) == (1, 1, 1, 0)
    assert (strict.largest_absolute, strict.largest_ulp, strict.median_ulp) == (None, None, None)
    assert strict.first_index == (1,)
    assert strict.first_b == f"nan (0x{nan + 1:x})"
    assert compare_tensor("w", a, b, max_ulp=1).equal


@pytest.mark.parametrize("max_ulp", [0, 1, 2**70])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_nan_on_one_side_never_passes(dtype: torch.dtype, max_ulp: int) -> None:
    for a, b in ([1.0, NAN], [1.0, 2.0]), ([1.0, INF], [1.0, NAN]):
        for one, other in ((a, b), (b, a)):
            found = compare(one, other, dtype, max_ulp)
            assert not found.equal
            assert (found.beyond, found.nan_on_one_side, found.nan_payloads, found.largest_ulp) == (1, 1, 0, None)


def test_infinities_are_numbers_next_to_the_largest() -> None:
    largest = float(np.finfo(np.float32).max)
    near = compare([INF, -INF], [largest, -largest], max_ulp=1)
    assert near.equal
    assert (near.infinities, near.largest_ulp, near.largest_absolute, near.largest_relative) == (2, 1, None, None)
    opposite = compare([INF], [-INF])
    assert opposite.largest_ulp == 2 * 0x7F800000 + 1
    assert opposite.infinities == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_subnormals_are_counted(dtype: torch.dtype) -> None:
    smallest = torch.finfo(dtype).smallest_normal
    tensor = torch.tensor([smallest, smallest / 2, 0.0, 1.0], dtype=dtype)
    found = compare_tensor("w", tensor, torch.zeros(4, dtype=dtype))
    assert (found.differing, found.subnormals) == (3, 1)
    step = from_bits([1], dtype)
    assert compare_tensor("w", step, torch.zeros(1, dtype=dtype)).largest_ulp == 1
    assert compare_tensor("w", step, -step).largest_ulp == 3


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_distances_against_steps_of_nextafter(dtype: type) -> None:
    starts = np.array([1.0, -1.0, 0.1, 65504.0 / 2, np.finfo(dtype).tiny, -3 * np.finfo(dtype).smallest_subnormal])
    for towards, steps in itertools.product((np.inf, -np.inf), (1, 2, 7)):
        a = starts.astype(dtype)
        b = a
        for _ in range(steps):
            b = np.nextafter(b, dtype(towards))
        # nextafter has one zero: a walk over it is one of our steps longer.
        crossed = (a < 0) & (b > 0)
        found = compare_tensor("w", torch.from_numpy(a), torch.from_numpy(b))
        assert found.largest_ulp == (steps + crossed).max()
        assert found.differing == len(a)
        assert compare_tensor("w", torch.from_numpy(a), torch.from_numpy(b), steps + 1).equal


def test_neighbours_in_bfloat16_against_torch() -> None:
    a = torch.tensor([1.0, -1.0, 0.1, 1e38, -1e-40], dtype=torch.bfloat16)
    b = torch.nextafter(a, torch.full_like(a, INF))
    found = compare_tensor("w", a, b)
    assert (found.differing, found.largest_ulp, found.median_ulp) == (5, 1, 1.0)
    assert found.first_a == "1.0 (0x3f80)"
    assert found.first_b == "1.0078125 (0x3f81)"


def test_distances_in_one_binade_against_math_ulp() -> None:
    generator = np.random.default_rng(0)
    a, b = generator.uniform(1, 2, (2, 101))
    steps = np.array([abs(x - y) / math.ulp(x) for x, y in zip(a, b, strict=True)])  # exact: both are in [1, 2)
    found = compare_tensor("w", torch.from_numpy(a), torch.from_numpy(b))
    assert found.largest_ulp == steps.max()
    assert found.median_ulp == sorted(steps)[50]
    assert found.largest_absolute == np.abs(a - b).max()
    assert found.largest_relative == (np.abs(a - b) / np.maximum(a, b)).max()


def test_the_longest_distance_in_float64_does_not_overflow() -> None:
    largest = np.finfo(np.float64).max
    found = compare([largest, 1.0], [-largest, 1.5], torch.float64)
    assert found.largest_ulp == 2 * 0x7FEFFFFFFFFFFFFF + 1
    assert found.largest_absolute == 0.5  # the other is beyond float64
    assert compare([largest], [-largest], torch.float64, max_ulp=2 * 0x7FEFFFFFFFFFFFFF + 1).equal
    assert not compare([largest], [-largest], torch.float64, max_ulp=2 * 0x7FEFFFFFFFFFFFFF).equal


@pytest.mark.parametrize("dtype", FLOAT8)
def test_all_numbers_of_float8_in_order(dtype: torch.dtype) -> None:
    codes = torch.arange(256).to(torch.uint8)
    values = codes.view(dtype).double()
    codes = codes[~torch.isnan(values)]
    values = values[~torch.isnan(values)].numpy()
    order = np.lexsort((~np.signbit(values), values))  # by value, −0 before +0
    ranks = np.empty(len(order), dtype=int)
    ranks[order] = range(len(order))
    for shift in (1, 5, 100):
        found = compare_tensor("w", codes.view(dtype), codes.roll(shift).view(dtype))
        distances = np.abs(ranks - np.roll(ranks, shift))
        assert found.largest_ulp == distances.max()
        assert found.median_ulp == np.median(distances[distances > 0])
        close = compare_tensor("w", codes.view(dtype), codes.roll(shift).view(dtype), max_ulp=3)
        assert close.beyond == (distances > 3).sum()
    assert compare_tensor("w", codes.view(dtype), codes.view(dtype)).equal


def test_packed_dtypes_are_refused() -> None:
    packed = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(RecordingError, match=r"^w: found float4_e2m1fn_x2; allowed: .*whole bytes$"):
        compare_tensor("w", packed, packed)


@pytest.mark.parametrize(
    ("dtype", "a", "b", "distance"),
    [
        (torch.int64, -(2**63), 2**63 - 1, 2**64 - 1),
        (torch.int64, 2**53, 2**53 + 1, 1),
        (torch.int32, -3, 4, 7),
        (torch.int8, -128, 127, 255),
        (torch.uint8, 0, 255, 255),
        (torch.bool, False, True, 1),
    ],
)
def test_integers_and_bools_have_no_tolerance(dtype: torch.dtype, a: int, b: int, distance: int) -> None:
    found = compare([a, a], [a, b], dtype, max_ulp=2**64)
    assert not found.equal
    assert (found.beyond, found.largest_ulp, found.first_index) == (1, distance, (1,))
    assert found.largest_absolute == float(distance)
    assert (found.subnormals, found.signed_zeros) == (0, 0)
    assert found.first_b is not None
    assert found.first_b.startswith(f"{torch.tensor(b, dtype=dtype).item()} (0x")


def test_unsigned_integers_of_64_bits() -> None:
    a, b = (torch.from_numpy(np.array([value], dtype=np.uint64)) for value in (0, 2**64 - 1))
    assert compare_tensor("w", a, b).largest_ulp == 2**64 - 1


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_part_by_part(dtype: torch.dtype) -> None:
    a = torch.tensor([1 + 1j, 2 + 2j, complex(NAN, 1), 3 + 4j, complex(0.0, 0.0)], dtype=dtype)
    b = torch.tensor([1 + 1j, 2 + 2.5j, complex(NAN, 2), -3 - 4j, complex(0.0, -0.0)], dtype=dtype)
    found = compare_tensor("w", a, b)
    assert (found.elements, found.differing, found.beyond, found.signed_zeros) == (5, 4, 4, 1)
    assert (found.nan_on_one_side, found.nan_payloads) == (0, 0)
    assert (found.largest_absolute, found.largest_relative) == (10.0, 2.0)
    part = torch.float32 if dtype == torch.complex64 else torch.float64
    assert found.largest_ulp == compare([4.0], [-4.0], part).largest_ulp
    assert found.first_a is not None
    assert found.first_a.startswith("2.0+2.0j (0x40000000")
    assert compare_tensor("w", a, b, max_ulp=2**64).beyond == 0
    conjugate = a.conj()
    assert compare_tensor("w", conjugate, conjugate.resolve_conj()).equal
    assert compare_tensor("w", conjugate.imag, conjugate.resolve_conj().imag.clone()).equal


@pytest.mark.parametrize(
    ("a", "b", "difference"),
    [
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), "dtype"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32), "dtype"),
        (torch.zeros(2), torch.zeros(2, 1), "shape"),
        (torch.zeros(0, 2), torch.zeros(0, 3), "shape"),
        (None, torch.zeros(2), "missing in a"),
        (torch.zeros(2), None, "missing in b"),
    ],
)
def test_another_form_is_a_difference(a: Tensor | None, b: Tensor | None, difference: str) -> None:
    found = compare_tensor("w", a, b, max_ulp=10)
    assert not found.equal
    assert found.difference == difference
    assert (found.shape_a, found.shape_b) == tuple(None if side is None else tuple(side.shape) for side in (a, b))
    assert found.dtype_a == (None if a is None else "float32")
    assert found.elements == (a if a is not None else torch.zeros(2)).numel()
    assert found.first_index is None


def test_a_tensor_of_neither_side() -> None:
    with pytest.raises(ValueError, match="neither side"):
        compare_tensor("w", None, None)


def test_single_numbers_and_empty_tensors() -> None:
    single = compare(1.0, 2.0)
    assert (single.elements, single.differing, single.first_index, single.shape_a) == (1, 1, (), ())
    assert single.share == 1.0
    empty = compare_tensor("w", torch.zeros(0, 3), torch.zeros(0, 3))
    assert empty.equal
    assert (empty.elements, empty.share) == (0, 0.0)
    assert compare_tensor("w", torch.zeros(0, dtype=torch.complex64), torch.zeros(0, dtype=torch.complex64)).equal


def test_strides_do_not_matter() -> None:
    a = torch.arange(24.0).reshape(4, 6).T
    b = a.contiguous()
    assert not a.is_contiguous()
    assert compare_tensor("w", a, b).equal
    b[4, 1] = -1.0
    b[5, 3] = -1.0
    found = compare_tensor("w", a[:, ::2], b[:, ::2])
    assert (found.elements, found.differing) == (12, 0)
    found = compare_tensor("w", a[:, 1::2], b[:, 1::2])
    assert (found.differing, found.first_index) == (2, (4, 0))
    parameter = torch.nn.Parameter(b)
    assert compare_tensor("w", a, parameter).differing == 2


def test_the_tolerance_is_inclusive() -> None:
    a = np.ones(4, dtype=np.float32)
    b = (a.view(np.int32) + np.array([0, 1, 3, 4], dtype=np.int32)).view(np.float32)
    for max_ulp, beyond in ((0, 3), (1, 2), (2, 2), (3, 1), (4, 0)):
        found = compare_tensor("w", torch.from_numpy(a), torch.from_numpy(b), max_ulp)
        assert (found.differing, found.beyond, found.equal) == (3, beyond, beyond == 0)
        assert found.median_ulp == 3.0


def test_states_in_the_order_of_the_first_without_what_is_ignored() -> None:
    one, two = torch.ones(2), torch.full((2,), 2.0)
    a = {"parameters/b": one, "parameters/a": one, "momentum/b": one, "buffers/n": one}
    b = {"buffers/m": one, "momentum/b": two, "parameters/a": two, "parameters/b": one}
    found = compare_states(a, b, Tolerance())
    assert [(tensor.name, tensor.difference) for tensor in found] == [
        ("parameters/b", "none"),
        ("parameters/a", "values"),
        ("momentum/b", "values"),
        ("buffers/n", "missing in b"),
        ("buffers/m", "missing in a"),
    ]
    left = compare_states(a, b, Tolerance(ignore=("momentum/*", "*/[mn]", "PARAMETERS/*")))
    assert [tensor.name for tensor in left] == ["parameters/b", "parameters/a"]
    assert all(tensor.equal for tensor in compare_states(a, a, Tolerance()))
    far = compare_states(a, b, Tolerance(max_ulp=0x40000000 - 0x3F800000))
    assert [tensor.name for tensor in far if not tensor.equal] == ["buffers/n", "buffers/m"]
