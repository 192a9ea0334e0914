"""Code for one instruction set must not reach a machine that lacks it.

The trap: an inline function of a header is a weak symbol in every object that includes it. The
linker keeps one copy, and if that is the one compiled with AVX-512 flags, code that looks harmless
dies of SIGILL elsewhere. So an ISA object may define nothing but the getter of its table.
"""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

X86 = {"scalar", "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16"}
ARM = {"scalar", "neon"}
#: A wide register, or a VEX-encoded instruction on a narrow one. Neither is in baseline x86-64.
BEYOND_BASELINE = re.compile(r"%[yz]mm\d|\tv[a-z0-9]+ .*%xmm\d|%k[0-7]\b")


def exported_symbols(path: Path) -> list[tuple[str, str]]:
    """(type letter of nm, demangled name) of every symbol that other objects can see."""
    command = ["nm", "--demangle", "--defined-only", "--extern-only", str(path)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [(line.split(maxsplit=2)[1], line.split(maxsplit=2)[2]) for line in lines]


def beyond_baseline(path: Path) -> list[str]:
    """The first few disassembled lines that a baseline x86-64 machine cannot run."""
    command = ["objdump", "--disassemble", "--no-show-raw-insn", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return [line for line in text.splitlines() if BEYOND_BASELINE.search(line)][:5]


def compiled(tmp_path: Path, source: str, *flags: str) -> Path:
    (tmp_path / "a.cc").write_text(source)
    path = tmp_path / "a.o"
    command = ["g++", "-std=c++20", *flags, "-c", str(tmp_path / "a.cc"), "-o", str(path)]
    subprocess.run(command, check=True)
    return path


def test_every_isa_of_this_architecture_is_built(objects: dict[str, list[Path]]) -> None:
    built = {name.removeprefix("isa_") for name in objects if name.startswith("isa_")}
    assert built == (ARM if platform.machine() == "aarch64" else X86)


def test_an_isa_object_exports_its_table_and_nothing_else(objects: dict[str, list[Path]]) -> None:
    checked = 0
    for target, paths in objects.items():
        if not target.startswith("isa_"):
            continue
        for path in paths:
            symbols = exported_symbols(path)
            assert len(symbols) == 1, f"{path.name} exports {symbols}"
            assert symbols[0][0] in "TRDB", f"{path.name}: weak symbol {symbols[0]}"
            checked += 1
    assert checked >= 2


@pytest.mark.skipif(platform.machine() != "x86_64", reason="NEON is part of the Arm baseline")
@pytest.mark.parametrize("target", ["core", "cpu", "engine", "_C", "isa_scalar"])
def test_baseline_objects_hold_no_avx(objects: dict[str, list[Path]], target: str) -> None:
    assert objects[target]
    for path in objects[target]:
        assert not beyond_baseline(path), path.name


def test_the_module_exports_its_entry_only() -> None:
    from gpt2_fast import _C

    command = ["nm", "--dynamic", "--defined-only", "--extern-only", _C.__file__]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split()[-1] for line in lines] == ["PyInit__C"]


def test_a_shared_inline_function_would_be_seen(tmp_path: Path) -> None:
    source = "inline __attribute__((noinline)) int f() { return 1; }  int table() { return f(); }"
    kinds = sorted(kind for kind, _ in exported_symbols(compiled(tmp_path, source)))
    assert kinds == ["T", "W"]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64 instructions")
@pytest.mark.parametrize("flags", [("-O3", "-mavx2"), ("-O3", "-mavx512f"), ("-O1", "-mavx")])
def test_an_avx_instruction_would_be_seen(tmp_path: Path, flags: tuple[str, ...]) -> None:
    source = "void f(float* x) { for (int i = 0; i < 1024; ++i) x[i] += 1.0f; }"
    assert beyond_baseline(compiled(tmp_path, source, *flags))
    assert not beyond_baseline(compiled(tmp_path, source, "-O3"))
