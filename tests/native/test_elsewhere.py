"""Kernels for processors that this one is not give the bits of the scalar kernels: NEON on an Arm
processor emulated by qemu, AVX-512 with its instructions written out in C++, AVX-VNNI likewise in
those of AVX2."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from gpt2_fast import _C

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O0", "-ffp-contract=off", "-fno-math-errno", "-fno-strict-aliasing"]
CROSS = "aarch64-linux-gnu-g++"
EMULATOR = "qemu-aarch64"
#: Products, layer norm, GELU and attention of two sizes in two precisions, each quantised one
#: packed and with 1 ... 9 rows, an int8 cache of two head sizes and attention over it, sampling
#: with its log-probabilities.
RESULTS = 5 * 2 + 10 * 2 + 2 * 2 + 2
SHARED = ["tests/native/isa_bits.cc", "csrc/cpu/pack_quantized.cc", "csrc/engine/quantize.cc"]


def checksums(
    isa: str, folder: Path, *flags: str, compiler: str = "g++", run: str = ""
) -> list[str]:
    program = folder / f"isa_bits_{isa}"
    sources = [ROOT / path for path in (*SHARED, f"csrc/cpu/isa_{isa}.cc")]
    table = f"-DGPT2F_TABLE=table_{isa}"
    subprocess.run(
        [compiler, *FLAGS, *flags, table, f"-I{ROOT / 'csrc'}", "-static", *sources, "-o", program],
        check=True,
    )
    command = [*run.split(), str(program)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def scalar(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    lines = checksums("scalar", tmp_path_factory.mktemp("scalar"))
    assert len(lines) == RESULTS
    return lines


@pytest.mark.skipif(
    shutil.which(CROSS) is None or shutil.which(EMULATOR) is None,
    reason=f"needs {CROSS} and {EMULATOR} (Debian: g++-aarch64-linux-gnu, qemu-user)",
)
def test_neon_gives_the_scalar_bits(scalar: list[str], tmp_path: Path) -> None:
    assert checksums("neon", tmp_path, compiler=CROSS, run=EMULATOR) == scalar


@pytest.mark.skipif("avx2" not in _C.isas(), reason="needs a processor with AVX2")
def test_avx2_vnni_gives_the_scalar_bits(scalar: list[str], tmp_path: Path) -> None:
    emulated = ("-mavx2", "-mfma", "-include", str(ROOT / "tests/native/avx_vnni_in_avx2.h"))
    assert checksums("avx2_vnni", tmp_path, *emulated) == scalar


@pytest.mark.parametrize(
    ("isa", "extensions"),
    [
        ("avx512", ()),
        ("avx512_vnni", ("-D__AVX512VNNI__",)),
        ("avx512_bf16", ("-D__AVX512VNNI__", "-D__AVX512BF16__")),
    ],
)
def test_avx512_gives_the_scalar_bits(
    isa: str, extensions: tuple[str, ...], scalar: list[str], tmp_path: Path
) -> None:
    in_c = f"-I{ROOT / 'tests/native/avx512_in_c'}"
    assert checksums(isa, tmp_path, in_c, *extensions) == scalar
