"""`gpt2-fast score`: what it works out and how it shows it."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from . import terminal

if TYPE_CHECKING:
    from .model import GPT2


def score_facts(model: GPT2, text: str, *, bos: bool) -> dict[str, Any]:
    """Probabilities of a text.

    Args:
        model: scores it; has a tokenizer.
        text: what to score.
        bos: as in `GPT2.score`.

    Returns:
        What `gpt2-fast score --json` writes. `scored_tokens` and `scored_bytes` count what has a
        probability; `bits_per_byte` and `perplexity` are over those, and None where there are none.
        `total` is in nats.
    """
    score = model.score(text, bos=bos)
    known = [
        token for token, p in zip(score.token_ids, score.logprobs, strict=True) if p is not None
    ]
    tokenizer = model.tokenizer
    sizes = [] if tokenizer is None else [len(tokenizer.token_bytes(token)) for token in known]
    length = sum(sizes)
    return {
        "model": model.name,
        "precision": model.precision,
        "bos": bos,
        "tokens": score.tokens,
        "token_ids": score.token_ids,
        "logprobs": score.logprobs,
        "total": score.total,
        "scored_tokens": len(known),
        "scored_bytes": length,
        "bits_per_byte": -score.total / math.log(2) / length if length else None,
        "perplexity": _exp(-score.total / len(known)) if known else None,
    }


def write_score(facts: dict[str, Any]) -> None:
    """Write the table of tokens and the sums under it."""
    rows = []
    for text, token, logprob in zip(
        facts["tokens"], facts["token_ids"], facts["logprobs"], strict=True
    ):
        numbers = ["", ""] if logprob is None else [f"{logprob:.4f}", f"{_exp(logprob):.4g}"]
        rows.append([json.dumps(text, ensure_ascii=False), str(token), *numbers])
    terminal.table(["token", "id", "log-prob", "prob"], rows)
    tokens, length = facts["scored_tokens"], facts["scored_bytes"]
    terminal.pairs(
        [
            ("sum", f"{facts['total']:.4f} nats over {tokens} tokens, {length} bytes"),
            ("bits per byte", _number(facts["bits_per_byte"])),
            ("perplexity", _number(facts["perplexity"])),
        ]
    )


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _number(value: float | None) -> str:
    return "none: no token has a probability" if value is None else f"{value:.4f}"
