"""What training reads: windows of the texts that prepare.py wrote."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt2_fast.tokenizer import Tokenizer

# Of the training windows; of a held-out novel the end is held out, and never among them.
SHARES = {"held-out novels": 0.55, "other books": 0.4, "bible": 0.05}
BEGINNINGS_SHARE = 0.5  # of them: begin with a paragraph, after the token that ends documents
END = 0  # <|endoftext|>, the first id of this vocabulary


class Windows:
    """Random windows of the training texts: SHARES of each kind, within a kind by size.

    Some begin as a document does, with <|endoftext|> and a paragraph, so that the model knows how
    to start from nothing; the others begin anywhere.
    """

    def __init__(self, texts: Path, tokenizer: Tokenizer, length: int, seed: int) -> None:
        self.length = length
        self.random = np.random.default_rng(seed)
        encoded: dict[str, list[int]] = {kind: [] for kind in SHARES}
        for path in sorted(texts.glob("*.train.txt")):
            name = path.name.removesuffix(".train.txt")
            held_out = (texts / f"{name}.heldout.txt").exists()
            kind = "held-out novels" if held_out else "bible" if name == "bible" else "other books"
            encoded[kind] += [*tokenizer.encode(path.read_text(encoding="utf-8")), END]
        newline = tokenizer.encode("\n")[0]
        self.sources = []
        for kind, kept in encoded.items():
            if len(kept) <= length + 1:
                raise ValueError(f"{texts}: {kind}: {len(kept)} tokens, wanted over {length + 1}")
            ids = torch.tensor(kept)
            blank = (ids[: -length - 1] == newline) & (ids[1:-length] == newline)
            self.sources.append((ids, [0, *(2 + blank.nonzero().flatten()).tolist()]))

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Ids and their targets, both (B, T)."""
        rows = []
        for _ in range(size):
            ids, paragraphs = self.sources[
                int(self.random.choice(len(SHARES), p=list(SHARES.values())))
            ]
            if self.random.random() < BEGINNINGS_SHARE:
                start = paragraphs[int(self.random.integers(len(paragraphs)))]
                row = F.pad(ids[start : start + self.length], (1, 0), value=END)
            else:
                start = int(self.random.integers(len(ids) - self.length))
                row = ids[start : start + self.length + 1]
            rows.append(row)
        stack = torch.stack(rows)
        return stack[:, :-1].contiguous(), stack[:, 1:].contiguous()
