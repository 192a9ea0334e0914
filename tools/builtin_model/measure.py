"""Measure a built-in model on the held-out texts with gpt2_fast itself, and let it write.

    python -m tools.builtin_model.measure TEXTS gpt2_fast/data/builtin

prints, as Markdown: bits per byte of each held-out text in every precision of the CPU engine, and
twenty samples, one per seed. Loss is over all tokens of a text but its first, in windows as long as
the model's context, each on its own: a token is predicted from those of its window before it and,
for the first of a window, from the one before.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from gpt2_fast import GPT2

from .baselines import held_out_texts

PRECISIONS = ("fp32", "bf16", "int8", "int4")
SAMPLES = 20


def bits_per_byte(model: GPT2, text: str) -> float:
    """Loss of the model on a text."""
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer")
    ids, length = model.tokenizer.encode(text), model.config.n_ctx
    nats = 0.0
    for start in range(0, len(ids) - 1, length - 1):
        nats -= model.score(ids[start : start + length]).total
    return nats / math.log(2) / len(text.encode())


def table(texts: dict[str, str], folder: Path) -> str:
    """Bits per byte, a row per text and a column per precision."""
    found: dict[str, list[float]] = {name: [] for name in texts}
    for precision in PRECISIONS:
        with GPT2.from_pretrained(folder, precision=precision, device="cpu") as model:
            for name, text in texts.items():
                found[name].append(bits_per_byte(model, text))
    lines = ["| text | bytes | " + " | ".join(PRECISIONS) + " |"]
    lines.append("| --- " * (2 + len(PRECISIONS)) + "|")
    for name, values in found.items():
        cells = " | ".join(f"{value:.4f}" for value in values)
        lines.append(f"| {name} | {len(texts[name].encode()):,} | {cells} |")
    return "\n".join(lines) + "\n"


def samples(folder: Path) -> str:
    """What the model writes in fp32 at the start of a document, one line per seed."""
    lines = []
    with GPT2.from_pretrained(folder, precision="fp32", device="cpu") as model:
        for seed in range(SAMPLES):
            text = model.generate("", max_new_tokens=80, temperature=0.8, top_p=0.95, seed=seed)
            lines.append(f"{seed}. {' / '.join(str(text).split(chr(10) + chr(10))).strip()}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="held-out loss and samples of a built-in model")
    parser.add_argument("texts", type=Path, help="what prepare.py wrote")
    parser.add_argument("model", type=Path, help="its folder")
    arguments = parser.parse_args()
    sys.stdout.write(table(held_out_texts(arguments.texts), arguments.model) + "\n")
    sys.stdout.write(samples(arguments.model))


if __name__ == "__main__":
    main()
