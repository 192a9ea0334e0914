"""Which of a folder's files `GPT2.from_pretrained` loads, in which precision and where."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Thread
from typing import TYPE_CHECKING, Generic, TypeVar

from .checkpoints import open_checkpoint
from .checkpoints.folder import holds_ordinary, holds_prepared
from .checkpoints.prepared import PreparedFile
from .device import choose
from .errors import ParameterError
from .sources import CheckpointSource, PreparedSource

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from .config import GPT2Config
    from .sources import Source
    from .tokenizer import Tokenizer

T = TypeVar("T")

_USUAL = "bf16"


@dataclass(frozen=True)
class Found:
    """What was chosen.

    Attributes:
        source: open; whoever takes it closes it.
        device, precision: as `GPT2` takes them.
    """

    source: Source
    device: str
    precision: str


def open_folder(folder: Path, device: str, precision: str | None) -> Found:
    """Open a folder's prepared file where it serves, else its ordinary weights.

    Args:
        folder: an existing one.
        device, precision: as in `GPT2.from_pretrained`. A precision of None means that of the
            prepared file, else "bf16". Where there are no ordinary weights, "auto" is the CPU.

    Raises:
        CheckpointError: the files are damaged, unsafe, or not a GPT-2.
        ParameterError: only a prepared file is here, and it is for another precision or device.
        DeviceError: as in `gpt2_fast.device.choose`.
    """
    if not holds_prepared(folder):
        return _ordinary(folder, device, _USUAL if precision is None else precision)
    prepared = PreparedFile(folder)
    try:
        wanted = prepared.precision if precision is None else precision
        if holds_ordinary(folder):
            # Resolved here once: "auto" must mean the same when the model is made.
            device = str(choose(device, wanted))
            if device == "cpu" and wanted == prepared.precision:
                return Found(PreparedSource(prepared), device, wanted)
            prepared.close()
            return _ordinary(folder, device, wanted)
        _require_fit(prepared, device, wanted)
        return Found(PreparedSource(prepared), "cpu", wanted)
    except BaseException:
        prepared.close()
        raise


def tokenizer_of(folder: Path, config: GPT2Config) -> Tokenizer | None:
    """The folder's tokenizer; without vocabulary files GPT-2's own if the model has its tokens.

    Raises:
        TokenizerError: the folder's vocabulary is damaged.
    """
    from .tokenizer import Tokenizer

    found = Tokenizer.from_folder(folder)
    if found is None and config.vocab_size >= Tokenizer.gpt2().vocab_size:
        return Tokenizer.gpt2()
    return found


def ready_for_text(folder: Path, config: GPT2Config) -> Tokenizer | None:
    """`tokenizer_of`, with what the first text would else wait for.

    Raises:
        TokenizerError: the folder's vocabulary is damaged.
    """
    from . import generation  # noqa: F401 - imported here, while the weights are read

    tokenizer = tokenizer_of(folder, config)
    if tokenizer is not None:
        tokenizer.make_ready()
    return tokenizer


class Beside(Generic[T]):
    """A function that runs in a thread of its own, beside native code that needs no interpreter."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._thread = Thread(target=self._run)
        self._error: BaseException | None = None
        self._thread.start()

    def result(self) -> T:
        """What it returned; raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._value

    def _run(self) -> None:
        try:
            self._value = self._function()
        except BaseException as error:  # noqa: BLE001 - result() raises it
            self._error = error


def _ordinary(folder: Path, device: str, precision: str) -> Found:
    return Found(CheckpointSource(open_checkpoint(folder)), device, precision)


def _require_fit(prepared: PreparedFile, device: str, precision: str) -> None:
    """A prepared file alone serves one precision, on the CPU."""
    if str(device).startswith("cuda"):
        raise ParameterError(
            f"device: got {device!r}, but {prepared.path} is a prepared file, which is for the "
            "CPU, and no other weights lie beside it"
        )
    choose("cpu" if device == "auto" else device, precision)  # refuses what is neither at all
    if precision != prepared.precision:
        raise ParameterError(
            f"precision: got {precision!r}, but {prepared.path} was prepared in "
            f"{prepared.precision!r}, and no other weights lie beside it"
        )
