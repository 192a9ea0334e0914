"""The native module. Private: `gpt2_fast.GPT2` and `gpt2_fast.ops` are its public faces.

A `_Tensor` argument is a contiguous numpy array or torch tensor, read in place through DLPack or
the buffer protocol, of a type that the op of that name in `gpt2_fast.ops` takes. `cuda` is None for
the CPU; for CUDA tensors it is the stream, and a function that allocates so many bytes there.
Outputs are allocated by the caller. Every function raises gpt2_fast.errors.ParameterError that
names the argument, what was wanted and what came.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

_Tensor: TypeAlias = Any
_Array: TypeAlias = Any
_Cuda: TypeAlias = tuple[int, Callable[[int], _Tensor]] | None

def build_info() -> dict[str, Any]: ...
def isas() -> list[str]: ...
def default_isa() -> str: ...
def available_threads() -> int: ...
def available_memory(root: str = "") -> int: ...
def cpu_budget(root: str = "") -> tuple[int, float, int]: ...
def set_op_backend(isa: str, threads: int) -> None: ...
def read_bandwidth(bytes: int, threads: int, repeats: int) -> float: ...
def crc32c(data: _Tensor, seed: int = 0) -> int: ...
def read_tokens(data: bytes) -> tuple[bytes, ...]: ...
def plan(
    config: dict[str, Any],
    precision: str,
    threads: int,
    max_sequences: int,
    device: str = "cpu",
    int8_cache: bool = False,
) -> dict[str, int]: ...
def cuda_devices() -> list[dict[str, Any]]: ...
def layernorm(
    x: _Tensor, weight: _Tensor, bias: _Tensor, eps: float, out: _Tensor, cuda: _Cuda = None
) -> None: ...
def add_layernorm(
    residual: _Tensor,
    delta: _Tensor,
    weight: _Tensor,
    bias: _Tensor,
    eps: float,
    out: _Tensor,
    cuda: _Cuda = None,
) -> None: ...
def gelu(x: _Tensor, out: _Tensor, cuda: _Cuda = None) -> None: ...
def embed(
    tokens: _Tensor,
    positions: _Tensor,
    wte: _Tensor,
    wpe: _Tensor,
    out: _Tensor,
    cuda: _Cuda = None,
) -> None: ...
def linear(
    x: _Tensor,
    weight: _Tensor,
    bias: _Tensor | None,
    residual: _Tensor | None,
    gelu: bool,
    out: _Tensor,
    cuda: _Cuda = None,
) -> None: ...
def attention_prefill(
    q: _Tensor, k: _Tensor, v: _Tensor, scale: float, out: _Tensor, cuda: _Cuda = None
) -> None: ...
def attention_decode(
    q: _Tensor,
    k: _Tensor,
    v: _Tensor,
    lengths: _Tensor,
    scale: float,
    out: _Tensor,
    cuda: _Cuda = None,
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
    cuda: _Cuda = None,
) -> None: ...
def quantize(weights: _Tensor, precision: str) -> tuple[_Array, _Array]: ...

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
        device: str = "cpu",
        index: int = 0,
        int8_cache: bool = False,
    ) -> None: ...
    def load(self, name: str, array: _Tensor, dtype: str) -> None: ...
    def missing(self) -> list[str]: ...
    def packed(self) -> _Array: ...
    def load_packed(
        self, descriptor: int, offset: int, bytes: int, piece: int, checksums: list[int]
    ) -> None: ...
    def open(self) -> int: ...
    def fork(self, sequence: int) -> int: ...
    def close(self, sequence: int) -> None: ...
    def length(self, sequence: int) -> int: ...
    def step(self, items: list[tuple[int, list[int], Any]]) -> list[Any]: ...
    def decode(
        self, items: list[tuple[int, int, Draw]], passes: int, end: int
    ) -> list[list[tuple[int, float]]]: ...
    @property
    def free_blocks(self) -> int: ...
    @property
    def blocks(self) -> int: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def recordings(self) -> int: ...
    @property
    def threads(self) -> int: ...
    @property
    def isa(self) -> str: ...
