"""Every kernel compiles for every shipped processor and keeps its budget; no GPU is needed."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cuda import gates
from tests.cuda.budgets import BUDGETS, Budget
from tests.cuda.gates import Kernel

HERE = Path(__file__).parent
SOURCES = sorted((gates.CSRC / "cuda").glob("*.cu"))
QUICK = (80, 90)  # of the rest, -m slow compiles what was not built

Compile = Callable[[Path, int], list[Kernel]]

needs_tools = pytest.mark.skipif(
    bool(gates.missing_tools()),
    reason=f"not found: {', '.join(gates.missing_tools())}; docs/install.md has them from PyPI",
)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Kernels of a source for a processor: from the build, else compiled once in a session."""
    folder = tmp_path_factory.mktemp("cubins")
    known: dict[tuple[Path, int], list[Kernel]] = {}

    def compile_once(source: Path, architecture: int) -> list[Kernel]:
        key = (source, architecture)
        if key not in known:
            built = gates.built_object(source)
            kernels = gates.read_kernels(built, architecture) if built else []
            known[key] = kernels or gates.compile_kernels(source, architecture, folder)
        return known[key]

    return compile_once


def each_source_and_architecture() -> list[object]:
    return [
        pytest.param(
            source,
            architecture,
            marks=() if architecture in QUICK or gates.built_object(source) else pytest.mark.slow,
            id=f"{source.stem}-sm_{architecture}",
        )
        for source, architecture in itertools.product(SOURCES, gates.ARCHITECTURES)
    ]


def budget_of(kernel: Kernel) -> Budget:
    found = [budget for name, budget in BUDGETS.items() if re.fullmatch(name, kernel.name)]
    assert len(found) == 1, f"{kernel.name}: {len(found)} budgets in tests/cuda/budgets.py"
    return found[0]


# ---- The kernels ---------------------------------------------------------------------------------


def over_budget(kernel: Kernel, budget: Budget) -> list[str]:
    complaints = [
        *gates.local_memory(kernel),
        *gates.float_atomics(kernel),
        *gates.narrow_copies(kernel),
    ]
    if not kernel.threads:
        complaints.append(f"{kernel}: no LAUNCH_BOUNDS")
        return complaints
    if kernel.registers > budget.registers:
        complaints.append(f"{kernel}: {kernel.registers} registers, at most {budget.registers}")
    # A launch that asks for more than a processor has is not made there.
    limits = gates.MULTIPROCESSORS[kernel.architecture]
    if kernel.shared + budget.dynamic_shared + limits.reserved <= limits.shared:
        blocks = gates.blocks_per_multiprocessor(kernel, budget.dynamic_shared)
        if blocks * kernel.threads // gates.WARP < budget.warps:
            complaints.append(
                f"{kernel}: {blocks} blocks of {kernel.threads} threads on a processor, "
                f"at least {budget.warps} warps are wanted"
            )
    if budget.mma and not gates.is_trap(kernel):
        complaints += gates.no_tensor_cores(kernel)
    if budget.streams and not gates.is_trap(kernel):
        complaints += gates.no_stream(kernel)
        spent = gates.instructions_per_byte(kernel)
        if spent > budget.instructions_per_byte:
            complaints.append(
                f"{kernel}: {spent:.2f} lane-instructions a byte, "
                f"at most {budget.instructions_per_byte}"
            )
        flying = gates.bytes_in_flight(kernel, budget.dynamic_shared)
        if flying < budget.bytes_in_flight:
            complaints.append(
                f"{kernel}: {flying} bytes in flight, at least {budget.bytes_in_flight}"
            )
    return complaints


@needs_tools
@pytest.mark.parametrize(("source", "architecture"), each_source_and_architecture())
def test_kernels_keep_their_budget(source: Path, architecture: int, compiled: Compile) -> None:
    kernels = compiled(source, architecture)
    complaints = [c for kernel in kernels for c in over_budget(kernel, budget_of(kernel))]
    assert not complaints, "\n".join(complaints)


@needs_tools
def test_no_budget_is_left_over(compiled: Compile) -> None:
    names = {kernel.name for source in SOURCES for kernel in compiled(source, QUICK[-1])}
    unused = [name for name in BUDGETS if not any(re.fullmatch(name, n) for n in names)]
    assert unused == []


def order_of_fences(kernel: Kernel) -> list[str]:
    """Fences and global atomics, in the order of the code."""
    return [i.family for i in kernel.instructions if i.family in {"MEMBAR", "ATOMG"}]


@needs_tools
@pytest.mark.parametrize("architecture", QUICK)
def test_who_arrives_last_sees_what_the_others_left(architecture: int, compiled: Compile) -> None:
    """A fence before the ticket publishes a block's partial results; one behind it keeps the last
    block from reading the others' too early, which the simulated device cannot show."""
    (source,) = (path for path in SOURCES if path.stem == "attention_decode")
    for kernel in compiled(source, architecture):
        assert order_of_fences(kernel) == ["MEMBAR", "ATOMG", "MEMBAR"], str(kernel)


# ---- The gates can fail --------------------------------------------------------------------------


@pytest.fixture(params=QUICK, ids=lambda architecture: f"sm_{architecture}")
def planted(request: pytest.FixtureRequest, compiled: Compile) -> dict[str, Kernel]:
    kernels = compiled(HERE / "planted.cu", request.param)
    return {kernel.name.partition("<")[0]: kernel for kernel in kernels}


GENEROUS = Budget(registers=255, warps=1)
STREAM = Budget(registers=128, warps=16, mma=True, streams=True)


@needs_tools
def test_a_kernel_without_fault_passes(planted: dict[str, Kernel]) -> None:
    good = planted["good"]
    assert good.name == "good<Fp16, 8>"
    assert good.threads == 256
    assert over_budget(good, STREAM) == []
    assert over_budget(planted["int_atomic"], GENEROUS) == []
    assert planted["shared_float_atomic"].shared == 4
    # Eight loads, eight mma, their operands, and little else.
    loop = gates.main_loop(good)
    assert sum(i.streams for i in loop) == 8
    assert sum(i.family == "HMMA" for i in loop) == 8
    assert gates.stream_loads_before_use(good) == 8
    assert gates.bytes_in_flight(good) == 2 * 256 * 8 * 16


@needs_tools
@pytest.mark.parametrize(
    ("name", "budget", "complaint"),
    [
        ("spill", GENEROUS, r"a stack of \d+ bytes"),
        ("spill", GENEROUS, r"local memory, .*'STL'"),
        ("local_array", GENEROUS, "a stack of 256 bytes"),
        ("float_atomic", GENEROUS, r"REDG?\.E\.ADD\.F32.* no fixed order"),
        ("shared_float_atomic", GENEROUS, r"ATOMS\.CAST?.* no fixed order"),
        ("narrow", STREAM, "no 128-bit load of weights"),
        ("narrow_copy", GENEROUS, r"LDGSTS\.E\S* copies less than 16 bytes"),
        ("no_mma", STREAM, "no HMMA"),
        ("no_mma", STREAM, r"7\.\d+ lane-instructions a byte, at most 4\.68"),
        ("one_at_a_time", replace(STREAM, dynamic_shared=60_000), r"\d bytes in flight, at least"),
        ("good", replace(STREAM, registers=64), r"9\d registers, at most 64"),
        ("good", replace(STREAM, warps=17), r"2 blocks of 256 threads .* 17 warps"),
        ("good", replace(STREAM, dynamic_shared=150_000), "1 blocks of 256"),
    ],
)
def test_a_fault_is_seen(
    name: str, budget: Budget, complaint: str, planted: dict[str, Kernel]
) -> None:
    complaints = over_budget(planted[name], budget)
    assert any(re.search(complaint, text) for text in complaints), complaints


@needs_tools
def test_a_missing_fence_is_seen(tmp_path: Path) -> None:
    (source,) = (path for path in SOURCES if path.stem == "attention_decode")
    text = source.read_text()
    at = text.index("  fence_device();\n  if (threadIdx.x == 0) *ticket = 0;")
    planted = tmp_path / "attention_decode.cu"
    planted.write_text(text[:at] + text[at:].replace("  fence_device();\n", "", 1))
    for kernel in gates.compile_kernels(planted, 90, tmp_path):
        assert order_of_fences(kernel) == ["MEMBAR", "ATOMG"]


@needs_tools
def test_weights_behind_the_wait_are_seen(compiled: Compile) -> None:
    # sm_80 has no such wait.
    for architecture, loads in ((80, 8), (90, 0)):
        kernels = compiled(HERE / "planted.cu", architecture)
        (late,) = (kernel for kernel in kernels if kernel.name == "waits_first")
        assert gates.stream_loads_before_use(late) == loads


@needs_tools
def test_a_warning_stops_the_compiler(tmp_path: Path) -> None:
    source = tmp_path / "warn.cu"
    source.write_text("__global__ void unused_variable(float* x) { int unused; x[0] = 1; }\n")
    with pytest.raises(AssertionError, match="declared but never referenced"):
        gates.compile_kernels(source, 90, tmp_path)


def test_occupancy_is_what_nvidia_computes(tmp_path: Path) -> None:
    nvcc = gates.find_tool("nvcc")
    # CUDA is optional, and so are its tools; .ci/run installs them and runs this.
    if nvcc is None:
        pytest.skip("no nvcc, and so no cuda_occupancy.h")
    root = re.search(r"TOP=(\S+)", gates.run(nvcc, "-v", "__root", may_fail=True))
    assert root is not None
    include = f"-I{root[1]}/include"
    gates.run("g++", "-std=c++17", include, HERE / "occupancy.cc", "-o", tmp_path / "occupancy")
    cases = [
        (architecture, registers, threads, shared)
        for architecture in gates.ARCHITECTURES
        for registers in (16, 24, 40, 64, 96, 128, 168, 200, 255)
        for threads in (32, 96, 128, 256, 512, 1024)
        for shared in (0, 100, 8720, 16912, 33296, 63000)
        if registers * threads <= 65536
    ]
    limits = gates.MULTIPROCESSORS
    lines = [
        f"{a} {r} {t} {s} {limits[a].warps} {limits[a].shared} {limits[a].reserved} "
        f"{limits[a].shared - limits[a].reserved}\n"
        for a, r, t, s in cases
    ]
    done = subprocess.run(
        [tmp_path / "occupancy"], input="".join(lines), check=True, capture_output=True, text=True
    )
    ours = [limits[a].resident_blocks(r, t, s) for a, r, t, s in cases]
    assert ours == [int(word) for word in done.stdout.split()]
    assert len(set(ours)) > 10


# ---- Parsers -------------------------------------------------------------------------------------


def test_the_innermost_loop_with_the_most_weights_is_the_main_one() -> None:
    def code(*words: str) -> tuple[gates.Instruction, ...]:
        return tuple(
            gates.Instruction(16 * i, word.split()[0], tuple(word.split()[1:]))
            for i, word in enumerate(words)
        )

    stream = "LDG.E.NA.128.CONSTANT R4 [R2]"
    body = code(
        stream, "IMAD R1 R2", stream, stream, "HMMA.16816.F32 R8 R4", "BRA 0x20", "BRA 0x10",
        stream, "BRA 0x70",
    )  # fmt: skip
    kernel = Kernel("k", 90, 32, 0, 0, 128, body)
    assert gates.main_loop(kernel) == body[2:6]
    assert gates.instructions_per_byte(kernel) == 4 / 32
    assert gates.stream_loads_before_use(kernel) == 3


def test_names_lose_namespaces_and_parameters() -> None:
    demangled = (
        "void gpt2f::cuda::(anonymous namespace)::embed_kernel<gpt2f::cuda::Fp16, "
        "(gpt2f::Precision)2, (bool)1>(unsigned int const*, int)"
    )
    assert gates.short_name(demangled) == "embed_kernel<Fp16, 2, 1>"


def test_tools_come_from_path_or_from_packages() -> None:
    for name in ("nvcc", "cuobjdump"):
        found = gates.find_tool(name)
        if shutil.which(name):
            assert found == shutil.which(name)
    assert gates.find_tool("no_such_tool") is None
