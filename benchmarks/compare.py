"""Ours against eager torch and transformers, or any engine of `peers/`, in one case.

    python -m benchmarks.compare --model 124M --precision fp32 --context 32 --new 64 --rounds 5

Each engine lives in a process of its own with the same random weights, prompts and number of greedy
tokens, and runs at the best of its settings (threads 1 and all; for transformers, eager and sdpa),
found first, for decoding and for reading the prompt each; then they take turns: turns.py. Bytes:
weights once and the KV cache of each text, per step. In fp32 the tokens are compared: where they
part, float64 must say that the choice was closer than the errors of the two engines.
`python -m benchmarks.peers` runs every installed engine in every case.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import agreement, peers, roofline, traffic
from benchmarks.peers import OURS
from benchmarks.peers.contract import Job, Shape, common_weights
from benchmarks.turns import (
    BUSY,
    Result,
    Worker,
    loaded,
    play,
    prepare,
    progress,
    random_prompts,
    row,
    span,
    spread,
)
from gpt2_fast import _C, PUBLISHED, GPT2Config


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Run everything; the result is what the JSON file holds."""
    config = PUBLISHED[options.model]
    if options.layers:
        config = replace(config, n_layer=options.layers)
    prompts = random_prompts(config.vocab_size, options.batch, options.context)
    agreements: dict[str, str] = {}
    with ExitStack() as stack:
        folder = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        common_weights(config, folder)
        job = Job(Shape.of(config), options.precision, options.threads, options.batch, folder)
        workers: list[Worker] = []
        for engine in options.engines:
            progress(f"loading {engine}")
            prepare(engine, job)
            workers.append(stack.enter_context(loaded(engine, job)))
        results, peaks = play(
            workers, prompts, options.new, options.rounds, options.mib, options.threads
        )
        if options.precision == "fp32":
            for worker, result in zip(workers[1:], results[1:], strict=True):
                agreements[worker.engine] = agreement.explain(
                    config, prompts, results[0].tokens, result.tokens, *_logits(workers[0], worker)
                )
    return summary(options, config, results, peaks, agreements)


def _logits(*workers: Worker) -> list[agreement.Logits]:
    def of(worker: Worker) -> agreement.Logits:
        return lambda tokens: worker.ask(do="logits", tokens=tokens)["logits"]

    return [of(worker) for worker in workers]


def summary(
    options: argparse.Namespace,
    config: GPT2Config,
    results: list[Result],
    peaks: list[float],
    agreements: dict[str, str],
) -> dict[str, Any]:
    """Medians, bytes and ratios."""
    context, new, batch = options.context, options.new, options.batch
    moved = traffic.decode_bytes(config, options.precision, context, new, batch)
    ours = results[0].decode
    engines = []
    for result in results:
        gbps = [rate / batch * moved / 1e9 for rate in result.decode]
        engines.append(
            asdict(result)
            | {
                "decode_tokens_per_s": spread(result.decode),
                "prompt_tokens_per_s": spread(result.prompt),
                "gbps": spread(gbps),
                "of_bandwidth": spread([g / p for g, p in zip(gbps, peaks, strict=True)]),
                "ours_is_faster_by": spread(
                    [a / b for a, b in zip(ours, result.decode, strict=True)]
                ),
                "agreement": agreements.get(result.engine),
            }
        )
    names = ("model", "layers", "precision", "context", "new", "batch", "rounds", "threads")
    return {
        "machine": roofline.machine(),
        "case": {name: getattr(options, name) for name in names},
        "step_bytes": moved,
        "read_gbps": spread(peaks) | {"rounds": peaks},
        "engines": engines,
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The table, and what one must know to read it."""
    about, case, peak = result["machine"], result["case"], result["read_gbps"]
    layers = f", first {case['layers']} layers" if case["layers"] else ""
    versions = ", ".join(f"{n} {about[n]}" for n in (OURS, "torch", "transformers") if n in about)
    about_case = (
        f"GPT-2 {case['model']}{layers}, {case['precision']}, batch {case['batch']}, context "
        f"{case['context']}, {case['new']} new tokens, greedy, random weights; median (min-max) of "
        f"{case['rounds']} interleaved rounds. {about['cpu']}, {case['threads']} threads; read "
        f"bandwidth in the same run {span(peak, 1)} GB/s; {result['step_bytes'] / 1e6:.1f} MB a "
        f"step (weights + KV). {versions}."
    )
    columns = [
        "engine",
        "best setting",
        "decode tokens/s",
        "GB/s",
        "% of bandwidth",
        "prompt tokens/s",
        "gpt2_fast is faster by",
    ]
    lines = [about_case, "", row(columns), row(["---"] * len(columns))]
    for engine in result["engines"]:
        share = {name: 100 * value for name, value in engine["of_bandwidth"].items()}
        faster = "" if engine["engine"] == OURS else span(engine["ours_is_faster_by"], 2) + "x"
        elsewhere = ""
        if engine["prompt_setting"] != engine["setting"]:
            elsewhere = f" with {engine['prompt_setting']}"
        cells = [
            engine["engine"],
            engine["setting"],
            span(engine["decode_tokens_per_s"], 1),
            span(engine["gbps"], 1),
            span(share, 0),
            span(engine["prompt_tokens_per_s"], 0) + elsewhere,
            faster,
        ]
        lines.append(row(cells))
    lines.append("")
    for engine in result["engines"]:
        if engine["agreement"]:
            lines.append(f"- {engine['engine']}: {engine['agreement']}")
        others = max(engine["others"])
        if others > BUSY:
            lines.append(
                f"- {engine['engine']}: other processes took up to {100 * others:.0f} % of this "
                "machine during a run; measure again when it is quiet"
            )
    return "\n".join(lines).rstrip() + "\n"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description="Interleaved comparison with other engines.")
    parser.add_argument("--model", choices=PUBLISHED, default="124M")
    parser.add_argument("--layers", type=int, default=0, help="only the first N layers; 0: all")
    parser.add_argument("--precision", choices=peers.PRECISIONS, default="fp32")
    parser.add_argument("--context", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")
    parser.add_argument("--batch", type=int, default=1, help="texts at the same time")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=_C.available_threads())
    parser.add_argument(
        "--mib",
        type=int,
        default=roofline.MIN_MIB,
        help="bandwidth buffer; below 512 a cache may answer",
    )
    rivals = [name for name in peers.MODULES if name != OURS]
    usual = ["torch", "transformers"]
    parser.add_argument("--rivals", nargs="*", choices=rivals, default=usual)
    parser.add_argument("--work", type=Path, help="keep the engines' files here for another run")
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file too")
    options = parser.parse_args(arguments)
    for name in ("context", "batch", "rounds", "threads", "mib"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    room = PUBLISHED[options.model].n_ctx + 1
    if options.new < 2 or options.context + options.new > room:
        parser.error(f"--new must be at least 2, and --context + --new at most {room}")
    if not 0 <= options.layers <= PUBLISHED[options.model].n_layer:
        parser.error(f"--layers must be in 0..{PUBLISHED[options.model].n_layer}")
    options.engines = [OURS, *options.rivals]
    for engine in options.engines:
        reason = peers.missing(engine, options.precision)
        if reason:
            parser.error(f"{engine}, {options.precision}: {reason}")
    return options


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Compare, write, print."""
    options = parse(arguments)
    result = compare(options)
    table = as_markdown(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    if options.markdown:
        options.markdown.write_text(table)
    sys.stdout.write(table)
    return result


if __name__ == "__main__":
    main()
