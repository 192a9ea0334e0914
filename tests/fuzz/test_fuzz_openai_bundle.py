"""A short run of the fuzzer of OpenAI's layout, and proof that it finds what is planted."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from gpt2_fast.checkpoints import openai_bundle, tensor_bundle
from gpt2_fast.checkpoints.base import MappedFile
from gpt2_fast.errors import CheckpointError
from tests.fuzz import fuzz_openai_bundle, harness
from tests.fuzz.fuzz_support import findings, short_run


def test_ten_seconds_find_nothing(tmp_path: Path) -> None:
    short_run(fuzz_openai_bundle, tmp_path)


def unchecked_name(key: bytes, where: str) -> str:
    """Names may be any bytes."""
    return key.decode("utf-8")


def unchecked_integer(value: Any, field: str, where: str) -> int:
    """A number's field may hold bytes."""
    return -1 if value > 1 << 63 else int(value)


def slow(data: bytes, where: str) -> None:
    """Refuses after 0.04 s."""
    ends = time.process_time() + 0.04
    while time.process_time() < ends:
        pass
    raise CheckpointError(where)


def greedy(data: bytes, where: str) -> None:
    """Refuses after taking more memory than any file is worth."""
    raise CheckpointError(where + str(len(bytes(harness.BYTES_PER_CASE + 1))))


def leaking(file: MappedFile) -> None:
    """Files are never closed."""


@pytest.mark.parametrize(
    ("place", "name", "fault", "wanted"),
    [
        (tensor_bundle, "_tensor_name", unchecked_name, "UnicodeDecodeError"),
        (tensor_bundle, "_integer", unchecked_integer, "TypeError"),
        (openai_bundle, "parse_index", slow, "s of processor time"),
        (openai_bundle, "parse_index", greedy, "bytes of memory"),
        (MappedFile, "close", leaking, "files left open"),
    ],
    ids=["name", "field", "slow", "memory", "leak"],
)
def test_a_planted_fault_is_found(
    place: Any,
    name: str,
    fault: Any,
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = fuzz_openai_bundle.target()
    monkeypatch.setattr(place, name, fault)
    if fault is slow:
        monkeypatch.setattr(harness, "SECONDS_PER_CASE", 0.02)
    assert findings(target, tmp_path) == 1
    assert wanted in capsys.readouterr().err


class Always:
    """The same decision every time."""

    def __init__(self, value: int) -> None:
        self._value = value

    def below(self, limit: int) -> int:
        return self._value % limit


@pytest.mark.parametrize("seed", [0, 1], ids=["one block", "many blocks"])
def test_the_repair_leads_past_the_checksums(seed: int, tmp_path: Path) -> None:
    target = fuzz_openai_bundle.target()
    for part, find, accepted in (
        (b"c_attn", bytearray.find, False),  # a name in the first data block
        (b"wte", bytearray.rfind, True),  # the key of an entry of the index block: means nothing
    ):
        files = {name: bytearray(data) for name, data in target.seeds[seed].items()}
        (index,) = (data for name, data in files.items() if name.endswith(".index"))
        index[find(index, part)] = ord("z")
        assert "crc" in harness.attempt(target, files, tmp_path / "case")
        fuzz_openai_bundle.repair_index(files, Always(2))
        outcome = harness.attempt(target, files, tmp_path / "case")
        assert "crc" not in outcome
        assert (outcome == "accepted") == accepted
