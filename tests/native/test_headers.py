"""Every header compiles alone, and every room includes only what it may (csrc/README.md)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pybind11
import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
#: room -> the rooms whose headers it may include
MAY_INCLUDE = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "engine": {"core", "engine"},
    "python": {"core", "cpu", "engine", "python"},
}
# An *.inl.h is part of a translation unit, after a simd_*.h, and is compiled once per ISA there.
HEADERS = sorted(h for h in CSRC.rglob("*.h") if not h.name.endswith(".inl.h"))
SOURCES = sorted(p for p in CSRC.rglob("*") if p.suffix in {".h", ".cc"})


def name(path: Path) -> str:
    return path.relative_to(CSRC).as_posix()


@pytest.mark.parametrize("header", HEADERS, ids=name)
def test_a_header_compiles_alone(header: Path, compile_commands: dict[str, list[str]]) -> None:
    room = header.parent.name
    isa = re.fullmatch(r"simd_(\w+)\.h", header.name)
    if isa and f"cpu/isa_{isa[1]}.cc" not in compile_commands:
        pytest.skip(f"this build has no {isa[1]}")
    model = f"cpu/isa_{isa[1]}.cc" if isa else None
    model = model or next(source for source in compile_commands if source.startswith(f"{room}/"))
    command = [
        *compile_commands[model],
        *("-Werror", "-Wno-unused-function", "-Wno-unused-const-variable"),
        # The build may have found it in an isolated environment that pip has deleted since.
        *(("-isystem", pybind11.get_include()) if room == "python" else ()),
        *("-fsyntax-only", "-include", str(header), "-x", "c++", "/dev/null"),
    ]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("source", SOURCES, ids=name)
def test_a_room_includes_only_what_it_may(source: Path) -> None:
    room = source.parent.name
    includes = re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', source.read_text(), re.MULTILINE)
    for quote, target in includes:
        if quote == '"':
            assert (CSRC / target).is_file(), f"{target}: includes are written from csrc"
            assert target.split("/")[0] in MAY_INCLUDE[room], target
        else:
            foreign = target.startswith(("pybind11", "torch", "ATen", "c10", "Python.h"))
            assert not foreign or room == "python", target
