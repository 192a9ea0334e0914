"""How far the exponentials are from the truth, where bfloat16's rounding would hide it."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_exponentials_are_as_exact_as_the_documentation_says(tmp_path: Path) -> None:
    program = tmp_path / "exponentials"
    source = ROOT / "tests/native/exponentials.cc"
    command = ["g++", "-std=c++20", "-O2", "-ffp-contract=off", f"-I{ROOT / 'csrc'}", source]
    subprocess.run([*command, "-o", program], check=True)
    out = subprocess.run([program], check=True, timeout=120, capture_output=True, text=True).stdout

    errors = {name: float(error) for name, error in map(str.split, out.splitlines())}

    assert 0 < errors["fexp"] < 1.25e-7
    assert 0 < errors["fexp2_short"] < 7e-6
