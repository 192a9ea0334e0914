"""`gpt2_fast.generate`: one call from prompt to text."""

from __future__ import annotations

from collections import OrderedDict
from threading import Lock
from typing import Any

from .model import GPT2

# Models of earlier calls, so that a second call does not load again. Two are enough to compare a
# pair; more would hold gigabytes that nobody asked to keep.
_KEPT = 2
_models: OrderedDict[tuple[str, str, str | None, int | None], GPT2] = OrderedDict()
_lock = Lock()


def generate(
    prompt: Any,
    model: str | GPT2 = "builtin",
    *,
    stream: bool = False,
    device: str = "auto",
    precision: str | None = None,
    threads: int | None = None,
    **sampling: Any,
) -> Any:
    """Continue a prompt, or several.

    Args:
        prompt: a text or a list of token ids, or a list of such prompts.
        model: a `GPT2`, or what `GPT2.from_pretrained` takes. The last two are kept loaded.
        stream: return an iterator of text pieces instead of the finished text.
        device, precision, threads: as in `GPT2.from_pretrained`; for a loaded model not used.
        sampling: max_new_tokens, temperature, top_k, top_p, min_p, top_p_rule, seed, stop, n,
            ignore_eos: see `SamplingParams`.

    Returns:
        The new text, without the prompt, as a `Generation` (a `str` with token ids, probabilities
        and more); for a list of prompts a list; for n > 1 a list of n in place of each.

    Raises:
        Gpt2FastError: one of its kinds; see `GPT2.from_pretrained` and `GPT2.generate`.
    """
    loaded = model if isinstance(model, GPT2) else _load(str(model), device, precision, threads)
    return loaded.stream(prompt, **sampling) if stream else loaded.generate(prompt, **sampling)


def _load(name: str, device: str, precision: str | None, threads: int | None) -> GPT2:
    key = (name, device, precision, threads)
    with _lock:
        if key not in _models:
            while len(_models) >= _KEPT:
                _models.popitem(last=False)  # not closed: another thread may still be using it
            _models[key] = GPT2.from_pretrained(
                name, device=device, precision=precision, threads=threads
            )
        _models.move_to_end(key)
        return _models[key]
