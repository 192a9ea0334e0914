"""A short run of the fuzzer of Hugging Face folders, and proof that it finds what is planted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gpt2_fast.checkpoints import huggingface, safetensors_file, strict_json
from gpt2_fast.checkpoints.base import MappedFile
from gpt2_fast.checkpoints.strict_json import read_object
from tests.fuzz import fuzz_checkpoints, harness
from tests.fuzz.fuzz_support import findings, short_run


def test_ten_seconds_find_nothing(tmp_path: Path) -> None:
    short_run(fuzz_checkpoints, tmp_path)


def no_layout_check(*arguments: Any) -> None:
    """Tensors may overlap, leave holes and end anywhere."""


def plain_json(data: bytes, path: Path) -> Any:
    """The standard library's errors come through."""
    return json.loads(data)


def leaking(file: MappedFile) -> None:
    """Files are never closed."""


def trusting_index(path: Path) -> Any:
    """Whatever the index says is taken for names of files."""
    return read_object(path, 1 << 20)["weight_map"]


@pytest.mark.parametrize(
    ("place", "name", "fault", "wanted"),
    [
        (safetensors_file, "_check_layout", no_layout_check, "SafetensorError"),
        (strict_json, "parse_object", plain_json, "Error: "),
        (MappedFile, "close", leaking, "files left open"),
        (huggingface, "_read_index", trusting_index, "Error: "),
        (harness, "SECONDS_PER_CASE", 0.0, "s of processor time"),
        (huggingface, "_MASK_BUFFER", re.compile(r".*"), None),
    ],
    ids=["layout", "JSON", "leak", "index", "slow", "no fault that it could see"],
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
    target = fuzz_checkpoints.target()
    monkeypatch.setattr(place, name, fault)
    seconds = 3.0 if wanted is None else 200.0
    assert findings(target, tmp_path, seconds) == (wanted is not None)
    if wanted is not None:
        assert wanted in capsys.readouterr().err
