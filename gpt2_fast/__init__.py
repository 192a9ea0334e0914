"""gpt2_fast: GPT-2 as fast as the hardware allows, with results that never change.

>>> import gpt2_fast
>>> text = gpt2_fast.generate("Once upon a time", max_new_tokens=20, seed=1)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import PUBLISHED, GPT2Config
from .errors import (
    Cancelled,
    CapacityError,
    CheckpointError,
    ContextOverflow,
    DeviceError,
    DownloadError,
    Gpt2FastError,
    ParameterError,
    TokenizerError,
)

if TYPE_CHECKING:
    from .api import generate
    from .model import GPT2, plan
    from .results import Generation, Plan, Score, Timings
    from .sampling import SamplingParams
    from .tokenizer import Tokenizer

__all__ = [
    "GPT2",
    "PUBLISHED",
    "Cancelled",
    "CapacityError",
    "CheckpointError",
    "ContextOverflow",
    "DeviceError",
    "DownloadError",
    "GPT2Config",
    "Generation",
    "Gpt2FastError",
    "ParameterError",
    "Plan",
    "SamplingParams",
    "Score",
    "Timings",
    "Tokenizer",
    "TokenizerError",
    "__version__",
    "generate",
    "plan",
]

# Imported when first used, so that `import gpt2_fast` itself stays quick.
_LAZY = {
    "GPT2": "model",
    "plan": "model",
    "Generation": "results",
    "Plan": "results",
    "Score": "results",
    "Timings": "results",
    "SamplingParams": "sampling",
    "Tokenizer": "tokenizer",
    "generate": "api",
}


def __getattr__(name: str) -> Any:
    """Import what `name` stands for."""
    if name == "__version__":
        from ._C import build_info

        return build_info()["version"]
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Everything public, whether imported yet or not."""
    return sorted(__all__)
