"""One process from nothing to a first token: `python -m benchmarks.peers.start JSON`.

Prints the first token the moment it is there, and then a line of JSON: seconds to load, and the
most memory the process held until a short text was done and until a text filled the context.
Imports nothing that the engine itself does not.
"""

from __future__ import annotations

import json
import os
import sys
import time

from benchmarks import peers
from benchmarks.cold_start import peak_rss
from benchmarks.peers.contract import Job

SHORT_TOKENS = 16


def main(argument: str) -> None:
    """Import, load, generate."""
    start = time.perf_counter()
    asked = json.loads(argument)
    target = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no token
    job = Job.from_json(asked["job"])
    engine = peers.find(asked["engine"]).Engine(job)
    engine.use(asked["setting"])
    loaded = time.perf_counter()
    prompt = asked["prompt"]
    first = engine.generate([prompt[: asked["context"]]], 1)
    target.write(f"{first.tokens[0][0]}\n")
    target.flush()
    engine.generate([prompt[: asked["context"]]], SHORT_TOKENS)
    short = peak_rss()
    engine.generate([prompt[: job.shape.n_ctx - SHORT_TOKENS]], SHORT_TOKENS)
    figures = {"load_s": loaded - start, "rss_short": short, "rss_full": peak_rss()}
    target.write(json.dumps(figures) + "\n")
    target.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
