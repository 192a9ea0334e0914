"""What the simulated device computes, and the CUDA runtime that it stands for."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.timeout(900)  # the first test waits for 40 compilations
SCHEDULES = ("forward_late", "reverse_early", "random_1", "random_2")
RUNTIME = (
    "work_is_late",
    "random_moments",
    "graph_replay",
    "spoilt_recording",
    "fresh_memory_is_poisoned",
    "copies_are_checked",
    "planned_failures",
    "shared_limits",
    "older_devices",
    "older_code",
    "unknown_attributes",
    "events",
    "other_threads",
    "traffic",
)


@pytest.mark.parametrize("name", RUNTIME)
@pytest.mark.parametrize("flavour", ["plain", "race", "address"])
def test_runtime(flavour: str, name: str, run: Callable[..., str]) -> None:
    assert run(flavour, "runtime", name) == "ok\n"


@pytest.mark.parametrize("flavour", ["plain", "race"])
def test_errors_come_late(flavour: str, run: Callable[..., str]) -> None:
    """Under AddressSanitizer the first of them ends the program."""
    assert run(flavour, "runtime", "late_errors") == "ok\n"


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("flavour", ["plain", "race"])
def test_fragments(flavour: str, schedule: str, run: Callable[..., str]) -> None:
    """Of mma and ldmatrix, against a plain matrix product."""
    assert run(flavour, "matrices", schedule) == "wrong: \n"


def rounding_boundaries() -> np.ndarray:
    """Floats at, just below and just above every number and every tie of both 16-bit types."""
    every = np.arange(65536, dtype=np.uint32)
    bf16 = every << 16
    fp16 = every.astype(np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    ties = [bf16, bf16 | 0x8000, fp16, fp16 + 0x1000, fp16 - 0x1000]
    words = np.concatenate([tie + step for tie in ties for step in np.array([-1, 0, 1], np.int32)])
    small = np.arange(1, 4096, dtype=np.float64) * 2.0**-26  # subnormals of fp16 and their ties
    edges = [np.nextafter(small.astype(np.float32), np.float32(s)) for s in (0, 1)]
    extra = np.concatenate([small.astype(np.float32), *edges, [65504, 65519.996, 65520, -65520]])
    return np.concatenate([words.astype(np.uint32).view(np.float32), extra.astype(np.float32)])


def test_conversions_of_16_bits(programs: dict[str, Path]) -> None:
    floats = rounding_boundaries()
    command = [str(programs["plain"]), "halves"]
    out = subprocess.run(command, input=floats.tobytes(), check=True, capture_output=True).stdout
    widened = np.frombuffer(out[: 65536 * 8], np.float32).reshape(-1, 2)
    every = np.arange(65536, dtype=np.uint32)
    np.testing.assert_array_equal(widened[:, 0].view(np.uint32), every << 16)
    with np.errstate(invalid="ignore", over="ignore"):
        halves = every.astype(np.uint16).view(np.float16)
        np.testing.assert_array_equal(widened[:, 1], halves.astype(np.float32))
        np.testing.assert_array_equal(np.signbit(widened[:, 1]), np.signbit(halves))

        rounded = np.frombuffer(out[65536 * 8 :], np.uint16).reshape(-1, 2)
        nan = np.isnan(floats)
        assert (rounded[nan] == 0x7FFF).all()
        wanted = floats.astype(np.float16).view(np.uint16)
        np.testing.assert_array_equal(rounded[~nan, 1], wanted[~nan])
    words = floats.view(np.uint32).astype(np.uint64)
    half, odd = np.uint64(0x7FFF), (words >> np.uint64(16)) & np.uint64(1)
    nearest = ((words + half + odd) >> np.uint64(16)).astype(np.uint16)
    np.testing.assert_array_equal(rounded[~nan, 0], nearest[~nan])


def rounded_to_fp16(units: int) -> float:
    """The fp16 nearest to units / 2^48, ties to even, for magnitudes below infinity's."""
    magnitude = abs(units)
    # The last place: 2^-24 for subnormals, else 11 bits below the first.
    place = max(24, magnitude.bit_length() - 11)
    quotient, rest = divmod(magnitude, 1 << place)
    half = 1 << (place - 1)
    quotient += rest > half or (rest == half and quotient % 2 == 1)
    return float(quotient) * 2.0 ** (place - 48) * (-1 if units < 0 else 1)


def test_fma_rounds_once(programs: dict[str, Path]) -> None:
    """Also where the sum needs more bits than a double has, and lies beside a tie."""
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 0x7C00, (20000, 3), np.uint16) | rng.choice([0, 0x8000], (20000, 3))
    bits = bits.astype(np.uint16)
    bits[:500] = (0x0401, 0x0401, 0x7801)  # 2^-14 (1 + 2^-10) squared beside 2^15
    bits[500:1000, :2] = 0x0001  # 2^-48
    bits[500:1000, 2] = rng.integers(0, 0x7C00, 500, np.uint16)
    words = (bits[0::2].astype(np.uint32) << 16) | bits[1::2]
    command = [str(programs["plain"]), "fma"]
    out = subprocess.run(command, input=words.tobytes(), check=True, capture_output=True).stdout
    pairs = np.frombuffer(out, np.uint32)
    results = np.empty(len(bits), np.uint16)
    results[0::2], results[1::2] = pairs >> 16, pairs & 0xFFFF
    for (a, b, c), result in zip(
        (bits.view(np.float16).astype(np.float64) * 2.0**24).tolist(),
        results.view(np.float16).tolist(),
        strict=True,
    ):
        wanted = rounded_to_fp16(int(a) * int(b) + (int(c) << 24))
        assert result == wanted if abs(wanted) < 65520 else np.isinf(result), (a, b, c)


def test_speed_is_known(run: Callable[..., str]) -> None:
    """Whole-engine tests count on it: a warp-wide operation in less than ten microseconds."""
    words = run("plain", "speed").replace(",", "").split()
    rates = dict(zip(words[3:-2:2], map(float, words[4:-2:2]), strict=True))
    assert set(rates) == {"barriers", "shuffles", "mma", "starts"}
    assert min(rates.values()) > 3.2, rates
