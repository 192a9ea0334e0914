"""One engine in a process of its own: `python -m benchmarks.worker`, driven by compare.py.

The first line of its input says what to load; every further line is a command. Each is answered
with one line of JSON. Whatever a library prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import IO, Any

from benchmarks.rivals import ENGINES, Engine
from gpt2_fast import PUBLISHED


def load(engine: str, model: str, layers: int, precision: str, threads: int, batch: int) -> Engine:
    """The engine with its model."""
    config = PUBLISHED[model]
    if layers:
        config = replace(config, n_layer=layers)
    made: Engine = ENGINES[engine](config, precision, threads, batch)
    return made


def answer(engine: Engine, command: dict[str, Any]) -> dict[str, Any]:
    """Carry out one command."""
    what = command.pop("do")
    if what == "settings":
        return {"settings": engine.settings}
    if what == "use":
        engine.use(command["setting"])
        return {}
    if what == "generate":
        run = engine.generate(command["prompts"], command["new"])
        return {"tokens": run.tokens, "first": run.first, "total": run.total}
    if what == "logits":
        return {"logits": engine.logits(command["tokens"])}
    raise ValueError(f"unknown command {what!r}")


def serve(source: IO[str], target: IO[str]) -> None:
    """Answer until the input ends."""

    def reply(make: Callable[[], dict[str, Any]]) -> None:
        try:
            made = make()
        except Exception:  # noqa: BLE001  # compare.py reports it and stops
            made = {"error": traceback.format_exc()}
        target.write(json.dumps(made) + "\n")
        target.flush()

    engine: list[Engine] = []

    def first() -> dict[str, Any]:
        engine.append(load(**json.loads(source.readline())))
        return {}

    reply(first)
    for line in source:
        command = json.loads(line)
        reply(lambda command=command: answer(engine[0], command))  # type: ignore[misc]


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
