"""What the build left behind: the folder with the objects, and the commands that made them."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _is_release(folder: Path) -> bool:
    cache = folder / "CMakeCache.txt"
    text = cache.read_text() if cache.is_file() else ""
    return (
        "CMAKE_BUILD_TYPE:STRING=Release\n" in text
        and "GPT2_FAST_SANITIZE:STRING=\n" in text
        and "GPT2_FAST_SIMT:STRING=OFF\n" in text
        and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" in text
    )


@pytest.fixture(scope="session")
def build_folder() -> Path:
    """The newest release build of this source tree, or of GPT2_FAST_BUILD_DIR."""
    chosen = os.environ.get("GPT2_FAST_BUILD_DIR")
    folders = [Path(chosen)] if chosen else list((ROOT / "build").glob("*"))
    releases = [folder for folder in folders if _is_release(folder)]
    if not releases:
        if chosen:
            pytest.fail(f"GPT2_FAST_BUILD_DIR={chosen} is no release build of {ROOT}")
        # Objects and commands of a build are looked at, which an installed wheel has not.
        pytest.skip("no release build in build/: pip install -e . makes one")
    return max(releases, key=lambda folder: (folder / "CMakeCache.txt").stat().st_mtime)


@pytest.fixture(scope="session")
def compile_commands(build_folder: Path) -> dict[str, list[str]]:
    """Source path below csrc -> the words of its compile command, without source and output."""
    commands = {}
    for entry in json.loads((build_folder / "compile_commands.json").read_text()):
        source = Path(entry["file"])
        words = shlex.split(entry["command"])
        united = [source]
        if source.parent.name == "Unity":
            united = [Path(path) for path in re.findall(r'#include "(.*)"', source.read_text())]
        for path in united:
            flags = words[: words.index("-o")]
            commands[path.relative_to(ROOT / "csrc").as_posix()] = flags
    return commands


@pytest.fixture(scope="session")
def objects(build_folder: Path) -> dict[str, list[Path]]:
    """CMake target without its prefix gpt2f_ -> its object files."""
    found: dict[str, list[Path]] = {}
    for path in sorted((build_folder / "CMakeFiles").glob("*.dir/**/*.o")):
        target = path.relative_to(build_folder / "CMakeFiles").parts[0].removesuffix(".dir")
        found.setdefault(target.removeprefix("gpt2f_"), []).append(path)
    return found
