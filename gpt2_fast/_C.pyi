"""The native module. Private: `gpt2_fast.GPT2` and `gpt2_fast.ops` are its public faces.

A `Tensor` argument is a contiguous numpy array or CPU torch tensor, read in place through DLPack or
the buffer protocol; float32, and bfloat16 where it says T. Outputs are allocated by the caller.
Every function raises gpt2_fast.errors.ParameterError that names the argument, what was wanted and
what came.
"""

from typing import Any, TypeAlias

Tensor: TypeAlias = Any

def build_info() -> dict[str, Any]: ...
def isas() -> list[str]: ...
def default_isa() -> str: ...
def available_threads() -> int: ...
def set_op_backend(isa: str, threads: int) -> None: ...
def read_bandwidth(bytes: int, threads: int, repeats: int) -> float: ...
def layernorm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor) -> None: ...
def add_layernorm(
    residual: Tensor, delta: Tensor, weight: Tensor, bias: Tensor, eps: float, out: Tensor
) -> None: ...
def gelu(x: Tensor, out: Tensor) -> None: ...
def embed(tokens: Tensor, positions: Tensor, wte: Tensor, wpe: Tensor, out: Tensor) -> None: ...
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gelu: bool,
    out: Tensor,
) -> None: ...
def attention_prefill(q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> None: ...
def attention_decode(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float, out: Tensor
) -> None: ...
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    openai_top_p: bool,
    seeds: Tensor,
    samples: Tensor,
    positions: Tensor,
    out_ids: Tensor,
    out_logprobs: Tensor,
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
