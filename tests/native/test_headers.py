"""Every header compiles alone, and every room includes only what it may (csrc/README.md)."""

from __future__ import annotations

import re
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
#: room -> the rooms whose headers it may include
MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "engine", "cpu"},
    "engine": {"core", "engine"},
    "cuda": {"core", "engine", "cuda", "simt"},
    "simt": {"core", "engine", "cuda", "simt"},
    "python": {"core", "cpu", "engine", "python", "cuda", "simt"},
}
#: Headers that only one file of another room may include, where a build asks for it.
DOORS = {
    "simt/device.h": {"cuda/device.cuh"},
    "simt/launch.h": {"cuda/launch.h"},
    "simt/python/bindings.h": {"python/module.cc"},
    "cuda/kernels.h": {"python/cuda_backend.cc"},
    "engine/quantize.h": {"cpu/pack_quantized.cc", "cuda/layout.h", "cuda/pack.cc"},
}
# An *.inl.h is part of a translation unit, after a simd_*.h, and is compiled once per ISA there.
HEADERS = sorted(h for h in CSRC.rglob("*.h") if not h.name.endswith(".inl.h"))
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cc", ".cu", ".cuh"})
SIMT = ("-DGPT2_FAST_SIMT", "-I", str(CSRC / "simt" / "include"))


def name(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(CSRC).parts[0]


def binds(path: Path) -> bool:
    return "python" in path.relative_to(CSRC).parts


@pytest.mark.parametrize("header", HEADERS, ids=name)
def test_a_header_compiles_alone(header: Path, compile_commands: dict[str, list[str]]) -> None:
    simulated = room_of(header) in {"cuda", "simt"}
    # One body of device.cuh: nobody else includes it.
    included = CSRC / "cuda" / "device.cuh" if name(header) == "simt/device.h" else header
    room = "core" if simulated else room_of(header)
    isa = re.fullmatch(r"simd_(\w+)\.h", header.name)
    if isa and f"cpu/isa_{isa[1]}.cc" not in compile_commands:
        # Another architecture's intrinsics; .ci/run compiles NEON for aarch64.
        pytest.skip(f"this build has no {isa[1]}")
    model = f"cpu/isa_{isa[1]}.cc" if isa else None
    model = model or next(source for source in compile_commands if source.startswith(f"{room}/"))
    command = [
        *compile_commands[model],
        *("-Werror", "-Wno-unused-function", "-Wno-unused-const-variable"),
        # The build may have found it in an isolated environment that pip has deleted since.
        *(("-isystem", pybind11.get_include()) if binds(header) else ()),
        *(("-isystem", sysconfig.get_path("include")) if binds(header) else ()),
        *(SIMT if simulated else ()),
        *("-fsyntax-only", "-include", str(included), "-x", "c++", "/dev/null"),
    ]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_a_room_includes_only_what_it_may(source: Path) -> None:
    room = room_of(source)
    includes = re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', source.read_text(), re.MULTILINE)
    for quote, target in includes:
        if quote == '"':
            assert (CSRC / target).is_file(), f"{target}: includes are written from csrc"
            entered = target.split("/")[0]
            assert entered in MAY_INCLUDE[room], target
            guarded = {"cuda", "simt", "engine"} if room in {"cpu", "cuda"} else {"cuda", "simt"}
            if room not in {entered, "simt"} and entered in guarded:
                assert name(source) in DOORS[target], target
            if room == "cuda" and entered == "engine":
                assert name(source) in DOORS[target], target
        else:
            foreign = target.startswith(("pybind11", "torch", "ATen", "c10", "Python.h"))
            assert not foreign or binds(source), target
