"""One process from nothing to a first token: `python -m benchmarks.cold_start FOLDER PRECISION`.

Prints the first token the moment it is there, and then a line of JSON: seconds of its parts, and
the most memory the process ever held.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

PROMPT = "The quick brown fox jumps over the lazy dog"
NEW_TOKENS = 32


def peak_rss() -> int:
    """Most bytes of memory this process ever held at once.

    Not `resource.getrusage`: its maximum survives exec, so that the child of a large process would
    report its parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def main(folder: str, precision: str) -> None:
    """Import, load, generate."""
    start = time.perf_counter()
    from gpt2_fast import GPT2

    model = GPT2.from_pretrained(folder, precision=precision)
    loaded = time.perf_counter()
    first = model.generate(PROMPT, max_new_tokens=1, temperature=0.0)
    sys.stdout.write(f"{first.token_ids[0]}\n")
    sys.stdout.flush()
    rest = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    figures = {
        "load_s": loaded - start,
        "peak_rss": peak_rss(),
        "plan_weights": model.plan().weights,
        "tokens": rest.token_ids,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
