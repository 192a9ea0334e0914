"""Builds the programs of this folder with the C++ compiler alone: no CMake, no CUDA, no Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror"),
    *("-fno-strict-aliasing", "-ffp-contract=off", "-DGPT2_FAST_SIMT"),
    *("-I", str(CSRC), "-I", str(CSRC / "simt/include")),
]
RUNTIME = sorted((CSRC / "simt").glob("*.cc"))
PROGRAM = [HERE / "main.cc", *sorted(HERE.glob("*.cu"))]
#: flavour -> flags of the kernels, flags of everything
FLAVOURS: dict[str, tuple[list[str], list[str]]] = {
    "plain": ([], []),
    "race": (["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"], []),
    "address": ([], ["-fsanitize=address"]),
}

Run = Callable[..., str]


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    # Whoever installed a wheel need not have one; .ci/run has, for it builds the package first.
    if found is None:
        pytest.skip("no C++ compiler: set CXX, or install g++")
    return found


def build(compile_one: Callable[[tuple[Path, Path, list[str]]], None], folder: Path) -> None:
    """All objects of all flavours, the same ones only once, two at a time."""
    jobs: dict[Path, tuple[Path, Path, list[str]]] = {}
    for flavour, (of_kernels, of_all) in FLAVOURS.items():
        for source in RUNTIME + PROGRAM:
            flags = of_all + (of_kernels if source.suffix == ".cu" else [])
            target = object_path(folder, flavour, source)
            jobs.setdefault(target, (source, target, flags))
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, jobs.values()))


def object_path(folder: Path, flavour: str, source: Path) -> Path:
    of_kernels, of_all = FLAVOURS[flavour]
    special = of_all or (of_kernels and source.suffix == ".cu")
    return folder / f"{source.stem}.{flavour if special else 'plain'}.o"


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Flavour -> program."""
    cxx = compiler()
    folder = tmp_path_factory.mktemp("simt")

    def compile_one(job: tuple[Path, Path, list[str]]) -> None:
        source, target, flags = job
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        command = [cxx, *FLAGS, *flags, *language, "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, check=False, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    build(compile_one, folder)
    linked = {}
    for flavour, (_, of_all) in FLAVOURS.items():
        linked[flavour] = folder / flavour
        objects = [str(object_path(folder, flavour, source)) for source in RUNTIME + PROGRAM]
        subprocess.run([cxx, *of_all, *objects, "-ldl", "-o", str(folder / flavour)], check=True)
    return linked


@pytest.fixture
def run(programs: dict[str, Path]) -> Run:
    """Runs a program with words as arguments and returns what it prints."""

    def start(flavour: str, *words: str) -> str:
        command = [str(programs[flavour]), *words]
        # No leak check: a kernel that fails is dropped with what its threads hold.
        quiet = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        result = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=60, env=quiet
        )
        assert result.returncode == 0 or flavour == "address", result.stdout + result.stderr
        return result.stdout + result.stderr

    return start
