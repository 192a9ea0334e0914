"""Packed weights of csrc/cuda/layout.h: made by simt.pack, read by the layout's own words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .arrays import DTYPES, Array, array_of, unwritten

PRECISIONS = ("bf16", "fp16", "int8", "int4")
GROUPS = {"int8": 64, "int4": 32}


def activations(precision: str) -> torch.dtype:
    """The dtype of what weights of `precision` are multiplied with."""
    return torch.bfloat16 if precision == "bf16" else torch.float16


@dataclass
class Packed:
    """A matrix as the device holds it."""

    precision: str
    words: Array
    outputs: int
    inputs: int

    def elements(self) -> tuple[Array, Array]:
        """(bits or integers, scales as bfloat16 bits), padding included.

        The first is (16 tiles, padded inputs), the second (16 tiles, groups) or without groups.
        """
        tiles, padded = -(-self.outputs // 16), -(-self.inputs // 64) * 64
        weights = tiles * padded * 16 * {"int8": 8, "int4": 4}.get(self.precision, 16) // 32
        words, scales = self.words[:weights], self.words[weights:].view(np.uint16)
        if self.precision == "int8":  # [tile][k / 32][g][t][e / 2][h][e % 2]
            q = words.view(np.uint8).reshape(tiles, padded // 32, 8, 4, 4, 2, 2)
            q = q.transpose(0, 5, 2, 1, 3, 4, 6).astype(np.int32) - 128
        elif self.precision == "int4":  # [tile][k / 64][g][t][e / 2], nibble [e % 2][k / 32 % 2][h]
            nibbles = words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
            q = nibbles.reshape(tiles, padded // 64, 8, 4, 4, 2, 2, 2)
            q = q.transpose(0, 7, 2, 1, 6, 3, 4, 5).astype(np.int32) - 8
        else:  # [tile][k / 32][h][g][t][e]
            q = words.view(np.uint16).reshape(tiles, padded // 32, 2, 8, 4, 8)
            q = q.transpose(0, 2, 3, 1, 4, 5)
        groups = padded // GROUPS[self.precision] if self.precision in GROUPS else 0
        by_output = scales.reshape(tiles, groups, 16).transpose(0, 2, 1)
        return q.reshape(tiles * 16, padded), by_output.reshape(tiles * 16, groups)

    def weight(self) -> Tensor:
        """The (outputs, inputs) weights that the device multiplies with, float64."""
        q, scales = self.elements()
        if self.precision in GROUPS:
            scale = torch.from_numpy(scales.astype(np.int32) << 16).view(torch.float32)
            group = GROUPS[self.precision]
            full = torch.from_numpy(q).double() * scale.double().repeat_interleave(group, 1)
        else:
            bits = torch.from_numpy(q.astype(np.uint16).view(np.int16))
            full = bits.view(DTYPES[self.precision]).double()
        return full[: self.outputs, : self.inputs]


def pack(
    simt: Any, weight: Tensor, precision: str, *, transposed: bool = True, lanes: int = 1
) -> Packed:
    """Packs weight (outputs, inputs); without `transposed` it is (inputs, outputs).

    Raises:
        ValueError: with the index of the first element that `precision` cannot hold.
    """
    outputs, inputs = weight.shape if transposed else weight.shape[::-1]
    count = simt.linear_words(precision, inputs, outputs)
    words = unwritten((count,), torch.float32).view(np.uint32)
    name = next(name for name, dtype in DTYPES.items() if dtype == weight.dtype)
    bad = simt.pack(precision, array_of(weight), name, transposed, words, lanes)
    if bad >= 0:
        raise ValueError(bad)
    return Packed(precision, words, outputs, inputs)
