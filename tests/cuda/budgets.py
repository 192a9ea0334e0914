"""What each kernel may use. A rise fails test_gates.py: raise a number here only with the reason.

Registers are the most of any shipped processor, in units of eight as they are handed out; warps the
fewest resident ones of any, which is often the oldest (sm_75: 64 KB of shared memory, 32 warps).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    registers: int
    warps: int  # resident on one processor, at least
    dynamic_shared: int = 0  # bytes of the largest launch that must reach `warps`
    mma: bool = False  # its products are on tensor cores
    streams: bool = False  # it reads weights, each once
    #: 0.6 of what an H200 can issue while a byte arrives: 128 lanes a clock, 16.4 bytes a clock.
    instructions_per_byte: float = 4.68
    #: 3 TB/s for 0.8 us, spread over the 132 processors of an H100.
    bytes_in_flight: int = 18 << 10


KB = 1 << 10
#: As template arguments have them.
HALF, INT8, INT4 = "[12]", "3", "4"


def decode(kernel: str, registers: int, warps: int, dynamic_shared: int) -> dict[str, Budget]:
    """Products of one tile of tokens, at the speed of memory, and of four tiles.

    int4 takes more than its share of instructions: 56 a lane for 16 bytes in the main loop at the
    least (csrc/cuda/fragments.cuh), 3.5 a byte, and twice that with the addresses and scales of a
    loop this short. An H200 issues 7.8 while a byte arrives, an H100 11.2.
    Four tiles of tokens share one pass over the weights: what counts there is that a token costs
    less than alone.
    """
    one = {HALF: 4.68, INT8: 4.68, INT4: 7.1}
    four = {HALF: 2.3, INT8: 5.2, INT4: 11.9}
    return {
        **{
            f"{kernel}<{weights}, 1, .*>": Budget(
                *(registers, warps, dynamic_shared),
                mma=True, streams=True, instructions_per_byte=spent,
            )
            for weights, spent in one.items()
        },
        **{
            f"{kernel}<{weights}, 4, .*>": Budget(
                *((168, 12) if kernel == "product_kernel" else (184, 8)),
                mma=True, streams=True, instructions_per_byte=spent,
                bytes_in_flight=16 * KB,
            )
            for weights, spent in four.items()
        },
    }  # fmt: skip


#: name with template arguments, as a pattern -> budget
BUDGETS: dict[str, Budget] = {
    # The processor's registers are full of weights on their way: one block of 16 warps.
    **decode("product_kernel", registers=128, warps=16, dynamic_shared=64 * KB - 16 * KB),
    **decode("head_kernel", registers=128, warps=16, dynamic_shared=24 * KB),
    r"gemm_kernel<GemmTile<2, 4>, .*>": Budget(168, warps=4, dynamic_shared=48 * KB, mma=True),
    # A block of this size is launched only where 144 KB of shared memory are to be had.
    r"gemm_kernel<GemmTile<4, 8>, .*>": Budget(255, warps=8, dynamic_shared=144 * KB, mma=True),
    r"attention_decode_kernel<\w+, (64|96)>": Budget(208, warps=8, mma=True),
    r"attention_decode_kernel<\w+, 32>": Budget(136, warps=12, mma=True),
    r"attention_decode_kernel<\w+, 128>": Budget(216, warps=4, mma=True),
    r"attention_prefill_kernel<\w+, 32>": Budget(136, 12, dynamic_shared=16 * KB, mma=True),
    r"attention_prefill_kernel<\w+, 64>": Budget(168, 8, dynamic_shared=32 * KB, mma=True),
    r"attention_prefill_kernel<\w+, 96>": Budget(192, 4, dynamic_shared=48 * KB, mma=True),
    r"attention_prefill_kernel<\w+, 128>": Budget(224, 4, dynamic_shared=64 * KB, mma=True),
    # Rows stay in registers between the passes.
    r"layernorm_kernel<.*>": Budget(168, warps=12),
    r"layernorm_rows_kernel<.*>": Budget(160, warps=12),
    r"sample_kernel<Held<197> ?>": Budget(255, warps=8),  # the logits, in registers
    r"sample_kernel<Streamed>": Budget(64, warps=32),
    "parts_kernel": Budget(48, warps=32),
    r"(op_)?embed_kernel<.*>": Budget(40, warps=32),
    r"gelu_kernel<.*>": Budget(32, warps=32),
    "append_kv_kernel": Budget(56, warps=32),
    "pad_kernel": Budget(24, warps=32),
    # Eight addresses of tensors, all loads in flight at once: 26 on sm_100 and sm_120.
    "widen_tokens|gather": Budget(32, warps=32),
}
