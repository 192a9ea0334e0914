"""Sizes a reader can hold: files up to 500 lines, kernels up to 300, Python functions up to 60."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {".py", ".pyi", ".h", ".cc", ".cu", ".cuh", ".cmake", ".md", ".toml"}
ROOMS = (".ci", "benchmarks", "cmake", "csrc", "docs", "gpt2_fast", "tests", "tools")
FILE_LINES, KERNEL_LINES, FUNCTION_LINES = 500, 300, 60


def is_kernel(path: Path) -> bool:
    return path.name.endswith((".inl.h", ".cu"))


def long_functions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(), str(path))
    return [
        f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or node.lineno) - node.lineno + 1) > FUNCTION_LINES
    ]


def main(arguments: list[str]) -> int:
    paths = [Path(a) for a in arguments] or [
        *(p for p in ROOT.iterdir() if p.is_file()),
        *(p for room in ROOMS for p in (ROOT / room).rglob("*")),
    ]
    complaints = []
    for path in sorted(p for p in paths if p.suffix in SOURCES and p.is_file()):
        lines = len(path.read_text().splitlines())
        limit = KERNEL_LINES if is_kernel(path) else FILE_LINES
        if lines > limit:
            complaints.append(f"{path}: {lines} lines, at most {limit}")
        if path.suffix == ".py":
            complaints += long_functions(path)
    print("\n".join(complaints) or "sizes: every file and function is small enough")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
