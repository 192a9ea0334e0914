"""The pool's barrier and its queues of work, in a program of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_lanes_meet_and_share_their_work(tmp_path: Path) -> None:
    program = tmp_path / "lanes"
    sources = [ROOT / "tests/native/lanes.cc", ROOT / "csrc/core/thread_pool.cc"]
    command = ["g++", "-std=c++20", "-O2", f"-I{ROOT / 'csrc'}", "-pthread", *sources]
    subprocess.run([*command, "-o", program], check=True)
    subprocess.run([program], check=True, timeout=120)
