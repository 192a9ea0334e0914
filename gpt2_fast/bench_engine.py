"""What `gpt2-fast bench` times: runners that decode greedily from any position, and ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from . import _C
from .device import int8_cache
from .sources import RandomSource

if TYPE_CHECKING:
    from .config import GPT2Config
    from .device import Device

Row = npt.NDArray[Any]

WEIGHT_SEED = 0
GRAPHS = "GPT2_FAST_CUDA_GRAPHS"


class Runner(Protocol):
    """Something that decodes. All have the weights of `RandomSource(config, WEIGHT_SEED)`.

    Attributes:
        name: what the report calls it.
        precision: of its weights.
    """

    name: str
    precision: str

    def begin(self, batch: int, position: int) -> None:
        """Hold `batch` sequences of `position` tokens each, ready for the next."""
        ...

    def steps(self, count: int) -> None:
        """Draw `count` more tokens of each sequence, likeliest first; all done on return."""
        ...

    def end(self) -> None:
        """Let go of the sequences."""
        ...

    def logits(self, tokens: list[int]) -> Row:
        """(V,) of the token behind `tokens`."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


def random_tokens(config: GPT2Config, batch: int, length: int) -> list[list[int]]:
    """The same (batch, length) ids for every runner."""
    ids = np.random.default_rng(1).integers(0, config.vocab_size, (batch, length))
    rows: list[list[int]] = ids.tolist()
    return rows


@contextmanager
def _graphs(wanted: bool) -> Iterator[None]:
    """Let engines that are made meanwhile record their steps, or not."""
    before = os.environ.pop(GRAPHS, None)
    if not wanted:
        os.environ[GRAPHS] = "0"
    try:
        yield
    finally:
        os.environ.pop(GRAPHS, None)
        if before is not None:
            os.environ[GRAPHS] = before


class EngineRunner:
    """Our engine, as `GPT2.generate` drives it: one call draws many tokens."""

    def __init__(
        self,
        config: GPT2Config,
        precision: str,
        device: Device,
        *,
        threads: int,
        max_batch: int,
        graphs: bool = True,
        kv_precision: str | None = None,
    ) -> None:
        self.name = "gpt2_fast" if graphs else "gpt2_fast, no graphs"
        self.precision = precision
        self._config = config
        where = device.kind, device.index, int8_cache(kv_precision, device.kind)
        with _graphs(graphs):
            self._engine: _C.Engine | None = _C.Engine(
                config.to_dict(), precision, _C.default_isa(), threads, max_batch, *where
            )
        for tensor, dtype, array, release in RandomSource(config, WEIGHT_SEED).tensors():
            self._engine.load(tensor, array, dtype)
            release()
        self._draw = _C.Draw(
            temperature=0.0,
            top_k=0,
            top_p=1.0,
            min_p=0.0,
            openai_top_p=False,
            seed=0,
            sample=0,
            drawable=0,
        )
        self._sequences: list[int] = []
        self._tokens: list[int] = []

    def begin(self, batch: int, position: int) -> None:
        """See `Runner`."""
        for tokens in random_tokens(self._config, batch, position + 1):
            self._sequences.append(self._made.open())
            self._feed(self._sequences[-1], tokens[:-1])
            self._tokens.append(tokens[-1])

    def steps(self, count: int) -> None:
        """See `Runner`."""
        engine, draw = self._made, self._draw
        while count > 0:
            pairs = zip(self._sequences, self._tokens, strict=True)
            items = [(sequence, token, draw) for sequence, token in pairs]
            answers = engine.decode(items, count, -1)
            self._tokens = [token for token, _ in answers[-1]]
            count -= len(answers)

    def end(self) -> None:
        """See `Runner`."""
        for sequence in self._sequences:
            self._made.close(sequence)
        self._sequences, self._tokens = [], []

    def logits(self, tokens: list[int]) -> Row:
        """See `Runner`."""
        sequence = self._made.open()
        try:
            row: Row = self._made.step([(sequence, tokens, "all")])[0][-1]
        finally:
            self._made.close(sequence)
        return row

    def close(self) -> None:
        """See `Runner`."""
        self._engine = None

    @property
    def _made(self) -> _C.Engine:
        if self._engine is None:
            raise RuntimeError("this runner is closed")
        return self._engine

    def _feed(self, sequence: int, tokens: list[int]) -> None:
        for start in range(0, len(tokens), self._made.max_rows):
            part = tokens[start : start + self._made.max_rows]
            self._made.step([(sequence, part, None)])
