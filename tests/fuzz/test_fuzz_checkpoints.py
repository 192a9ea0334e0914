"""A short run of the fuzzer of Hugging Face folders, and proof that it finds what is planted."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from gpt2_fast.checkpoints import huggingface, safetensors_file, strict_json
from gpt2_fast.checkpoints.base import MappedFile
from gpt2_fast.checkpoints.strict_json import read_object
from tests.fuzz import fuzz_checkpoints, harness


def test_ten_seconds_find_nothing(tmp_path: Path) -> None:
    script = fuzz_checkpoints.__file__
    command = [sys.executable, str(script), "--seconds", "10", "--artifacts", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(r"(\d+) cases, .*: (\d+) accepted, (\d+) kinds of refusal", result.stdout)
    assert found is not None, result.stdout
    cases, accepted, kinds = map(int, found.groups())
    assert cases > 200
    assert 0 < accepted < cases / 2  # the damage must not miss, and must not destroy everything
    assert kinds > 30  # and must reach more than the first check


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
    options = Namespace(seconds=3.0 if wanted is None else 200.0, seed=0, artifacts=tmp_path)
    options.kinds, options.stop_after = 0, 1
    assert harness.fuzz(target, options, tmp_path / "case") == (wanted is not None)
    if wanted is not None:
        assert wanted in capsys.readouterr().err
