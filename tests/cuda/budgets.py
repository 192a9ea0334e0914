"""What each kernel may use. A rise fails test_gates.py: raise a number here only with the reason.

Registers are the most of any shipped processor, warps the fewest resident ones of any.
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


#: name with template arguments, as a pattern -> budget
BUDGETS: dict[str, Budget] = {}
