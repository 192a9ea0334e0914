"""The native module with CUDA kernels, on a machine that may have neither GPU nor driver."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_fast import _C
from tests.cuda import gates

ROOT = Path(__file__).resolve().parents[2]
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))

needs_cuda_build = pytest.mark.skipif(
    not _C.build_info()["cuda"],
    reason=f"{_C.build_info()['cuda_note']}; GPT2_FAST_CUDA=ON pip install -e . has the kernels",
)
needs_cuobjdump = pytest.mark.skipif(
    gates.find_tool("cuobjdump") is None, reason="no cuobjdump: pip install '.[test]'"
)


def needed(module: str | Path) -> set[str]:
    """Shared libraries that the loader looks for."""
    text = gates.run("readelf", "--dynamic", module)
    return set(re.findall(r"\(NEEDED\)\s+Shared library: \[([\w.+-]+)\]", text))


def in_a_process(module: str | Path, script: str, **variables: str) -> tuple[str, str]:
    """Standard output and error of a script that uses this native module and sees no GPU."""
    load = (
        "import importlib.util as u, sys\n"
        f"spec = u.spec_from_file_location('gpt2_fast._C', {str(module)!r})\n"
        "module = sys.modules['gpt2_fast._C'] = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "import gpt2_fast\n"
    )
    hidden = {"CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [sys.executable, "-c", load + script],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **hidden, **variables},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


ASK_FOR_CUDA = """
try:
    gpt2_fast.GPT2.from_pretrained('builtin', device='cuda', precision='fp16')
except gpt2_fast.DeviceError as error:
    print(error)
print(len(gpt2_fast.generate('Once', max_new_tokens=3).token_ids))
print(module.build_info()['cuda_note'])
"""


# ---- The module in use ---------------------------------------------------------------------------


@needs_cuda_build
def test_the_module_needs_no_cuda_library() -> None:
    libraries = needed(_C.__file__)
    assert {name for name in libraries if re.search(r"cuda|cublas|nvidia|nv", name)} == set()
    assert any(name.startswith("libstdc++") for name in libraries)


@needs_cuda_build
def test_the_module_holds_no_path_of_the_build_machine() -> None:
    # Debug information holds paths, for debuggers to find the source by; .ci/run builds Release.
    if _C.build_info()["build_type"] != "Release":
        pytest.skip("a build with debug information")
    module = Path(_C.__file__).read_bytes()
    for path in (str(ROOT), sys.prefix, "site-packages", "pip-build-env", "tmpxft"):
        assert path.encode() not in module, path


@needs_cuda_build
def test_import_asks_for_no_driver() -> None:
    _, opened = in_a_process(_C.__file__, "module.build_info()", LD_DEBUG="files")
    assert str(_C.__file__) in opened
    assert "libcuda.so" not in opened


@needs_cuda_build
def test_without_a_device_cuda_is_a_clear_error() -> None:
    message, generated, _ = in_a_process(_C.__file__, ASK_FOR_CUDA)[0].splitlines()
    assert message.startswith(
        (
            "device 'cuda' is not available: no NVIDIA driver answers",
            "device 'cuda' is not available: the NVIDIA driver sees no GPU",
        )
    )
    assert re.search(r"cudaError(InsufficientDriver|NoDevice)", message)
    assert generated == "3"


@needs_cuda_build
def test_info_names_version_and_architectures() -> None:
    script = "from gpt2_fast.cli import main; main(['info'])"
    text, _ = in_a_process(_C.__file__, script, NO_COLOR="1", COLUMNS="300")
    assert f"CUDA {_C.build_info()['cuda']}" in text
    assert "device 'cuda' is not available:" in text
    note = _C.build_info()["cuda_note"]
    assert re.fullmatch(r"CUDA \d+\.\d+ for ((sm_|PTX )\d+[af]?(, )?)+", note)


@needs_cuda_build
@needs_cuobjdump
def test_the_module_holds_every_architecture_it_names() -> None:
    cuobjdump = gates.find_tool("cuobjdump")
    assert cuobjdump is not None
    listing = gates.run(cuobjdump, "--list-elf", "--list-ptx", _C.__file__)
    note = _C.build_info()["cuda_note"]
    elves = re.findall(r"\.sm_(\w+)\.cubin", listing)
    texts = re.findall(r"\.sm_(\w+)\.ptx", listing)
    for wanted, found in (("sm_", elves), ("PTX ", texts)):
        for architecture in re.findall(rf"{wanted}(\w+)", note):
            assert found.count(architecture) >= len(KERNELS) - 1, architecture
        assert set(found) == set(re.findall(rf"{wanted}(\w+)", note))


# ---- Shared runtime, PTX as text -----------------------------------------------------------------


@pytest.fixture(scope="module")
def ptx_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build for tools that read or run PTX; its host code is not optimised, to take less time."""
    nvcc, cmake = gates.find_tool("nvcc"), gates.find_tool("cmake")
    # CUDA is optional, and so are its tools; .ci/run installs them and runs this.
    if nvcc is None or cmake is None or gates.find_tool("ninja") is None:
        pytest.skip("needs nvcc, cmake and ninja")
    folder = tmp_path_factory.mktemp("ptx")
    gates.run(
        *(cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"),
        *("-DGPT2_FAST_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", "-DCMAKE_CXX_FLAGS_RELEASE=-O0"),
        *("-DGPT2_FAST_CUDA_RUNTIME=shared", "-DCMAKE_CUDA_ARCHITECTURES=80-virtual"),
        *("-DCMAKE_CUDA_FLAGS=--Werror all-warnings -Xcompiler=-Werror",),
    )
    return folder


def build(folder: Path, *target: str) -> None:
    gates.run(gates.find_tool("cmake") or "cmake", "--build", folder, "--parallel", "2", *target)


@pytest.fixture(scope="module")
def ptx_objects(ptx_build: Path) -> Path:
    build(ptx_build, "--target", "gpt2f_cuda")
    return ptx_build / "CMakeFiles" / "gpt2f_cuda.dir" / "csrc" / "cuda"


def entries(text: str) -> set[str]:
    return set(re.findall(r"\.entry\s+(\w+)", text))


@needs_cuobjdump
def test_every_kernel_is_there_as_plain_ptx(ptx_objects: Path) -> None:
    cuobjdump = gates.find_tool("cuobjdump")
    assert cuobjdump is not None
    kernels = []
    for source in KERNELS:
        compiled = ptx_objects / f"{source.name}.o"
        plain = compiled.read_bytes().decode("latin1")
        wanted = entries(gates.run(cuobjdump, "-ptx", compiled))
        assert entries(plain) == wanted
        if wanted:
            assert set(re.findall(r"^\.target (\w+)", plain, re.MULTILINE)) == {"sm_80"}
        kernels.append(len(wanted))
    assert kernels.count(0) <= 1  # attention.cu only chooses
    assert sum(kernels) > 50
    assert gates.run(cuobjdump, "--list-elf", *ptx_objects.glob("*.o"), may_fail=True).count(
        ".cubin"
    ) == 0  # fmt: skip


@pytest.mark.slow
def test_the_module_runs_with_the_shared_runtime(ptx_build: Path) -> None:
    build(ptx_build)
    (module,) = ptx_build.glob("_C.*.so")
    assert any(re.fullmatch(r"libcudart\.so\.\d+", name) for name in needed(module))
    dynamic = gates.run("readelf", "--dynamic", module)
    assert re.search(r"\(RUNPATH\)\s+Library runpath: \[\$ORIGIN/\.\./nvidia/cu\d+/lib\]", dynamic)
    nvcc = gates.find_tool("nvcc")
    assert nvcc is not None
    root = re.search(r"TOP=(\S+)", gates.run(nvcc, "-v", "__root", may_fail=True))
    assert root is not None
    libraries = f"{root[1]}/lib64:{root[1]}/lib"
    text, _ = in_a_process(module, ASK_FOR_CUDA, LD_LIBRARY_PATH=libraries)
    assert text.startswith("device 'cuda' is not available: ")
    assert text.endswith("for PTX 80\n")
