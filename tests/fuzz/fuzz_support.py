"""What the tests of the fuzzers share."""

from __future__ import annotations

import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

from tests.fuzz import harness


def short_run(fuzzer: ModuleType, artifacts: Path) -> None:
    """Ten seconds from the command line: nothing found, and the damage neither mild nor total."""
    command = [sys.executable, str(fuzzer.__file__), "--seconds", "10"]
    command += ["--artifacts", str(artifacts)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    found = re.search(r"(\d+) cases, .*: (\d+) accepted, (\d+) kinds of refusal", result.stdout)
    assert found is not None, result.stdout
    cases, accepted, kinds = map(int, found.groups())
    assert cases > 200
    assert 0 < accepted < cases / 2  # the damage must not miss, and must not destroy everything
    assert kinds > 30  # and must reach more than the first check


def findings(target: harness.Target, scratch: Path, seconds: float = 200.0) -> int:
    """Run in this process until the first finding; how many there were, 0 or 1."""
    options = Namespace(seconds=seconds, seed=0, artifacts=scratch, kinds=0, stop_after=1)
    return harness.fuzz(target, options, scratch / "case")
