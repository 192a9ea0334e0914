"""The native module. Private: `gpt2_fast.GPT2` and `gpt2_fast.ops` are its public faces.

A `_Tensor` argument is a contiguous numpy array or CPU torch tensor, read in place through DLPack
or the buffer protocol; float32, or bfloat16 where the op of that name in `gpt2_fast.ops` takes it.
Outputs are allocated by the caller. Every function raises gpt2_fast.errors.ParameterError that
names the argument, what was wanted and what came.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from typing_extensions import Buffer

_Tensor: TypeAlias = Any

MAX_ROWS: int

def build_info() -> dict[str, Any]: ...
def isas() -> list[str]: ...
def default_isa() -> str: ...
def available_threads() -> int: ...
def available_memory() -> int: ...
def set_op_backend(isa: str, threads: int) -> None: ...
def read_bandwidth(bytes: int, threads: int, repeats: int) -> float: ...
def crc32c(data: Buffer, seed: int = 0) -> int: ...
def plan(
    config: dict[str, Any], precision: str, threads: int, max_sequences: int
) -> dict[str, int]: ...
def layernorm(x: _Tensor, weight: _Tensor, bias: _Tensor, eps: float, out: _Tensor) -> None: ...
def add_layernorm(
    residual: _Tensor, delta: _Tensor, weight: _Tensor, bias: _Tensor, eps: float, out: _Tensor
) -> None: ...
def gelu(x: _Tensor, out: _Tensor) -> None: ...
def embed(
    tokens: _Tensor, positions: _Tensor, wte: _Tensor, wpe: _Tensor, out: _Tensor
) -> None: ...
def linear(
    x: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    residual: _Tensor | None,
    gelu: bool,
    out: _Tensor,
) -> None: ...
def attention_prefill(q: _Tensor, k: _Tensor, v: _Tensor, scale: float, out: _Tensor) -> None: ...
def attention_decode(
    q: _Tensor, k: _Tensor, v: _Tensor, lengths: _Tensor, scale: float, out: _Tensor
) -> None: ...
def sample(
    logits: _Tensor,
    temperature: _Tensor,
    top_k: _Tensor,
    top_p: _Tensor,
    min_p: _Tensor,
    openai_top_p: bool,
    seeds: _Tensor,
    samples: _Tensor,
    positions: _Tensor,
    out_ids: _Tensor,
    out_logprobs: _Tensor,
) -> None: ...

class Draw:
    def __init__(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        openai_top_p: bool,
        seed: int,
        sample: int,
        drawable: int,
    ) -> None: ...


MAX_ROWS: int

def plan(
    config: dict[str, Any], precision: str, threads: int, max_sequences: int
) -> dict[str, int]: ...

class Draw:
    def __init__(
        self,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        openai_top_p: bool,
        seed: int,
        sample: int,
        drawable: int,
    ) -> None: ...

class Engine:
    def __init__(
        self,
        config: dict[str, Any],
        precision: str,
        isa: str,
        threads: int,
        max_sequences: int,
    ) -> None: ...
    def load(self, name: str, array: Tensor, dtype: str) -> None: ...
    def missing(self) -> list[str]: ...
    def open(self) -> int: ...
    def fork(self, sequence: int) -> int: ...
    def close(self, sequence: int) -> None: ...
    def length(self, sequence: int) -> int: ...
    def step(self, items: list[tuple[int, list[int], Any]]) -> list[Any]: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
