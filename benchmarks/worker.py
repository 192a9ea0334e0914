"""One engine in a process of its own: `python -m benchmarks.worker`, driven by turns.py.

Every line of its input is a command, answered with one line of JSON. Whatever a library prints goes
to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import IO, Any

from benchmarks import peers
from benchmarks.peers.contract import Engine, Job


class Host:
    """The engine that was loaded, and what can be asked of it."""

    def __init__(self) -> None:
        self.engine: Engine | None = None

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        """Carry out one command."""
        what = command.pop("do")
        if what in {"load", "prepare"}:
            peer, job = peers.find(command["engine"]), Job.from_json(command["job"])
            if what == "prepare":
                peer.prepare(job)
            else:
                self.engine = peer.Engine(job)
            return {}
        if self.engine is None:
            raise ValueError(f"{what}: no engine is loaded")
        return self._of_engine(self.engine, what, command)

    @staticmethod
    def _of_engine(engine: Engine, what: str, command: dict[str, Any]) -> dict[str, Any]:
        if what == "settings":
            return {"settings": engine.settings}
        if what == "use":
            engine.use(command["setting"])
            return {}
        if what == "generate":
            return vars(engine.generate(command["prompts"], command["new"]))
        if what == "logits":
            return {"logits": engine.logits(command["tokens"])}
        raise ValueError(f"unknown command {what!r}")


def serve(source: IO[str], target: IO[str]) -> None:
    """Answer until the input ends."""
    host = Host()
    for line in source:
        try:
            made = host.answer(json.loads(line))
        except Exception:  # noqa: BLE001  # whoever asked reports it and stops
            made = {"error": traceback.format_exc()}
        target.write(json.dumps(made) + "\n")
        target.flush()


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
