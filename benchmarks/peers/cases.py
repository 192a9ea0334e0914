"""What is measured, and what a measurement means: bytes, operations, shares of the limits."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks import traffic
from benchmarks.peers import OURS, find
from benchmarks.turns import Result, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.peaks import Limits
    from gpt2_fast import GPT2Config


@dataclass(frozen=True)
class Case:
    """`batch` prompts of `context` tokens, continued by `new`; by one: reading the prompt."""

    context: int
    new: int
    batch: int = 1

    @property
    def decodes(self) -> bool:
        """Whether the tokens after the first are measured, and not the prompt."""
        return self.new > 1

    @property
    def name(self) -> str:
        """For people."""
        if not self.decodes:
            return f"prompt of {self.context}"
        return f"decode, context {self.context}" + f", batch {self.batch}" * (self.batch > 1)


def cases(
    contexts: Sequence[int], prompts: Sequence[int], batches: Sequence[int], new: int, n_ctx: int
) -> list[Case]:
    """Every case; a text that would leave the context gets fewer tokens.

    Raises:
        ValueError: a context leaves no room for two tokens, or a prompt for one.
    """
    made = [Case(context, min(new, n_ctx + 1 - context)) for context in contexts]
    made += [Case(context, 1) for context in prompts]
    short = contexts[0] if contexts else 32
    made += [Case(short, min(new, n_ctx + 1 - short), batch) for batch in batches]
    for case in made:
        if case.context > n_ctx or (case.new < 2 and case.context not in prompts):
            raise ValueError(f"a prompt of {case.context} leaves no room in {n_ctx} positions")
    return made


def work(config: GPT2Config, case: Case, precision: str, engine: str) -> tuple[float, float]:
    """Bytes and operations of one decode step, or of the whole prompt, in an engine's format."""
    element = cached = None
    if engine != OURS:
        stored = find(engine).PRECISIONS[precision]
        element, cached = stored.weight, stored.cached
    if not case.decodes:
        moved = traffic.prefill_bytes(config, precision, element)
        return moved, case.batch * traffic.prefill_flops(config, case.context)
    sizes = (case.context, case.new, case.batch)
    moved = traffic.decode_bytes(config, precision, *sizes, element, cached)
    return moved, traffic.decode_flops(config, *sizes)


def figures(
    config: GPT2Config,
    case: Case,
    precision: str,
    result: Result,
    limits: Limits,
    peaks: Sequence[float],
) -> dict[str, Any]:
    """Everything about one engine in one case."""
    rates = result.decode if case.decodes else result.prompt
    moved, operations = work(config, case, precision, result.engine)
    # Tokens of one step, or of the prompt: what the bytes and operations are for.
    tokens = case.batch * (1 if case.decodes else case.context)
    seconds = [tokens / rate for rate in rates]
    least = limits.seconds(precision, moved, operations)
    arithmetic = limits.arithmetic(precision)
    return {
        "engine": result.engine,
        "label": find(result.engine).LABEL,
        "stored": asdict(find(result.engine).PRECISIONS[precision]),
        "setting": result.setting if case.decodes else result.prompt_setting,
        "tuning": result.tuning,
        "rounds": rates,
        "tokens_per_s": spread(rates),
        "bytes": moved,
        "operations": operations,
        "gbps": spread([moved / s / 1e9 for s in seconds]),
        "gflops": spread([operations / s / 1e9 for s in seconds]),
        "of_bandwidth": spread(
            [moved / s / 1e9 / peak for s, peak in zip(seconds, peaks, strict=True)]
        ),
        "of_arithmetic": spread([operations / s / arithmetic for s in seconds])
        if arithmetic
        else None,
        "of_limit": spread([least / s for s in seconds]),
        "others": max(result.others),
        "repeatable": result.repeatable,
        "tokens": result.tokens,
    }


def compared(engines: list[dict[str, Any]]) -> None:
    """Add to every engine how much faster ours is in the same rounds, and its common tokens."""
    ours = next((one for one in engines if one["engine"] == OURS), None)
    for one in engines:
        if ours is None or one is ours:
            one["ours_is_faster_by"] = one["same_tokens"] = None
            continue
        pairs = zip(ours["rounds"], one["rounds"], strict=True)
        one["ours_is_faster_by"] = spread([mine / theirs for mine, theirs in pairs])
        one["same_tokens"] = common_share(ours["tokens"], one["tokens"])


def common_share(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of the tokens before each text's first difference."""
    same = 0
    for left, right in zip(ours, theirs, strict=True):
        for a, b in zip(left, right, strict=True):
            if a != b:
                break
            same += 1
    return same / sum(len(left) for left in ours)
