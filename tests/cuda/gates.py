"""What the compiler made of the kernels, read without a GPU: registers, occupancy, machine code.

`cuobjdump` reads the objects of a CUDA build of this source tree, or what `nvcc -cubin` makes of a
source: registers, stack and shared memory (`-res-usage`), launch bounds (`-elf`), instructions
(`-sass`). Budgets stand in `budgets.py`, the tests in `test_gates.py`.

Terms. A *stream load* is a 128-bit load that `load_stream16` of `device.cuh` makes (weights, read
once), marked `.NA` from sm_80 on and `.CONSTANT` below. The *main loop* of a kernel is the code
between a backward branch and its target that holds the most bytes of stream loads, of nested ones
the innermost; a kernel whose stream loads are in no loop is its own main loop. Its instructions
are counted as they stand there, branches not taken included, so the count errs to the high side.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)  # cmake/cuda.cmake ships these
#: As cmake/cuda.cmake has them; test_cuda_options.py compares.
FLAGS = ("-O3", "-DNDEBUG", "-std=c++20", "-fmad=false", "--expt-relaxed-constexpr")
STRICT = ("--Werror", "all-warnings")

WARP = 32
WIDE = 16  # bytes of a 128-bit load


def find_tool(name: str) -> str | None:
    """From this environment, from PATH, or from NVIDIA's Python packages in this environment."""
    here = shutil.which(name, path=sysconfig.get_path("scripts"))
    folders = sorted(Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}"))
    return here or shutil.which(name) or next(map(str, folders), None)


def missing_tools() -> list[str]:
    return [name for name in ("nvcc", "cuobjdump", "nvdisasm", "c++filt") if not find_tool(name)]


# ---- What a multiprocessor holds -----------------------------------------------------------------


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one processor; test_gates.py compares with NVIDIA's cuda_occupancy.h."""

    warps: int
    blocks: int
    shared: int  # bytes
    reserved: int  # bytes of shared memory that the system takes of each block
    granularity: int  # of an allocation of shared memory
    registers: int = 65536

    def resident_blocks(self, registers: int, threads: int, shared: int) -> int:
        warps = -(-threads // WARP)
        per_warp = -(-registers * WARP // 256) * 256
        # Each of the four parts of a processor has its own registers.
        by_registers = self.registers // 4 // per_warp * 4 // warps
        taken = -(-(shared + self.reserved) // self.granularity) * self.granularity
        by_shared = self.shared // taken if taken else self.blocks
        return min(self.blocks, self.warps // warps, by_registers, by_shared)


MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64 << 10, 0, 256),
    80: Multiprocessor(64, 32, 164 << 10, 1024, 128),
    86: Multiprocessor(48, 16, 100 << 10, 1024, 128),
    89: Multiprocessor(48, 24, 100 << 10, 1024, 128),
    90: Multiprocessor(64, 32, 228 << 10, 1024, 128),
    100: Multiprocessor(64, 32, 228 << 10, 1024, 128),
    120: Multiprocessor(48, 24, 100 << 10, 1024, 128),
}


# ---- Machine code --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers, LDG.E.128.CONSTANT
    operands: tuple[str, ...]

    @property
    def family(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def wide(self) -> bool:
        return "128" in self.opcode.split(".")

    @property
    def streams(self) -> bool:
        marks = {"CONSTANT", "NA"} & set(self.opcode.split("."))
        return self.family == "LDG" and bool(marks) and self.wide

    @property
    def target(self) -> int | None:
        """Where a branch goes."""
        if self.family not in {"BRA", "JMP"}:
            return None
        found = re.search(r"0x[0-9a-f]+", self.operands[-1]) if self.operands else None
        return int(found[0], 16) if found else None


@dataclass(frozen=True)
class Kernel:
    name: str  # ln_qkv_kernel<Fp16, 2>
    architecture: int
    registers: int
    stack: int  # bytes, of arrays and of registers that did not fit
    shared: int  # static, bytes
    threads: int  # as launch bounds state them
    instructions: tuple[Instruction, ...] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.architecture})"

    def opcodes(self, *families: str) -> list[str]:
        return [i.opcode for i in self.instructions if i.family in families]


INSTRUCTION = re.compile(
    r"/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)


def parse_sass(text: str) -> dict[str, tuple[Instruction, ...]]:
    """Mangled name -> instructions."""
    functions = {}
    for part in text.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        functions[name.strip()] = tuple(
            Instruction(
                int(found["address"], 16),
                found["opcode"],
                tuple(word.strip() for word in found["operands"].split(",") if word.strip()),
            )
            for found in INSTRUCTION.finditer(body)
        )
    return functions


USAGE = re.compile(
    r"Function (?P<name>\w+):\s+REG:(?P<registers>\d+) STACK:(?P<stack>\d+) "
    r"SHARED:(?P<shared>\d+) LOCAL:(?P<local>\d+)"
)


def parse_usage(text: str, architecture: int) -> dict[str, dict[str, int]]:
    """Mangled name -> registers, and bytes of stack and of static shared memory."""
    # From sm_90 on the number includes what the system takes, if the kernel has any.
    system = MULTIPROCESSORS[architecture].reserved if architecture >= 90 else 0
    return {
        found["name"]: {
            "registers": int(found["registers"]),
            "stack": int(found["stack"]) + int(found["local"]),
            "shared": max(int(found["shared"]) - system, 0),
        }
        for found in USAGE.finditer(text)
    }


def parse_threads(elf: str) -> dict[str, int]:
    """Mangled name -> threads of a block, from its launch bounds."""
    threads = {}
    for part in re.split(r"\.nv\.info\.(?=\w)", elf)[1:]:
        found = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(0x[0-9a-f]+)", part)
        if found:
            threads[part.split()[0]] = int(found[1], 16)
    return threads


def run(*command: str | Path, may_fail: bool = False) -> str:
    done = subprocess.run(
        [str(word) for word in command], check=False, capture_output=True, text=True
    )
    if done.returncode and not may_fail:
        raise AssertionError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def short_name(demangled: str) -> str:
    """The name and template arguments of a kernel, without namespaces and parameters."""
    name = demangled.removeprefix("void ").replace("(anonymous namespace)::", "")
    name = re.sub(r"\(\w+\)(?=-?\d)", "", re.sub(r"\b\w+::", "", name))
    return name[: name.index("(")] if "(" in name else name


def read_kernels(path: Path, architecture: int) -> list[Kernel]:
    """The kernels of a cubin, or those for one architecture of an object."""
    cuobjdump = find_tool("cuobjdump")
    assert cuobjdump is not None
    tool = (cuobjdump, f"-arch=sm_{architecture}")
    usage = parse_usage(run(*tool, "-res-usage", path), architecture)
    code = parse_sass(run(*tool, "-sass", path))
    threads = parse_threads(run(*tool, "-elf", path))
    names = run("c++filt", *usage).splitlines() if usage else []
    return [
        Kernel(
            short_name(name), architecture, threads=threads.get(mangled, 0),
            instructions=code[mangled], **numbers,
        )
        for name, (mangled, numbers) in zip(names, usage.items(), strict=True)
    ]  # fmt: skip


def compile_kernels(source: Path, architecture: int, folder: Path) -> list[Kernel]:
    nvcc = find_tool("nvcc")
    assert nvcc is not None
    cubin = folder / f"{source.stem}_{architecture}.cubin"
    target = (f"-arch=sm_{architecture}", "-cubin", source, "-o", cubin)
    run(nvcc, *FLAGS, *STRICT, f"-I{CSRC}", *target)
    return read_kernels(cubin, architecture)


@functools.cache
def built_object(source: Path) -> Path | None:
    """The object of a source in the newest CUDA build, if nothing it could depend on is newer."""
    chosen = os.environ.get("GPT2_FAST_BUILD_DIR")
    folders = [Path(chosen)] if chosen else (ROOT / "build").glob("*")
    name = f"CMakeFiles/gpt2f_cuda.dir/csrc/cuda/{source.name}.o"
    objects = [folder / name for folder in folders if (folder / name).is_file()]
    newest = max(objects, key=lambda path: path.stat().st_mtime, default=None)
    inputs = [path for path in CSRC.rglob("*") if path.suffix in {".h", ".cuh"}]
    changed = max(path.stat().st_mtime for path in (source, *inputs))
    return newest if newest and newest.stat().st_mtime > changed else None


# ---- Loops and streams ---------------------------------------------------------------------------


def stream_bytes(instructions: tuple[Instruction, ...]) -> int:
    """Bytes that one lane asks for."""
    return WIDE * sum(i.streams for i in instructions)


@functools.cache
def main_loop(kernel: Kernel) -> tuple[Instruction, ...]:
    code = kernel.instructions
    loops = [
        tuple(i for i in code if target <= i.address <= branch.address)
        for branch in code
        if (target := branch.target) is not None and target < branch.address
    ]
    loops = [loop for loop in loops if stream_bytes(loop)]
    innermost = [loop for loop in loops if not any(set(other) < set(loop) for other in loops)]
    return max(innermost, key=lambda loop: (stream_bytes(loop), -len(loop)), default=code)


def instructions_per_byte(kernel: Kernel) -> float:
    """Lane-instructions of the main loop per byte that it streams."""
    loop = main_loop(kernel)
    streamed = stream_bytes(loop)
    return len(loop) / streamed if streamed else float("inf")


def register_of(operand: str) -> int | None:
    found = re.search(r"(?<![\w])R(\d+)", operand)
    return int(found[1]) if found else None


def stream_loads_before_use(kernel: Kernel) -> int:
    """Stream loads of one lane before the first instruction that needs the result of one.

    Nor after the wait for the previous kernel: weights are to come while it still runs.
    """
    loaded: set[int] = set()
    count = 0
    for instruction in kernel.instructions:
        if instruction.family == "ACQBULK":
            break
        sources = instruction.operands[0 if instruction.family in {"STG", "STS"} else 1 :]
        if any(register_of(operand) in loaded for operand in sources):
            break
        if instruction.streams:
            count += 1
            first = register_of(instruction.operands[0])
            if first is not None:
                loaded |= set(range(first, first + 4))
    return count


def blocks_per_multiprocessor(kernel: Kernel, dynamic_shared: int = 0) -> int:
    limits = MULTIPROCESSORS[kernel.architecture]
    return limits.resident_blocks(kernel.registers, kernel.threads, kernel.shared + dynamic_shared)


def bytes_in_flight(kernel: Kernel, dynamic_shared: int = 0) -> int:
    """Weights that the warps of one processor ask for before the first of them needs any."""
    blocks = blocks_per_multiprocessor(kernel, dynamic_shared)
    return stream_loads_before_use(kernel) * WIDE * kernel.threads * blocks


# ---- Complaints ----------------------------------------------------------------------------------


def local_memory(kernel: Kernel) -> list[str]:
    """Spills, stack frames and what they compile to."""
    complaints = []
    if kernel.stack:
        complaints.append(f"{kernel}: a stack of {kernel.stack} bytes")
    if found := kernel.opcodes("LDL", "STL"):
        complaints.append(f"{kernel}: local memory, {sorted(set(found))}")
    return complaints


def float_atomics(kernel: Kernel) -> list[str]:
    """Atomics on anything but integers: their order, and so the sum's bits, is not fixed.

    Where the hardware has no such atomic the compiler writes a loop around compare-and-swap.
    """
    found = [
        opcode
        for opcode in kernel.opcodes("RED", "REDG", "REDAS", "ATOM", "ATOMG", "ATOMS", "UREDGR")
        if re.search(r"\.B?F\d|\.CAS", opcode)
    ]
    return [f"{kernel}: {opcode} adds in no fixed order" for opcode in sorted(set(found))]


def no_stream(kernel: Kernel) -> list[str]:
    if stream_bytes(kernel.instructions):
        return []
    return [f"{kernel}: no 128-bit load of weights (LDG.E.NA.128)"]


def narrow_copies(kernel: Kernel) -> list[str]:
    """Asynchronous copies to shared memory move 16 bytes each."""
    narrow = {i.opcode for i in kernel.instructions if i.family == "LDGSTS" and not i.wide}
    return [f"{kernel}: {opcode} copies less than 16 bytes" for opcode in sorted(narrow)]


def is_trap(kernel: Kernel) -> bool:
    """bf16 on sm_75, which the engine refuses: a trap stands in place of the products."""
    return kernel.architecture < 80 and bool(kernel.opcodes("BPT")) and not kernel.opcodes("HMMA")


def no_tensor_cores(kernel: Kernel) -> list[str]:
    return [] if kernel.opcodes("HMMA") else [f"{kernel}: no HMMA"]
