"""Ragged batches for the tests of the bits contract: sequences join a running batch, are fed in
chunks, and leave."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

if TYPE_CHECKING:
    from gpt2_fast import _C
    from gpt2_fast.sources import RandomSource

Logits = npt.NDArray[np.float32]

ALL_ROWS = "all"


def perturbed(source: RandomSource) -> list[tuple[str, npt.NDArray[np.float32]]]:
    """Random parameters with biases, norms and scores large enough that every term matters."""
    rng = np.random.default_rng(7)
    return [
        (name, np.asarray(array * 4 + 0.1 * rng.standard_normal(array.shape), dtype=np.float32))
        for name, _, array, _ in source.tensors()
    ]


def run_alone(engine: _C.Engine, tokens: list[int]) -> Logits:
    """Logits of one sequence, in as few passes as possible."""
    sequence = engine.open()
    try:
        parts = [
            engine.step([(sequence, tokens[i : i + engine.max_rows], ALL_ROWS)])[0]
            for i in range(0, len(tokens), engine.max_rows)
        ]
    finally:
        engine.close(sequence)
    return np.concatenate(parts)


def some_tokens(seed: int, length: int, vocab: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, vocab, length).tolist())


@dataclass
class Guest:
    """A sequence that joins a running batch, is fed in chunks, and leaves."""

    tokens: tuple[int, ...]
    chunks: list[int]
    joins: int
    sequence: int = -1
    fed: int = 0
    parts: list[Logits] = field(default_factory=list)

    def next_chunk(self, turn: int, room: int) -> tuple[int, ...]:
        size = min(self.chunks[turn % len(self.chunks)], room)
        return self.tokens[self.fed : self.fed + size]


def run_together(engine: _C.Engine, guests: list[Guest]) -> None:
    """Step until every guest was fed, each joining and leaving at its own time."""
    turn = 0
    waiting, present = list(guests), []
    try:
        while waiting or present:
            for guest in [g for g in waiting if g.joins <= turn]:
                guest.sequence = engine.open()
                waiting.remove(guest)
                present.append(guest)
            items: list[tuple[int, list[int], Any]] = []
            taken = []
            room = engine.max_rows
            for guest in present:
                chunk = guest.next_chunk(turn, room)
                if chunk:
                    items.append((guest.sequence, list(chunk), ALL_ROWS))
                    taken.append((guest, len(chunk)))
                    room -= len(chunk)
            for (guest, count), logits in zip(taken, engine.step(items), strict=True):
                guest.parts.append(logits)
                guest.fed += count
            for guest in [g for g in present if g.fed == len(g.tokens)]:
                engine.close(guest.sequence)
                present.remove(guest)
            turn += 1
    finally:
        for guest in present:
            engine.close(guest.sequence)


def guest_lists(
    vocab: int, longest: int, most: int, largest_chunk: int
) -> st.SearchStrategy[list[Guest]]:
    """Batches in which most sequences are short and some are long; every length can come."""
    lengths = st.one_of(st.integers(1, min(40, longest)), st.integers(1, longest))
    return st.lists(
        st.builds(
            lambda seed, length, chunks, joins: Guest(
                some_tokens(seed, length, vocab), chunks, joins
            ),
            st.integers(0, 50),
            lengths,
            st.lists(st.integers(1, largest_chunk), min_size=1, max_size=4),
            st.integers(0, 12),
        ),
        min_size=1,
        max_size=most,
    )
