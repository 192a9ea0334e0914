"""`gpt2-fast eval`: perplexity on WikiText-2, last words of LAMBADA, with published figures beside.

A perplexity means nothing without its unit, windows and treatment of the text, so every result
names them. The published figures are those of the paper (Radford et al. 2019, Table 3), whose code
for this was never released, and those that others reproduced, each with its source.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import terminal
from .config import PUBLISHED
from .errors import ParameterError

if TYPE_CHECKING:
    from .model import GPT2
    from .tokenizer import Tokenizer

_PAPER = "Radford et al. 2019, Table 3"


@dataclass(frozen=True)
class Figure:
    """A published result: of which size, what, and who says so."""

    size: str
    metric: str
    value: float
    source: str


def _paper(metric: str, *values: float) -> list[Figure]:
    return [
        Figure(size, metric, value, _PAPER) for size, value in zip(PUBLISHED, values, strict=True)
    ]


FIGURES: dict[str, list[Figure]] = {
    "wikitext2": [
        *_paper("word_perplexity of detokenized text", 29.41, 22.76, 19.93, 18.34),
        Figure("124M", "perplexity", 29.94, "huggingface/transformers#13761"),
        Figure("774M", "perplexity", 19.44, "transformers, docs/perplexity, stride 1024"),
        Figure("774M", "perplexity", 16.44, "transformers, docs/perplexity, stride 512"),
    ],
    "lambada": [
        *_paper("perplexity", 35.13, 15.60, 10.87, 8.63),
        *_paper("last_token_accuracy", 0.4599, 0.5548, 0.6012, 0.6324),
        Figure("124M", "perplexity", 40.06, "EleutherAI/lm-evaluation-harness#2159"),
        Figure("124M", "accuracy", 0.3256, "EleutherAI/lm-evaluation-harness#2159"),
        Figure("124M", "last_token_accuracy", 0.4667, "huggingface/transformers#13761"),
        Figure("1558M", "perplexity", 10.63, "EleutherAI/lm-evaluation-harness#911"),
    ],
}


def evaluate(
    model: GPT2, task: str, data: Path, *, stride: int | None = None, detokenize: bool = False
) -> dict[str, Any]:
    """Run one task on a file in its published format.

    Args:
        model: has a tokenizer.
        task: "wikitext2" or "lambada".
        data: wiki.test.raw or wiki.test.tokens of WikiText-2; LAMBADA's test set as JSON lines with
            a field `text`, or as plain text, a passage a line.
        stride: WikiText-2: new tokens per window; None takes windows side by side.
        detokenize: WikiText-2: undo its tokenization first, as the paper did.

    Returns:
        What `gpt2-fast eval --json` writes: results, protocol, published figures.

    Raises:
        ParameterError: an unknown task, an option the task does not have, or a file that is not in
            its format.
        OSError: the file cannot be read.
    """
    if task not in FIGURES:
        raise ParameterError(f"task must be one of {', '.join(FIGURES)}, got {task!r}")
    if model.tokenizer is None:
        raise ParameterError("model has no tokenizer")
    if task == "lambada" and (stride is not None or detokenize):
        raise ParameterError("stride and detokenize are for wikitext2, not for lambada")
    try:
        text = data.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ParameterError(f"{data} is not UTF-8: {error.reason} at {error.start}") from None
    if task == "wikitext2":
        found = _wikitext(model, model.tokenizer, text, str(data), stride, detokenize)
    else:
        found = _lambada(model, model.tokenizer, text, str(data))
    facts = {"model": model.name, "precision": model.precision, "task": task, "data": str(data)}
    return facts | found | {"published": _published(model, task)}


def _published(model: GPT2, task: str) -> list[dict[str, Any]]:
    """The figures of the model's size, or of all sizes when it is none of them."""
    config = model.config
    own = [
        size
        for size, each in PUBLISHED.items()
        if (each.n_layer, each.n_embd, each.vocab_size)
        == (config.n_layer, config.n_embd, config.vocab_size)
    ]
    return [vars(figure) for figure in FIGURES[task] if figure.size in own or not own]


def _wikitext(
    model: GPT2, tokenizer: Tokenizer, text: str, name: str, stride: int | None, detokenize: bool
) -> dict[str, Any]:
    context = model.config.n_ctx
    step = context if stride is None else stride
    if not 1 <= step <= context:
        raise ParameterError(f"stride must be in 1 .. {context}, got {step}")
    lines = text.splitlines(keepends=True)
    words = len(text.split()) + len(lines)
    if detokenize:
        fed = "".join(wikitext_plain(line) for line in lines)
    else:
        fed = "\n\n".join(line if line.strip() else "" for line in lines)
    ids = tokenizer.encode(fed)
    if len(ids) < 2:
        raise ParameterError(f"{name} has no text to predict")
    nats, scored = 0.0, 0
    for window, new in _windows(ids, context, step):
        known = [p for p in model.score(window).logprobs[-new:] if p is not None]
        nats -= math.fsum(known)
        scored += len(known)
    # What the first tokens of windows would have cost is taken to be the mean.
    total = nats / scored * len(ids)
    return {
        "perplexity": _exp(nats / scored),
        "word_perplexity": _exp(total / words),
        "bits_per_byte": total / math.log(2) / len(fed.encode()),
        "tokens": len(ids),
        "words": words,
        "bytes": len(fed.encode()),
        "protocol": {
            "unit": "perplexity is per token of the model, word_perplexity per word or line end "
            "of the file",
            "windows": f"{context} tokens, {step} new ones in each; first token of the first not "
            "scored" if step < context else f"{context} tokens side by side; first token of each "
            "not scored",
            "beginning": "no end-of-text token",
            "text": "detokenized" if detokenize else "lines joined by blank lines, as "
            "transformers' docs/perplexity does",
        },
    }  # fmt: skip


def _windows(ids: list[int], context: int, step: int) -> Iterator[tuple[list[int], int]]:
    """Windows of a sequence, each with the number of tokens at its end that are new in it."""
    done = 0
    for start in range(0, len(ids), step):
        end = min(start + context, len(ids))
        yield ids[start:end], end - done
        done = end
        if end == len(ids):
            return


_JOINED = re.compile(r" ?@([-,.])@ ?")
_BEFORE = re.compile(r" (?=[,.;:!?%)\]}]|'(?:s|t|m|d|re|ve|ll)\b|n't\b)")
_AFTER = re.compile(r"(?<=[(\[{$£]) ")
_QUOTED = re.compile(r'" ([^"]*?) "')
_HEADING = re.compile(r"^ ?((?:= )+)(.*?)((?: =)+) ?$")


def wikitext_plain(line: str) -> str:
    """A line of WikiText as it would be written: `1 @,@ 000 people ( in all ) .` loses its gaps.

    WikiText's tokenizer put blanks around punctuation and marks those inside numbers and compounds
    with @. Quotation marks are paired within the line; a single one keeps its blanks.
    """
    end = "\n" if line.endswith("\n") else ""
    text = line.rstrip("\n").strip(" ")
    heading = _HEADING.match(text)
    if heading:
        marks = heading[1].replace(" ", "")
        return f"{marks} {heading[2]} {marks}{end}"
    text = _JOINED.sub(r"\1", text)
    text = _QUOTED.sub(r'"\1"', text)
    return _AFTER.sub("", _BEFORE.sub("", text)) + end


def _lambada(model: GPT2, tokenizer: Tokenizer, text: str, name: str) -> dict[str, Any]:
    passages = _passages(text, name)
    nats, right, last_right = 0.0, 0, 0
    for passage in passages:
        context, _, word = passage.rpartition(" ")
        before = tokenizer.encode(context)
        ids = tokenizer.encode(f"{context} {word}")
        target = ids[len(before) :]
        if len(target) >= model.config.n_ctx:
            raise ParameterError(f"{name} has a last word of {len(target)} tokens")
        fed = ids[-model.config.n_ctx :]
        rows = np.asarray(model.forward(fed))[-len(target) - 1 : -1].astype(np.float64)
        rows -= rows.max(-1, keepdims=True)
        logprobs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
        hits = rows.argmax(-1) == target
        nats -= float(logprobs[np.arange(len(target)), target].sum())
        right += bool(hits.all())
        last_right += bool(hits[-1])
    count = len(passages)
    return {
        "perplexity": _exp(nats / count),
        "accuracy": right / count,
        "last_token_accuracy": last_right / count,
        "passages": count,
        "protocol": {
            "unit": "perplexity is per last word, all its tokens together; accuracy asks for all "
            "of them, greedily, last_token_accuracy for the last alone",
            "beginning": "no end-of-text token",
            "text": "as it is in the file; last word is what follows the last blank",
            "filter": "no stop words removed",
        },
    }


def _passages(text: str, name: str) -> list[str]:
    """The passages of LAMBADA, from JSON lines or plain text."""
    passages = []
    as_json = text.lstrip().startswith("{")
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        passage: Any = line
        if as_json:
            try:
                passage = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                passage = None
        if not isinstance(passage, str) or " " not in passage.strip():
            raise ParameterError(f"{name} line {number} is no passage of several words")
        passages.append(passage.strip())
    if not passages:
        raise ParameterError(f"{name} has no passages")
    return passages


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def write_evaluation(facts: dict[str, Any]) -> None:
    """Write the results, the protocol under them, and the published figures."""
    counted = ("tokens", "words", "bytes", "passages")
    shown = [("model", f"{facts['model']}, {facts['precision']}"), ("task", facts["task"])]
    for name, value in facts.items():
        if name in counted:
            shown.append((name, f"{value:,}"))
        elif isinstance(value, float):
            shown.append((name.replace("_", " "), f"{value:.4f}"))
    shown += list(facts["protocol"].items())
    terminal.pairs(shown)
    terminal.line()
    rows = [
        [each["size"], each["metric"].replace("_", " "), each["source"], f"{each['value']:g}"]
        for each in facts["published"]
    ]
    terminal.table(["published for", "figure", "source", "value"], rows, left=3)
