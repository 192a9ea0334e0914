"""What the commands write, so that no encoding, pipe or terminal breaks it.

Colours and dim text appear on a terminal only, and not where NO_COLOR is set or TERM is "dumb"
(https://no-color.org). Characters that the output's encoding lacks are written as backslash
escapes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

# Control characters other than line break and tab, as they would be written in Python. On a
# terminal they can move the cursor, recolour it or type for the user.
_CONTROL = {
    code: f"\\x{code:02x}" for code in (*range(32), 127, *range(128, 160)) if code not in (9, 10)
}


def prepare() -> None:
    """Make standard output and error take every character."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a person reads `stream`."""
    return stream is not None and not stream.closed and stream.isatty()


def has_styles(stream: TextIO | None) -> bool:
    """Whether `stream` may be sent escape codes."""
    return (
        is_terminal(stream) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def dim(text: str, stream: TextIO | None) -> str:
    """`text` in a weaker colour where `stream` has any."""
    return f"\x1b[2m{text}\x1b[0m" if text and has_styles(stream) else text


def visible(text: str) -> str:
    """`text` without power over a terminal: control characters as backslash escapes."""
    return text.translate(_CONTROL)


def write(text: str) -> None:
    """Write to standard output at once.

    Raises:
        OSError: it is closed, or full.
    """
    if sys.stdout is None:
        raise OSError(errno.EBADF, "standard output is closed")
    sys.stdout.write(text)
    sys.stdout.flush()


def line(text: str = "") -> None:
    """Write one line to standard output."""
    write(text + "\n")


def note(text: str) -> None:
    """Write one dim line to standard error, if there is one."""
    if sys.stderr is not None:
        sys.stderr.write(dim(text, sys.stderr) + "\n")
        sys.stderr.flush()


def json_line(value: Mapping[str, Any]) -> None:
    """Write one JSON object as one line of ASCII; numbers that are not finite become null."""
    line(json.dumps(_finite(value), allow_nan=False))


def table(headers: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> None:
    """Write a table: drawn on a terminal, separated by tabs elsewhere.

    Args:
        headers: one for each column.
        rows: texts, as many in each as there are headers.
        left: how many of the first columns are texts; the others are numbers, aligned right.
    """
    if not is_terminal(sys.stdout):
        write("".join("\t".join(cells) + "\n" for cells in [headers, *rows]))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=SIMPLE_HEAD, pad_edge=False)
    for number, header in enumerate(headers):
        grid.add_column(header, justify="left" if number < left else "right")
    for cells in rows:
        grid.add_row(*(Text(visible(cell)) for cell in cells))
    system = "auto" if has_styles(sys.stdout) else None
    Console(color_system=system, highlight=False).print(grid)  # type: ignore[arg-type]


def pairs(facts: Iterable[tuple[str, str]]) -> None:
    """Write lines of a label and what it says, the labels aligned."""
    shown = list(facts)
    width = max((len(label) for label, _ in shown), default=0)
    for label, text in shown:
        line(f"{label:<{width}}  {visible(text)}".rstrip())


def count(number: float) -> str:
    """A number as people say it: 3.5 million."""
    for size, word in ((1e9, " billion"), (1e6, " million")):
        if number >= size:
            return f"{number / size:.1f}{word}"
    return f"{number:,.0f}"


def size(count_of_bytes: float) -> str:
    """Bytes in the largest unit that leaves at least one: 3.1 GB, of 1000 MB."""
    for unit, word in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count_of_bytes >= unit:
            return f"{count_of_bytes / unit:.1f} {word}"
    return f"{count_of_bytes:.0f} bytes"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
