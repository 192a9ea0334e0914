"""What an engine must offer to be compared. Imports nothing heavy: a cold start counts imports too.

Each file of this folder with a `PRECISIONS` is one engine: `missing`, `prepare` and `Engine` are
what `Peer` says. Modules of an engine's own library are imported inside its functions, so that
another engine's process never loads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from gpt2_fast import GPT2Config

Prompts = list[list[int]]
WEIGHT_SEED = 0
COMMON = "weights"  # the folder every engine's own format is made from


@dataclass
class Run:
    """One generation: tokens of each prompt, seconds to the first and to the last of them."""

    tokens: list[list[int]]
    first: float
    total: float


@dataclass(frozen=True)
class Shape:
    """A GPT-2's shape, without the package that checks it: see `gpt2_fast.GPT2Config`."""

    n_layer: int
    n_embd: int
    n_head: int
    n_ctx: int
    vocab_size: int
    inner_size: int
    layer_norm_epsilon: float

    @classmethod
    def of(cls, config: GPT2Config) -> Shape:
        """The shape of a published model, or of its first layers."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.n_embd // self.n_head


@dataclass(frozen=True)
class Job:
    """What an engine has to load.

    Attributes:
        shape: of the model.
        precision: one of the engine's `PRECISIONS`.
        threads: the most it may use.
        batch: the most texts it will get at once.
        folder: holds the common weights and each engine's conversions of them.
    """

    shape: Shape
    precision: str
    threads: int
    batch: int
    folder: Path

    def as_json(self) -> dict[str, Any]:
        """Plain values, for another process."""
        return {**vars(self), "shape": vars(self.shape), "folder": str(self.folder)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """What `as_json` gave."""
        shape, folder = Shape(**values["shape"]), Path(values["folder"])
        return cls(**{**values, "shape": shape, "folder": folder})


@dataclass(frozen=True)
class Format:
    """How an engine stores a precision: what its speed is divided by.

    Attributes:
        what: in its own words.
        weight: bytes of a matrix element, with its share of the scales.
        cached: bytes of a number in its cache of keys and values.
    """

    what: str
    weight: float
    cached: float


class Engine(Protocol):
    """A loaded model.

    Attributes:
        settings: what it can be run with; the best is found by measuring.
    """

    settings: list[str]

    def use(self, setting: str) -> None:
        """Run with this setting from now on."""
        ...

    def generate(self, prompts: Prompts, new: int) -> Run:
        """Greedy continuations of prompts of equal length, `new` tokens each, none cut short."""
        ...

    def logits(self, tokens: list[int]) -> list[float]:
        """(V,) of the token after `tokens`."""
        ...


class Peer(Protocol):
    """A module of this folder.

    Attributes:
        LABEL: what reports call it.
        PACKAGES: distributions whose versions belong to its results.
        PRECISIONS: ours -> how it stores the same or a heavier one.
        Engine: makes the loaded model from a `Job`.
    """

    LABEL: str
    PACKAGES: tuple[str, ...]
    PRECISIONS: dict[str, Format]
    Engine: Callable[[Job], Engine]

    def missing(self, precision: str) -> str | None:
        """Why it cannot run here in this precision, or None."""
        ...

    def prepare(self, job: Job) -> None:
        """Convert the common weights into its own format, unless that was done before."""
        ...


def absent(*modules: str) -> str | None:
    """Which of an engine's modules are not installed, in words, or None."""
    lacking = [name for name in modules if find_spec(name) is None]
    return f"not installed: {', '.join(lacking)} (pip install '.[peers]')" if lacking else None


def thread_settings(most: int) -> list[str]:
    """1 and all threads, in words."""
    return [f"{count} thread{'s' * (count > 1)}" for count in sorted({1, most})]


def threads_of(setting: str) -> int:
    """The number that a setting of `thread_settings` begins with."""
    return int(setting.split(maxsplit=1)[0])


def require(setting: str, settings: list[str]) -> None:
    """Refuse what an engine did not offer.

    Raises:
        ValueError: names the setting and the choices.
    """
    if setting not in settings:
        raise ValueError(f"setting must be one of {settings}, got {setting!r}")


def once(target: Path, make: Callable[[Path], object]) -> Path:
    """A file or folder made by `make`, unless it is there; half-made, it never has its name."""
    if not target.exists():
        partial = target.with_name(f"partial-{target.name}")
        if partial.is_dir():
            import shutil  # no engine's cold start comes here

            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        partial.rename(target)
    return target


def common_weights(config: GPT2Config, folder: Path) -> Path:
    """The random weights of every engine, in float32, as transformers and we read them.

    Raises:
        ValueError: the folder holds weights of another shape.
    """
    from gpt2_fast.checkpoints.save import save_pretrained
    from gpt2_fast.sources import RandomSource

    def make(target: Path) -> None:
        source = RandomSource(config, WEIGHT_SEED)
        save_pretrained(target, config, ((name, array) for name, _, array, _ in source.tensors()))

    made = once(folder / COMMON, make)
    stored = json.loads((made / "config.json").read_text())
    for name in ("n_layer", "n_embd", "n_head", "vocab_size"):
        if stored[name] != getattr(config, name):
            raise ValueError(
                f"{made} holds {name} {stored[name]}, wanted {getattr(config, name)}; "
                "give another --work folder"
            )
    return made


def read_weights(folder: Path) -> dict[str, Any]:
    """Name -> float32 array of every parameter; linear weights are (inputs, outputs)."""
    from safetensors.numpy import load_file

    arrays = load_file(folder / COMMON / "model.safetensors")
    return {name.removeprefix("transformer."): array for name, array in arrays.items()}
