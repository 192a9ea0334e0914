"""ln_head on CUDA: accurate logits, the same bits for any batch, the parts that sample makes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.accuracy import assert_as_accurate_as_torch

from .arrays import Array, normal, tensor_of, unwritten
from .packed import PRECISIONS, Packed, activations, pack

pytestmark = pytest.mark.usefixtures("schedule")  # every test in every order of threads

EPS = 1e-5
PART = 128

each_precision = pytest.mark.parametrize("precision", PRECISIONS)


@dataclass
class Head:
    """Final norm and head of a model, and the rows of a residual."""

    residual: Tensor  # (R, C)
    weight: Tensor  # (C)
    bias: Tensor
    packed: Packed

    @property
    def width(self) -> int:
        return int(self.residual.shape[1])

    def run(
        self,
        simt: Any,
        asked: list[int],
        parameters: list[dict[str, Any]] | None = None,
    ) -> tuple[Array, Array, Array]:
        """Logits (A, V), parts (A, parts, 4) and the normalised rows, where they were written."""
        stride = -(-self.width // 64) * 64
        V = self.packed.outputs
        residual = unwritten((len(self.residual), stride), torch.float32)
        norm = [unwritten((stride,), torch.float32) for _ in range(2)]
        residual[:, : self.width] = self.residual.numpy()
        norm[0][: self.width], norm[1][: self.width] = self.weight, self.bias
        normed = unwritten((len(asked), stride), torch.float16)
        logits = unwritten((len(asked), -(-V // 64) * 64 + 64), torch.float32)
        parts = unwritten((len(asked), -(-V // PART), 4), torch.float32).view(np.uint32)
        simt.ln_head(
            self.packed.precision, residual, np.array(asked, np.int32), norm[0], norm[1],
            EPS, self.packed.words, self.width, V, normed, logits, parameters, parts,
        )  # fmt: skip
        assert (logits[:, V:].view(np.uint32) == 0xFFFFFFFF).all()
        return logits[:, :V], parts, normed[:, : self.width]


def head(simt: Any, precision: str, V: int, C: int, R: int) -> Head:
    """Outliers as in GPT-2's residual, and a mean."""
    residual = normal(R, C, seed=R) + 0.5
    residual[:, 5 % C] *= 300
    weight, bias = normal(2, C, seed=C) * 0.3
    matrix = normal(V, C, seed=V) * 0.08
    return Head(residual, weight + 1, bias, pack(simt, matrix, precision))


def drawn(R: int) -> list[dict[str, Any]]:
    """Parameters of R rows, of all kinds."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0}, {}, {"temperature": 0.5}, {"target": 0}, {"top_k": 3},
        {"temperature": 1e-3}, {"drawable": 1},
    ]  # fmt: skip
    return [{"seed": r, "position": 3 * r, **kinds[r % len(kinds)]} for r in range(R)]


def assert_accurate(h: Head, asked: list[int], logits: Array) -> None:
    """As accurate as torch with the same weights and activations of the same type."""
    half = activations(h.packed.precision)
    weight = h.packed.weight()
    rows = h.residual[asked]
    shape = (h.width,)
    truth = F.layer_norm(rows.double(), shape, h.weight.double(), h.bias.double(), EPS) @ weight.T
    same = F.linear(F.layer_norm(rows, shape, h.weight, h.bias, EPS).to(half), weight.to(half))
    assert_as_accurate_as_torch(torch.from_numpy(logits.copy()), same.float(), truth)


@each_precision
@pytest.mark.parametrize("C", [768, 1024, 1280, 1600])
@pytest.mark.parametrize("R", [1, 8, 40])
def test_accuracy(simt: Any, precision: str, C: int, R: int) -> None:
    """R rows: one tile of tokens that the block normalises, four that another kernel did, two
    blocks of them; 8 rows of 1600 do not fit into shared memory."""
    h = head(simt, precision, 200, C, 3)
    asked = [(2 * r + 1) % 3 for r in range(R)]
    logits, _, normed = h.run(simt, asked)
    assert_accurate(h, asked, logits)
    if (normed != 0xFFFF).all():  # the rows as they were multiplied: only sums are rounded
        rows = tensor_of(normed, activations(precision)).double()
        weight = h.packed.weight()
        bound = 2.0**-20 * (rows.abs() @ weight.abs().T)
        assert ((torch.from_numpy(logits).double() - rows @ weight.T).abs() <= bound).all()


@each_precision
def test_bits_do_not_depend_on_the_batch(simt: Any, schedule: str, precision: str) -> None:
    h = head(simt, precision, 150, 320, 10)
    parameters = drawn(10)
    asked = [3, 9, 0, 7, 7, 1, 5, 2, 8, 6]
    logits, parts, _ = h.run(simt, asked, parameters)
    for first, last in ((0, 1), (1, 9), (9, 10)):
        mine = h.run(simt, asked[first:last], parameters[first:last])
        assert mine[0].tobytes() == logits[first:last].tobytes()
        assert mine[1].tobytes() == parts[first:last].tobytes()
    many = h.run(simt, asked * 7, parameters * 7)
    assert many[0].tobytes() == np.tile(logits, (7, 1)).tobytes()
    assert many[1].tobytes() == np.tile(parts, (7, 1, 1)).tobytes()


@pytest.mark.parametrize("V", [1, 15, 17, 64, 127, 128, 129, 300])
@pytest.mark.parametrize("R", [2, 12])
def test_parts_are_those_of_sample(simt: Any, V: int, R: int) -> None:
    """Bit for bit, also where the vocabulary ends inside a part, a tile or a lane's four."""
    h = head(simt, "bf16", V, 64, 3)
    h.packed = pack(simt, normal(V, 64).abs(), "bf16")
    h.weight *= 0.1
    h.bias[:] = -1  # all logits are below those of the padding
    parameters = drawn(R)
    logits, parts, _ = h.run(simt, [r % 3 for r in range(R)], parameters)
    assert logits.max() < 0
    own = logits.copy()
    tokens, logprobs = np.zeros((2, R), np.int32), np.zeros((2, R), np.float32)
    made = unwritten(parts.shape, torch.float32).view(np.uint32)
    simt.sample(own, V, parameters, tokens[0], logprobs[0], made, None)
    assert made.tobytes() == parts.tobytes()
    simt.sample(own, V, parameters, tokens[1], logprobs[1], None, parts)
    assert tokens[0].tolist() == tokens[1].tolist()
    assert (tokens >= 0).all()
    assert logprobs[0].tobytes() == logprobs[1].tobytes()


def test_without_parameters_there_are_no_parts(simt: Any) -> None:
    h = head(simt, "fp16", 40, 64, 2)
    logits, parts, _ = h.run(simt, [1, 0])
    assert np.isfinite(logits).all()
    assert (parts == 0xFFFFFFFF).all()


def test_a_nan_stays_in_its_row(simt: Any, schedule: str) -> None:
    h = head(simt, "bf16", 140, 96, 3)
    calm = h.run(simt, [0, 1, 2], drawn(3))
    h.residual[1, 17] = torch.nan
    logits, parts, _ = h.run(simt, [0, 1, 2], drawn(3))
    assert np.isnan(logits[1]).all()
    assert np.isnan(parts[1, :, 2].copy().view(np.float32)).all()
    assert logits[[0, 2]].tobytes() == calm[0][[0, 2]].tobytes()
    assert parts[[0, 2]].tobytes() == calm[1][[0, 2]].tobytes()


@pytest.mark.parametrize("C", [1, 40, 257, 1100])
def test_widths_that_are_no_multiple(simt: Any, C: int) -> None:
    for R in (3, 9):
        h = head(simt, "fp16", 33, C, 3)
        if C == 1:
            h.residual[:] = normal(3, 1)  # its norm is the bias
        asked = [r % 3 for r in range(R)]
        assert_accurate(h, asked, h.run(simt, asked)[0])


@pytest.mark.slow
@pytest.mark.parametrize("R", [1, 10])
def test_the_whole_vocabulary(simt: Any, R: int) -> None:
    h = head(simt, "bf16", 50257, 768, 10)
    parameters = drawn(R)
    logits, parts, _ = h.run(simt, list(range(R)), parameters)
    assert_accurate(h, list(range(R)), logits)
    made, found = unwritten(parts.shape, torch.float32).view(np.uint32), np.zeros((2, R), np.int32)
    simt.sample(logits.copy(), 50257, parameters, found[0], np.zeros(R, np.float32), made, None)
    assert made.tobytes() == parts.tobytes()
