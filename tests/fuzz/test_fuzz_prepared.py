"""A short run of the fuzzer of prepared folders, and proof that it finds what is planted."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from gpt2_fast.checkpoints import prepared
from gpt2_fast.checkpoints.base import MappedFile
from gpt2_fast.checkpoints.prepared import PreparedFile
from tests.fuzz import fuzz_prepared
from tests.fuzz.fuzz_support import findings, short_run

if TYPE_CHECKING:
    from pathlib import Path


def test_ten_seconds_find_nothing(tmp_path: Path) -> None:
    short_run(fuzz_prepared, tmp_path)


def plain_json(data: bytes, where: str) -> Any:
    """The standard library's errors come through."""
    return json.loads(data)


def unchecked_sums(file: PreparedFile) -> tuple[int, list[int]]:
    """Words are taken for numbers."""
    words = file._stored.metadata["crc32c"].split(" ")
    return 1 << 20, [int(word, 16) for word in words]


def leaking(file: MappedFile) -> None:
    """Files are never closed."""


@pytest.mark.parametrize(
    ("place", "name", "fault", "wanted"),
    [
        (prepared, "parse_object", plain_json, "Error: "),
        (PreparedFile, "_sums", unchecked_sums, "Error: "),
        (MappedFile, "close", leaking, "files left open"),
        (prepared, "LAYOUT", "cpu-1", None),
    ],
    ids=["JSON", "sums", "leak", "no fault"],
)
def test_a_planted_fault_is_found(
    place: Any,
    name: str,
    fault: Any,
    wanted: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = fuzz_prepared.target()
    monkeypatch.setattr(place, name, fault)
    seconds = 3.0 if wanted is None else 100.0
    assert findings(target, tmp_path, seconds) == (wanted is not None)
    if wanted is not None:
        assert wanted in capsys.readouterr().err
