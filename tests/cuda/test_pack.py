"""Packing for CUDA: every element in its place, padding neutral, what cannot be held refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from .arrays import DTYPES, array_of, normal
from .packed import GROUPS, PRECISIONS, pack

SHAPES = [(1, 1), (16, 64), (17, 65), (50, 100), (33, 160), (9, 6400)]  # outputs, inputs

each_precision = pytest.mark.parametrize("precision", PRECISIONS)
each_shape = pytest.mark.parametrize("shape", SHAPES)


@each_shape
@pytest.mark.parametrize("stored", list(DTYPES))
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_halves_are_rounded_to_nearest_even(
    simt: Any, shape: tuple[int, int], stored: str, precision: str
) -> None:
    weight = normal(*shape).to(DTYPES[stored])

    elements, _ = pack(simt, weight, precision).elements()

    expected = np.zeros(elements.shape, np.uint16)
    expected[: shape[0], : shape[1]] = array_of(weight.to(DTYPES[precision]))
    np.testing.assert_array_equal(elements, expected)


@each_precision
@each_shape
def test_both_orientations_and_any_lanes_give_the_same_words(
    simt: Any, shape: tuple[int, int], precision: str
) -> None:
    weight = normal(*shape)
    words = pack(simt, weight, precision).words

    for lanes in (1, 3):
        for transposed in (True, False):
            source = weight if transposed else weight.T.contiguous()
            again = pack(simt, source, precision, transposed=transposed, lanes=lanes).words
            np.testing.assert_array_equal(again, words)


@each_shape
@pytest.mark.parametrize("precision", list(GROUPS))
def test_quantised_weights_are_near(simt: Any, shape: tuple[int, int], precision: str) -> None:
    weight = normal(*shape)
    weight[:, ::40] *= 50  # an outlier must cost its own group only
    group = GROUPS[precision]
    padded = torch.nn.functional.pad(weight, (0, -shape[1] % group))
    packed = pack(simt, weight, precision)

    near = torch.nn.functional.pad(packed.weight(), (0, -shape[1] % group))
    error = (near - padded).abs().unflatten(1, (-1, group)).amax(2)
    largest = padded.abs().unflatten(1, (-1, group)).amax(2)
    # Half a step, and the scale's own rounding; int4 may clip the largest by its quarter.
    assert (error <= largest * (0.6 / 127 if precision == "int8" else 0.32)).all()
    q, scales = packed.elements()
    assert (q[shape[0] :] == 0).all()
    assert (scales[shape[0] :] == 0).all()
    assert (q[:, shape[1] :] == 0).all()


@each_precision
@pytest.mark.parametrize("stored", list(DTYPES))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_the_first_non_finite_element_is_named(
    simt: Any, value: float, stored: str, precision: str
) -> None:
    weight = normal(33, 70).to(DTYPES[stored])
    weight[32, 69] = weight[20, 3] = weight[20, 68] = value

    for lanes in (1, 2):
        with pytest.raises(ValueError, match=f"^{20 * 70 + 3}$"):
            pack(simt, weight, precision, lanes=lanes)


@pytest.mark.parametrize(("value", "fits"), [(65519.0, True), (65520.0, False), (-1e30, False)])
def test_fp16_refuses_what_would_become_infinite(simt: Any, value: float, fits: bool) -> None:
    weight = normal(3, 70)
    weight[2, 5] = value

    for precision in ("bf16", "int8", "int4"):
        pack(simt, weight, precision)
    if fits:
        assert pack(simt, weight, "fp16").weight()[2, 5] == 65504
    else:
        with pytest.raises(ValueError, match=f"^{2 * 70 + 5}$"):
            pack(simt, weight, "fp16")
