"""CRC-32C against the published vectors and against one byte at a time."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_fast import _C

from .bundle_writer import crc32c as bytewise

# RFC 3720, appendix B.4; the last is the check value of the CRC catalogue.
VECTORS = {
    bytes(32): 0x8A9136AA,
    b"\xff" * 32: 0x62A8AB43,
    bytes(range(32)): 0x46DD794E,
    bytes(reversed(range(32))): 0x113FDB5C,
    b"123456789": 0xE3069283,
    b"": 0,
}


@pytest.mark.parametrize("data", VECTORS, ids=lambda data: data[:4].hex() or "empty")
def test_published_vectors(data: bytes) -> None:
    assert _C.crc32c(data, 0) == VECTORS[data]


# Around one word, and around the three interleaved stretches of 4,096 bytes.
@pytest.mark.parametrize("size", [1, 7, 8, 9, 63, 4096, 12287, 12288, 12289, 12295, 24577, 40001])
@pytest.mark.parametrize("offset", [0, 1, 7])
def test_any_length_and_alignment(size: int, offset: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size + offset, np.uint8)[offset:]
    data.flags.writeable = False
    assert _C.crc32c(data, 0) == bytewise(data.tobytes())


def test_continues_from_a_seed() -> None:
    data = np.random.default_rng(1).bytes(30000)
    for cut in (0, 1, 4096, 12288, 29999, 30000):
        assert _C.crc32c(data[cut:], _C.crc32c(data[:cut], 0)) == _C.crc32c(data, 0)


def test_every_bit_counts() -> None:
    data = bytearray(np.random.default_rng(2).bytes(12288 + 16))
    whole = _C.crc32c(data, 0)
    for at in (0, 4095, 4096, 8191, 8192, 12287, 12288, 12303):
        for bit in range(8):
            data[at] ^= 1 << bit
            assert _C.crc32c(data, 0) != whole
            data[at] ^= 1 << bit
