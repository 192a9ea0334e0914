"""The simulated device finds faults that were planted in kernels, and says where they are."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.timeout(900)  # the first test waits for 40 compilations
SCHEDULES = ("forward_late", "reverse_early", "random_1", "random_2")
LATE = ("forward_late", "random_1")

#: fault -> what the plain build prints, in every schedule
PLAIN = {
    "missing_sync_block": "result: wrong numbers",
    "divergent_barrier": r"kernel branches: .*divergent barrier: .*cases\.cu:\d+.*cases\.cu:\d+",
    "barrier_after_return": r"kernel leaves_early: .*(after \d+ threads have left|leaves the kernel"
    r" while block)",
    "deadlock": r"kernel waits_for_itself: deadlock: 64 threads wait in cases\.cu:\d+.*64 threads",
    "shared_past_end": r"kernel shifts: block 0 writes shared memory 0 bytes past the end of row",
    "global_past_end": r"kernel fills writes past the end of a device buffer of 400 bytes",
    "misaligned": r"kernel loads_odd: .*load16 .* at cases\.cu:\d+: .*not a multiple of 16",
    "shuffle_in_branches": r"kernel exchanges: .*shuffle at cases\.cu:(\d+) while its warp waits"
    r" in shuffle at cases\.cu:(?!\1)\d+",
    "missing_lane": r"kernel adds: .*(leaves the kernel while its warp waits in warp_sum"
    r"|calls warp_sum at cases\.cu:\d+ after lanes of its warp have left)",
    "missing_sync_warp": "result: wrong numbers",
    "never_waits": r"kernel impatient: .*leaves the kernel without wait_for_previous",
}
#: fault -> what the race build prints, in every schedule
RACE = {
    "missing_sync_block": r"race: kernel reverse: .* race on row byte \d+: .*thread \d+",
    "missing_prefetch_barrier": r"race: kernel pipeline: .* race on dynamic shared memory byte \d+",
    "missing_sync_warp": r"race: kernel passes_on: .* race on word byte \d+",
    "arrival_without_barrier": r"race: kernel last_arriver: read-after-write race .*block \d",
    "arrival_without_fence": r"race: kernel last_arriver: read-after-write race .*block \d",
    "merge_without_ticket": r"race: kernel last_arriver: (read-after-write|write-after-read) race",
    "blocks_write_the_same": r"race: kernel overlapping: write-write race .*block \d thread \d+",
    "reads_before_waiting": r"race: kernel reads: loads what an earlier kernel wrote before wait",
}
#: fault -> what AddressSanitizer prints
ADDRESS = {
    "shared_past_end": r"use-after-poison(.|\n)*in shifts .*cases\.cu:\d+",
    "global_past_end": r"use-after-poison(.|\n)*in fills .*cases\.cu:\d+",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("flavour", ["plain", "race", "address"])
def test_right_kernels_raise_no_alarm(flavour: str, schedule: str, run: Callable[..., str]) -> None:
    for name in run("plain", "list").split():
        assert run(flavour, "case", name, "right", schedule) == "result: right\n", name


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_build_finds(name: str, schedule: str, run: Callable[..., str]) -> None:
    assert re.search(PLAIN[name], run("plain", "case", name, "faulty", schedule))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", RACE)
def test_the_race_build_finds(name: str, schedule: str, run: Callable[..., str]) -> None:
    assert re.search(RACE[name], run("race", "case", name, "faulty", schedule))


@pytest.mark.parametrize("name", ADDRESS)
def test_address_sanitizer_finds(name: str, run: Callable[..., str]) -> None:
    assert re.search(ADDRESS[name], run("address", "case", name, "faulty", "forward_late"))


def test_a_copy_that_is_not_waited_for_lands_late(run: Callable[..., str]) -> None:
    for schedule in SCHEDULES:
        wanted = "wrong numbers" if schedule in LATE else "right"
        assert run("plain", "case", "wait_too_lax", "faulty", schedule) == f"result: {wanted}\n"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_tile_is_overwritten_while_it_is_read(schedule: str, run: Callable[..., str]) -> None:
    wrong = "result: wrong numbers\n"
    assert run("plain", "case", "missing_prefetch_barrier", "faulty", schedule) == wrong


def test_every_case_is_tested(run: Callable[..., str]) -> None:
    no_fault = {"halves_of_words"}
    elsewhere = {"wait_too_lax", "missing_prefetch_barrier"}
    assert set(run("plain", "list").split()) == no_fault | elsewhere | set(PLAIN) | set(RACE)
