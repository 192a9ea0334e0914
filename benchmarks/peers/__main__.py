"""Ours against every installed engine: `python -m benchmarks.peers --model 124M --out results`.

Cases: decoding at each of --contexts, reading each of --prompts up to the first token, decoding
--batches texts together, a cold start, and the most memory held. The folder gets peers.json,
peers.md and, with matplotlib, PNG files. Exit code 1: in fp32 an engine chose tokens that its error
against float64 cannot explain.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import peers, plots, roofline
from benchmarks.peers import report
from benchmarks.peers.cases import cases
from benchmarks.peers.run import Plan, compare
from benchmarks.turns import progress
from gpt2_fast import _C, PUBLISHED


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    rivals = [name for name in peers.MODULES if name != peers.OURS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description="Ours against every installed engine."
    )
    add = parser.add_argument
    add("--model", choices=PUBLISHED, default="124M")
    add("--layers", type=int, default=0, help="only the first N layers; 0: all")
    add("--precision", choices=peers.PRECISIONS, nargs="+", default=list(peers.PRECISIONS))
    add("--rivals", choices=rivals, nargs="*", default=rivals)
    add("--contexts", type=int, nargs="*", default=[32, 896], help="positions to decode from")
    add("--prompts", type=int, nargs="*", default=[512, 1023], help="lengths to read")
    add("--batches", type=int, nargs="*", default=[8], help="texts decoded at the same time")
    add("--new", type=int, default=64, help="tokens to decode")
    add("--rounds", type=int, default=5)
    add("--threads", type=int, default=_C.available_threads())
    add("--mib", type=int, default=roofline.MIN_MIB, help="buffer of the read bandwidth")
    add("--work", type=Path, help="keep the engines' files here for another run")
    add("--out", type=Path, required=True, help="folder for the results")
    options = parser.parse_args(arguments)
    for name in ("rounds", "threads", "mib"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    for name in ("contexts", "prompts", "batches"):
        if any(value < 1 for value in getattr(options, name)):
            parser.error(f"--{name} must be at least 1 each")
    config = PUBLISHED[options.model]
    if not 0 <= options.layers <= config.n_layer:
        parser.error(f"--layers must be in 0..{config.n_layer}")
    if options.new < 2:
        parser.error("--new must be at least 2")
    try:
        sizes = (options.contexts, options.prompts, options.batches, options.new)
        options.cases = cases(*sizes, config.n_ctx)
    except ValueError as error:
        parser.error(str(error))
    options.config = replace(config, n_layer=options.layers) if options.layers else config
    return options


def write(result: dict[str, Any], folder: Path) -> str:
    """Put everything measured so far into the folder; the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.json").write_text(json.dumps(result, indent=1) + "\n")
    table = report.as_markdown(result)
    reason = plots.missing()
    if reason:
        table += f"\n{reason}.\n"
    else:
        names = [path.name for path in report.draw(result, folder)]
        table += "\n" + "\n".join(f"![{name}]({name})" for name in names) + "\n"
    (folder / "peers.md").write_text(table)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, write after every precision, print."""
    options = parse(arguments)
    result: dict[str, Any] = {
        "machine": roofline.machine(),
        "precisions": [],
        **{name: getattr(options, name) for name in ("model", "layers", "rounds", "threads")},
    }
    table = ""
    with ExitStack() as stack:
        folder = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        plan = Plan(
            options.config,
            [peers.OURS, *options.rivals],
            options.cases,
            options.rounds,
            options.threads,
            options.mib,
            folder / options.model / f"{options.config.n_layer} layers",
        )
        for precision in options.precision:
            result["precisions"].append(compare(plan, precision))
            table = write(result, options.out)
    sys.stdout.write(table)
    wrong = report.disagreements(result)
    for line in wrong:
        progress(f"disagreement: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
