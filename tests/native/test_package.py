"""What a user gets: the files of the wheel, what it needs, and how long `import` takes."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
import zlib
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMPORT_SECONDS = 0.25
WHEEL_BYTES = 15_000_000
CORE = {"numpy", "tiktoken", "huggingface_hub", "rich"}


@pytest.fixture(scope="module")
def wheel() -> zipfile.ZipFile:
    path = os.environ.get("GPT2_FAST_WHEEL")
    # Building one takes over a minute, and tests do not install what they test.
    if not path:
        pytest.skip("GPT2_FAST_WHEEL names no wheel; .ci/run builds one")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_declared_files_only(wheel: zipfile.ZipFile) -> None:
    declared = re.compile(
        r"gpt2_fast/(\w+/)*\w+\.py|gpt2_fast/_C\.pyi|gpt2_fast/py\.typed"
        r"|gpt2_fast/_C\.[\w-]+\.so|gpt2_fast/data/(builtin(-draft)?/)?[\w.-]+"
        r"|gpt2_fast-[\w.]+\.dist-info/(METADATA|WHEEL|RECORD|top_level\.txt|entry_points\.txt"
        r"|licenses/(LICENSE|NOTICE))"
    )
    names = wheel.namelist()
    assert [name for name in names if not declared.fullmatch(name)] == []
    assert sum(name.endswith(".so") for name in names) == 1


def test_the_wheel_holds_every_source_file(wheel: zipfile.ZipFile) -> None:
    skipped = {".so", ".pyc", ".pyo"}
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "gpt2_fast").rglob("*")
        if path.is_file() and path.suffix not in skipped and "__pycache__" not in path.parts
    }
    packed = {name for name in wheel.namelist() if name.startswith("gpt2_fast/")}
    assert wanted - packed == set()


def test_the_wheel_holds_licence_and_notice(wheel: zipfile.ZipFile) -> None:
    for name in ("LICENSE", "NOTICE"):
        (path,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/licenses/{name}"))
        assert wheel.read(path) == (ROOT / name).read_bytes()


def test_the_module_holds_no_path_of_the_build_machine(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith(".so"))
    module = wheel.read(name)
    for path in (str(ROOT), sys.prefix, str(Path.home()), "pip-build-env", "site-packages"):
        assert path.encode() not in module, path


def test_the_wheel_is_small_with_the_kernels_installed_here_too(wheel: zipfile.ZipFile) -> None:
    """CI's wheel has none for GPUs; what is installed beside it does."""
    own = next(entry for entry in wheel.infolist() if entry.filename.endswith(".so"))
    (installed,) = (ROOT / "gpt2_fast").glob("_C.*.so")
    size = Path(wheel.filename or "").stat().st_size
    with_installed = size - own.compress_size + len(zlib.compress(installed.read_bytes()))
    sys.stdout.write(f"wheel {size / 1e6:.1f} MB, with this module {with_installed / 1e6:.1f}\n")
    assert max(size, with_installed) < WHEEL_BYTES


def test_the_vocabulary_is_the_one_the_notice_names() -> None:
    vocabulary = files("gpt2_fast").joinpath("data", "gpt2.tiktoken").read_bytes()
    assert f"sha256: {hashlib.sha256(vocabulary).hexdigest()}" in (ROOT / "NOTICE").read_text()


def test_the_core_needs_nothing_heavy() -> None:
    try:
        requirements = importlib.metadata.requires("gpt2_fast") or []
    except importlib.metadata.PackageNotFoundError:
        # What it needs is in the metadata, which a source folder lacks; .ci/run installs it.
        pytest.skip("gpt2_fast is on the path but not installed")
    plain = {
        re.split(r"[^\w-]", r)[0].replace("-", "_") for r in requirements if "extra ==" not in r
    }
    assert plain == CORE
    assert not [r for r in requirements if "extra ==" not in r and re.search(r"[<=~!]=|<", r)]


def test_import_is_quick_and_loads_nothing_heavy() -> None:
    script = (
        "import sys, gpt2_fast\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'tiktoken', 'rich', 'requests'}\n"
        "sys.exit(f'import gpt2_fast loaded {heavy & set(sys.modules)}' "
        "if heavy & set(sys.modules) else 0)"
    )
    seconds = []
    for _ in range(3):  # the first run may have to read from a cold disk
        result = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", script],
            check=False,
            capture_output=True,
            text=True,
        )
        lines = result.stderr.splitlines()
        assert result.returncode == 0, lines[-1]
        (total,) = (line.split("|") for line in lines if re.search(r"\| gpt2_fast$", line))
        seconds.append(int(total[1]) / 1e6)
    assert min(seconds) < IMPORT_SECONDS, f"import gpt2_fast took {seconds} s"
