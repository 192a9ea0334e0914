"""Fuzzing of readers of folders: damage good files, and see that the reader accepts or refuses.

A target is a set of good folders and a function that opens one. Each case damages a folder in a few
places and opens it. A finding is any exception but the target's own refusal, more than a second of
processor time, memory far beyond the files, or a file left open. The damage is decided by a stream
of choices: numbers from a seeded generator, so a case is repeated by its number, or the bytes of
atheris, so that coverage guides it.

    python tests/fuzz/fuzz_checkpoints.py --seconds 600
    python tests/fuzz/fuzz_checkpoints.py --seconds 600 --engine atheris
    python tests/fuzz/fuzz_checkpoints.py --case 12345          (one case again, with its traceback)
"""

from __future__ import annotations

import argparse
import gc
import random
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
import tracemalloc
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gpt2_fast.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

#: A folder: file name -> content.
Files = dict[str, bytearray]

#: Address space a case may take beyond what the process has when fuzzing starts.
HEADROOM = 512 << 20
SECONDS_PER_CASE = 1.0
#: What a case may allocate through Python at one time; measured in one case of eight, being slow.
BYTES_PER_CASE = 32 << 20

_NUMBERS = [0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 1023, 1024, 65535, 65536]
_NUMBERS += [2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
_COMMON = [b"", b"\x00", b"\xff", b"\x80", b"\xff\xff\xff\xff", bytes(16), b"-1", b"\n", b"../"]


class Choices(Protocol):
    """Where decisions come from."""

    def below(self, limit: int) -> int:
        """An integer in 0..limit-1."""


class SeededChoices:
    """Decisions of case `number` under `seed`."""

    def __init__(self, seed: int, number: int) -> None:
        self._random = random.Random(f"{seed}/{number}")

    def below(self, limit: int) -> int:
        """An integer in 0..limit-1."""
        return self._random.randrange(limit)


class ByteChoices:
    """Decisions read from bytes; zeros once they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, limit: int) -> int:
        """An integer in 0..limit-1."""
        width = max(1, ((limit - 1).bit_length() + 7) // 8)
        piece = self._data[self._at : self._at + width]
        self._at += width
        return int.from_bytes(piece, "little") % limit


def _repair_nothing(files: Files, choices: Choices) -> None:
    """For formats without lengths or checksums that damage would always break."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        seeds: good folders, as file name -> content.
        open: opens a folder and uses what it finds; raises `refusal` to refuse it.
        dictionary: snippets that mean something in the format.
        repair: puts lengths or checksums right again after the damage, as often as it chooses, so
            that damage reaches what lies behind them.
        refusal: the one exception that may come of a damaged folder.
    """

    seeds: Sequence[Mapping[str, bytes]]
    open: Callable[[Path], None]
    dictionary: Sequence[bytes] = ()
    repair: Callable[[Files, Choices], None] = _repair_nothing
    refusal: type[Exception] = CheckpointError


def damaged(target: Target, choices: Choices) -> Files:
    """One of the target's folders with one to four things wrong."""
    files = {
        name: bytearray(data)
        for name, data in target.seeds[choices.below(len(target.seeds))].items()
    }
    for _ in range(1 + choices.below(4)):
        if not files:
            break
        name = sorted(files)[choices.below(len(files))]
        _DAMAGES[choices.below(len(_DAMAGES))](files, name, target.dictionary, choices)
    target.repair(files, choices)
    return files


def damaged_part(part: bytes, words: Sequence[bytes], choices: Choices) -> bytes:
    """Something that a repair puts together again, with one thing wrong."""
    files = {"": bytearray(part)}
    _INNER_DAMAGES[choices.below(len(_INNER_DAMAGES))](files, "", words, choices)
    return bytes(files[""])


def _place(data: bytearray, choices: Choices) -> int:
    """A position; three of four times near the start or the end, where formats keep structure."""
    region = choices.below(4)
    window = min(len(data), 600) if region else len(data)
    at = choices.below(window + 1)
    return len(data) - at if region == 1 else at


def _flip(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    data = files[name]
    at = _place(data, choices)
    if at < len(data):
        data[at] ^= 1 << choices.below(8)


def _set(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    data = files[name]
    at = _place(data, choices)
    if at < len(data):
        data[at] = choices.below(256)


def _cut(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    data = files[name]
    at = _place(data, choices)
    del data[at : at + 1 + choices.below(40)]


def _truncate(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    del files[name][_place(files[name], choices) :]


def _insert(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    snippets = [*_COMMON, *words]
    snippet = snippets[choices.below(len(snippets))]
    at = _place(files[name], choices)
    files[name][at:at] = snippet * (1 + choices.below(3))


def _overwrite(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    snippets = [*_COMMON, *words]
    snippet = snippets[choices.below(len(snippets))]
    at = _place(files[name], choices)
    files[name][at : at + len(snippet)] = snippet


def _copy(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    data = files[name]
    start, at = _place(data, choices), _place(data, choices)
    data[at:at] = data[start : start + 1 + choices.below(200)]


def _integer(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    width = (4, 8)[choices.below(2)]
    value = _NUMBERS[choices.below(len(_NUMBERS))] % (1 << 8 * width)
    at = 0 if choices.below(2) else _place(files[name], choices)
    files[name][at : at + width] = value.to_bytes(width, "little")


def _digits(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    found = [m.span() for m in re.finditer(rb"[0-9]+", bytes(files[name][:4096]))]
    if found:
        start, end = found[choices.below(len(found))]
        near = int(files[name][start:end]) + choices.below(3) - 1
        value = near if choices.below(2) else _NUMBERS[choices.below(len(_NUMBERS))]
        files[name][start:end] = str(value).encode()


def _nest(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    at = _place(files[name], choices)
    files[name][at:at] = (b"[", b'{"a":')[choices.below(2)] * (1 + choices.below(100_000))


def _remove(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    del files[name]


def _exchange(files: Files, name: str, words: Sequence[bytes], choices: Choices) -> None:
    other = sorted(files)[choices.below(len(files))]
    files[name], files[other] = files[other], files[name]


_INNER_DAMAGES = [_flip, _flip, _set, _cut, _truncate, _copy, _integer, _nest]
_INNER_DAMAGES += 4 * [_digits] + 2 * [_insert, _overwrite]
_DAMAGES = [*_INNER_DAMAGES, _remove, _exchange]


class Finding(Exception):
    """A case that the reader neither accepted nor refused in good order."""


def attempt(target: Target, files: Files, folder: Path, *, memory: bool = False) -> str:
    """Open one damaged folder: "accepted", or the kind of refusal. Raises Finding.

    With `memory` the memory is judged, and not the time, which that makes several times as long.
    """
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if memory:
        tracemalloc.start()
    started = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target.open(folder)
        outcome = "accepted"
    except target.refusal as error:
        outcome = re.sub(r"['\"].*?['\"]|[0-9]+|/\S+", "*", str(error))[-60:]
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error}") from error
    finally:
        seconds = time.process_time() - started
        peak = tracemalloc.get_traced_memory()[1] if memory else 0
        tracemalloc.stop()
    if peak > BYTES_PER_CASE:
        raise Finding(f"{peak} bytes of memory, outcome: {outcome}")
    if seconds > SECONDS_PER_CASE and not memory:
        raise Finding(f"{seconds:.1f} s of processor time, outcome: {outcome}")
    return outcome


def _open_files() -> int:
    gc.collect()
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _limit_memory() -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (taken + HEADROOM, hard))


def _keep(files: Files, artifacts: Path, label: str, finding: BaseException) -> None:
    kept = artifacts / label
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for name, data in files.items():
        (kept / name).write_bytes(data)
    print("".join(traceback.format_exception(finding)), file=sys.stderr)
    print(f"FINDING in case {label}, files kept in {kept}: {finding}", file=sys.stderr)


def fuzz(target: Target, options: argparse.Namespace, folder: Path) -> int:
    """The plain engine: cases 0, 1, 2, ... until the time is over; the number of findings."""
    outcomes: Counter[str] = Counter()
    findings = number = 0
    before = _open_files()
    end = time.monotonic() + options.seconds
    while time.monotonic() < end:
        files = damaged(target, SeededChoices(options.seed, number))
        try:
            outcomes[attempt(target, files, folder, memory=number % 8 == 0)] += 1
            if number % 500 == 0 and _open_files() > before:
                raise Finding(f"{_open_files() - before} files left open since the start")
        except Finding as finding:
            _keep(files, options.artifacts, f"{options.seed}-{number}", finding)
            findings += 1
            if findings == options.stop_after:
                break
        number += 1
    print(
        f"{number} cases, seed {options.seed}: {outcomes.pop('accepted', 0)} accepted, "
        f"{len(outcomes)} kinds of refusal, {findings} findings"
    )
    for outcome, count in outcomes.most_common(options.kinds):
        print(f"  {count:7} {outcome}")
    return findings


def fuzz_with_atheris(target: Target, options: argparse.Namespace, folder: Path) -> None:
    """The coverage-guided engine. Does not return: libFuzzer ends the process."""
    import atheris  # type: ignore[import-untyped]

    def one_input(data: bytes) -> None:
        files = damaged(target, ByteChoices(data))
        try:
            attempt(target, files, folder)
        except Finding as finding:
            _keep(files, options.artifacts, "atheris", finding)
            raise

    atheris.instrument_all()
    flags = [f"-max_total_time={options.seconds:.0f}", "-max_len=400", "-len_control=0"]
    flags += ["-print_final_stats=1"]
    flags += [f"-artifact_prefix={options.artifacts}/", f"-seed={options.seed}", "-timeout=600"]
    options.artifacts.mkdir(parents=True, exist_ok=True)
    atheris.Setup([sys.argv[0], *flags], one_input)
    atheris.Fuzz()


def main(target: Target, arguments: Sequence[str] | None = None) -> int:
    """Command line of a fuzzer; the exit status is 1 after a finding."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["plain", "atheris"], default="plain")
    parser.add_argument("--case", type=int, help="run only this case of the plain engine")
    parser.add_argument("--kinds", type=int, default=0, help="how many kinds of refusal to list")
    parser.add_argument("--stop-after", type=int, default=10, help="this many findings")
    parser.add_argument("--artifacts", type=Path, default=Path("fuzz-findings"))
    options = parser.parse_args(arguments)
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as scratch:
        folder = Path(scratch) / "case"
        for seed in target.seeds:
            good = {name: bytearray(data) for name, data in seed.items()}
            if (outcome := attempt(target, good, folder)) != "accepted":
                raise SystemExit(f"a seed is refused: {outcome}")
        if options.case is not None:
            files = damaged(target, SeededChoices(options.seed, options.case))
            print(attempt(target, files, folder, memory=options.case % 8 == 0))
            return 0
        _limit_memory()
        if options.engine == "atheris":
            fuzz_with_atheris(target, options, folder)
        return 1 if fuzz(target, options, folder) else 0
