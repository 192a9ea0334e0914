"""`gpt2-fast bench`: how fast a model decodes here, by position and batch.

On a CUDA device also: every torch op against float64, the time of every stage and op on the device,
and torch (eager, with its fused attention, compiled) and transformers, in turns with ours.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from . import _C, terminal
from .bench_bytes import step_bytes
from .bench_engine import EngineRunner, Runner, random_tokens
from .bench_report import Kernel, as_markdown, spread, stage_table
from .config import GPT2Config
from .device import PRECISIONS, Device, choose
from .errors import CapacityError, DeviceError, ParameterError

#: Runs a function and gives the kernels it ran on the device.
Profiler = Callable[[Callable[[], Any]], "list[Kernel]"]

_READ_BYTES, _READ_REPEATS = 512 << 20, 8
_AGREEMENT = 2.0**-4  # of the largest logit: far above rounding, far below another model


@dataclass(frozen=True)
class Bench:
    """What to measure.

    Attributes:
        model: a published name, or anything `GPT2.from_pretrained` takes; its shape is used, with
            random weights.
        device: as in `GPT2.from_pretrained`.
        precisions: of ours; empty is all of the device. Rivals run in the first.
        batches, positions: every pair is measured; a position beyond the context is its last.
        steps: tokens of one measurement.
        rounds: measurements of each, in turns.
        rivals: whether torch and transformers are measured too.
    """

    model: str = "124M"
    device: str = "auto"
    precisions: tuple[str, ...] = ()
    batches: tuple[int, ...] = (1, 8, 16)
    positions: tuple[int, ...] = (1, 128, 512, 1023)
    steps: int = 16
    rounds: int = 5
    rivals: bool = True

    def __post_init__(self) -> None:
        """Refuse numbers that measure nothing."""
        for name in ("batches", "positions"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                raise ParameterError(f"{name} must be at least 1 each, got {values}")
        for name in ("steps", "rounds"):
            if getattr(self, name) < 1:
                raise ParameterError(f"{name} must be at least 1, got {getattr(self, name)}")


def measure(bench: Bench) -> dict[str, Any]:
    """Everything, as `gpt2-fast bench --json` writes it.

    Raises:
        ParameterError, DeviceError, CapacityError: as in `GPT2.from_pretrained`.
    """
    config = _config(bench.model)
    device = choose(bench.device, bench.precisions[0] if bench.precisions else "bf16")
    precisions = bench.precisions or _precisions(device)
    cuda = device.kind == "cuda"
    missing = _no_torch(device) if cuda else "for CUDA devices only: see benchmarks/compare.py"
    result: dict[str, Any] = {
        "device": _device_name(device),
        "software": _software(),
        "case": asdict(bench) | {"precisions": precisions, "config": config.to_dict()},
        "bandwidth_of": "reads plus writes of a copy" if cuda else "reads",
        "copy_gbps": None,
        "checks": [],
        "ops": [],
        "stages": [],
        "left_out": {},
    }
    profiler: Profiler | None = None
    if missing is None:
        profiler = _with_torch(result, config, device, precisions)
    else:
        result["left_out"]["torch: rivals, ops, stages, copies"] = missing
    if not cuda:
        result["copy_gbps"] = (
            _C.read_bandwidth(_READ_BYTES, _C.available_threads(), _READ_REPEATS) / 1e9
        )
    rivals = _rivals(config, precisions[0], device, bench) if missing is None else []
    runners = _runners(bench, config, precisions, device, result["left_out"], rivals)
    try:
        result["agreement"] = agree(runners, config)
        if profiler is not None:
            _stages(result, runners, config, bench, profiler)
        result["decode"] = decode(runners, config, bench, result["left_out"])
    finally:
        for runner in runners:
            runner.close()
    return result


def decode(
    runners: list[Runner],
    config: GPT2Config,
    bench: Bench,
    left_out: dict[str, str],
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """Tokens a second of every runner at every batch and position, all taking turns.

    Args:
        runners: ours first; one that fails is left out from then on, and said so.
        config, bench: what to run.
        left_out: names and reasons are added here.
        clock: seconds.
    """
    found = []
    for batch in bench.batches:
        for position in dict.fromkeys(min(p, config.n_ctx - 1) for p in bench.positions):
            start, steps = _window(config, position, bench.steps)
            times: dict[int, list[float]] = {n: [] for n in range(len(runners))}
            terminal.note(f"batch {batch}, position {position}")
            for turn in range(bench.rounds + 1):  # the first loads, records and compiles
                for number, runner in enumerate(runners):
                    if number not in times:
                        continue
                    try:
                        seconds = _once(runner, batch, start, steps, clock)
                    except Exception as error:
                        if number == 0:
                            raise
                        left_out[_name(runner)] = _reason(error)
                        del times[number]
                        continue
                    if turn > 0:
                        times[number].append(seconds)
            found += [
                _entry(runners[n], config, batch, position, start, steps, took, times[0])
                for n, took in times.items()
            ]
    return found


def agree(runners: list[Runner], config: GPT2Config) -> dict[str, float]:
    """Largest distance of each runner's logits from the first one's, over the largest logit.

    Raises:
        DeviceError: a runner of the same precision computes another model.
    """
    tokens = random_tokens(config, 1, min(4, config.n_ctx))[0]
    rows = [runner.logits(tokens).astype(np.float64) for runner in runners]
    found = {}
    for runner, row in zip(runners, rows, strict=True):
        share = float(np.abs(row - rows[0]).max() / np.abs(rows[0]).max())
        if runner.precision == runners[0].precision and not share <= _AGREEMENT:
            raise DeviceError(
                f"{_name(runner)} computes something else than {_name(runners[0])}: its logits "
                f"are {share:.3f} of the largest away"
            )
        found[_name(runner)] = share
    return found


def write_report(result: dict[str, Any], folder: Path | None, *, as_json: bool) -> None:
    """Write the result to standard output, and as bench.json and bench.md into a folder."""
    text = as_markdown(result)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "bench.md").write_text(text, encoding="utf-8")
        (folder / "bench.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if as_json:
        terminal.json_line(result)
    else:
        terminal.write(text)


def _once(runner: Runner, batch: int, start: int, steps: int, clock: Callable[[], float]) -> float:
    """Seconds of `steps` steps."""
    try:
        runner.begin(batch, start)
        before = clock()
        runner.steps(steps)
        return clock() - before
    finally:
        runner.end()


def _window(config: GPT2Config, position: int, steps: int) -> tuple[int, int]:
    """First position and number of steps: from `position` on, or the last ones there are."""
    count = min(steps, config.n_ctx - 1)
    return min(position, config.n_ctx - count), count


def _entry(
    runner: Runner,
    config: GPT2Config,
    batch: int,
    position: int,
    start: int,
    steps: int,
    seconds: list[float],
    ours: list[float],
) -> dict[str, Any]:
    attended = start + (steps + 1) / 2
    moved = step_bytes(config, runner.precision, attended, batch)
    return {
        "batch": batch,
        "position": position,
        "runner": runner.name,
        "precision": runner.precision,
        "bytes": moved,
        "tokens_per_s": spread([batch * steps / each for each in seconds]),
        "step_us": spread([each / steps * 1e6 for each in seconds]),
        "gbps": spread([moved * steps / each / 1e9 for each in seconds]),
        "first_is_faster_by": None
        if seconds is ours
        else spread([theirs / mine for theirs, mine in zip(seconds, ours, strict=True)]),
    }


def _runners(
    bench: Bench,
    config: GPT2Config,
    precisions: tuple[str, ...],
    device: Device,
    left_out: dict[str, str],
    rivals: list[tuple[str, Callable[[], Runner]]],
) -> list[Runner]:
    """Ours in every precision, ours without recorded graphs, and the rivals."""
    threads, most = _C.available_threads(), max(bench.batches)
    runners: list[Runner] = []
    for precision in precisions:
        for graphs in (True, False) if device.kind == "cuda" else (True,):
            if graphs or precision == precisions[0]:
                terminal.note(f"loading {precision}{'' if graphs else ', no graphs'}")
                runners.append(
                    EngineRunner(
                        config,
                        precision,
                        device,
                        threads=threads,
                        max_batch=most,
                        graphs=graphs,
                    )
                )
    for name, make in rivals:
        terminal.note(f"loading {name}")
        try:
            runners.append(make())
        except Exception as error:  # noqa: BLE001  # the report says what a rival died of
            left_out[name] = _reason(error)
    return runners


def _with_torch(
    result: dict[str, Any], config: GPT2Config, device: Device, precisions: tuple[str, ...]
) -> Profiler:
    """Copies, checks and times of ops by torch; gives its profiler."""
    import torch

    from . import bench_ops, bench_torch

    there = torch.device(str(device))
    narrow = [p for p in precisions if p in {"bf16", "fp16"}] or ["fp16"]

    def profiler(run: Callable[[], Any]) -> list[Kernel]:
        return bench_torch.device_kernels(run, there)

    terminal.note("copies and ops")
    result["copy_gbps"] = bench_torch.copy_gbps(there)
    result["checks"] = bench_ops.check_all(config, there, narrow)
    result["ops"] = bench_ops.time_ops(config, there, narrow[0], profiler)
    torch.cuda.empty_cache()
    return profiler


def _rivals(
    config: GPT2Config, precision: str, device: Device, bench: Bench
) -> list[tuple[str, Callable[[], Runner]]]:
    if not bench.rivals:
        return []
    import torch

    from .bench_torch import DTYPES, rivals

    wide = precision if precision in DTYPES else "fp16"
    return rivals(config, wide, torch.device(str(device)), max(bench.batches))


def _stages(
    result: dict[str, Any],
    runners: list[Runner],
    config: GPT2Config,
    bench: Bench,
    profiler: Profiler,
) -> None:
    """Where the time of a step goes, at the smallest and the largest batch."""
    start, steps = _window(config, min(512, config.n_ctx - 1), bench.steps)
    for runner in runners:
        if runner.name != "gpt2_fast":
            continue
        for batch in sorted({min(bench.batches), max(bench.batches)}):
            _once(runner, batch, start, steps, time.perf_counter)
            runner.begin(batch, start)
            kernels = profiler(lambda r=runner: r.steps(steps))  # type: ignore[misc]
            runner.end()
            attended = start + (steps + 1) / 2
            table = stage_table(
                kernels, config, runner.precision, steps=steps, positions=attended, batch=batch
            )
            about = {"precision": runner.precision, "batch": batch, "position": start}
            result["stages"].append(about | {"table": table})


def _config(name: str) -> GPT2Config:
    from .info import model_facts

    return GPT2Config(**model_facts(name)["config"])


def _precisions(device: Device) -> tuple[str, ...]:
    """All the device computes in."""
    if device.kind == "cuda" and _C.cuda_devices()[device.index]["capability"][0] < 8:
        return tuple(p for p in PRECISIONS["cuda"] if p != "bf16")
    return PRECISIONS[device.kind]


def _device_name(device: Device) -> str:
    if device.kind == "cuda":
        about = _C.cuda_devices()[device.index]
        return f"{about['name']} ({device})"
    return f"cpu, {_C.default_isa()}, {_C.available_threads()} threads"


def _software() -> str:
    names = [name for name in ("torch", "transformers") if find_spec(name) is not None]
    versions = [f"{name} {metadata.version(name)}" for name in names]
    build = _C.build_info()
    return ", ".join([f"gpt2_fast {build['version']} (CUDA {build['cuda'] or 'none'})", *versions])


def _no_torch(device: Device) -> str | None:
    """Why torch cannot be used on the device, or None."""
    if find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if device.index >= torch.cuda.device_count():
        return f"torch finds {torch.cuda.device_count()} CUDA devices"
    return None


def _name(runner: Runner) -> str:
    return f"{runner.name}, {runner.precision}"


def _reason(error: Exception) -> str:
    if isinstance(error, CapacityError | MemoryError):
        return f"out of memory: {error}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
