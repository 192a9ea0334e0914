"""NEON gives the bits of the scalar kernels. Runs on an Arm processor emulated by qemu."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"]
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"

pytestmark = pytest.mark.skipif(
    shutil.which(CROSS) is None or shutil.which(EMULATOR) is None,
    reason=f"needs {CROSS} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)


def checksums(compiler: str, isa: str, folder: Path, *run: str) -> list[str]:
    program = folder / f"isa_bits_{isa}"
    sources = [ROOT / "tests/native/isa_bits.cc", ROOT / f"csrc/cpu/isa_{isa}.cc"]
    table = f"-DGPT2F_TABLE=table_{isa}"
    subprocess.run(
        [compiler, *FLAGS, table, f"-I{ROOT / 'csrc'}", "-static", *sources, "-o", program],
        check=True,
    )
    done = subprocess.run([*run, program], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_neon_gives_the_scalar_bits(tmp_path: Path) -> None:
    neon = checksums(CROSS, "neon", tmp_path, EMULATOR)
    scalar = checksums("g++", "scalar", tmp_path)
    assert len(neon) == 10
    assert neon == scalar
