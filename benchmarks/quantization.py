"""What each precision costs in quality: `python -m benchmarks.quantization --text FILE`.

Two measurements, as Markdown tables, every precision against float32 on the same engine:

- the built-in model on a text (best one it was not trained on: the last 5 % of a novel): bits per
  byte, KL divergence of its predictions from those in float32, and how often the likeliest token is
  another one. Windows of the whole context, each on its own;
- random weights of a published shape with the outliers that GPT-2's residual stream has (a few
  channels many times the rest, from the embeddings on): the error of logits beside their spread.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gpt2_fast import GPT2, PUBLISHED
from gpt2_fast.device import PRECISIONS
from gpt2_fast.sources import RandomSource

if TYPE_CHECKING:
    from gpt2_fast import GPT2Config
    from gpt2_fast.sources import Tensor

Array = npt.NDArray[Any]
#: Precisions of the weights, then the same with an int8 cache.
SETTINGS = [(p, kv) for kv in (None, "int8") for p in PRECISIONS["cpu"]]
OUTLIERS = {138: 60.0, 378: 40.0, 447: 100.0}  # channel -> times the size of the others


class OutlierSource(RandomSource):
    """Random parameters whose embeddings have a few large channels, as trained ones do."""

    def tensors(self) -> Iterator[Tensor]:
        """Each parameter in float32."""
        for name, dtype, array, release in super().tensors():
            if name in {"wte.weight", "wpe.weight"}:
                for channel, factor in OUTLIERS.items():
                    array[:, channel % array.shape[1]] *= factor
            yield name, dtype, array, release


def log_probabilities(logits: Array) -> Array:
    """Log softmax over the last axis, in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    out: Array = wide - np.log(np.exp(wide).sum(-1, keepdims=True))
    return out


def name_of(precision: str, kv: str | None) -> str:
    """What a row of a table is called."""
    return precision if kv is None else f"{precision}, {kv} cache"


def windows(model: GPT2, text: str) -> list[list[int]]:
    """Token ids of the text, each window after an end-of-text token and as long as the context."""
    if model.tokenizer is None or model.config.eos_token_id is None:
        raise ValueError("the model needs a tokenizer and an end-of-text token")
    ids, room = model.tokenizer.encode(text), model.config.n_ctx - 1
    return [[model.config.eos_token_id, *ids[i : i + room]] for i in range(0, len(ids), room)]


def on_text(text: str) -> list[dict[str, float | str]]:
    """A row for each precision: the built-in model on `text`."""
    rows: list[dict[str, float | str]] = []
    exact: list[Array] = []
    for precision, kv in SETTINGS:
        with GPT2.from_pretrained(
            "builtin", precision=precision, kv_precision=kv, device="cpu"
        ) as model:
            nats, divergence, other, count = 0.0, 0.0, 0, 0
            for number, ids in enumerate(windows(model, text)):
                found = log_probabilities(model.forward(ids)[:-1])
                if not rows:
                    exact.append(found)
                right = exact[number]
                nats -= float(found[np.arange(len(found)), ids[1:]].sum())
                divergence += float((np.exp(right) * (right - found)).sum())
                other += int((found.argmax(-1) != right.argmax(-1)).sum())
                count += len(found)
        bits = nats / math.log(2) / len(text.encode())
        rows.append(
            {
                "precision": name_of(precision, kv),
                "bits per byte": bits,
                "more than fp32, %": 100 * (bits / float(rows[0]["bits per byte"]) - 1)
                if rows
                else 0.0,
                "KL, nats per token": divergence / count,
                "another likeliest token, %": 100 * other / count,
            }
        )
    return rows


def on_random_weights(config: GPT2Config, tokens: int) -> list[dict[str, float | str]]:
    """A row for each precision: logits of random weights with outlier channels."""
    ids = np.random.default_rng(3).integers(0, config.vocab_size, tokens).tolist()
    rows: list[dict[str, float | str]] = []
    exact: Array = np.empty(0)
    for precision, kv in SETTINGS:
        with GPT2(
            OutlierSource(config, 1),
            None,
            name="outliers",
            precision=precision,
            kv_precision=kv,
            device="cpu",
        ) as model:
            logits = np.asarray(model.forward(ids), np.float64)
        exact = exact if rows else logits
        spread = exact.std(-1, keepdims=True)
        rows.append(
            {
                "precision": name_of(precision, kv),
                "error / spread, root mean square": float(
                    np.sqrt(np.mean(((logits - exact) / spread) ** 2))
                ),
                "largest error / spread": float(np.abs((logits - exact) / spread).max()),
            }
        )
    return rows


def as_markdown(rows: list[dict[str, float | str]]) -> str:
    """A table of rows with the same keys."""
    lines = ["| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
    for row in rows:
        cells = [each if isinstance(each, str) else f"{each:.4g}" for each in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", type=Path, metavar="FILE", help="for the built-in model")
    parser.add_argument("--model", default="124M", choices=PUBLISHED, help="of random weights")
    parser.add_argument("--tokens", type=int, default=64, help="for random weights (64)")
    options = parser.parse_args(argv)
    if options.text is not None:
        sys.stdout.write(as_markdown(on_text(options.text.read_text())) + "\n")
    rows = on_random_weights(PUBLISHED[options.model], options.tokens)
    sys.stdout.write(as_markdown(rows))


if __name__ == "__main__":
    main()
