"""What other ways to predict or compress the held-out texts reach, in bits per byte.

    python -m tools.builtin_model.baselines TEXTS

prints a Markdown table over the texts that prepare.py held out:

* unigram: frequencies of the tokens in the training texts
* Kneser-Ney: a 5-gram model of the same tokens, interpolated, with the three discounts of Chen and
  Goodman 1999 (Computer Speech and Language 13, section 3.2), counted on the training texts
* gzip -9 and xz -9 of the text alone
* xz -9 after training: what the text adds to the compressed size of the training texts before it,
  with a dictionary that reaches over all of them
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpt2_fast.tokenizer import Tokenizer

from .prepare import ALICE_TAIL, NOVELS

Codes = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]
BITS = 12  # per token id: five ids fit an int64
ORDER = 5
DICTIONARY = 64 << 20  # bytes xz may look back


def tail(text: str, size: int) -> str:
    """The last `size` bytes of a text, without the piece of a character that a cut leaves."""
    return text.encode()[-size:].decode("utf-8", "ignore")


def held_out_texts(texts: Path) -> dict[str, str]:
    """Name -> text: the end of each novel, all of them, and the end of Alice."""
    found = {name: (texts / f"{name}.heldout.txt").read_text("utf-8") for name in NOVELS}
    found["all seven novels"] = "".join(found.values())
    found["alice"] = tail((texts / "alice.heldout.txt").read_text("utf-8"), ALICE_TAIL)
    return found


def training_texts(texts: Path) -> list[str]:
    """Everything the model learns from."""
    return [path.read_text("utf-8") for path in sorted(texts.glob("*.train.txt"))]


def codes(ids: Codes, order: int) -> Codes:
    """The n-grams of a sequence, each as one integer; the newest token is in the low bits."""
    out: Codes = np.zeros(len(ids) - order + 1, np.int64)
    for place in range(order):
        out = (out << BITS) | ids[place : len(ids) - order + 1 + place]
    return out


@dataclass(frozen=True)
class Table:
    """The n-grams of one order: their counts, and what their contexts add up to.

    Attributes:
        grams, counts: sorted n-grams and how often each occurs; below the highest order, how many
            different tokens it follows.
        contexts, totals: the n-grams without their newest token, and the sum of counts after each.
        kept: the probability each context leaves to the next lower order.
        discounts: taken off counts of 1, 2, and 3 or more.
    """

    grams: Codes
    counts: Values
    contexts: Codes
    totals: Values
    kept: Values
    discounts: Values

    @classmethod
    def of(cls, grams: Codes, counts: Codes) -> Table:
        """Build from sorted n-grams and their counts."""
        n = [int((counts == k).sum()) for k in range(1, 5)]
        y = n[0] / (n[0] + 2 * n[1])
        estimates = [k + 1 - (k + 2) * y * n[k + 1] / max(n[k], 1) for k in range(3)]
        discounts = np.clip(estimates, 0.01, [1.0, 2.0, 3.0])  # of tiny texts they can be absurd
        contexts, first = np.unique(grams >> BITS, return_index=True)
        totals = np.add.reduceat(counts, first).astype(np.float64)
        kinds = np.minimum(counts, 3) - 1
        kept = np.add.reduceat(discounts[kinds], first) / totals
        return cls(grams, counts.astype(np.float64), contexts, totals, kept, discounts)

    def probabilities(self, grams: Codes, lower: Values) -> Values:
        """Of the newest token of each n-gram, given what the next lower order says."""
        place = np.minimum(np.searchsorted(self.grams, grams), len(self.grams) - 1)
        counts = np.where(self.grams[place] == grams, self.counts[place], 0.0)
        kinds = np.clip(counts, 1, 3).astype(np.int64) - 1
        own = np.maximum(counts - self.discounts[kinds], 0.0)
        context = np.minimum(np.searchsorted(self.contexts, grams >> BITS), len(self.contexts) - 1)
        seen = self.contexts[context] == grams >> BITS
        mixed = own / self.totals[context] + self.kept[context] * lower
        return np.where(seen, mixed, lower)


class KneserNey:
    """Interpolated Kneser-Ney over token ids, with the three discounts of Chen and Goodman."""

    def __init__(self, ids: Codes, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.tables: list[Table] = []
        grams, counts = np.unique(codes(ids, ORDER), return_counts=True)
        for order in range(ORDER, 0, -1):
            self.tables.insert(0, Table.of(grams, counts))
            newest = grams & ((1 << BITS * (order - 1)) - 1)
            grams, counts = np.unique(newest, return_counts=True)

    def nats(self, ids: Codes) -> float:
        """Summed loss of all ids; those before the text count as end-of-text tokens."""
        grams = codes(np.concatenate([np.zeros(ORDER - 1, np.int64), ids]), ORDER)
        found: Values = np.full(len(ids), 1 / self.vocabulary)
        for order, table in enumerate(self.tables, 1):
            found = table.probabilities(grams & ((1 << BITS * order) - 1), found)
        return float(-np.log(found).sum())


def xz_size(data: bytes) -> int:
    """Bytes of xz -9 with a dictionary as large as the training texts."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": DICTIONARY}]
    return len(lzma.compress(data, filters=filters))


def rows(texts: Path, vocabulary: Path) -> list[tuple[str, int, dict[str, float]]]:
    """For each held-out text its name, its bytes, and bits per byte of each baseline."""
    tokenizer = Tokenizer.from_folder(vocabulary)
    if tokenizer is None or tokenizer.vocab_size > 1 << BITS:
        raise ValueError(f"{vocabulary} needs a tokenizer of at most {1 << BITS} entries")
    training = training_texts(texts)
    ids = np.array([i for text in training for i in [*tokenizer.encode(text), 0]], np.int64)
    frequencies = np.bincount(ids, minlength=tokenizer.vocab_size) + 1.0
    unigram = -np.log(frequencies / frequencies.sum())
    model = KneserNey(ids, tokenizer.vocab_size)
    before = "".join(training).encode()
    alone = xz_size(before)
    out = []
    for name, text in held_out_texts(texts).items():
        data, own = text.encode(), np.array(tokenizer.encode(text), np.int64)
        nats = len(data) * math.log(2)  # of one bit per byte
        found = {
            "unigram": float(unigram[own].sum()) / nats,
            "gzip -9": 8 * len(gzip.compress(data, 9, mtime=0)) / len(data),
            "xz -9": 8 * len(lzma.compress(data, preset=9)) / len(data),
            "xz -9 after training": 8 * (xz_size(before + data) - alone) / len(data),
            "Kneser-Ney 5-gram": model.nats(own) / nats,
        }
        out.append((name, len(data), found))
    return out


def main() -> None:
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(description="baselines on the held-out texts")
    parser.add_argument("texts", type=Path, help="what prepare.py wrote")
    parser.add_argument("--vocabulary", type=Path, default=root / "gpt2_fast/data/builtin")
    arguments = parser.parse_args()
    found = rows(arguments.texts, arguments.vocabulary)
    sys.stdout.write("| text | bytes | " + " | ".join(found[0][2]) + " |\n")
    sys.stdout.write("| --- " * (2 + len(found[0][2])) + "|\n")
    for name, size, values in found:
        cells = " | ".join(f"{value:.3f}" for value in values.values())
        sys.stdout.write(f"| {name} | {size:,} | {cells} |\n")


if __name__ == "__main__":
    main()
