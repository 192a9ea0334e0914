"""Measure a built-in model on the held-out texts with gpt2_fast itself, and let it write.

    python -m tools.builtin_model.measure TEXTS gpt2_fast/data/builtin

prints, as Markdown: bits per byte of each held-out text in every precision of the CPU engine, and
twenty samples, one per seed; with `--draft FOLDER` also how many of its tokens the model would
accept. Loss is over all tokens of a text but its first, in windows as long as the model's context,
each on its own: a token is predicted from those of its window before it and, for the first of a
window, from the one before.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from gpt2_fast import GPT2

from .baselines import held_out_texts

PRECISIONS = ("fp32", "bf16", "int8", "int4")
SAMPLES = 20


def _encoded(model: GPT2, text: str) -> list[int]:
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer")
    return model.tokenizer.encode(text)


def bits_per_byte(model: GPT2, text: str) -> float:
    """Loss of the model on a text."""
    ids, length = _encoded(model, text), model.config.n_ctx
    nats = 0.0
    for start in range(0, len(ids) - 1, length - 1):
        nats -= model.score(ids[start : start + length]).total
    return nats / math.log(2) / len(text.encode())


def accepted(model: GPT2, draft: GPT2, text: str) -> float:
    """Share of the draft's tokens, drawn at temperature 1, that the model accepts.

    The mean over the text's positions of the sum over all tokens of the smaller of both
    probabilities (Leviathan et al. 2023, arXiv:2211.17192, corollary 3.6).
    """
    ids, length = _encoded(model, text), model.config.n_ctx
    common = 0.0
    for start in range(0, len(ids), length):
        each = []
        for one in (model, draft):
            logits = np.asarray(one.forward(ids[start : start + length]), np.float64)
            shares = np.exp(logits - logits.max(axis=1, keepdims=True))
            each.append(shares / shares.sum(axis=1, keepdims=True))
        common += float(np.minimum(*each).sum())
    return common / len(ids)


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
    parser.add_argument("--draft", type=Path, help="folder of a model that drafts for it")
    arguments = parser.parse_args()
    texts = held_out_texts(arguments.texts)
    sys.stdout.write(table(texts, arguments.model) + "\n")
    if arguments.draft:
        with (
            GPT2.from_pretrained(arguments.model, precision="fp32", device="cpu") as model,
            GPT2.from_pretrained(arguments.draft, precision="fp32", device="cpu") as draft,
        ):
            for name, text in texts.items():
                share = accepted(model, draft, text)
                sys.stdout.write(f"{name}: {100 * share:.1f} % of the draft's tokens accepted\n")
        sys.stdout.write("\n")
    sys.stdout.write(samples(arguments.model))


if __name__ == "__main__":
    main()
