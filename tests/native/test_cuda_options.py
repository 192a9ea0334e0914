"""What cmake/cuda.cmake decides: which nvcc, which architectures, and the errors it stops with.

Most cases run the file alone, in a project without languages and with an nvcc that is a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.cuda import gates

ROOT = Path(__file__).resolve().parents[2]
CMAKE = gates.find_tool("cmake") or "cmake"
PROJECT = f"""
cmake_minimum_required(VERSION 3.22...4.0)
project(options LANGUAGES NONE)
set(GPT2_FAST_VERSION 1.2)
set(GPT2_FAST_CUDA AUTO CACHE STRING "")
macro(enable_language language)
  message(STATUS "enabled ${{language}}: ${{CMAKE_CUDA_COMPILER}} ${{CMAKE_CUDA_ARCHITECTURES}}")
endmacro()
include({ROOT}/cmake/cuda.cmake)
"""
SHIPPED = "75-real;80-real;86-real;89-real;90-real;100-real;120-real;80-virtual;120-virtual"

pytestmark = pytest.mark.skipif(
    gates.find_tool("cmake") is None or gates.find_tool("ninja") is None,
    reason="no cmake or ninja: pip install '.[dev]'",
)


def fake_nvcc(folder: Path, version: str = "13.0.88", known: str = "") -> Path:
    """An nvcc that knows its version and architectures and compiles nothing."""
    known = known or " ".join(f"compute_{a}" for a in gates.ARCHITECTURES)
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(
        "#!/bin/sh\n"
        f'case "$1" in --version) echo "Cuda compilation tools, release 1, V{version}";;\n'
        f'--list-gpu-arch) printf "%s\\n" {known};;\n'
        f'*) echo "#$ TOP={folder}" >&2;; esac\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter whose environment holds no packages of NVIDIA's."""
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    return tmp_path / "venv" / "bin" / "python"


def packages_of(python: Path) -> Path:
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    return Path(gates.run(python, "-c", script).strip())


def configure(
    folder: Path, python: Path, *options: str, path: Path | None = None, **variables: str
) -> tuple[int, str]:
    """Runs CMake with nothing on PATH but `path`; its status, and what it printed on one line."""
    source = folder / "project"
    source.mkdir(exist_ok=True)
    (folder / "build" / "CMakeCache.txt").unlink(missing_ok=True)
    (source / "CMakeLists.txt").write_text(PROJECT)
    kept = {"LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
    command = [CMAKE, "-S", str(source), "-B", str(folder / "build"), "-G", "Ninja", *options]
    command += [f"-DPython_EXECUTABLE={python}", f"-DCMAKE_MAKE_PROGRAM={gates.find_tool('ninja')}"]
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env={**kept, "PATH": str(path or folder / "nothing"), **variables},
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_without_nvcc_auto_is_a_cpu_build_that_says_so(tmp_path: Path, python: Path) -> None:
    status, text = configure(tmp_path, python)
    assert status == 0
    assert "CPU build: no nvcc found while building (GPT2_FAST_CUDA=AUTO)" in text


def test_without_nvcc_on_stops_and_names_what_was_searched(tmp_path: Path, python: Path) -> None:
    status, text = configure(tmp_path, python, "-DGPT2_FAST_CUDA=ON", CUDA_HOME="/no/such")
    site = packages_of(python)
    assert status != 0
    assert "GPT2_FAST_CUDA=ON needs nvcc, which was not found. Searched:" in text
    assert "CMAKE_CUDA_COMPILER (), CUDA_HOME (/no/such), CUDA_PATH (), PATH" in text
    assert f"NVIDIA's Python packages ({site}/nvidia/cu*/bin/nvcc)" in text
    assert "Set CUDA_HOME, or GPT2_FAST_CUDA=OFF for a CPU build." in text


def test_off_does_not_look(tmp_path: Path, python: Path) -> None:
    nvcc = fake_nvcc(tmp_path / "home")
    status, text = configure(tmp_path, python, "-DGPT2_FAST_CUDA=OFF", path=nvcc.parent)
    assert status == 0
    assert "CPU build (GPT2_FAST_CUDA=OFF)" in text
    assert "enabled" not in text


def test_nvcc_is_looked_for_in_this_order(tmp_path: Path, python: Path) -> None:
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True, capture_output=True, text=True,
        ).stdout.strip()
    )  # fmt: skip
    wheel = fake_nvcc(site / "nvidia" / "cu13")
    on_path, by_path, by_home, given = (
        fake_nvcc(tmp_path / name) for name in ("on_path", "by_path", "by_home", "given")
    )
    options: list[str] = []
    variables: dict[str, str] = {}
    path = None
    for nvcc in (wheel, on_path, by_path, by_home, given):
        if nvcc is on_path:
            path = on_path.parent
        elif nvcc is by_path:
            variables["CUDA_PATH"] = str(tmp_path / "by_path")
        elif nvcc is by_home:
            variables["CUDA_HOME"] = str(tmp_path / "by_home")
        elif nvcc is given:
            options.append(f"-DCMAKE_CUDA_COMPILER={given}")
        status, text = configure(tmp_path, python, *options, path=path, **variables)
        assert status == 0, text
        assert f"enabled CUDA: {nvcc} {SHIPPED}" in text


def test_packages_are_found_from_within_an_isolated_build(tmp_path: Path, python: Path) -> None:
    # As pip does it: the interpreter is the environment's, what it imports is not.
    (tmp_path / "isolation").mkdir()
    (tmp_path / "isolation" / "sitecustomize.py").write_text(
        f"import sys\nif sys.prefix == {str(python.parents[1])!r}:\n"
        "    sys.path = [p for p in sys.path if 'site-packages' not in p]\n"
    )
    nvcc = fake_nvcc(packages_of(python) / "nvidia" / "cu13")
    _, text = configure(tmp_path, python, PYTHONPATH=str(tmp_path / "isolation"))
    assert f"enabled CUDA: {nvcc} " in text


def test_a_compiler_that_was_named_must_exist(tmp_path: Path, python: Path) -> None:
    status, text = configure(tmp_path, python, "-DCMAKE_CUDA_COMPILER=/no/such/nvcc")
    assert status != 0
    assert "CMAKE_CUDA_COMPILER=/no/such/nvcc does not exist" in text


def test_an_old_nvcc_is_refused(tmp_path: Path, python: Path) -> None:
    nvcc = fake_nvcc(tmp_path / "old", "11.8.89")
    status, text = configure(tmp_path, python, "-DGPT2_FAST_CUDA=ON", path=nvcc.parent)
    assert status != 0
    assert f"needs CUDA 12.0 or newer, but {nvcc} is 11.8.89" in text
    status, text = configure(tmp_path, python, path=nvcc.parent)
    assert status == 0
    assert "CPU build: nvcc 11.8.89 is older than 12.0 (GPT2_FAST_CUDA=AUTO)" in text


def test_a_broken_nvcc_is_refused(tmp_path: Path, python: Path) -> None:
    nvcc = fake_nvcc(tmp_path / "broken")
    nvcc.write_text("#!/bin/sh\nexit 1\n")
    status, text = configure(tmp_path, python, "-DGPT2_FAST_CUDA=ON", path=nvcc.parent)
    assert status != 0
    assert f"found {nvcc}, which cannot be run" in text
    status, text = configure(tmp_path, python, path=nvcc.parent)
    assert status == 0
    assert "CPU build: nvcc could not be run" in text


def test_an_nvcc_that_does_not_take_the_compiler_is_refused(tmp_path: Path, python: Path) -> None:
    nvcc = fake_nvcc(tmp_path / "picky")
    said = "unsupported GNU version!"
    text = nvcc.read_text().replace("*) ", f"-std=*) echo '{said}' >&2; exit 1;;\n*) ")
    nvcc.write_text(text)
    status, text = configure(tmp_path, python, "-DGPT2_FAST_CUDA=ON", path=nvcc.parent)
    assert status != 0
    assert said in text
    assert "Set CUDAHOSTCXX to one that it takes" in text
    status, text = configure(tmp_path, python, path=nvcc.parent)
    assert status == 0
    assert "CPU build: nvcc 13.0.88 does not work with the C++ compiler" in " ".join(text.split())


def test_an_architecture_nvcc_does_not_know_is_left_out(tmp_path: Path, python: Path) -> None:
    nvcc = fake_nvcc(tmp_path / "a", "12.0.1", "compute_75 compute_80 compute_86 compute_90")
    status, text = configure(tmp_path, python, path=nvcc.parent)
    assert status == 0
    assert "75-real;80-real;86-real;90-real;80-virtual;90-virtual" in text
    for number in (89, 100, 120):
        assert f"does not know sm_{number}: left out" in text


@pytest.mark.parametrize(
    ("option", "variables", "said"),
    [
        ("-DCMAKE_CUDA_ARCHITECTURES=90-real", {}, "for sm_90"),
        ("-DCMAKE_CUDA_ARCHITECTURES=80-virtual", {}, "for PTX 80"),
        ("-DCMAKE_CUDA_ARCHITECTURES=75-real;90a;120-virtual", {}, "for sm_75, sm_90a, PTX 120"),
        ("-DGPT2_FAST_CUDA=ON", {"CUDAARCHS": "86-real"}, None),  # CMake's own
    ],
)
def test_a_list_of_architectures_is_honoured(
    option: str, variables: dict[str, str], said: str | None, tmp_path: Path, python: Path
) -> None:
    nvcc = fake_nvcc(tmp_path / "home")
    status, text = configure(tmp_path, python, option, path=nvcc.parent, **variables)
    assert status == 0
    assert SHIPPED not in text
    assert said is None or text.endswith(f"CUDA 13.0 {said}") or f"CUDA 13.0 {said} --" in text


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("-DGPT2_FAST_CUDA=maybe", "GPT2_FAST_CUDA must be AUTO, ON or OFF, got 'maybe'"),
        ("-DGPT2_FAST_CUDA=", "GPT2_FAST_CUDA must be AUTO, ON or OFF, got ''"),
        (
            "-DGPT2_FAST_CUDA_RUNTIME=dynamic",
            "GPT2_FAST_CUDA_RUNTIME must be static or shared, got 'dynamic'",
        ),
    ],
)
def test_a_wrong_value_is_named(option: str, message: str, tmp_path: Path, python: Path) -> None:
    status, text = configure(tmp_path, python, option)
    assert status != 0
    assert message in text


# ---- With the real nvcc --------------------------------------------------------------------------


def commands(folder: Path, *options: str) -> dict[str, str]:
    """Configures this project; source below csrc -> its compile command."""
    nvcc = gates.find_tool("nvcc")
    # CUDA is optional, and so are its tools; .ci/run installs them and runs this.
    if nvcc is None:
        pytest.skip("no nvcc")
    gates.run(
        *(CMAKE, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DGPT2_FAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", *options),
    )
    entries = json.loads((folder / "compile_commands.json").read_text())
    csrc = ROOT / "csrc"
    return {
        Path(entry["file"]).relative_to(csrc).as_posix(): entry["command"]
        for entry in entries
        if Path(entry["file"]).is_relative_to(csrc)
    }


def test_kernels_are_compiled_as_the_gates_compile_them(tmp_path: Path) -> None:
    found = commands(tmp_path)
    kernels = [source for source in found if source.endswith(".cu")]
    assert kernels == sorted(f"cuda/{p.name}" for p in (ROOT / "csrc/cuda").glob("*.cu"))
    for source in kernels:
        words = found[source].split()
        assert set(gates.FLAGS) <= set(words)
        assert "-Xcompiler=-fvisibility=hidden" in words
        assert not re.search(r"fast[-_]math|lineinfo|--threads|--no-compress|-G\b", found[source])
        for number in gates.ARCHITECTURES:
            assert f"arch=compute_{number},code=[sm_{number}]" in found[source]
        assert set(re.findall(r"code=\[compute_(\d+)\]", found[source])) == {"80", "120"}
    host = found["cuda/memory.cc"]
    assert "nvcc" not in host
    assert "-ffp-contract=off" in host
    assert re.search(r"-isystem \S*include", host)


def test_ptx_for_other_tools_is_not_compressed(tmp_path: Path) -> None:
    found = commands(
        tmp_path, "-DGPT2_FAST_CUDA_RUNTIME=shared", "-DCMAKE_CUDA_ARCHITECTURES=80-virtual"
    )
    for source, command in found.items():
        if source.endswith(".cu"):
            assert "--no-compress" in command
            assert re.findall(r"code=\[(\w+)\]", command) == ["compute_80"]
